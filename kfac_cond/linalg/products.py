"""Products of matrices that are symmetric, to the last bit."""

from __future__ import annotations

from math import prod

import torch
from einops import rearrange
from torch import Tensor

PANELS = 8
"""Into how many a triangle is cut at most: with k of them (k + 1) / 2k of all products are done."""
NARROWEST = {"cpu": 256}
"""Columns of a panel at least, by type of device: of fewer the product takes longer than is saved."""
NARROWEST_ELSEWHERE = 1024
"""The same on every other device, which multiplies many columns at once."""
PIECE, FEW = 2048, 128
"""Rows that one thread of the host takes of a product of few columns, which its library shares out badly."""


def symmetrise(matrix: Tensor) -> Tensor:
    """The symmetric part (M + M^T) / 2, symmetric to the last bit, as a tensor of its own.

    Args:
        matrix: [..., d, d].
    """
    return (matrix + matrix.mT).mul_(0.5)


def gram(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x^T x, symmetric to the last bit; of a large one the blocks below the diagonal are not computed again.

    Args:
        x: [..., n, d], of which no gradient is asked; n may be 0.
        out: [..., d, d], where it is put; a tensor of its own for None.
    """
    d = x.shape[-1]
    out = x.new_empty(*x.shape[:-2], d, d) if out is None else out
    _multiply_into(out, x, keeping=0)
    return mirrored(out)


def tall_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b; of many rows and few columns by pieces, which threads of the host take at once.

    Args:
        a: [..., n, d].
        b: [..., n, e].
    """
    if not _in_pieces(a, b):
        return a.mT @ b
    whole = a.shape[-2] // PIECE * PIECE
    pieces = [rearrange(x[..., :whole, :], "... (pieces rows) d -> ... pieces rows d", rows=PIECE) for x in (a, b)]
    total: Tensor = (pieces[0].mT @ pieces[1]).sum(-3) + a[..., whole:, :].mT @ b[..., whole:, :]
    return total


def _in_pieces(a: Tensor, b: Tensor) -> bool:
    if a.device.type != "cpu" or (threads := torch.get_num_threads()) == 1:
        return False
    alone = prod(a.shape[:-2]) == 1
    return alone and a.shape[-2] >= 2 * threads * PIECE and max(a.shape[-1], b.shape[-1]) <= FEW


def add_gram(upper: Tensor, x: Tensor) -> None:
    """Add x^T x to a matrix, in the blocks on and above the diagonal; ``mirrored`` makes it whole.

    Args:
        upper: [..., d, d], changed in place.
        x: [..., n, d].
    """
    _multiply_into(upper, x, keeping=1)


def _multiply_into(upper: Tensor, x: Tensor, *, keeping: int) -> None:
    """Blocks of x^T x where they are to be, plus what is there times ``keeping``: no product in memory of its own."""
    if x.ndim > 3:
        upper, x = upper.flatten(0, -3), x.flatten(0, -3)
    if _in_pieces(x, x):
        product = tall_product(x, x)
        upper.copy_(product + upper if keeping else product)
        return
    for panel in _panels(x.shape[-1], x.device):
        block = upper[..., panel, panel.start :]
        add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
        add_product(block, x[..., panel].mT, x[..., panel.start :], beta=keeping, out=block)


def mirrored(upper: Tensor) -> Tensor:
    """The symmetric matrix that ``add_gram`` has summed the upper blocks of, in place."""
    for panel in _panels(upper.shape[-1], upper.device):
        upper[..., panel, panel] = symmetrise(upper[..., panel, panel])
        upper[..., panel.stop :, panel] = upper[..., panel, panel.stop :].mT
    return upper


def gram_flops(n: int, d: int, device: torch.device) -> int:
    """Operations of ``gram`` of n rows of d columns."""
    return sum(2 * n * (panel.stop - panel.start) * (d - panel.start) for panel in _panels(d, device))


def _panels(d: int, device: torch.device) -> list[slice]:
    """Columns that are multiplied by themselves and all later ones at a time."""
    width = max(NARROWEST.get(device.type, NARROWEST_ELSEWHERE), -(-d // PANELS))
    return [slice(start, min(start + width, d)) for start in range(0, d, width)]
