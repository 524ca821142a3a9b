"""Products with a Kronecker matrix that is never formed, and the dense matrix for small sizes and tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import einsum, rearrange
from torch import Tensor

from .sides import Diagonal, Side


def kronecker_matmul(left: Side, v: Tensor, right: Side) -> Tensor:
    """(left (x) right^T) vec(v) as a matrix: left v right, for row-major vec.

    With left = G and right = A, symmetric, it is the product of the block G (x) A with v.

    Args:
        left: [..., o, o].
        v: [..., o, i].
        right: [..., i, i].

    Returns:
        [..., o, i].
    """
    # Either order costs o i (o + i) multiplications for square sides, so none is cheaper; left first.
    return left @ v @ right


def kronecker_solve(left: Side, v: Tensor, right: Side) -> Tensor:
    """(L^T L)^-1 v (R^T R)^-1 for upper triangular L and R; a side that is diagonal is an inverse already.

    One tensor of the size of v is written, and solved in place.

    Args:
        left: [..., o, o].
        v: [..., o, i].
        right: [..., i, i].

    Returns:
        [..., o, i].
    """
    if isinstance(left, Diagonal):
        found = left @ v
    else:
        found = v.clone()
        _solve_in_place(left.mT, left, found, left=True)
    if isinstance(right, Diagonal):
        return found @ right
    _solve_in_place(right, right.mT, found, left=False)
    return found


def _solve_in_place(first: Tensor, second: Tensor, v: Tensor, *, left: bool) -> None:
    """Solve with one triangular matrix and then with its transpose; the upper one is second on the left."""
    torch.linalg.solve_triangular(first, v, upper=not left, left=left, out=v)
    torch.linalg.solve_triangular(second, v, upper=left, left=left, out=v)


def block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """The dense matrix with the given ones along its diagonal and zeros elsewhere.

    Args:
        blocks: [p, p] each, any p, of one dtype and device.

    Returns:
        [P, P], P the sum of the sides.
    """
    size = sum(block.shape[-1] for block in blocks)
    dense = blocks[0].new_zeros(size, size)
    start = 0
    for block in blocks:
        end = start + block.shape[-1]
        dense[start:end, start:end] = block
        start = end
    return dense


def kron(left: Tensor, right: Tensor) -> Tensor:
    """The dense Kronecker product of each pair of matrices.

    Args:
        left: [..., o, p].
        right: [..., i, j].

    Returns:
        [..., o i, p j].
    """
    product = einsum(left, right, "... o p, ... i j -> ... o i p j")
    return rearrange(product, "... o i p j -> ... (o i) (p j)")
