"""A block in a Kronecker eigenbasis: what every matrix function of a Kronecker block is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import einsum
from torch import Tensor

from ..errors import ArgumentError
from ..layers.layout import WeightLayout
from ..linalg.kronecker import kron, kronecker_matmul
from .base import Block, checked_damping, require_eigenpairs, require_regular
from .diagonalised import DiagonalisedBlock


@dataclass(frozen=True, eq=False, repr=False)
class EigenBlock(DiagonalisedBlock):
    """F = (U_G (x) U_A) diag(values) (U_G (x) U_A)^T.

    Args:
        layout: how the layer's parameters sit in its matrix.
        basis_A: U_A, [d_in, d_in], orthonormal columns; [groups, d_in, d_in] where there are groups.
        basis_G: U_G, [d_out, d_out] likewise.
        values: eigenvalues, of ``layout.matrix_shape``, none negative: row o and column i belong to column o of U_G and
            column i of U_A.
        name: the layer's name, for messages.

    Source: George et al. 2018 (arXiv:1806.03884), section 3.
    """

    layout: WeightLayout
    basis_A: Tensor
    basis_G: Tensor
    values: Tensor
    name: str = ""

    def __post_init__(self) -> None:
        require_sides(self, self.basis_A, self.basis_G, ("basis_A", "basis_G"))
        if tuple(self.values.shape) != self.layout.matrix_shape:
            raise ArgumentError(
                f"{self.label}: values has shape {tuple(self.values.shape)}, expected {self.layout.matrix_shape}"
            )

    def with_values(self, values: Tensor) -> EigenBlock:
        """The same basis with other eigenvalues, of ``layout.matrix_shape``."""
        return replace(self, values=values)

    def diagonal(self) -> Tensor:
        return kronecker_matmul(self.basis_G.square(), self.values, self.basis_A.square().mT)

    def top_eigenpairs(self, k: int) -> tuple[Tensor, Tensor]:
        require_eigenpairs(self, k)
        values, flat = self.values.flatten().topk(k)
        # One group always: the code for groups then serves both.
        *_, d_out, d_in = self.layout.matrix_shape
        group, row, column = torch.unravel_index(flat, (self.layout.groups, d_out, d_in))
        left = self.basis_G.reshape(-1, d_out, d_out)[group, :, row]
        right = self.basis_A.reshape(-1, d_in, d_in)[group, :, column]
        vectors = self.values.new_zeros(k, self.layout.groups, d_out, d_in)
        vectors[torch.arange(k, device=self.device), group] = einsum(left, right, "k o, k i -> k o i")
        return values, vectors.reshape(k, *self.layout.matrix_shape)

    def to(self, target: torch.device | torch.dtype | str) -> EigenBlock:
        return replace(
            self, basis_A=self.basis_A.to(target), basis_G=self.basis_G.to(target), values=self.values.to(target)
        )

    def _product(self, matrix: Tensor) -> Tensor:
        rotated = kronecker_matmul(self.basis_G.mT, matrix, self.basis_A)
        return kronecker_matmul(self.basis_G, rotated * self.values, self.basis_A.mT)

    def _dense(self) -> Tensor:
        basis = kron(self.basis_G, self.basis_A)
        return (basis * self.values.flatten(-2).unsqueeze(-2)) @ basis.mT

    def _damped(self, damping: float) -> Tensor:
        """The eigenvalues plus the damping, all positive."""
        added = checked_damping(damping)
        if added == 0.0:
            require_regular(self.values.flatten(-2), self.label, max(self.layout.matrix_shape[-2:]))
        return self.values + added


def require_sides(block: Block, right: Tensor, left: Tensor, names: tuple[str, str]) -> None:
    """Refuse an input side and an output side that do not fit the layout, or each other."""
    *groups, d_out, d_in = block.layout.matrix_shape
    for name, side, d in ((names[0], right, d_in), (names[1], left, d_out)):
        if tuple(side.shape) != (*groups, d, d):
            raise ArgumentError(f"{block.label}: {name} has shape {tuple(side.shape)}, expected {(*groups, d, d)}")
    if (right.dtype, right.device) != (left.dtype, left.device):
        raise ArgumentError(
            f"{block.label}: {names[0]} is {right.dtype} on {right.device}, {names[1]} {left.dtype} on {left.device}; "
            "expected the same"
        )
