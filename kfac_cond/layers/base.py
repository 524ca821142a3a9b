"""What a layer kind is: how a module's inputs and output gradients become [batch, positions, features]."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from .layout import WeightLayout
from .rules import Sharing
from .summed import GradientSums


@dataclass(frozen=True)
class Part:
    """One weight of a module, with its bias: what a layer is made of. Most modules have one such part.

    Args:
        name: what the layer's name adds to that of the module; '' where it is the module's only part.
        weight: attribute of the module, or of a child of it ('out_proj.weight').
        bias: likewise; None where the weight has none of its own.
        groups: rows of the weight that have inputs of their own, in that many equal pieces.
    """

    name: str = ""
    weight: str = "weight"
    bias: str | None = "bias"
    groups: int = 1


#: A module of one weight.
WHOLE = Part()


class Override(NamedTuple):
    """The type that a module would count as, and the method that its class or somebody else replaced."""

    base: type[nn.Module]
    method: str


class LayerKind(ABC):
    """One kind of layer with an (a, g) form: y[n, s] = W a[n, s] + b at every position s of example n.

    A new kind is a subclass: your own for ``kc.register_layer``; in the library one in a file of its own and a line in
    ``KINDS`` of ``layers/__init__.py``. Nothing else asks what a layer is.

    Attributes:
        name: the kind's name in tables.
        modules: module types of this kind; ``kc.register_layer`` sets it. A subclass of one that overrides one of
            ``methods``, or an instance in which one was replaced, is not of this kind, since what its weight means is
            no longer known.
        methods: what says what such a module computes: ``forward`` and the methods that it leaves this to.
    """

    name: ClassVar[str]
    modules: ClassVar[tuple[type[nn.Module], ...]]
    methods: ClassVar[tuple[str, ...]] = ("forward",)
    #: Whether one call may look up what all examples share (positions, say), so that no dimension counts examples.
    looks_up: ClassVar[bool] = False
    #: Whether activations are made of the first input alone, whatever the module is.
    of_input_alone: ClassVar[bool] = False
    #: Effective label draws before a layer is preconditioned in training.
    draws_needed: ClassVar[int] = 1
    #: What is summed of the weight gradients of examples, where it is not a a^T and g g^T of positions.
    gradient_sums: ClassVar[GradientSums | None] = None

    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` computes just what this kind's own module computes."""
        return any(isinstance(module, base) for base in self.modules) and self.overridden(module) is None

    def overridden(self, module: nn.Module) -> Override | None:
        """The type of this kind that ``module`` is of, where its class or the instance has another of ``methods``."""
        for base in self.modules:
            if isinstance(module, base):
                return next((Override(base, name) for name in self.methods if _replaced(module, base, name)), None)
        return None

    def parts(self, module: nn.Module) -> tuple[Part, ...]:
        """The parts of ``module``, each of which is a layer."""
        return (WHOLE,)

    def part_layout(self, module: nn.Module, part: Part, *, weight: str | None, bias: str | None) -> WeightLayout:
        """The matrix of one part; names as for ``layout``."""
        return self.layout(module, weight=weight, bias=bias)

    def layout(self, module: nn.Module, *, weight: str | None, bias: str | None) -> WeightLayout:
        """The layer's matrix; ``weight`` and ``bias`` are canonical names, None where absent or frozen."""
        shape = tuple(cast(Tensor, module.weight).shape)
        return WeightLayout(weight, bias, shape, groups=getattr(module, "groups", 1))

    def of_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dtype: torch.dtype
    ) -> Tensor | None:
        """The activations of one call in ``dtype``; None where it was called with something else than it takes.

        A kind of several inputs, or of inputs that are no real numbers, has its own. One whose inputs are indices gives
        ``SparseRows``, which answer as a tensor does.
        """
        given = (*args, *kwargs.values())
        if len(given) != 1 or not isinstance(given[0], Tensor):
            return None
        return self.activations(module, given[0].detach().to(dtype))

    @abstractmethod
    def activations(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """The module's input as [batch, positions, d_in], or [groups, batch, positions, d_in]; no bias feature."""

    @abstractmethod
    def output_gradients(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """A gradient of the module's output as [batch, positions, d_out], or [groups, batch, positions, d_out]."""

    def moment_flops(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dtype: torch.dtype
    ) -> int | None:
        """Operations of summing the outer products of what one call gives; None for those of its rows one by one."""
        return None

    def present(self, module: nn.Module, a: Tensor) -> Tensor | None:
        """Which positions of its activations are there at all, [batch, positions, 1] bool; None for all of them."""
        return None

    def remark(self, module: nn.Module, sharing: Sharing) -> str:
        """What to know of the form of such a layer beside the kind's name, for its row; empty for nothing."""
        return ""

    def counts_groups(self, layout: WeightLayout) -> bool:
        """Whether the positions of each group are counted apart, by a constant feature that is summed in any case."""
        return False

    def sum_shapes(self, layout: WeightLayout, max_factor_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of what is summed for A and, in each slot, for G."""
        return layout.side_shapes(max_factor_dim)

    def factors(self, A: Tensor, G: Tensor, layout: WeightLayout, max_factor_dim: int) -> tuple[Tensor, Tensor]:
        """(A, G) of the block from what was summed for them, each divided by what it is a mean over."""
        return A, G


def _replaced(module: nn.Module, base: type[nn.Module], name: str) -> bool:
    """Whether a method of ``module`` is not the one of ``base``."""
    return name in vars(module) or getattr(type(module), name) is not getattr(base, name)
