"""What blocks that are dense matrices along their diagonal share: one batched eigendecomposition serves every verb."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import TypeVar

import torch
from einops import einsum
from torch import Tensor

from ..errors import NumericalError
from ..linalg.eigen import eigenbases, from_eigenbasis
from ..linalg.ladder import Rung
from ..linalg.moments import trace
from .base import Block, Rule, checked_damping, require_eigenpairs, require_regular, require_unfactored

S = TypeVar("S", bound="StackedBlock")


class StackedBlock(Block):
    """F with the symmetric matrices of a stack [..., d, d] along its diagonal, in the row-major order of the layout."""

    @property
    @abstractmethod
    def _stack(self) -> Tensor:
        """The matrices, [..., d, d]."""

    @abstractmethod
    def _with_stack(self: S, stack: Tensor) -> S:
        """The same block of other matrices."""

    @property
    def dtype(self) -> torch.dtype:
        return self._stack.dtype

    @property
    def device(self) -> torch.device:
        return self._stack.device

    def inverse(self: S, *, damping: float = 0.0, rule: Rule = "exact") -> S:
        require_unfactored(self, rule)
        return self._of_values(torch.reciprocal, self._damped(damping))

    def sqrt(self: S) -> S:
        return self._of_values(torch.sqrt, self._basis[0])

    def inverse_sqrt(self: S, *, damping: float = 0.0) -> S:
        return self._of_values(torch.rsqrt, self._damped(damping))

    def trace(self) -> Tensor:
        return trace(self._stack).sum()

    def logdet(self, *, damping: float = 0.0) -> Tensor:
        return self._damped(damping).log().sum()

    def frobenius_norm(self) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(self._stack)
        return norm

    def diagonal(self) -> Tensor:
        return self._stack.diagonal(dim1=-2, dim2=-1).reshape(self.layout.matrix_shape)

    def eigenvalues(self) -> Tensor:
        return torch.sort(self._basis[0].flatten(), descending=True)[0]

    def top_eigenpairs(self, k: int) -> tuple[Tensor, Tensor]:
        require_eigenpairs(self, k)
        values, basis = self._basis
        d = values.shape[-1]
        top, flat = values.flatten().topk(k)
        matrix, column = flat // d, flat % d
        vectors = basis.new_zeros(k, values.numel() // d, d)
        vectors[torch.arange(k, device=self.device), matrix] = basis.reshape(-1, d, d)[matrix, :, column]
        return top, vectors.reshape(k, *self.layout.matrix_shape)

    def to(self: S, target: torch.device | torch.dtype | str) -> S:
        return self._with_stack(self._stack.to(target))

    @cached_property
    def _basis(self) -> tuple[Tensor, Tensor]:
        """Of each matrix the ascending eigenvalues, clamped at 0, and the eigenvectors in columns."""
        ((values, basis),), (rung,) = eigenbases([self._stack])
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
            require_regular(values, self.label, values.shape[-1])
        return values + added

    def _of_values(self: S, function: Callable[[Tensor], Tensor], values: Tensor) -> S:
        return self._with_stack(from_eigenbasis(function(values), self._basis[1]))

    def _product(self, matrix: Tensor) -> Tensor:
        # One dimension for all vectors and one for all matrices, so that no matrix is copied for each vector.
        stack = self._flat_stack
        rows = matrix.reshape(-1, *stack.shape[:2])
        return einsum(rows, stack, "n u i, u i j -> n u j").reshape(matrix.shape)

    def _scaled(self: S, factor: float) -> S:
        return self._with_stack(self._stack * factor)

    def _dense(self) -> Tensor:
        return self._flat_stack

    @property
    def _flat_stack(self) -> Tensor:
        return self._stack.reshape(-1, *self._stack.shape[-2:])
