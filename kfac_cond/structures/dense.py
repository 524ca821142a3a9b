"""A block stored whole: of one layer, or of all layers together."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..errors import ArgumentError
from ..layers.layout import WeightLayout
from .stacked import StackedBlock


@dataclass(frozen=True, eq=False, repr=False)
class DenseBlock(StackedBlock):
    """F as a (P x P) matrix, P the number of parameters in the layout, groups of a layer included.

    Functions of it are those of its eigenvalues, from one eigendecomposition that is computed once.

    Args:
        layout: how the parameters sit in the vector that F acts on.
        matrix: [P, P], symmetric, in the row-major order of ``layout.matrix_shape``.
        name: the layer's name, for messages.
    """

    layout: WeightLayout
    matrix: Tensor
    name: str = ""

    def __post_init__(self) -> None:
        if tuple(self.matrix.shape) != self.shape:
            raise ArgumentError(f"{self.label}: matrix has shape {tuple(self.matrix.shape)}, expected {self.shape}")

    @property
    def _stack(self) -> Tensor:
        return self.matrix

    def _with_stack(self, stack: Tensor) -> DenseBlock:
        return replace(self, matrix=stack)
