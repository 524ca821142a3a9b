"""A block in a Kronecker eigenbasis: what every matrix function of a Kronecker block is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import einsum
from torch import Tensor

from ..errors import ArgumentError
from ..layers.layout import WeightLayout
from ..linalg.eigen import from_eigenbasis
from ..linalg.kronecker import kron, kronecker_matmul
from ..linalg.sides import Side, as_tensor, columns, identity, whole
from .base import Block, checked_damping, require_eigenpairs, require_regular
from .diagonalised import DiagonalisedBlock


@dataclass(frozen=True, eq=False, repr=False)
class EigenBlock(DiagonalisedBlock):
    """F = (U_G (x) U_A) diag(values) (U_G (x) U_A)^T.

    Args:
        layout: how the layer's parameters sit in its matrix.
        basis_A: U_A, [d_in, d_in], orthonormal columns; [groups, d_in, d_in] where there are groups. None for the
            identity, as of a side that is diagonal.
        basis_G: U_G, [d_out, d_out] likewise.
        values: eigenvalues, of ``layout.matrix_shape``, none negative: row o and column i belong to column o of U_G and
            column i of U_A.
        name: the layer's name, for messages.
        values_A: the eigenvalues of the factor A that the basis came from, [d_in] or [groups, d_in]; None where the
            block is not an estimate's own.
        values_G: those of G likewise.

    Source: George et al. 2018 (arXiv:1806.03884), section 3.
    """

    layout: WeightLayout
    basis_A: Tensor | None
    basis_G: Tensor | None
    values: Tensor
    name: str = ""
    values_A: Tensor | None = None
    values_G: Tensor | None = None

    def __post_init__(self) -> None:
        *groups, d_out, d_in = self.layout.matrix_shape
        require_tensors(
            self,
            values=(self.layout.matrix_shape,),
            basis_A=((*groups, d_in, d_in),),
            basis_G=((*groups, d_out, d_out),),
            values_A=((*groups, d_in),),
            values_G=((*groups, d_out),),
        )

    @property
    def A(self) -> Tensor:
        """The factor A that the basis came from, as ``KroneckerBlock.A``.

        Raises:
            ArgumentError: the block is a function of an estimate's, and has no factors.
        """
        return self._factor("A")

    @property
    def G(self) -> Tensor:
        """The factor G that the basis came from, as ``KroneckerBlock.G``; errors as for A."""
        return self._factor("G")

    @property
    def diagonal_sides(self) -> tuple[str, ...]:
        return tuple(name for name, basis in (("A", self.basis_A), ("G", self.basis_G)) if basis is None)

    def with_values(self, values: Tensor) -> EigenBlock:
        """The same basis with other eigenvalues, of ``layout.matrix_shape``; another matrix, so without factors."""
        return replace(self, values=values, values_A=None, values_G=None)

    def diagonal(self) -> Tensor:
        basis_A, basis_G = self._bases
        return kronecker_matmul(basis_G.square(), self.values, basis_A.square().mT)

    def top_eigenpairs(self, k: int) -> tuple[Tensor, Tensor]:
        require_eigenpairs(self, k)
        values, flat = self.values.flatten().topk(k)
        # One group always: the code for groups then serves both.
        *_, d_out, d_in = self.layout.matrix_shape
        group, row, column = torch.unravel_index(flat, (self.layout.groups, d_out, d_in))
        basis_A, basis_G = self._bases
        left, right = columns(basis_G, group, row), columns(basis_A, group, column)
        vectors = self.values.new_zeros(k, self.layout.groups, d_out, d_in)
        vectors[torch.arange(k, device=self.device), group] = einsum(left, right, "k o, k i -> k o i")
        return values, vectors.reshape(k, *self.layout.matrix_shape)

    def to(self, target: torch.device | torch.dtype | str) -> EigenBlock:
        names = ("basis_A", "basis_G", "values", "values_A", "values_G")
        held = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        return replace(self, **{name: tensor.to(target) for name, tensor in held.items()})

    @property
    def _bases(self) -> tuple[Side, Side]:
        """U_A and U_G as matrices."""
        *groups, d_out, d_in = self.layout.matrix_shape
        basis_A, basis_G = (
            identity(torch.Size((*groups, d, d)), self.values) if basis is None else basis
            for basis, d in ((self.basis_A, d_in), (self.basis_G, d_out))
        )
        return basis_A, basis_G

    def _factor(self, name: str) -> Tensor:
        values = getattr(self, f"values_{name}")
        if values is None:
            raise ArgumentError(
                f"{self.label}: it has no {name}, since it was made of another block by a verb, or by hand: take "
                f"{name} of the block that kc.estimate(structure='ekfac') or KroneckerBlock.eigen() gave"
            )
        return as_tensor(from_eigenbasis(values, getattr(self, f"basis_{name}")))

    def _product(self, matrix: Tensor) -> Tensor:
        basis_A, basis_G = self._bases
        rotated = kronecker_matmul(basis_G.mT, matrix, basis_A)
        return kronecker_matmul(basis_G, rotated * self.values, basis_A.mT)

    def _dense(self) -> Tensor:
        basis_A, basis_G = self._bases
        basis = kron(whole(basis_G), whole(basis_A))
        return (basis * self.values.flatten(-2).unsqueeze(-2)) @ basis.mT

    def _damped(self, damping: float) -> Tensor:
        """The eigenvalues plus the damping, all positive."""
        added = checked_damping(damping)
        if added == 0.0:
            require_regular(self.values.flatten(-2), self.label, side_of_basis(self.basis_A, self.basis_G))
        return self.values + added


def side_of_basis(*bases: Tensor | None) -> int:
    """Size of the largest side that was decomposed, which sets its round-off; 1 where all bases are identities."""
    return max(1 if basis is None else basis.shape[-1] for basis in bases)


def require_tensors(block: Block, **expected: tuple[tuple[int, ...], ...]) -> None:
    """Refuse fields of a block that have none of the shapes expected, or not one dtype and device; None passes."""
    held = {name: tensor for name in expected if (tensor := getattr(block, name)) is not None}
    for name, tensor in held.items():
        if tuple(tensor.shape) not in expected[name]:
            shapes = " or ".join(map(str, expected[name]))
            raise ArgumentError(f"{block.label}: {name} has shape {tuple(tensor.shape)}, expected {shapes}")
    first, one = next(iter(held.items()))
    for name, tensor in held.items():
        if (tensor.dtype, tensor.device) != (one.dtype, one.device):
            raise ArgumentError(
                f"{block.label}: {first} is {one.dtype} on {one.device}, {name} {tensor.dtype} on {tensor.device}; "
                "expected the same"
            )
