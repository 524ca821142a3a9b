"""The layout of a block over any set of parameters: one flat vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..layers.layout import WeightLayout


@dataclass(frozen=True)
class FlatLayout(WeightLayout):
    """Parameters one after another, each flattened: a block of a whole model, of whatever modules it is made.

    Made by ``FlatLayout.of``. Its "matrix" is the flat vector, of shape (P,).
    """

    parts: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> FlatLayout:
        """The layout of these parameters: canonical name -> shape, in order."""
        parts = tuple((name, tuple(shape)) for name, shape in shapes.items())
        if not parts:
            raise ArgumentError("a layout of no parameters: is anything in the model trainable?")
        return cls(None, None, (sum(prod(shape) for _, shape in parts),), parts=parts)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.parts)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self.parts)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """(P,)."""
        return self.weight_shape

    def to_matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensors of ``names`` as one flat vector."""
        for name, shape in self.parts:
            if name not in tensors:
                raise ArgumentError(f"'{name}' is missing: expected a tensor of shape {shape} for it")
            if tuple(tensors[name].shape) != shape:
                raise ArgumentError(f"'{name}' has shape {tuple(tensors[name].shape)}, expected {shape}")
        return torch.cat([tensors[name].reshape(-1) for name in self.names])

    def from_matrix(self, matrix: Tensor) -> dict[str, Tensor]:
        """The inverse of ``to_matrix``: a tensor for each of ``names``."""
        if tuple(matrix.shape) != self.matrix_shape:
            raise ArgumentError(f"got a vector of shape {tuple(matrix.shape)}, expected {self.matrix_shape}")
        pieces = torch.split(matrix, [prod(shape) for _, shape in self.parts])
        return {name: piece.reshape(shape) for (name, shape), piece in zip(self.parts, pieces, strict=True)}
