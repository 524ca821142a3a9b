"""Sums and counts of second moments, merged exactly and divided on read, and their moving average."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def statistic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics of a layer of ``dtype``: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def count_dtype(device: torch.device) -> torch.dtype:
    """The dtype of counts: float64, exact to 2^53, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass
class LayerSums:
    """One layer's sums over some data.

    Args:
        A: sum of a a^T over valid positions, [..., d_in, d_in].
        A_count: number of terms of that sum, 0-d.
        G: sum of g g^T, averaged over label draws, [..., d_out, d_out].
    """

    A: Tensor
    A_count: Tensor
    G: Tensor


@dataclass
class Statistics:
    """The sums of every layer over some data, with what the loss divides by.

    Args:
        layers: the layers used, by name; one that was not used adds nothing and is absent.
        divisor: M, 0-d: what the mean loss over this data divides by.
        adds: whether M of two pieces of data is the sum of theirs ('mean'), or stays ('sum': M = 1).
        examples: number of examples N.
        finite: 0-d bool: every sum is finite and every label was in range.
    """

    layers: dict[str, LayerSums]
    divisor: Tensor
    adds: bool
    examples: int
    finite: Tensor
    nonfinite: dict[str, Tensor] = field(default_factory=dict)

    def merged(self, other: Statistics) -> Statistics:
        """The statistics of both pieces of data; a piece that is not finite adds nothing.

        Consumes both: sums are added in place where that is safe.
        """
        mine, theirs = self.or_zero(), other.or_zero()
        layers = dict(mine.layers)
        for name, sums in theirs.layers.items():
            layers[name] = _added(layers[name], sums) if name in layers else sums
        divisor = mine.divisor + theirs.divisor if self.adds else torch.maximum(mine.divisor, theirs.divisor)
        flags = {name: flag | self.nonfinite.get(name, flag) for name, flag in other.nonfinite.items()}
        return Statistics(
            layers,
            divisor,
            self.adds,
            self.examples + other.examples,
            self.finite | other.finite,
            self.nonfinite | flags,
        )

    def or_zero(self) -> Statistics:
        """Itself where finite, else all zeros, decided on the device."""

        def keep(x: Tensor) -> Tensor:
            return torch.where(self.finite.to(x.device), x, 0)

        layers = {name: LayerSums(keep(sums.A), keep(sums.A_count), keep(sums.G)) for name, sums in self.layers.items()}
        return Statistics(layers, keep(self.divisor), self.adds, self.examples, self.finite)


def _added(mine: LayerSums, theirs: LayerSums) -> LayerSums:
    return LayerSums(mine.A.add_(theirs.A), mine.A_count + theirs.A_count, mine.G.add_(theirs.G))


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """0-d bool: no entry is infinite or NaN. A sum of the entries is finite only then."""
    sums = [tensor.sum() for tensor in tensors]
    return torch.isfinite(torch.stack(sums)).all()


def check_finite(layers: Mapping[str, LayerSums]) -> tuple[Tensor, dict[str, Tensor]]:
    """Whether all sums are finite, and for each layer whether its own are not."""
    bad = {name: ~all_finite([sums.A, sums.G]) for name, sums in layers.items()}
    flags = list(bad.values())
    return ~torch.stack([flag.to(flags[0].device) for flag in flags]).any(), bad


class MovingAverage:
    """Bias-corrected moving averages of A and G per layer: sum_s rho^(t-s) x_s / sum_s rho^(t-s).

    Numerators and weights start at zero. The weight of A is the layer's own, since a layer that is not used skips its
    A; G takes part in every capture, with zero where the layer was not used, since the loss divides by M all the same.

    Everything is decided on the device: a capture that is not finite, or has M = 0, changes nothing.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.A: dict[str, Tensor] = {}
        self.G: dict[str, Tensor] = {}
        self.A_weight: dict[str, Tensor] = {}
        self.G_weight: dict[str, Tensor | None] = dict.fromkeys(names)

    def update(self, statistics: Statistics, *, decay: float) -> None:
        """Take in one capture; ``decay`` is rho in [0, 1)."""
        usable = statistics.finite & (statistics.divisor > 0)
        for name, weight in self.G_weight.items():
            sums = statistics.layers.get(name)
            if sums is not None:
                used = usable.to(sums.A.device) & (sums.A_count > 0)
                before = self._like(self.A, name, sums.A), self._weight(self.A_weight.get(name), sums.A.device)
                self.A[name], self.A_weight[name] = _blended(before, sums.A / sums.A_count, used, decay)
            gradient = None if sums is None else sums.G
            if gradient is None:
                gradient = (
                    torch.zeros_like(self.G[name]) if name in self.G else usable.new_zeros((), dtype=torch.float32)
                )
            before = self._like(self.G, name, gradient), self._weight(weight, gradient.device)
            used, divisor = usable.to(gradient.device), statistics.divisor.to(gradient.device)
            average, self.G_weight[name] = _blended(before, gradient / divisor, used, decay)
            if average.ndim:
                self.G[name] = average

    @staticmethod
    def _like(store: dict[str, Tensor], name: str, new: Tensor) -> Tensor:
        """What is stored, where the layer's tensors are now; zeros where nothing is."""
        return store[name].to(new) if name in store else torch.zeros_like(new)

    @staticmethod
    def _weight(weight: Tensor | None, device: torch.device) -> Tensor:
        if weight is None:
            return torch.zeros((), dtype=count_dtype(device), device=device)
        return weight.to(device)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A, G) of a layer; zeros where nothing usable has come in yet."""
        G_weight = self.G_weight[name]
        assert G_weight is not None
        return _divided(self.A[name], self.A_weight[name]), _divided(self.G[name], G_weight)

    def restricted(self, names: Iterable[str], *, without: Iterable[str]) -> MovingAverage:
        """The same averages for these layers, starting anew for those in ``without`` and for new ones."""
        fresh = MovingAverage(names)
        for name in fresh.G_weight.keys() - set(without):
            fresh.G_weight[name] = self.G_weight.get(name)
            for mine, theirs in ((fresh.A, self.A), (fresh.G, self.G), (fresh.A_weight, self.A_weight)):
                if name in theirs:
                    mine[name] = theirs[name]
        return fresh

    def layer_state(self, name: str) -> dict[str, Tensor]:
        """What is stored of a layer: any of A, A_weight, G, G_weight."""
        return {key: tensor for key, store in self._stores().items() if (tensor := store.get(name)) is not None}

    def load_layer(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``layer_state`` gave."""
        stores = self._stores()
        for key, tensor in tensors.items():
            stores[key][name] = tensor

    def _stores(self) -> dict[str, dict[str, Any]]:
        return {"A": self.A, "A_weight": self.A_weight, "G": self.G, "G_weight": self.G_weight}

    def unused(self) -> set[str]:
        """The layers that never had a valid position, read from the device in one transfer: for a refresh, not a step.

        There are such where another rank's model has a layer that none has used, and where batches were empty.
        """
        weights = list(self.A_weight.values())
        if not weights or any(weight.is_meta for weight in weights):
            return set()
        used = torch.stack([weight.to(weights[0].device) for weight in weights]).tolist()
        return {name for name, weight in zip(self.A_weight, used, strict=True) if weight == 0}

    @property
    def ready(self) -> list[str]:
        """The layers that have both factors."""
        return [name for name in self.G_weight if name in self.A and name in self.G]


def _blended(before: tuple[Tensor, Tensor], new: Tensor, used: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """(rho x + new, rho w + 1) where ``used``, else as before (0 times NaN would not be zero: hence where)."""
    x, weight = before
    return torch.where(used, x * decay + new.to(x.dtype), x), torch.where(used, weight * decay + 1, weight)


def _divided(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.where(weight > 0, weight, 1).to(x.dtype)
