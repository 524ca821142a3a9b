"""What is collected for one estimate: layer by layer, each in its structure, or for all layers as one matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..layers.layout import JointLayout, WeightLayout
from ..linalg.kronecker import block_diagonal
from ..linalg.pairs import example_rows
from ..statistics import combined
from .base import Block, require_dense
from .collectors import (
    Collector,
    DenseCollector,
    DiagonalCollector,
    KroneckerCollector,
    Pairs,
    Scales,
    Sums,
    TraceRestrictedCollector,
    UnitWiseCollector,
    add_to,
)
from .dense import DenseBlock
from .keeping import EigenCollector, NearestCollector
from .kronecker import KroneckerBlock

#: One word for a layer's storage.
COLLECTORS: dict[str, type[Collector]] = {
    "kfac": KroneckerCollector,
    "ekfac": EigenCollector,
    "tkfac": TraceRestrictedCollector,
    "kpsvd": NearestCollector,
    "diagonal": DiagonalCollector,
    "unit_wise": UnitWiseCollector,
    "block": DenseCollector,
}


def _collector_of(structure: str, layout: WeightLayout, max_factor_dim: int) -> type[Collector]:
    """What collects a layer's block."""
    if structure == "kpsvd" and layout.d_in == 1 and layout.d_out > max_factor_dim:
        # Of all products of a diagonal and a number the nearest has the diagonal of F itself.
        return TraceRestrictedCollector
    return COLLECTORS[structure]


class LayerByLayer:
    """One estimate with a collector for each layer.

    Args:
        layouts: the layers' matrices by name, in order.
        structures: the layers' structures by name.
        twice: whether the data come a second time, so that 'ekfac' need not keep pairs.
        limits: size of the largest side of a Kronecker product that is kept whole, by name.
    """

    def __init__(
        self,
        layouts: Mapping[str, WeightLayout],
        structures: Mapping[str, str],
        *,
        twice: bool = False,
        limits: Mapping[str, int],
    ) -> None:
        self.collectors = {
            name: _collector_of(structures[name], layout, limits[name])(layout, name)
            for name, layout in layouts.items()
        }
        for name, one in self.collectors.items():
            one.limit_sides(limits[name])
        self.moments = frozenset(name for name, one in self.collectors.items() if one.moments)
        #: The layers that wait for the second pass, and those whose pairs are taken in the pass at hand.
        self.waiting = frozenset(
            name for name, one in self.collectors.items() if twice and isinstance(one, EigenCollector)
        )
        self.pairs = frozenset(name for name, one in self.collectors.items() if one.pairs) - self.waiting

    def look_again(self, factors: Mapping[str, KroneckerBlock]) -> None:
        """Begin the second pass, with G (x) A of the first."""
        self.moments, self.pairs = frozenset(), self.waiting & factors.keys()
        for name in self.pairs:
            collector = self.collectors[name]
            assert isinstance(collector, EigenCollector)
            collector.look_again(factors[name])

    def state(self) -> dict[str, Any]:
        """What was taken in, as plain values and tensors."""
        return {name: one.state() for name, one in self.collectors.items()}

    def load_state(self, state: Mapping[str, Any], devices: Mapping[str, torch.device]) -> None:
        """Go on from ``state``, each layer on its device."""
        for name, one in self.collectors.items():
            one.load_state(state[name], devices[name])

    def take(self, pairs: Pairs, weight: float, slot: int) -> None:
        """Take in the pairs of one batch and score, of layers in ``pairs`` alone."""
        for name, pair in pairs.items():
            self.collectors[name].add(*pair, weight, slot)

    def blocks(self, factors: Mapping[str, KroneckerBlock], scales: Scales) -> dict[str, Block]:
        """The blocks of the layers that took part, from G (x) A where they are made of them."""
        found = {name: one.block(factors.get(name), scales) for name, one in self.collectors.items()}
        return {name: block for name, block in found.items() if block is not None}

    def of_kronecker(self, factors: Mapping[str, KroneckerBlock]) -> dict[str, Block]:
        """Blocks that are Kronecker products, each in its storage."""
        return {name: self.collectors[name].of_kronecker(block) for name, block in factors.items()}


class Joint:
    """'dense': the sum of vec V_n vec V_n^T over all layers at once, with what couples them, as one block named '*'.

    Args:
        layouts: the layers' matrices by name, in order.
    """

    moments: frozenset[str] = frozenset()
    waiting: frozenset[str] = frozenset()

    def __init__(self, layouts: Mapping[str, WeightLayout]) -> None:
        self.layouts = dict(layouts)
        self.layout = JointLayout(parts=tuple(layouts.values()))
        self.pairs = frozenset(layouts)
        self.sums: Sums = {}
        require_dense(self.layout.numel, f"structure='dense' over {len(layouts)} layers")

    def look_again(self, factors: Mapping[str, KroneckerBlock]) -> None:
        """Take nothing in the second pass."""
        self.pairs = frozenset()

    def state(self) -> dict[str, Any]:
        """What was taken in, as plain values and tensors."""
        return {"sums": dict(self.sums)}

    def load_state(self, state: Mapping[str, Any], devices: Mapping[str, torch.device]) -> None:
        """Go on from ``state``, on the device of the first layer."""
        device = devices[next(iter(self.layouts))]
        self.sums = {slot: tensor.to(device) for slot, tensor in state["sums"].items()}

    def take(self, pairs: Pairs, weight: float, slot: int) -> None:
        """Take in the pairs of one batch and score; a layer that no gradient reached has zeros."""
        _, some = next(iter(pairs.values()))
        rows = [
            example_rows(*pairs[name]) if name in pairs else some.new_zeros(some.shape[-3], layout.numel)
            for name, layout in self.layouts.items()
        ]
        joined = torch.cat(rows, dim=-1)
        add_to(self.sums, slot, joined.mT @ joined, weight)

    def blocks(self, factors: Mapping[str, KroneckerBlock], scales: Scales) -> dict[str, Block]:
        """The one block."""
        return {"*": DenseBlock(self.layout, combined(self.sums, scales), "*")} if self.sums else {}

    def of_kronecker(self, factors: Mapping[str, KroneckerBlock]) -> dict[str, Block]:
        """Kronecker products along the diagonal of the one block."""
        layout = JointLayout(parts=tuple(block.layout for block in factors.values()))
        return {"*": DenseBlock(layout, block_diagonal([block.to_dense() for block in factors.values()]), "*")}
