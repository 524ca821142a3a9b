"""The inverse of a Kronecker block by Cholesky factors: a product is two triangular solves a side."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..linalg.inverse import inverted
from ..linalg.kronecker import kronecker_solve
from ..linalg.sides import Side, as_tensor
from .kronecker import KroneckerBlock


@dataclass(frozen=True, eq=False, repr=False)
class CholeskyBlock(KroneckerBlock):
    """(R_G^T R_G)^-1 (x) (R_A^T R_A)^-1 with upper triangular R_G and R_A; every verb but a product makes the inverses.

    Args:
        layout: how the layer's parameters sit in its matrix.
        A: R_A, [d_in, d_in]; [groups, d_in, d_in] where there are groups. A side that is diagonal is stored as its
            inverse, [d_in], [groups, d_in].
        G: R_G, [d_out, d_out] likewise.
        name: the layer's name, for messages.
    """

    @property
    def factors(self) -> tuple[Side, Side]:
        """R_A and R_G, and the inverses of diagonal sides."""
        return super().sides

    @cached_property
    def sides(self) -> tuple[Side, Side]:
        """Both inverses, whole or diagonal."""
        A, G = self.factors
        return inverted(A), inverted(G)

    def with_sides(self, A: Side, G: Side) -> KroneckerBlock:
        """A block of the same layer with other sides, which are its matrices."""
        return KroneckerBlock(self.layout, as_tensor(A), as_tensor(G), self.name)

    def _product(self, matrix: Tensor) -> Tensor:
        A, G = self.factors
        return kronecker_solve(G, matrix, A)

    def _scaled(self, factor: float) -> KroneckerBlock:
        return self.with_sides(*self.sides)._scaled(factor)
