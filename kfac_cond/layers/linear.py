"""Linear layers: one position per index between the first and the last dimension."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .base import LayerKind, Override
from .layout import WeightLayout


class LinearKind(LayerKind):
    """``nn.Linear`` on (features,), (batch, features) or (batch, ..., features)."""

    name: ClassVar[str] = "linear"
    modules: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    of_input_alone: ClassVar[bool] = True

    def matches(self, module: nn.Module) -> bool:
        """Every linear layer but attention's out_proj, whose module is never called."""
        return super().matches(module) and not isinstance(module, NonDynamicallyQuantizableLinear)

    def activations(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """(batch, ..., d_in) as [batch, positions, d_in]."""
        return positions_in_the_middle(inputs)

    def output_gradients(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """(batch, ..., d_out) as [batch, positions, d_out]."""
        return positions_in_the_middle(gradient)


class TransposedLinearKind(LinearKind):
    """A linear layer that stores its weight as (d_in, d_out): ``Conv1D`` of the transformers library.

    It is recognised by its name and attributes, so that the library need not be imported.
    """

    name: ClassVar[str] = "transposed linear"
    modules: ClassVar[tuple[type[nn.Module], ...]] = ()

    def matches(self, module: nn.Module) -> bool:
        """A module of a class named ``Conv1D``, from transformers, with ``nf`` outputs."""
        return _is_conv1d(module) and self.overridden(module) is None

    def overridden(self, module: nn.Module) -> Override | None:
        """``Conv1D`` itself, where the instance has another ``forward``."""
        return Override(type(module), "forward") if _is_conv1d(module) and "forward" in vars(module) else None

    def layout(self, module: nn.Module, *, weight: str | None, bias: str | None) -> WeightLayout:
        """The layer's matrix, transposed on the way in and out."""
        return replace(super().layout(module, weight=weight, bias=bias), transposed=True)


def _is_conv1d(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") and hasattr(module, "nf")


def positions_in_the_middle(x: Tensor) -> Tensor:
    """(batch, ..., features) as [batch, positions, features]; (features,) as a single example."""
    if x.ndim == 1:
        x = x[None]
    # Not -1: it is ambiguous for a batch of size zero.
    return x.reshape(x.shape[0], prod(x.shape[1:-1]), x.shape[-1])
