"""Factors as small pictures: their entries in bins, one byte each."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

SIDE = 64
"""Bins along a side; a side of fewer entries has a bin for each."""

DECADES = 6.0
"""How far below its largest bin a map goes; what is smaller has the colour of nothing."""

BUDGET = 3_000_000
"""Characters of maps in one page: about 270 layers with two whole sides each."""


def factor_maps(fisher: Mapping[str, Any] | None, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The maps of A and G, by layer, as long as they fit in a page.

    Args:
        fisher: layer name -> block, or None where there are no factors.
        names: of the layers, those first that matter most.
    """
    maps: dict[str, dict[str, Any]] = {}
    left = BUDGET
    for name in names:
        block = None if fisher is None else fisher.get(name)
        sides = {side: binned(values) for side in "AG" if (values := _side(block, side)) is not None}
        left -= sum(len(one["bytes"]) for one in sides.values())
        if left < 0:
            break
        if sides:
            maps[name] = sides
    return maps


def binned(side: Tensor) -> dict[str, Any]:
    """The mean size of the entries of each bin, as logarithms in one byte each.

    Args:
        side: [d, d], or [d] of one that is known by its diagonal.

    Returns:
        ``size`` d, ``bins`` along a side, ``diagonal`` whether it is one, ``low`` and ``high`` of log10, and ``bytes``
        in base64: 0 for what is below ``low``, 1 to 255 from ``low`` to ``high``.
    """
    size = side.shape[-1]
    bins = min(size, SIDE)
    values = side.detach()
    if values.dim() > 1:
        # The rows of one bin at a time, where they are: of a large side there is no second copy.
        values = torch.stack([_sizes(rows).mean(0) for rows in values.tensor_split(bins)])
    values = _means(_sizes(values), bins).cpu()
    high = float(values.max().log10()) if float(values.max()) > 0 else 0.0
    low = high - DECADES
    scaled = 1 + 254 * (values.clamp(min=10.0**low).log10() - low) / DECADES
    written = torch.where(values < 10.0**low, 0, scaled.round().clamp(1, 255)).to(torch.uint8)
    return {
        "size": size,
        "bins": bins,
        "diagonal": side.dim() == 1,
        "low": low,
        "high": high,
        "bytes": b64encode(written.numpy().tobytes()).decode("ascii"),
    }


def _sizes(values: Tensor) -> Tensor:
    return values.to(torch.float32).abs().nan_to_num(0.0, 0.0, 0.0)


def _means(values: Tensor, bins: int) -> Tensor:
    """The means over ``bins`` runs of the last dimension, as equal in length as can be."""
    return torch.stack([piece.mean(-1) for piece in values.tensor_split(bins, dim=-1)], dim=-1)


def _side(block: Any, side: str) -> Tensor | None:
    """A side of a block that has it and is one matrix; of groups the first, since they are alike in kind."""
    # An eigen-corrected block that a verb made of another has no factors, and says so by an error.
    try:
        values = getattr(block, side, None)
    except ValueError:
        return None
    if not isinstance(values, Tensor) or values.device.type == "meta":
        return None
    leading = len(block.layout.matrix_shape) - 2
    return values[0] if leading else values
