"""The Kronecker block G (x) A, with its functions by factors where they are Kronecker again, else by eigenbases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from einops import einsum
from torch import Tensor

from ..errors import NumericalError
from ..layers.layout import WeightLayout
from ..linalg.damping import factored_damping
from ..linalg.eigen import Eigenbasis, eigenbases, from_eigenbasis
from ..linalg.inverse import damped_inverses
from ..linalg.kronecker import kron, kronecker_matmul
from ..linalg.ladder import Rung
from ..linalg.moments import trace
from ..linalg.sides import Diagonal, Side, as_side, as_tensor, frobenius_norm, whole
from .base import Block, Rule, checked_damping, checked_rule, require_regular
from .eigen import EigenBlock, require_tensors, side_of_basis


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerBlock(Block):
    """F = G (x) A, acting on a matrix V as G V A; with groups, one such product for each group.

    Args:
        layout: how the layer's parameters sit in its matrix.
        A: second moment of the layer's input, [d_in, d_in], symmetric; [groups, d_in, d_in] where there are groups. A
            side that is diagonal is stored as [d_in], [groups, d_in], and nothing of the size of its square is formed.
        G: second moment of the scores at the layer's output, [d_out, d_out] likewise; it carries the scale of F.
        name: the layer's name, for messages.

    Source: Martens & Grosse 2015 (arXiv:1503.05671), section 3; Grosse & Martens 2016 (arXiv:1602.01407) for
    convolutions.
    """

    layout: WeightLayout
    A: Tensor
    G: Tensor
    name: str = ""

    def __post_init__(self) -> None:
        *groups, d_out, d_in = self.layout.matrix_shape
        require_tensors(self, A=((*groups, d_in, d_in), (*groups, d_in)), G=((*groups, d_out, d_out), (*groups, d_out)))

    @property
    def sides(self) -> tuple[Side, Side]:
        """A and G as matrices, whole or diagonal."""
        leading = len(self.layout.matrix_shape) - 2
        return as_side(self.A, leading=leading), as_side(self.G, leading=leading)

    def with_sides(self, A: Side, G: Side) -> KroneckerBlock:
        """A block of the same layer with other sides."""
        return replace(self, A=as_tensor(A), G=as_tensor(G))

    @property
    def diagonal_sides(self) -> tuple[str, ...]:
        return tuple(name for name, side in zip("AG", self.sides, strict=True) if isinstance(side, Diagonal))

    @property
    def dtype(self) -> torch.dtype:
        return self.A.dtype

    @property
    def device(self) -> torch.device:
        return self.A.device

    def eigen(self) -> EigenBlock:
        """The same matrix in its eigenbasis, computed once.

        Raises:
            NumericalError: where A or G is not finite.
        """
        return self._eigen

    def inverse(self, *, damping: float = 0.0, rule: Rule = "exact") -> Block:
        checked_rule(rule)
        added = checked_damping(damping)
        if added == 0.0:
            # (G (x) A)^-1 = G^-1 (x) A^-1, whichever the rule.
            self._require_regular()
            return self._of_factors(torch.reciprocal)
        return self.eigen().inverse(damping=added) if rule == "exact" else self._factored_inverse(added)

    def sqrt(self) -> KroneckerBlock:
        return self._of_factors(torch.sqrt)

    def inverse_sqrt(self, *, damping: float = 0.0) -> Block:
        added = checked_damping(damping)
        if added == 0.0:
            self._require_regular()
            return self._of_factors(torch.rsqrt)
        return self.eigen().inverse_sqrt(damping=added)

    def trace(self) -> Tensor:
        A, G = self.sides
        return (trace(A) * trace(G)).sum()

    def logdet(self, *, damping: float = 0.0) -> Tensor:
        added = checked_damping(damping)
        if added == 0.0:
            self._require_regular()
            # By factor: the products of small eigenvalues may leave the dtype where their logarithms do not.
            (values_A, _), (values_G, _) = self._bases
            return self.layout.d_out * values_A.log().sum() + self.layout.d_in * values_G.log().sum()
        return self.eigen().logdet(damping=added)

    def frobenius_norm(self) -> Tensor:
        # A sum over groups of |A|^2 |G|^2.
        A, G = self.sides
        norm: Tensor = torch.linalg.vector_norm(frobenius_norm(A) * frobenius_norm(G))
        return norm

    def diagonal(self) -> Tensor:
        diagonal_A, diagonal_G = (side.diagonal(dim1=-2, dim2=-1) for side in self.sides)
        return einsum(diagonal_G, diagonal_A, "... o, ... i -> ... o i")

    def eigenvalues(self) -> Tensor:
        return self.eigen().eigenvalues()

    def top_eigenpairs(self, k: int) -> tuple[Tensor, Tensor]:
        return self.eigen().top_eigenpairs(k)

    def to(self, target: torch.device | torch.dtype | str) -> KroneckerBlock:
        return replace(self, A=self.A.to(target), G=self.G.to(target))

    @cached_property
    def _bases(self) -> list[Eigenbasis]:
        """The eigenbases of A and of G."""
        bases, rungs = eigenbases(self.sides)
        for factor, rung in zip("AG", rungs, strict=True):
            if rung >= Rung.PREVIOUS:
                raise NumericalError(
                    f"{self.label}: {factor} has no eigenbasis, so it is not finite or not symmetric: look at the "
                    "data, the labels and the outputs it was estimated from"
                )
        return bases

    @cached_property
    def _eigen(self) -> EigenBlock:
        (values_A, basis_A), (values_G, basis_G) = self._bases
        values = einsum(values_G, values_A, "... o, ... i -> ... o i")
        return EigenBlock(self.layout, basis_A, basis_G, values, self.name, values_A, values_G)

    def _of_factors(self, function: Callable[[Tensor], Tensor]) -> KroneckerBlock:
        """The same function of both factors' eigenvalues."""
        A, G = (from_eigenbasis(function(values), basis) for values, basis in self._bases)
        return self.with_sides(A, G)

    def _require_regular(self) -> None:
        # By factor: two well conditioned factors may have a product whose eigenvalues span more than the dtype does.
        for factor, (values, basis) in zip("AG", self._bases, strict=True):
            require_regular(values, f"{self.label}: its factor {factor}", side_of_basis(basis))

    def _factored_inverse(self, damping: float) -> KroneckerBlock:
        """(G + sqrt(damping) / pi I)^-1 (x) (A + pi sqrt(damping) I)^-1."""
        (A, G), rungs = damped_inverses(self.sides, factored_damping(*self.sides, damping), [None, None])
        # The other rungs are the inverses of other matrices: good enough for a step, not for an algebra.
        for factor, rung in zip("AG", rungs, strict=True):
            if rung not in (Rung.FIRST, Rung.DOUBLE):
                raise NumericalError(
                    f"{self.label}: its factor {factor} is not positive definite with damping {damping:.3g}: pass more "
                    "damping, or look for values that are not finite"
                )
        return self.with_sides(A, G)

    def _product(self, matrix: Tensor) -> Tensor:
        A, G = self.sides
        return kronecker_matmul(G, matrix, A)

    def _scaled(self, factor: float) -> KroneckerBlock:
        # All scale is in G: A stays a mean.
        return replace(self, G=self.G * factor)

    def _dense(self) -> Tensor:
        A, G = self.sides
        return kron(whole(G), whole(A))
