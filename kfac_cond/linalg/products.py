"""Products of matrices that are symmetric, to the last bit."""

from __future__ import annotations

import torch
from torch import Tensor

PANELS = 8
"""Into how many a triangle is cut at most: with k of them (k + 1) / 2k of all products are done."""
NARROWEST = {"cpu": 128}
"""Columns of a panel at least, by type of device: of fewer the product takes longer than is saved."""
NARROWEST_ELSEWHERE = 1024
"""The same on every other device, which multiplies many columns at once."""


def symmetrise(matrix: Tensor) -> Tensor:
    """The symmetric part (M + M^T) / 2, symmetric to the last bit, as a tensor of its own.

    Args:
        matrix: [..., d, d].
    """
    return (matrix + matrix.mT).mul_(0.5)


def gram(x: Tensor) -> Tensor:
    """x^T x, symmetric to the last bit; of a large one the blocks below the diagonal are not computed again.

    Args:
        x: [..., n, d]; n may be 0.
    """
    d = x.shape[-1]
    if len(_panels(d, x.device)) <= 1:
        return symmetrise(x.mT @ x)
    upper = x.new_zeros(*x.shape[:-2], d, d)
    add_gram(upper, x)
    return mirrored(upper)


def add_gram(upper: Tensor, x: Tensor) -> None:
    """Add x^T x to a matrix, in the blocks on and above the diagonal; ``mirrored`` makes it whole.

    Args:
        upper: [..., d, d], changed in place.
        x: [..., n, d].
    """
    for panel in _panels(x.shape[-1], x.device):
        upper[..., panel, panel.start :] += x[..., panel].mT @ x[..., panel.start :]


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
