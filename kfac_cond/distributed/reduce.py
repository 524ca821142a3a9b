"""The statistics of all ranks together: sums and counts are added before anything is divided or averaged.

One buffer a dtype holds the sums of all layers, those of one keeper side by side, and the counts and flags of the
capture. Whoever keeps a layer gets its sums, everybody the counts, so that all ranks know what came of the capture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..health import Flags
from ..statistics import LayerSums, Statistics, count_dtype
from .group import Group, Started
from .layout import Layout, Stretch, offsets
from .packing import Piece, from_limbs, limbs, pack_sums, sum_pieces, unpacked_sums

WHAT = "the sum of the statistics over all ranks"


class Captured(NamedTuple):
    """A capture: its sums and flags, and the layers whose weight was seen to be used without a call of their module."""

    statistics: Statistics
    flags: Flags
    functional: set[str]


class Reduction:
    """The captures of all ranks on their way to whoever keeps them; every rank makes one, in the same order.

    A rank whose own batch is not finite adds nothing. Ranks may differ in batch size, and in which layers were used.

    Args:
        captured: this rank's; its sums are let go when those of all are there.
        layout: says who keeps what.
        group: of all ranks.
    """

    def __init__(self, captured: Captured, layout: Layout, group: Group) -> None:
        self.captured, self._layout, self._group = captured, layout, group
        self._sums = layout.sums()
        self._buffers = {dtype: self._filled(stretches, dtype) for dtype, stretches in self._sums.items()}
        self._started = [
            self._send(self._buffers[dtype][place], one)
            for dtype, stretches in self._sums.items()
            for one, place in zip(stretches, offsets(stretches), strict=True)
        ]

    def wait(self, *, functional: bool) -> Captured:
        """The capture of all ranks together, with the sums of the layers that this rank keeps.

        Args:
            functional: whether to read which layers some rank uses without a call of their module.

        Raises:
            RankError: a rank did not take part.
        """
        for one in self._started:
            one.wait()
        mine, layout = replace(self.captured.statistics, layers={}), self._layout
        # Beside the buffer there are the sums of this rank or those of all, never both.
        self.captured = self.captured._replace(statistics=mine)
        first = next(iter(self._buffers.values()))
        wide = count_dtype(first.device)
        counts = dict(zip(self._keys, from_limbs(first[-3 * layout.counts :].reshape(3, -1), wide), strict=True))
        layers = {
            name: self._unpacked(name, flat, counts[f"A {name}"])
            for dtype, stretches in self._sums.items()
            for one, place in zip(stretches, offsets(stretches), strict=True)
            if one.root in (None, self._group.rank)
            for name, flat in self._by_layer(one, self._buffers[dtype][place])
        }
        usable = counts["finite"].clamp(min=1)
        # A loss that is a sum has M = 1 however many ranks add to it.
        Ms = [counts[f"M {head}"] for head in range(len(mine.slots))]
        divisor = torch.stack([M if adds else M / usable for adds, M in zip(mine.slots.adds, Ms, strict=True)])
        keys = ("captures", "usable", "labels", *(f"layer {name}" for name in layout.layers))
        flags = Flags(counts["number"].long(), {key: counts[f"flag {key}"].long() for key in keys})
        examples = mine.examples * self._group.size
        together = Statistics(layers, divisor, mine.slots, examples, counts["finite"] > 0)
        return Captured(together, flags, self._named(counts) if functional else set())

    @property
    def _keys(self) -> list[str]:
        """The counts by name, in the order that every rank has."""
        layers = self._layout.layers
        return [
            *(f"M {head}" for head in range(self._layout.costing.heads)),
            "finite",
            "number",
            *(f"flag {key}" for key in ("captures", "usable", "labels")),
            *(f"{what} {name}" for what in ("A", "flag layer", "functional") for name in layers),
        ]

    def _filled(self, stretches: list[Stretch], dtype: torch.dtype) -> Tensor:
        """The buffer of one dtype, zero where a layer was not used here, or this rank's capture is not finite."""
        statistics = self.captured.statistics
        first = stretches[0].names[0]
        device = statistics.layers[first].A.device if first in statistics.layers else self._layout.layers[first].device
        buffer = torch.zeros(sum(one.numel for one in stretches), dtype=dtype, device=device)
        for one, place in zip(stretches, offsets(stretches), strict=True):
            # Into their places: parts that are brought together afterwards would be a second buffer.
            for name, flat in self._by_layer(one, buffer[place]):
                if name in statistics.layers:
                    pack_sums(self._pieces(name), statistics.layers[name], flat)
        buffer.masked_fill_(~statistics.finite.to(device), 0)
        if stretches[-1] is self._last:
            counts = limbs(self._counted(), dtype).reshape(-1)
            buffer[-len(counts) :].copy_(counts)
        return buffer

    @property
    def _last(self) -> Stretch:
        """The stretch that ends with the counts."""
        return next(iter(self._sums.values()))[-1]

    def _counted(self) -> Tensor:
        """The counts of this rank, in the order of ``_keys``."""
        statistics, flags, functional = self.captured
        device = statistics.divisor.device
        wide = count_dtype(device)
        none = torch.zeros((), dtype=wide, device=device)
        known: dict[str, Tensor] = {"finite": statistics.finite, "number": none + flags.captures}
        counts = {f"M {head}": M for head, M in enumerate(statistics.divisor.unbind())}
        counts |= {f"A {name}": sums.A_count.to(device) for name, sums in statistics.layers.items()}
        # Not times zero: what is not finite would make the counts of all ranks so.
        known |= {key: torch.where(statistics.finite, count, 0) for key, count in counts.items()}
        known |= {f"flag {key}": count for key, count in flags.counts.items()}
        known |= {f"functional {name}": none + 1 for name in functional}
        return torch.stack([known.get(key, none).to(none) for key in self._keys])

    def _send(self, view: Tensor, one: Stretch) -> Started:
        if one.root is None:
            return self._group.all_reduce(view, WHAT)
        return self._group.reduce(view, one.root, WHAT)

    def _by_layer(self, one: Stretch, view: Tensor) -> list[tuple[str, Tensor]]:
        sizes = [sum(p.numel for p in self._pieces(name)) for name in one.names]
        return list(zip(one.names, torch.split(view[: sum(sizes)], sizes), strict=True))

    def _pieces(self, name: str) -> tuple[Piece, ...]:
        return sum_pieces(self._layout.layers[name], self._layout.costing.heads)

    def _unpacked(self, name: str, flat: Tensor, count: Tensor) -> LayerSums:
        layer, pieces = self._layout.layers[name], self._pieces(name)
        parts = torch.split(flat, [piece.numel for piece in pieces])
        sums = unpacked_sums(layer, pieces, parts, count)
        device = layer.device
        return LayerSums(sums.A.to(device), count.to(device), sums.G.to(device))

    def _named(self, counts: Mapping[str, Tensor]) -> set[str]:
        """The layers that some rank uses functionally, read from the device in one transfer."""
        names = list(self._layout.layers)
        seen = torch.stack([counts[f"functional {name}"] for name in names])
        flags = [False] * len(names) if seen.is_meta else seen.tolist()
        return {name for name, flag in zip(names, flags, strict=True) if flag}
