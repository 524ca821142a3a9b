"""The two sides of a Kronecker product, each whole or known by its diagonal: one surface, two storages.

A side that is whole is a tensor [..., d, d]. One that is diagonal is a ``Diagonal``, which holds d numbers and answers
as a tensor of matrices does; the few functions here are those that a tensor has under another name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Diagonal:
    """A diagonal matrix, or one for each group, as its diagonal alone.

    Args:
        values: the diagonal, [..., d].
    """

    values: Tensor

    @property
    def shape(self) -> torch.Size:
        """That of the matrix, [..., d, d]."""
        return torch.Size((*self.values.shape, self.values.shape[-1]))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the entries."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """The device of the entries."""
        return self.values.device

    @property
    def mT(self) -> Diagonal:
        """The transpose: itself."""
        return self

    def diagonal(self, *, dim1: int, dim2: int) -> Tensor:
        """The diagonal, [..., d]; the two dimensions are the last ones, as ``Tensor.diagonal`` is told."""
        assert {dim1, dim2} == {-2, -1}
        return self.values

    def square(self) -> Diagonal:
        """Every entry squared."""
        return Diagonal(self.values.square())

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.values.unsqueeze(-1) * v

    def __rmatmul__(self, v: Tensor) -> Tensor:
        return v * self.values.unsqueeze(-2)


Side = Tensor | Diagonal
"""A matrix [..., d, d], whole or diagonal."""


def as_side(tensor: Tensor, *, leading: int) -> Side:
    """A side from what a block stores for it.

    Args:
        tensor: [..., d, d], or the diagonal alone, [..., d].
        leading: the number of dimensions in front of either.
    """
    return Diagonal(tensor) if tensor.dim() == leading + 1 else tensor


def as_tensor(side: Side) -> Tensor:
    """What a block stores for a side: [..., d, d], or the diagonal alone, [..., d]."""
    return side.values if isinstance(side, Diagonal) else side


def whole(side: Side) -> Tensor:
    """A side as [..., d, d], for small sizes and tests."""
    return torch.diag_embed(side.values) if isinstance(side, Diagonal) else side


def identity(shape: torch.Size, like: Tensor) -> Diagonal:
    """The identity of a ``shape`` [..., d, d], of which one number is held."""
    return Diagonal(like.new_ones(()).expand(shape[:-1]))


def stored_identity(shape: tuple[int, ...], *, leading: int, like: Tensor) -> Tensor:
    """The identity as a block stores it.

    Args:
        shape: [..., d, d], or [..., d] for the diagonal alone.
        leading: the number of dimensions in front of either.
        like: of the dtype and device.
    """
    if len(shape) == leading + 1:
        return like.new_ones(shape)
    return torch.eye(shape[-1], dtype=like.dtype, device=like.device).expand(shape).contiguous()


def identity_like(side: Side) -> Side:
    """The identity in the storage of a side."""
    tensor, leading = as_tensor(side), len(side.shape) - 2
    return as_side(stored_identity(tuple(tensor.shape), leading=leading, like=tensor), leading=leading)


def inner(mine: Side, theirs: Side) -> Tensor:
    """The sum of the products of all entries, [...]."""
    if isinstance(mine, Diagonal) or isinstance(theirs, Diagonal):
        return (mine.diagonal(dim1=-2, dim2=-1) * theirs.diagonal(dim1=-2, dim2=-1)).sum(-1)
    return (mine * theirs).sum((-2, -1))


def frobenius_norm(side: Side) -> Tensor:
    """The root of the sum of all squared entries, [...]."""
    norm: Tensor = (
        torch.linalg.vector_norm(side.values, dim=-1) if isinstance(side, Diagonal) else torch.linalg.matrix_norm(side)
    )
    return norm


def columns(side: Side, group: Tensor, index: Tensor) -> Tensor:
    """Some columns of a side, [k, d].

    Args:
        side: [..., d, d].
        group: [k], which of the matrices, counted over all leading dimensions.
        index: [k], which of its columns.
    """
    d = side.shape[-1]
    if not isinstance(side, Diagonal):
        return side.reshape(-1, d, d)[group, :, index]
    found = side.values.new_zeros(len(index), d)
    found[torch.arange(len(index), device=index.device), index] = side.values.reshape(-1, d)[group, index]
    return found
