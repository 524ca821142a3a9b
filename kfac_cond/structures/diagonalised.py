"""What blocks that are diagonal in some orthonormal basis share: every function of theirs is one of their values."""

from __future__ import annotations

from abc import abstractmethod
from typing import TypeVar

import torch
from torch import Tensor

from .base import Block, Rule, require_unfactored

D = TypeVar("D", bound="DiagonalisedBlock")


class DiagonalisedBlock(Block):
    """F = U diag(values) U^T with orthonormal U; ``values`` are of ``layout.matrix_shape``, none negative."""

    values: Tensor

    @abstractmethod
    def with_values(self: D, values: Tensor) -> D:
        """The same basis with other eigenvalues, of ``layout.matrix_shape``."""

    @abstractmethod
    def _damped(self, damping: float) -> Tensor:
        """The eigenvalues plus the damping, all positive."""

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def inverse(self: D, *, damping: float = 0.0, rule: Rule = "exact") -> D:
        require_unfactored(self, rule)
        return self.with_values(self._damped(damping).reciprocal())

    def sqrt(self: D) -> D:
        return self.with_values(self.values.sqrt())

    def inverse_sqrt(self: D, *, damping: float = 0.0) -> D:
        return self.with_values(self._damped(damping).rsqrt())

    def trace(self) -> Tensor:
        return self.values.sum()

    def logdet(self, *, damping: float = 0.0) -> Tensor:
        return self._damped(damping).log().sum()

    def frobenius_norm(self) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(self.values)
        return norm

    def eigenvalues(self) -> Tensor:
        return torch.sort(self.values.flatten(), descending=True)[0]

    def _scaled(self: D, factor: float) -> D:
        return self.with_values(self.values * factor)
