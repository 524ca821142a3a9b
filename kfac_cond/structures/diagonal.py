"""The diagonal of a layer's block, as a block of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..layers.layout import WeightLayout
from .base import checked_damping, require_eigenpairs, require_regular
from .diagonalised import DiagonalisedBlock


@dataclass(frozen=True, eq=False, repr=False)
class DiagonalBlock(DiagonalisedBlock):
    """F = diag(values).

    Args:
        layout: how the layer's parameters sit in its matrix.
        values: the diagonal, of ``layout.matrix_shape``, none negative.
        name: the layer's name, for messages.
    """

    layout: WeightLayout
    values: Tensor
    name: str = ""

    def __post_init__(self) -> None:
        if tuple(self.values.shape) != self.layout.matrix_shape:
            raise ArgumentError(
                f"{self.label}: values has shape {tuple(self.values.shape)}, expected {self.layout.matrix_shape}"
            )

    def with_values(self, values: Tensor) -> DiagonalBlock:
        """Other values on the diagonal, of ``layout.matrix_shape``."""
        return replace(self, values=values)

    def diagonal(self) -> Tensor:
        return self.values.clone()

    def top_eigenpairs(self, k: int) -> tuple[Tensor, Tensor]:
        require_eigenpairs(self, k)
        values, flat = self.values.flatten().topk(k)
        vectors = self.values.new_zeros(k, self.layout.numel)
        vectors[torch.arange(k, device=self.device), flat] = 1.0
        return values, vectors.reshape(k, *self.layout.matrix_shape)

    def to(self, target: torch.device | torch.dtype | str) -> DiagonalBlock:
        return replace(self, values=self.values.to(target))

    def _product(self, matrix: Tensor) -> Tensor:
        return matrix * self.values

    def _dense(self) -> Tensor:
        return torch.diag(self.values.flatten())

    def _damped(self, damping: float) -> Tensor:
        """The values plus the damping, all positive."""
        added = checked_damping(damping)
        if added == 0.0:
            require_regular(self.values.flatten(), self.label, 1)
        return self.values + added
