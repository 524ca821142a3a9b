"""What a preconditioner keeps of its layers: moving averages, and the inverses that are made of them now and then.

Where layers are shared out among ranks each has the averages of those that it keeps and the inverses of those that it
preconditions, and knows of the others which there are.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Set
from functools import partial

from torch import Tensor

from .damping import Damping
from .distributed import Ranks
from .health import Flags, Health
from .layers.layer import Layer, draws_needed
from .linalg.ladder import Rung
from .state import inverse_state, loaded_inverse
from .statistics import MovingAverage, Statistics, statistic_dtype
from .structures import Block, DiagonalBlock, KroneckerBlock, averaged, damped_inverses_of


class Factors:
    """The averages of some layers, and the inverses in use.

    Args:
        layers: by name.
        average: of what is summed of them.
        health: counts what failed.
        inverses: those in use.
        elsewhere: the layers whose averages other ranks keep.
        inverted: the layers that have an inverse on some rank; None for those of ``inverses``.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        average: MovingAverage,
        health: Health,
        inverses: Mapping[str, Block] | None = None,
        *,
        elsewhere: Set[str] = frozenset(),
        inverted: Set[str] | None = None,
    ) -> None:
        self.layers, self.average, self.health = layers, average, health
        self.inverses: dict[str, Block] = dict(inverses or {})
        self.inverted: Set[str] = set(self.inverses) if inverted is None else inverted
        self._elsewhere = elsewhere
        # What the last refresh left out it is not to be repeated for.
        self._unused = set(self.ready) - self.inverted if self.inverted else set()

    @classmethod
    def empty(cls, layers: Mapping[str, Layer], weights: tuple[float, ...], *, patience: int) -> Factors:
        """Of layers that nothing is known of yet.

        Args:
            layers: by name.
            weights: of the heads.
            patience: of ``Health``.
        """
        average = MovingAverage(layers, weights, draws_needed(layers))
        return cls(layers, average, Health(layers, patience=patience))

    @property
    def ready(self) -> list[str]:
        """The layers that have averages, on whatever rank."""
        there = {*self.average.ready, *self._elsewhere}
        return [name for name in self.layers if name in there]

    @property
    def waiting(self) -> set[str]:
        """The layers that have averages, and no inverse that a refresh would not leave out."""
        return set(self.ready) - self.inverted - self._unused

    def add(self, statistics: Statistics, flags: Flags, *, decay: float) -> None:
        """Bring one capture into the averages."""
        self.health.add(flags)
        self.average.update(statistics, decay=decay)
        # Every rank takes part in the capture of every layer.
        self._elsewhere = self.layers.keys() - self.average.G_weight.keys()

    def blocks(self, names: Iterable[str] | None = None) -> dict[str, KroneckerBlock | DiagonalBlock]:
        """The averages here as blocks; those of these layers alone, where names are given."""
        wanted = self.average.ready if names is None else names
        return {name: averaged(self.layers[name], *self.average.factors(name)) for name in wanted}

    def refresh(self, damping: Damping, ranks: Ranks, *, step: int) -> None:
        """Invert all averages anew, each where it is owned; nothing where none is usable yet.

        Raises:
            LikelihoodError, NumericalError: what was captured, or cannot be inverted, is not to go on with.
            RankError: a rank did not take part.
        """
        if not self.health.read(first=not self.inverted):
            return
        rungs, inverses = ranks.inverted(partial(self._owned_inverses, damping, step), self.inverses, rule=damping.rule)
        self.health.climbed(rungs)
        self.inverses, self.inverted = inverses, rungs.keys()
        self._unused = set(self.ready) - self.inverted

    def _owned_inverses(
        self, damping: Damping, step: int, owned: Container[str]
    ) -> tuple[dict[str, Block], dict[str, Rung]]:
        """The inverses of the layers owned that have averages worth it, and how far each factorisation climbed."""
        unused = self.average.unused()
        blocks = self.blocks(name for name in self.average.ready if name in owned and name not in unused)
        dampings = {
            name: damping.of(*block.sides, step=step, override=self.layers[name].rule.damping)
            for name, block in blocks.items()
        }
        return damped_inverses_of(blocks, dampings, rule=damping.rule, previous=self.inverses)

    def inverse_of(self, name: str, like: Tensor) -> Block | None:
        """The layer's inverse, where its gradient is and in the dtype of its statistics; None where there is none."""
        inverse, dtype = self.inverses.get(name), statistic_dtype(like.dtype)
        if inverse is not None and (inverse.device, inverse.dtype) != (like.device, dtype):
            inverse = self.inverses[name] = inverse.to(like.device).to(dtype)
        return inverse

    def restricted(self, layers: Mapping[str, Layer], *, without: Iterable[str]) -> Factors:
        """The same for these layers, starting anew for those in ``without`` and for new ones; all must be here."""
        changed = set(without)
        fresh = Factors(
            layers,
            self.average.restricted(layers, without=changed, needed=draws_needed(layers)),
            self.health.restricted(layers, without=changed),
            {name: inverse for name, inverse in self.inverses.items() if name not in changed},
        )
        fresh._unused = self._unused - changed
        return fresh

    def with_those(self, names: Iterable[str], *, of: Factors) -> Factors:
        """The same, but of these layers what ``of`` has."""
        taken = set(names)
        for name in taken:
            self.average.load_layer(name, of.average.layer_state(name))
            self.health.failures[name] = of.health.failures.get(name, 0)
        inverses = self.inverses | {name: inverse for name, inverse in of.inverses.items() if name in taken}
        return Factors(self.layers, self.average, self.health, inverses)

    def whole(self, ranks: Ranks) -> Factors:
        """The same with all averages and inverses here, on every rank; all of them call it.

        Raises:
            RankError: a rank did not take part.
        """
        if ranks.layout.replicated:
            return self
        mine = {
            name: {"average": self.average.layer_state(name), "inverse": inverse_state(self.inverses.get(name))}
            for name in ranks.owned()
        }
        average = MovingAverage(self.layers, self.average.weights, draws_needed(self.layers))
        inverses: dict[str, Block] = {}
        for name, entry in ranks.union(mine, "the averages and inverses of all layers").items():
            average.load_layer(name, entry["average"])
            if entry["inverse"] is not None:
                inverses[name] = loaded_inverse(name, self.layers[name], entry["inverse"])
        return Factors(self.layers, average, self.health, inverses)

    def placed(self, ranks: Ranks) -> Factors:
        """What this rank has of it; all must be here before."""
        if ranks.layout.replicated:
            return self
        kept = set(ranks.kept())
        return Factors(
            self.layers,
            self.average.restricted(ranks.kept(), without=(), needed=draws_needed(self.layers)),
            self.health,
            {name: inverse for name, inverse in self.inverses.items() if name in ranks.worked()},
            elsewhere=set(self.ready) - kept,
            inverted=self.inverses.keys(),
        )

    def summary(self) -> list[str]:
        """What there is, in words."""
        return [
            f"factors of {len(self.ready)}, inverses of {len(self.inverted)} of {len(self.layers)} layers; "
            f"{self.health.skipped_captures} captures left out",
            *_waiting_for_draws(self.layers, self.inverted),
        ]


def _waiting_for_draws(layers: Mapping[str, Layer], ready: Container[str]) -> list[str]:
    """A line on the layers that need several draws, where there are any, and how many of them are ready."""
    needed = draws_needed(layers)
    if not needed:
        return []
    number = sum(name in ready for name in needed)
    return [
        f"{len(needed)} parameters in the universal form, {number} of them preconditioned: each has its plain gradient "
        f"until {max(needed.values())} effective draws are in"
    ]
