"""A block stored whole: of one layer, or of all layers together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import ArgumentError, NumericalError
from ..layers.layout import WeightLayout
from ..linalg.eigen import eigenbases, from_eigenbasis
from ..linalg.ladder import Rung
from ..linalg.moments import trace
from .base import Block, Rule, checked_damping, require_eigenpairs, require_regular, require_unfactored


@dataclass(frozen=True, eq=False, repr=False)
class DenseBlock(Block):
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
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def inverse(self, *, damping: float = 0.0, rule: Rule = "exact") -> DenseBlock:
        require_unfactored(self, rule)
        return self._of_values(torch.reciprocal, self._damped(damping))

    def sqrt(self) -> DenseBlock:
        return self._of_values(torch.sqrt, self._basis[0])

    def inverse_sqrt(self, *, damping: float = 0.0) -> DenseBlock:
        return self._of_values(torch.rsqrt, self._damped(damping))

    def trace(self) -> Tensor:
        return trace(self.matrix)

    def logdet(self, *, damping: float = 0.0) -> Tensor:
        return self._damped(damping).log().sum()

    def frobenius_norm(self) -> Tensor:
        norm: Tensor = torch.linalg.matrix_norm(self.matrix)
        return norm

    def diagonal(self) -> Tensor:
        return self.matrix.diagonal().reshape(self.layout.matrix_shape)

    def eigenvalues(self) -> Tensor:
        return self._basis[0].flip(0)

    def top_eigenpairs(self, k: int) -> tuple[Tensor, Tensor]:
        require_eigenpairs(self, k)
        values, basis = self._basis
        vectors = basis[:, -k:].flip(1).mT.reshape(k, *self.layout.matrix_shape)
        return values[-k:].flip(0), vectors

    def to(self, target: torch.device | torch.dtype | str) -> DenseBlock:
        return replace(self, matrix=self.matrix.to(target))

    @cached_property
    def _basis(self) -> tuple[Tensor, Tensor]:
        """Ascending eigenvalues, clamped at 0, and the eigenvectors in columns."""
        ((values, basis),), (rung,) = eigenbases([self.matrix])
        if rung >= Rung.PREVIOUS:
            raise NumericalError(
                f"{self.label}: the matrix has no eigenbasis, so it is not finite: look at the data, the labels and "
                "the outputs it was estimated from"
            )
        assert basis is not None
        return values, basis

    def _damped(self, damping: float) -> Tensor:
        """The eigenvalues plus the damping, all positive."""
        added, (values, _) = checked_damping(damping), self._basis
        if added == 0.0:
            require_regular(values, self.label, len(values))
        return values + added

    def _of_values(self, function: Callable[[Tensor], Tensor], values: Tensor) -> DenseBlock:
        return replace(self, matrix=from_eigenbasis(function(values), self._basis[1]))

    def _product(self, matrix: Tensor) -> Tensor:
        batch = matrix.shape[: matrix.dim() - len(self.layout.matrix_shape)]
        return (matrix.reshape(*batch, self.layout.numel) @ self.matrix).reshape(matrix.shape)

    def _scaled(self, factor: float) -> DenseBlock:
        return replace(self, matrix=self.matrix * factor)

    def _dense(self) -> Tensor:
        return self.matrix.clone()
