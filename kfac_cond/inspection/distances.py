"""How far two blocks of one layer are from each other as matrices, by their sides: no square of a block is formed."""

from __future__ import annotations

from math import sqrt

import torch
from einops import einsum
from torch import Tensor

from ..linalg.eigen import eigenbases, from_eigenbasis
from ..linalg.ladder import has_float64
from ..linalg.sides import Diagonal, Side, inner
from ..structures import Block, DiagonalBlock, EigenBlock, KroneckerBlock
from ..structures.stacked import StackedBlock


def in_double(block: Block, device: torch.device | None = None) -> Block:
    """A block in float64 on a device, its own by default; on the host where there is no float64."""
    target = block.device if device is None else device
    return block.to(target if has_float64(target) else torch.device("cpu")).to(torch.float64)


def fisher_overlap(one: Block, other: Block) -> float | None:
    """tr(F_a F_b) / (|F_a| |F_b|) in the Frobenius norm, the cosine of the two matrices: from 0 to 1, no unit.

    For G (x) A it is that of the sides A times that of the sides G; with groups the traces are added over them.

    Args:
        one, other: blocks of one layer in float64, on one device.

    Returns:
        None where a block is zero, or where the two forms have no common one.

    Cost: d^2 for Kronecker blocks; for eigen-corrected ones three products of the layer's matrix with a side.
    """
    norms = float(one.frobenius_norm()) * float(other.frobenius_norm())
    product = _product_trace(one, other)
    return None if product is None or norms == 0.0 else min(float(product) / norms, 1.0)


def bures(one: Block, other: Block) -> float | None:
    """The Bures distance (tr F_a + tr F_b - 2 tr (F_a^1/2 F_b F_a^1/2)^1/2)^1/2, in the unit of the root of F.

    It is the 2-Wasserstein distance of Gaussians with these covariances. For G (x) A the last trace is that of the
    sides A times that of the sides G, added over groups. Two equal blocks are 0 apart up to the root of round-off.

    Args:
        one, other: as for ``fisher_overlap``.

    Returns:
        None where the last trace does not factorise: for eigen-corrected blocks, and blocks of two forms.

    Cost: two eigendecompositions and the singular values of a product, of each side.
    Source: Bhatia, Jain & Lim 2019 (Expositiones Mathematicae 37(2)).
    """
    fidelity = _fidelity(one, other)
    if fidelity is None:
        return None
    return sqrt(max(float(one.trace()) + float(other.trace()) - 2 * float(fidelity), 0.0))


def _product_trace(one: Block, other: Block) -> Tensor | None:
    """tr(F_a F_b)."""
    if isinstance(one, KroneckerBlock) and isinstance(other, KroneckerBlock):
        (A, G), (their_A, their_G) = one.sides, other.sides
        return (inner(A, their_A) * inner(G, their_G)).sum()
    if isinstance(one, DiagonalBlock) and isinstance(other, DiagonalBlock):
        return (one.values * other.values).sum()
    if isinstance(one, StackedBlock) and type(one) is type(other):
        return (one._stack * other._stack).sum()
    mine, theirs = (block.eigen() if isinstance(block, KroneckerBlock) else block for block in (one, other))
    if isinstance(mine, EigenBlock) and isinstance(theirs, EigenBlock):
        turned = _squared_cosines(mine.basis_G, theirs.basis_G, theirs.values)
        turned = _squared_cosines(mine.basis_A, theirs.basis_A, turned.mT).mT
        return (mine.values * turned).sum()
    return None


def _squared_cosines(mine: Tensor | None, theirs: Tensor | None, values: Tensor) -> Tensor:
    """(U^T V)^2 times values, [..., d, n], entry by entry squared: values along the axes V as seen along the axes U."""
    if mine is None and theirs is None:
        return values
    if mine is None:
        cosines = theirs
    elif theirs is None:
        cosines = mine.mT
    else:
        cosines = mine.mT @ theirs
    assert cosines is not None
    return einsum(cosines.square(), values, "... i j, ... j n -> ... i n")


def _fidelity(one: Block, other: Block) -> Tensor | None:
    """tr (F_a^1/2 F_b F_a^1/2)^1/2."""
    if isinstance(one, KroneckerBlock) and isinstance(other, KroneckerBlock):
        of_A, of_G = (fidelity(mine, theirs) for mine, theirs in zip(one.sides, other.sides, strict=True))
        return (of_A * of_G).sum()
    if isinstance(one, DiagonalBlock) and isinstance(other, DiagonalBlock):
        return (one.values * other.values).sqrt().sum()
    if isinstance(one, StackedBlock) and type(one) is type(other):
        return fidelity(one._stack, other._stack).sum()
    return None


def fidelity(one: Side, other: Side) -> Tensor:
    """tr (X^1/2 Y X^1/2)^1/2, [...]: the sum of the singular values of X^1/2 Y^1/2, which keeps small ones exact.

    Args:
        one, other: positive semi-definite, [..., d, d], whole or diagonal.
    """
    if isinstance(one, Diagonal) and isinstance(other, Diagonal):
        return (one.values * other.values).sqrt().sum(-1)
    bases, _ = eigenbases([one, other])
    left, right = (from_eigenbasis(values.sqrt(), basis) for values, basis in bases)
    if isinstance(right, Diagonal):
        left, right = right, left  # the transpose, which has the same singular values
    assert isinstance(right, Tensor)
    total: Tensor = torch.linalg.svdvals(left @ right).sum(-1)
    return total
