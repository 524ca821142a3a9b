"""Sums and counts of second moments, merged exactly and divided on read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


def statistic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics of a layer of ``dtype``: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def count_dtype(device: torch.device) -> torch.dtype:
    """The dtype of counts: float64, exact to 2^53, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class Slots:
    """What is summed apart and made one where it is divided: a slot for each head and each group of label draws.

    F = sum_h (w_h / M_h) S_h. M_h / M_h' may differ from batch to batch, so that sums of different heads cannot be
    added before the end; and the spread between groups of draws is what ``Fisher.sampling_error`` is made of.

    Args:
        weights: w_h, the loss weight of each head.
        adds: whether M_h of two pieces of data is the sum of theirs ('mean'), or stays ('sum': M = 1).
        draws: number of label draws.
        groups: how many groups they are dealt to in turn, at most ``draws``.
        names: of the heads.
    """

    weights: tuple[float, ...] = (1.0,)
    adds: tuple[bool, ...] = (True,)
    draws: int = 1
    groups: int = 1
    names: tuple[str, ...] = ("",)

    def __len__(self) -> int:
        return len(self.weights) * self.groups

    def index(self, head: int, draw: int) -> int:
        """The slot of a head and a draw."""
        return head * self.groups + draw % self.groups

    def head(self, slot: int) -> int:
        """The head of a slot."""
        return slot // self.groups

    def share(self, group: int) -> float:
        """The part of all draws that is in a group."""
        return len(range(group, self.draws, self.groups)) / self.draws

    def scales(self, divisor: Tensor, group: int | None = None) -> dict[int, Tensor]:
        """What each slot's sum is multiplied by in F, 0-d; with ``group`` in the estimate of that group of draws alone.

        Args:
            divisor: M_h, [heads].
        """
        groups = range(self.groups) if group is None else (group,)
        share = 1.0 if group is None else self.share(group)
        return {
            self.index(head, of): weight / share / torch.where(M > 0, M, 1)
            for head, (weight, M) in enumerate(zip(self.weights, divisor.unbind(), strict=True))
            for of in groups
        }

    def added(self, mine: Tensor, theirs: Tensor) -> Tensor:
        """M_h of two pieces of data together, [heads]."""
        if all(self.adds):
            return mine + theirs
        pairs = zip(self.adds, mine.unbind(), theirs.unbind(), strict=True)
        return torch.stack([a + b if adds else torch.maximum(a, b) for adds, a, b in pairs])


def combined(sums: Tensor | Mapping[int, Tensor], scales: Mapping[int, Tensor], *, spent: bool = False) -> Tensor:
    """The sums of all slots, each times its scale, as one; a slot that nothing was added to may be absent.

    Where nothing reads them afterwards, as they are ``spent``, and there is one slot, it is scaled where it is.
    """
    first, *others = scales if isinstance(sums, Tensor) else [slot for slot in scales if slot in sums]
    scale = scales[first].to(sums[first])
    # Of several the result would keep the memory of all.
    total = sums[first].mul_(scale) if spent and len(sums) == 1 else sums[first] * scale
    for slot in others:
        total.addcmul_(sums[slot], scales[slot].to(total))
    return total


@dataclass
class LayerSums:
    """One layer's sums over some data.

    Args:
        A: sum of a a^T over valid positions, [..., d_in, d_in]; zero, 0-d, in the universal form.
        A_count: number of terms of that sum, 0-d; of backwards in the universal form.
        G: sum of g g^T of each slot, averaged over label draws, [slots, ..., d_out, d_out]; in the universal form both
            of its moments, flat, [slots, entries].
    """

    A: Tensor
    A_count: Tensor
    G: Tensor


@dataclass
class Statistics:
    """The sums of every layer over some data, with what the loss divides by.

    Args:
        layers: the layers used, by name; one that was not used adds nothing and is absent.
        divisor: M of each head, [heads]: what its mean loss over this data divides by.
        slots: what is summed apart.
        examples: number of examples N.
        finite: 0-d bool: every sum is finite and every label was in range.
    """

    layers: dict[str, LayerSums]
    divisor: Tensor
    slots: Slots
    examples: int
    finite: Tensor
    nonfinite: dict[str, Tensor] = field(default_factory=dict)

    def merged(self, other: Statistics) -> Statistics:
        """The statistics of both pieces of data; a piece that is not finite adds nothing.

        Consumes both: sums are added in place.
        """
        mine, theirs = self.or_zero(), other.or_zero()
        layers = dict(mine.layers)
        for name, sums in theirs.layers.items():
            layers[name] = _added(layers[name], sums) if name in layers else sums
        flags = {name: flag | self.nonfinite.get(name, flag) for name, flag in other.nonfinite.items()}
        return Statistics(
            layers,
            self.slots.added(mine.divisor, theirs.divisor),
            self.slots,
            self.examples + other.examples,
            self.finite | other.finite,
            self.nonfinite | flags,
        )

    def with_own_inputs(self) -> Statistics:
        """The same, with copies of what is summed of inputs: where forwards keep that, it is not to change."""
        layers = {name: LayerSums(sums.A.clone(), sums.A_count.clone(), sums.G) for name, sums in self.layers.items()}
        return replace(self, layers=layers)

    def state(self) -> dict[str, Any]:
        """Everything but the slots, as plain values and tensors."""
        layers = {name: {"A": sums.A, "A_count": sums.A_count, "G": sums.G} for name, sums in self.layers.items()}
        return {
            "layers": layers,
            "divisor": self.divisor,
            "examples": self.examples,
            "finite": self.finite,
            "nonfinite": dict(self.nonfinite),
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], slots: Slots, devices: Mapping[str, torch.device]) -> Statistics:
        """What ``state`` was taken of, each layer's sums on its device."""
        layers = {
            name: LayerSums(**{key: tensor.to(devices[name]) for key, tensor in sums.items()})
            for name, sums in state["layers"].items()
        }
        first = next(iter(layers.values())).A.device
        flags = {name: flag.to(devices[name]) for name, flag in state["nonfinite"].items()}
        divisor, finite = state["divisor"].to(first), state["finite"].to(first)
        return cls(layers, divisor, slots, int(state["examples"]), finite, flags)

    def or_zero(self) -> Statistics:
        """Itself where finite, else all zeros, decided on the device; its sums are changed in place."""

        def keep(x: Tensor) -> Tensor:
            return x.masked_fill_(~self.finite.to(x.device), 0)

        layers = {name: LayerSums(keep(sums.A), keep(sums.A_count), keep(sums.G)) for name, sums in self.layers.items()}
        divisor = torch.where(self.finite.to(self.divisor.device), self.divisor, 0)
        return Statistics(layers, divisor, self.slots, self.examples, self.finite)


def _added(mine: LayerSums, theirs: LayerSums) -> LayerSums:
    return LayerSums(mine.A.add_(theirs.A), mine.A_count + theirs.A_count, mine.G.add_(theirs.G))


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """0-d bool: no entry is infinite or NaN. A sum of the entries is finite only then."""
    sums = [tensor.sum() for tensor in tensors]
    return torch.isfinite(torch.stack(sums)).all()


def check_finite(layers: Mapping[str, Iterable[Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Whether the sums of all layers are finite, and for each layer whether its own are not."""
    bad = {name: ~all_finite(sums) for name, sums in layers.items()}
    flags = list(bad.values())
    return ~torch.stack([flag.to(flags[0].device) for flag in flags]).any(), bad
