"""A few eigenpairs, and one eigenvalue for all that is left: closed forms of every verb."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ArgumentError, NumericalError
from ..layers.layout import WeightLayout
from .base import Block, Rule, checked_damping, checked_rule, require_dense, require_regular


@dataclass(frozen=True, eq=False, repr=False)
class LowRankBlock(Block):
    """F = V^T diag(values) V + rest (I - V^T V), for k orthonormal rows V: k P numbers, a product costs 2 k P.

    Args:
        layout: how the parameters sit in the vector or matrix the block acts on.
        values: eigenvalues [k], none negative.
        vectors: orthonormal eigenvectors, [k, *matrix_shape].
        rest: the eigenvalue of the complement; 0 for an approximation of rank k, more for what its inverse becomes.
        name: the layer's name, for messages.
    """

    layout: WeightLayout
    values: Tensor
    vectors: Tensor
    rest: float = 0.0
    name: str = ""

    def __post_init__(self) -> None:
        expected = (len(self.values), *self.layout.matrix_shape)
        if self.values.dim() != 1 or tuple(self.vectors.shape) != expected:
            raise ArgumentError(
                f"{self.label}: values has shape {tuple(self.values.shape)} and vectors {tuple(self.vectors.shape)}, "
                f"expected (k,) and (k, {', '.join(map(str, self.layout.matrix_shape))})"
            )
        if not 1 <= len(self.values) <= self.layout.numel:
            raise ArgumentError(f"{self.label}: rank {len(self.values)}, expected 1 to {self.layout.numel}")

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def rank(self) -> int:
        """k."""
        return len(self.values)

    @property
    def _rows(self) -> Tensor:
        return self.vectors.reshape(self.rank, -1)

    @property
    def _others(self) -> int:
        """Dimensions of the complement."""
        return self.layout.numel - self.rank

    def inverse(self, *, damping: float = 0.0, rule: Rule = "exact") -> LowRankBlock:
        if checked_rule(rule) == "factored":
            raise ArgumentError(f"{self.label}: rule='factored' damps two factors, and it has none: use rule='exact'")
        return self._of_eigenvalues(torch.reciprocal, checked_damping(damping), regular=True)

    def sqrt(self) -> LowRankBlock:
        return self._of_eigenvalues(torch.sqrt, 0.0, regular=False)

    def inverse_sqrt(self, *, damping: float = 0.0) -> LowRankBlock:
        return self._of_eigenvalues(torch.rsqrt, checked_damping(damping), regular=True)

    def pseudo_solve(self, v: Tensor) -> Tensor:
        """The shortest x with F x = v.

        Args:
            v: a tensor in one of the forms of ``Block``.

        Raises:
            NumericalError: where v is not in the range of F but for round-off.
        """
        matrix = self._to_matrix(v).reshape(-1)
        inside = self._rows @ matrix
        outside = torch.linalg.vector_norm(matrix - inside @ self._rows)
        if self.rest == 0.0 and bool(outside > torch.finfo(self.dtype).eps ** 0.5 * torch.linalg.vector_norm(matrix)):
            raise NumericalError(
                f"{self.label}: the vector has a part of norm {float(outside):.3g} outside the range of F, where F is "
                "singular: pass damping > 0"
            )
        return (inside / self.values @ self._rows).reshape(v.shape)

    def trace(self) -> Tensor:
        return self.values.sum() + self.rest * self._others

    def logdet(self, *, damping: float = 0.0) -> Tensor:
        return self._spectrum(checked_damping(damping), regular=True).log().sum()

    def frobenius_norm(self) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(self._spectrum(0.0, regular=False))
        return norm

    def diagonal(self) -> Tensor:
        diagonal = (self.values - self.rest) @ self._rows.square() + self.rest
        return diagonal.reshape(self.layout.matrix_shape)

    def eigenvalues(self) -> Tensor:
        return torch.sort(self._spectrum(0.0, regular=False), descending=True)[0]

    def top_eigenpairs(self, k: int) -> tuple[Tensor, Tensor]:
        usable = int((self.values >= self.rest).sum())
        if not 1 <= k <= usable:
            raise ArgumentError(
                f"{self.label}: asked for {k} eigenpairs, expected 1 to {usable}: the others share the eigenvalue "
                f"{self.rest:.3g} and have no vectors of their own"
            )
        values, index = self.values.topk(k)
        return values, self.vectors[index]

    def to(self, target: torch.device | torch.dtype | str) -> LowRankBlock:
        return replace(self, values=self.values.to(target), vectors=self.vectors.to(target))

    def to_dense(self) -> Tensor:
        """F as a (P x P) tensor; raises ArgumentError above ``MAX_DENSE`` parameters."""
        require_dense(self.layout.numel, self.label)
        return self._dense()

    def _dense(self) -> Tensor:
        identity = torch.eye(self.layout.numel, dtype=self.dtype, device=self.device)
        return self.rest * identity + (self._rows.mT * (self.values - self.rest)) @ self._rows

    def _product(self, matrix: Tensor) -> Tensor:
        rows = matrix.reshape(-1, self.layout.numel)
        inside = rows @ self._rows.mT
        # The two parts apart: a small difference of large terms where ``rest`` is the inverse of a small damping.
        result = self.rest * (rows - inside @ self._rows) + (inside * self.values) @ self._rows
        return result.reshape(matrix.shape)

    def _scaled(self, factor: float) -> LowRankBlock:
        return replace(self, values=self.values * factor, rest=self.rest * factor)

    def _spectrum(self, damping: float, *, regular: bool) -> Tensor:
        """All P eigenvalues plus the damping."""
        rest = self.values.new_full((self._others,), self.rest)
        values = torch.cat([self.values, rest]) + damping
        if regular and damping == 0.0:
            require_regular(values, self.label, self.layout.numel)
        return values

    def _of_eigenvalues(self, function: Callable[[Tensor], Tensor], damping: float, *, regular: bool) -> LowRankBlock:
        if regular:
            self._spectrum(damping, regular=True)
        rest = self.values.new_tensor(self.rest + damping, dtype=torch.float64)
        # Without a complement its eigenvalue has no meaning, and must not become infinite.
        kept = float(function(rest)) if self._others else 0.0
        return replace(self, values=function(self.values + damping), rest=kept)
