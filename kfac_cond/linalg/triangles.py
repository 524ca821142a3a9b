"""Symmetric matrices as one triangle of each, half of the numbers."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


def triangle_size(d: int) -> int:
    """Numbers of one triangle of a matrix [d, d]."""
    return d * (d + 1) // 2


def triangle_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of ``triangle`` of a tensor of ``shape`` [..., d, d]."""
    return (*shape[:-2], triangle_size(shape[-1]))


def triangle(matrix: Tensor) -> Tensor:
    """One triangle of symmetric matrices [..., d, d], as ``fold`` lays it out, [..., d (d + 1) / 2]."""
    shape = triangle_shape(tuple(matrix.shape))
    flat = matrix.new_zeros(prod(shape))
    fold(matrix, flat)
    return flat.view(shape)


def fold(matrix: Tensor, flat: Tensor) -> None:
    """Write one triangle of symmetric matrices [..., d, d], d (d + 1) / 2 numbers of each, into zeros [n].

    The matrix is cut into four blocks. The triangles of the two on its diagonal make one rectangle, the block beside
    them is another, so that no index of the size of the matrix is formed.

    Source: Gustavson, Wasniewski, Dongarra & Langou 2010 (rectangular full packed format).
    """
    d = matrix.shape[-1]
    k = d // 2
    m = d - k
    leading = matrix.shape[:-2]
    both, beside = torch.split(flat.view(*leading, -1), [m * (k + 1), k * m], dim=-1)
    both, beside = both.view(*leading, m, k + 1), beside.view(*leading, k, m)
    both[..., :m] += matrix[..., k:, k:].tril().to(flat.device)
    both[..., :k, 1:] += matrix[..., :k, :k].triu().to(flat.device)
    beside.copy_(matrix[..., :k, k:])


def unfolded(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The matrices of ``shape`` [..., d, d] that ``fold`` took."""
    *leading, d, _ = shape
    k = d // 2
    m = d - k
    both, beside = torch.split(flat.reshape(*leading, -1), [m * (k + 1), k * m], dim=-1)
    both, beside = both.reshape(*leading, m, k + 1), beside.reshape(*leading, k, m)
    matrix = flat.new_empty(shape)
    lower, upper = both[..., :m].tril(), both[..., :k, 1:].triu()
    matrix[..., k:, k:] = lower + lower.tril(-1).mT
    matrix[..., :k, :k] = upper + upper.triu(1).mT
    matrix[..., :k, k:] = beside
    matrix[..., k:, :k] = beside.mT
    return matrix
