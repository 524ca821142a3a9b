"""Moving averages of the sums of captures, divided, as training keeps them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .statistics import Statistics, count_dtype, statistic_dtype


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
        storage: of layers whose averages are kept in bfloat16. They are rounded at random, up or down by how near
            either is: to the nearest, a change smaller than half a unit in the last place would never be made.
    """

    def __init__(
        self,
        names: Iterable[str],
        weights: tuple[float, ...] = (1.0,),
        needed: Mapping[str, int] | None = None,
        storage: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self.weights = weights
        self.needed = dict(needed or {})
        self.storage = dict(storage or {})
        self.draws: dict[str, Tensor] = {}
        self.draws_squared: dict[str, Tensor] = {}
        self.A: dict[str, Tensor] = {}
        self.G: dict[str, Tensor] = {}
        self.A_weight: dict[str, Tensor] = {}
        self.G_weight: dict[str, Tensor | None] = dict.fromkeys(names)

    def update(self, statistics: Statistics, *, decay: float, step: int = 0) -> None:
        """Take in one capture, whose layers are taken out of it one by one.

        Args:
            statistics: of the capture.
            decay: rho in [0, 1).
            step: the count of steps, for what is rounded at random.
        """
        usable = statistics.finite & (statistics.divisor > 0)
        for name, weight in self.G_weight.items():
            sums = statistics.layers.pop(name, None)
            used = torch.zeros_like(statistics.finite)
            if sums is not None:
                used = usable.any().to(sums.A.device) & (sums.A_count > 0)
                part = _Part(used, self._weight(self.A_weight.get(name), sums.A_count), decay)
                before = self._opened(self.A, name)
                self.A[name] = self._stored(name, part.into(before, sums.A, sums.A_count), 2 * step)
                self.A_weight[name] = part.weight
            like = self.G.get(name, usable) if sums is None else sums.G
            taken = usable.to(like.device)
            part = _Part(taken, self._weight(weight, taken), decay)
            if sums is not None:
                before, M = self._opened(self.G, name), statistics.divisor.to(like.device)
                self.G[name] = self._stored(name, part.into(before, sums.G, M), 2 * step + 1)
            elif (before := self._opened(self.G, name)) is not None:
                self.G[name] = self._stored(name, part.kept(before), 2 * step + 1)
            self.G_weight[name] = part.weight
            if name in self.needed:
                self._count(name, used, usable.any(), decay)

    def _opened(self, store: Mapping[str, Tensor], name: str) -> Tensor | None:
        """What is stored, in a dtype that is added in."""
        return opened(store[name]) if name in store else None

    def _stored(self, name: str, average: Tensor, count: int) -> Tensor:
        """An average as it is kept; ``count`` is another one each time that it is."""
        if name not in self.storage:
            return average
        # By the name, whatever other layers are kept here.
        generator = torch.Generator(average.device).manual_seed(zlib.crc32(f"{name} {count}".encode()))
        return rounded_at_random(average, generator)

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
        A, G = opened(self.A[name]), opened(self.G[name])
        if self.weights == (1.0,):
            return A, G[0]
        total = G[0] * self.weights[0]
        for weight, of_head in zip(self.weights[1:], G[1:], strict=True):
            total.add_(of_head, alpha=weight)
        return A, total

    def restricted(
        self,
        names: Iterable[str],
        *,
        without: Iterable[str],
        needed: Mapping[str, int] | None = None,
        storage: Mapping[str, torch.dtype] | None = None,
    ) -> MovingAverage:
        """The same averages for these layers, starting anew for those in ``without`` and for new ones."""
        fresh = MovingAverage(names, self.weights, needed, storage)
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


def opened(average: Tensor) -> Tensor:
    """An average in a dtype of statistics: itself, where it is kept in one."""
    return average.to(statistic_dtype(average.dtype))


def rounded_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """x in bfloat16, of the two numbers around it each as often as it is near: on average x itself.

    Args:
        x: floating point.
        generator: on the device of x.
    """
    # The upper half of float32's bits: what is added below them carries over as often as the lower half is large.
    bits = x.to(torch.float32).view(torch.int32)
    noise = torch.randint(2**16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    return ((bits + noise) & -(2**16)).view(torch.float32).to(torch.bfloat16)
