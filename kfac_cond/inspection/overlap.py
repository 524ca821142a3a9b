"""How far the largest eigenvectors of two blocks of one layer span the same subspace."""

from __future__ import annotations

import torch
from torch import Tensor

from ..structures import Block, EigenBlock, KroneckerBlock

_Basis = tuple[Tensor, Tensor | None]
"""Eigenvalues and the eigenvectors in columns; None for the identity."""

TOP = 10
"""Dimensions of the subspaces that are compared, where both matrices have the rank and twice as many dimensions."""


def top_overlap(one: Block, other: Block, k: int | None = None) -> tuple[float | None, int]:
    """|U^T V|^2 / k of the k largest eigenvectors of each, from k / P for unrelated ones to 1; and k as it was used.

    Args:
        one, other: blocks of one layer, on whatever device.
        k: at most; less where a block has a smaller rank. None for ``TOP``, or for half of all dimensions where that is
            less: two subspaces of everything are always the same. Where the k-th and the next eigenvalue are equal, the
            subspace is any of several.

    Returns:
        (overlap, k); (None, 0) where a block is zero.
    """
    k = _dimensions(k, min(one.layout.numel, other.layout.numel))
    pairs = [block.top_eigenpairs(k) for block in (one, other)]
    k = min(_rank(values, max(one.layout.matrix_shape)) for values, _ in pairs)
    if k == 0:
        return None, 0
    left, right = (vectors[:k].flatten(1).to(pairs[0][1]) for _, vectors in pairs)
    return _share(left @ right.mT, k), k


def side_overlaps(one: Block, other: Block, k: int | None = None) -> tuple[float | None, float | None]:
    """The same of the sides A and of the sides G; with groups their mean.

    None where either block has no sides, or no factors that they came from, or a side is zero.
    """
    pairs = zip(_eigenbases(one), _eigenbases(other), strict=True)
    of_A, of_G = (_of_sides(mine, theirs, k) for mine, theirs in pairs)
    return of_A, of_G


def _eigenbases(block: Block) -> tuple[_Basis | None, _Basis | None]:
    """The eigenbases of A and of G, each None where there is no such side."""
    eigen = block.eigen() if isinstance(block, KroneckerBlock) else block
    if not isinstance(eigen, EigenBlock):
        return None, None
    values_A, values_G = eigen.values_A, eigen.values_G
    return (
        None if values_A is None else (values_A, eigen.basis_A),
        None if values_G is None else (values_G, eigen.basis_G),
    )


def _of_sides(mine: _Basis | None, theirs: _Basis | None, k: int | None) -> float | None:
    if mine is None or theirs is None:
        return None
    found = [_of_group(a, b, k) for a, b in zip(_groups(*mine), _groups(*theirs), strict=True)]
    known = [one for one in found if one is not None]
    return sum(known) / len(known) if known else None


def _of_group(mine: _Basis, theirs: _Basis, k: int | None) -> float | None:
    k = min(_dimensions(k, len(mine[0])), *(_rank(values, len(values)) for values, _ in (mine, theirs)))
    if k == 0:
        return None
    left, right = (_columns(*side, k) for side in (mine, theirs))
    return _share(left.mT @ right.to(left), k)


def _groups(values: Tensor, basis: Tensor | None) -> list[_Basis]:
    d = values.shape[-1]
    rows = values.reshape(-1, d)
    bases = [None] * len(rows) if basis is None else list(basis.reshape(-1, d, d))
    return list(zip(rows, bases, strict=True))


def _columns(values: Tensor, basis: Tensor | None, k: int) -> Tensor:
    """The eigenvectors of the k largest eigenvalues, [d, k]; the identity is never stored."""
    largest = values.argsort(descending=True)[:k]
    if basis is not None:
        return basis[:, largest]
    found = values.new_zeros(len(values), k)
    found[largest, torch.arange(k, device=values.device)] = 1.0
    return found


def _dimensions(k: int | None, size: int) -> int:
    return min(TOP, max(1, size // 2)) if k is None else min(k, size)


def _share(products: Tensor, k: int) -> float:
    """The squares of all inner products over k; above 1 by round-off alone."""
    return min(1.0, float(products.square().sum() / k))


def _rank(values: Tensor, side: int) -> int:
    """How many eigenvalues are more than round-off."""
    least = values.amax() * (side * torch.finfo(values.dtype).eps)
    return int((values > least).sum())
