"""A dense block for each unit of a layer: each row of its matrix by itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..errors import ArgumentError
from ..layers.layout import WeightLayout
from .base import MAX_DENSE
from .stacked import StackedBlock


@dataclass(frozen=True, eq=False, repr=False)
class UnitWiseBlock(StackedBlock):
    """F with a (d_in x d_in) matrix for each row of the layer's matrix, and zero between different rows.

    Functions of it are those of its eigenvalues, from one batched eigendecomposition that is computed once.

    Args:
        layout: how the layer's parameters sit in its matrix.
        matrices: [d_out, d_in, d_in], each symmetric; [groups, d_out, d_in, d_in] where there are groups.
        name: the layer's name, for messages.

    Source: Ollivier 2015 (arXiv:1303.0818), the unitwise natural gradient; Amari, Karakida & Oizumi 2019
    (arXiv:1808.07172) on when the Fisher is close to it; Osawa et al. 2020 (arXiv:2002.06015) for batch norm.
    """

    layout: WeightLayout
    matrices: Tensor
    name: str = ""

    def __post_init__(self) -> None:
        expected = (*self.layout.matrix_shape, self.layout.d_in)
        if tuple(self.matrices.shape) != expected:
            raise ArgumentError(f"{self.label}: matrices has shape {tuple(self.matrices.shape)}, expected {expected}")

    @property
    def _stack(self) -> Tensor:
        return self.matrices

    def _with_stack(self, stack: Tensor) -> UnitWiseBlock:
        return replace(self, matrices=stack)


def require_unit_wise(layout: WeightLayout, label: str) -> None:
    """Refuse matrices too large, all rows together, to be meant."""
    if layout.numel * layout.d_in > MAX_DENSE**2:
        raise ArgumentError(
            f"{label}: structure='unit_wise' would hold {layout.numel // layout.d_in} matrices of {layout.d_in} x "
            f"{layout.d_in}, {layout.numel * layout.d_in:.2g} numbers, the most is {MAX_DENSE**2:.2g}: use 'kfac', "
            "'ekfac' or 'diagonal' for it, with structure='mixed' and a rule"
        )
