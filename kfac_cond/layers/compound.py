"""Modules that multiply by several weights in one call, with no module call at each: their parts are layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import LayerKind, Part
from .layout import WeightLayout
from .replay import Replay


class CompoundKind(LayerKind):
    """A kind whose module is run again, to see what its linear maps are given and what comes back to them.

    A part may have ``groups``: rows with inputs of their own, of which there may be different numbers of positions. Of
    such a part the constant feature is summed beside the inputs, whether or not there is a bias: it counts the
    positions of each group, which A is divided by.
    """

    #: Pairs (i, j) of outputs where the j-th may lie on the way to the i-th: what comes to it then counts both ways.
    nested: ClassVar[tuple[tuple[int, int], ...]] = ()

    @abstractmethod
    def parts(self, module: nn.Module) -> tuple[Part, ...]:
        """The parts of ``module``, each of which is a layer."""

    @abstractmethod
    def replay(self, replay: Replay, module: nn.Module, *args: Any, **kwargs: Any) -> Sequence[Tensor | None]:
        """What ``module`` returns for the arguments of its call, from ``replay.linear`` and detached inputs."""

    @abstractmethod
    def outputs(self, output: Any) -> Sequence[Tensor | None]:
        """The tensors of what the module returned, in the order of those that ``replay`` gives."""

    def draws_numbers(self, module: nn.Module) -> bool:
        """Whether the call of ``module`` draws random numbers, as dropout does."""
        return False

    def part_layout(self, module: nn.Module, part: Part, *, weight: str | None, bias: str | None) -> WeightLayout:
        """The matrix of one part."""
        return WeightLayout(weight, bias, tuple(attrgetter(part.weight)(module).shape), groups=part.groups)

    def activations(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """What a replay has put into this form already."""
        return inputs

    def output_gradients(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """What a replay has put into this form already."""
        return gradient

    def counts_groups(self, layout: WeightLayout) -> bool:
        """Whether the constant feature is summed, for the number of positions of each group."""
        return layout.groups > 1

    def sum_shapes(self, layout: WeightLayout, max_factor_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of what is summed for A and, in each slot, for G."""
        of_A, of_G = layout.side_shapes(max_factor_dim)
        if not self.counts_groups(layout) or layout.bias is not None:
            return of_A, of_G
        groups, *side = of_A
        return (groups, *(size + 1 for size in side)), of_G

    def factors(self, A: Tensor, G: Tensor, layout: WeightLayout, max_factor_dim: int) -> tuple[Tensor, Tensor]:
        """(A, G), A of each group divided by the number of its own positions."""
        if not self.counts_groups(layout):
            return A, G
        matrix = A.dim() == 3
        count = A[..., -1:, -1:] if matrix else A[..., -1:]
        mean = A / torch.where(count > 0, count, 1)
        if layout.bias is None:
            mean = mean[..., :-1, :-1] if matrix else mean[..., :-1]
        return mean, G
