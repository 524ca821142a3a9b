"""Sums and counts of second moments, merged exactly and divided on read, and their moving average."""

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


class MovingAverage:
    """Bias-corrected moving averages of A and G per layer: sum_s rho^(t-s) x_s / sum_s rho^(t-s).

    Kept are the averages themselves, so that a refresh reads them where they are, and the denominators, their weights,
    which start at zero. The weight of A is the layer's own, since a layer that is not used skips its A; G takes part in
    every capture, with zero where the layer was not used, since the loss divides by M all the same. Each head has an
    average of G of its own, [heads, ..., d_out, d_out], and a weight of it, [heads].

    Everything is decided on the device: a capture that is not finite, or has M = 0, changes nothing.

    Args:
        names: the layers.
        weights: w_h of each head.
        needed: for layers whose factors a single capture leaves too uncertain, the effective number of captures,
            (sum w)^2 / sum w^2 over the weights w of those that a layer took part in, that it counts as used from.
    """

    def __init__(
        self, names: Iterable[str], weights: tuple[float, ...] = (1.0,), needed: Mapping[str, int] | None = None
    ) -> None:
        self.weights = weights
        self.needed = dict(needed or {})
        self.draws: dict[str, Tensor] = {}
        self.draws_squared: dict[str, Tensor] = {}
        self.A: dict[str, Tensor] = {}
        self.G: dict[str, Tensor] = {}
        self.A_weight: dict[str, Tensor] = {}
        self.G_weight: dict[str, Tensor | None] = dict.fromkeys(names)

    def update(self, statistics: Statistics, *, decay: float) -> None:
        """Take in one capture, whose layers are taken out of it one by one; ``decay`` is rho in [0, 1)."""
        usable = statistics.finite & (statistics.divisor > 0)
        for name, weight in self.G_weight.items():
            sums = statistics.layers.pop(name, None)
            used = torch.zeros_like(statistics.finite)
            if sums is not None:
                used = usable.any().to(sums.A.device) & (sums.A_count > 0)
                part = _Part(used, self._weight(self.A_weight.get(name), sums.A_count), decay)
                self.A[name], self.A_weight[name] = part.into(self.A.get(name), sums.A, sums.A_count), part.weight
            like = self.G.get(name, usable) if sums is None else sums.G
            taken = usable.to(like.device)
            part = _Part(taken, self._weight(weight, taken), decay)
            if sums is not None:
                self.G[name] = part.into(self.G.get(name), sums.G, statistics.divisor.to(like.device))
            elif name in self.G:
                part.kept(like)
            self.G_weight[name] = part.weight
            if name in self.needed:
                self._count(name, used, usable.any(), decay)

    def _count(self, name: str, used: Tensor, taken: Tensor, decay: float) -> None:
        """Add one capture to the sums of weights and of their squares."""
        for store, rate in ((self.draws, decay), (self.draws_squared, decay * decay)):
            before = self._weight(store.get(name), used)
            store[name] = torch.where(taken.to(used.device), before * rate + used, before)

    @staticmethod
    def _weight(weight: Tensor | None, like: Tensor) -> Tensor:
        if weight is None:
            return torch.zeros(like.shape, dtype=count_dtype(like.device), device=like.device)
        return weight.to(like.device)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A, G) of a layer as they are kept, changed by the next capture; zeros where nothing usable came in yet."""
        A, G = self.A[name], self.G[name]
        if self.weights == (1.0,):
            return A, G[0]
        total = G[0] * self.weights[0]
        for weight, of_head in zip(self.weights[1:], G[1:], strict=True):
            total.add_(of_head, alpha=weight)
        return A, total

    def restricted(
        self, names: Iterable[str], *, without: Iterable[str], needed: Mapping[str, int] | None = None
    ) -> MovingAverage:
        """The same averages for these layers, starting anew for those in ``without`` and for new ones."""
        fresh = MovingAverage(names, self.weights, needed)
        for name in fresh.G_weight.keys() - set(without):
            fresh.load_layer(name, self.layer_state(name))
        return fresh

    def layer_state(self, name: str) -> dict[str, Tensor]:
        """What is stored of a layer now: any of A, A_weight, G, G_weight, draws, draws_squared."""
        return {key: tensor for key, store in self._stores().items() if (tensor := store.get(name)) is not None}

    def load_layer(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``layer_state`` gave, in tensors of its own: those here are changed in place."""
        stores = self._stores()
        for key, tensor in tensors.items():
            stores[key][name] = tensor.clone()

    def _stores(self) -> dict[str, dict[str, Any]]:
        return {
            "A": self.A,
            "A_weight": self.A_weight,
            "G": self.G,
            "G_weight": self.G_weight,
            "draws": self.draws,
            "draws_squared": self.draws_squared,
        }

    def unused(self) -> set[str]:
        """The layers that never had a valid position, or had too few captures: those without a block worth inverting.

        Read from the device in one transfer: for a refresh, not a step. There are such where another rank's model has a
        layer that none has used, where batches were empty, and in the universal form to begin with.
        """
        enough = self._read({name: self._enough(name, weight) for name, weight in self.A_weight.items()})
        return {name for name, flag in enough.items() if not flag}

    def seen(self) -> list[str]:
        """The layers that have both factors and had a valid position, on whatever rank; read like ``unused``."""
        seen = self._read({name: self.A_weight[name] > 0 for name in self.ready})
        return [name for name, flag in seen.items() if flag]

    @staticmethod
    def _read(flags: Mapping[str, Tensor]) -> dict[str, bool]:
        """Flags, 0-d, on the host; all are set where they cannot be read, on the meta device."""
        if not flags or any(flag.is_meta for flag in flags.values()):
            return dict.fromkeys(flags, True)
        first = next(iter(flags.values())).device
        together = torch.stack([flag.to(first) for flag in flags.values()]).tolist()
        return dict(zip(flags, together, strict=True))

    def _enough(self, name: str, weight: Tensor) -> Tensor:
        """0-d bool: whether as many captures came in as the layer needs."""
        if name not in self.needed:
            return weight > 0
        return self.draws[name].square() >= self.needed[name] * _whole(self.draws_squared[name])

    @property
    def ready(self) -> list[str]:
        """The layers that have both factors."""
        return [name for name in self.G_weight if name in self.A and name in self.G]


@dataclass(frozen=True)
class _Part:
    """One capture's part in an average: x becomes (rho w x + sum / divisor) / (rho w + 1) where it is ``used``.

    Elsewhere x is as it was. All of it is done in the memory of both.

    Args:
        used: 0-d, or of each head.
        before: w, the weight of what came before, likewise.
        decay: rho.
    """

    used: Tensor
    before: Tensor
    decay: float

    @property
    def weight(self) -> Tensor:
        """rho w + 1, or w."""
        return torch.where(self.used, self.before * self.decay + 1, self.before)

    def into(self, average: Tensor | None, summed: Tensor, divisor: Tensor) -> Tensor:
        """The average with a sum taken in, which is changed; of none before it the sum's own memory."""
        # 0 times NaN would not be zero.
        summed.masked_fill_(~_wide(self.used, summed), 0)
        share = torch.where(self.used, (self.weight * divisor).reciprocal(), 0)
        share = _wide(share.to(summed.dtype), summed)
        if average is None:
            # A part of a larger buffer would keep all of it.
            alone = summed.untyped_storage().nbytes() == summed.nbytes
            return summed.mul_(share) if alone else summed * share
        return self.kept(average.to(summed)).addcmul_(summed, share)

    def kept(self, average: Tensor) -> Tensor:
        """What stays of the average, in its place."""
        share = torch.where(self.used, self.before * self.decay / self.weight, 1)
        return average.mul_(_wide(share.to(average.dtype), average))


def _wide(numbers: Tensor, like: Tensor) -> Tensor:
    """A number a head made broadcastable to tensors of heads; a 0-d one stays so."""
    return numbers.reshape(*numbers.shape, *[1] * (like.ndim - 1)) if numbers.ndim else numbers


def _whole(weight: Tensor) -> Tensor:
    """A weight to divide by: 1 where nothing came in."""
    return torch.where(weight > 0, weight, 1)
