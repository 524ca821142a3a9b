"""What a preconditioner keeps of its layers: moving averages, and the inverses that are made of them now and then.

Where layers are shared out among ranks each has the averages of those that it keeps and the inverses of those that it
preconditions, and knows of the others which there are.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Set
from functools import partial

import torch
from torch import Tensor

from .averages import MovingAverage
from .costs import in_parts
from .damping import DampingNow
from .distributed import Ranks
from .health import Flags, Health
from .layers.layer import Layer, draws_needed, storage_of, waiting_for_draws
from .layers.summed import IDENTITIES, Bases, EigenSquares
from .linalg.ladder import Rung, read_status
from .state import inverse_state, loaded_inverse
from .statistics import Statistics, statistic_dtype
from .structures import (
    Block,
    EigenBlock,
    KroneckerBlock,
    Trained,
    averaged,
    damped_inverse,
    damped_inverses_of,
    diagonals_in,
    near,
    refreshed,
    scaling_sides,
    stepped,
    unread_inverses_of,
)


class Factors:
    """The averages of some layers, and the inverses in use.

    Args:
        layers: by name.
        average: of what is summed of them.
        health: counts what failed.
        inverses: those in use.
        elsewhere: the layers whose averages other ranks keep.
        inverted: the layers that have an inverse on some rank; None for those of ``inverses``.
        bases: those that layers in 'ekfac' are in, on every rank; None for those of ``inverses``.
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
        bases: Mapping[str, Bases] | None = None,
    ) -> None:
        self.layers, self.average, self.health = layers, average, health
        self.inverses: dict[str, Block] = dict(inverses or {})
        self.inverted: Set[str] = set(self.inverses) if inverted is None else inverted
        self._elsewhere = elsewhere
        # What the last refresh left out it is not to be repeated for.
        self._unused = set(self.ready) - self.inverted if self.inverted else set()
        #: The bases that layers in 'ekfac' are in: weight gradients are squared in them before ranks are added up.
        self.bases: dict[str, Bases] = {
            name: (inverse.basis_A, inverse.basis_G)
            for name, inverse in self.inverses.items()
            if isinstance(inverse, EigenBlock) and layers[name].turns
        }
        self.bases |= bases or {}
        #: The layers in 'ekfac' whose averages or bases are newer than their inverses.
        self._stale: set[str] = set()
        self._refreshed: list[str] = []
        #: The factors that inverses were made of, (A, G) with one head, where it is looked at how far they have moved.
        self.references: dict[str, tuple[Tensor, Tensor]] = {}
        #: The step at which each inverse was made of averages, on whatever rank; of one from an older state unknown.
        self.made: dict[str, int] = {}
        #: Of the last capture the number of examples, and of positions by layer, on the device.
        self.examples: int | None = None
        self.positions: dict[str, Tensor] = {}

    @classmethod
    def empty(cls, layers: Mapping[str, Layer], weights: tuple[float, ...], *, patience: int) -> Factors:
        """Of layers that nothing is known of yet.

        Args:
            layers: by name.
            weights: of the heads.
            patience: of ``Health``.
        """
        average = MovingAverage(layers, weights, draws_needed(layers), storage_of(layers))
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

    def add(self, statistics: Statistics, flags: Flags, *, decay: float, step: int) -> None:
        """Bring one capture into the averages."""
        self.health.add(flags)
        self.examples = statistics.examples
        self.positions = {name: sums.A_count for name, sums in statistics.layers.items()}
        self.average.update(statistics, decay=decay, step=step)
        # Every rank takes part in the capture of every layer.
        self._elsewhere = self.layers.keys() - self.average.G_weight.keys()
        self._stale |= self.bases.keys()

    def blocks(self, names: Iterable[str]) -> dict[str, Trained]:
        """The averages of these layers, which are here, as blocks: as they are kept, until the next capture."""
        bases = {name: self.bases.get(name, IDENTITIES) for name in names}
        return {name: averaged(self.layers[name], *self.average.factors(name), of) for name, of in bases.items()}

    def refresh(self, damping: DampingNow, ranks: Ranks, *, only: Container[str] | None = None) -> None:
        """Invert averages anew, each where it is owned; nothing where none is usable yet.

        Args:
            damping: of the step.
            ranks: those that take part.
            only: these layers, and whichever has no inverse or could not be inverted at a step of its own; all, for
                None. Of a layer it is what its owner says that counts.

        Raises:
            LikelihoodError, NumericalError: what was captured, or cannot be inverted, is not to go on with.
            RankError: a rank did not take part.
        """
        if not self.health.read(first=not self.inverted):
            return
        make = partial(self._invert, damping, only, ranks.layout.costing.uses)
        rungs, fresh, self.health.unsettled = ranks.inverted(
            make, self.inverses, self.health.unsettled, rule=damping.rule
        )
        self._take_bases([name for name, rung in rungs.items() if rung != Rung.PREVIOUS], ranks)
        kept: Set[str] = set() if only is None else self.inverted - rungs.keys()
        self.inverses = {name: one for name, one in self.inverses.items() if name in kept} | fresh
        self.inverted = kept | rungs.keys()
        self._unused = set(self.ready) - self.inverted
        self._refreshed = list(rungs)
        self.made |= dict.fromkeys((name for name, rung in rungs.items() if rung != Rung.PREVIOUS), damping.step)
        # Before what failed may stop the run: the averages are in the bases of these.
        self.rescale(damping, ranks)
        self.health.climbed(rungs)

    def _invert(
        self,
        damping: DampingNow,
        only: Container[str] | None,
        uses: int | None,
        owned: Container[str],
        into: dict[str, Block],
    ) -> dict[str, Rung]:
        """Put the inverses of the layers owned that are due and worth it in the place of those before.

        Some layers at a time: beside what is kept there are the matrices of these alone. It gives how far each
        factorisation climbed.
        """
        unused = self.average.unused()
        again = self.health.unsettled | (set(self.ready) - self.inverted)
        usable = [name for name in self.average.ready if name in owned and name not in unused]
        due = [name for name in usable if only is None or name in only or name in again]
        climbed: dict[str, Rung] = {}
        for names in in_parts(due, self.layers):
            turned = self._turn(names)
            blocks = self.blocks(names)
            inverses, rungs = damped_inverses_of(
                blocks, self._dampings(blocks, damping), rule=damping.rule, previous=into, uses=uses
            )
            into |= inverses
            climbed |= {name: max(rung, turned.get(name, rung)) for name, rung in rungs.items()}
        return climbed

    def refresh_unread(self, names: Iterable[str], damping: DampingNow, ranks: Ranks) -> None:
        """Invert those of these averages that were inverted before, on the step path: what fails stays as it was.

        Every rank that keeps averages does so. The next ``refresh`` reads which failed.
        """
        due = [name for name in names if name in self.inverted]
        if not due:
            return
        here = [name for name in due if name in self.average.G]
        self.health.noted("unsettled", self._step(here))
        blocks = self.blocks(here)
        inverses, failed = unread_inverses_of(
            blocks, self._dampings(blocks, damping), rule=damping.rule, previous=self.inverses
        )
        self.health.noted("unsettled", failed)
        self.inverses |= inverses
        plain = [name for name in due if not self.layers[name].turns]
        self.inverses |= ranks.handed_on(plain, self.inverses, self.bases, rule=damping.rule)
        if not ranks.layout.replicated:
            self._take_bases(due, ranks)
        self._stale |= self.bases.keys() & set(due)
        self.made |= dict.fromkeys(due, damping.step)

    def remember(self) -> None:
        """Keep copies of what the inverses that are new since the last call were made of."""
        for name in self._refreshed:
            if name not in self.average.G:
                continue
            A, G = self.average.factors(name)
            self.references[name] = A.clone(), G.clone().unsqueeze(0)
        self._refreshed = []

    def changed(self, share: float) -> set[str]:
        """The layers whose factors have changed by more than a share of what their inverses were made of.

        Read from the device in one transfer.
        """
        flags = {}
        for name, (A, G) in self.references.items():
            # Of the matrices: in a triangle the diagonal counts twice.
            now, before = (self.layers[name].whole(*pair) for pair in (self.average.factors(name), (A, G[0])))
            changes = [_relative_change(new, old.to(new)) for new, old in zip(now, before, strict=True)]
            flags[name] = (torch.stack(changes) > share).any().reshape(1)
        moved = read_status(list(flags.values()))
        return {name for name, flag in zip(flags, moved, strict=True) if flag}

    def rescale(self, damping: DampingNow, ranks: Ranks) -> None:
        """The inverses in 'ekfac' anew in the bases that they are in, after a capture or a refresh; nothing is read."""
        due = [name for name in self.layers if name in self._stale and name in self.inverted]
        blocks = self.blocks(name for name in due if name in self.average.G)
        for name, added in self._dampings(blocks, damping).items():
            block = blocks[name]
            assert isinstance(block, EigenBlock)
            self.inverses[name], _ = damped_inverse(block, added)
        self.inverses |= ranks.handed_on(due, self.inverses, self.bases, rule=damping.rule)
        self._stale = set()

    def _dampings(self, blocks: Mapping[str, Trained], damping: DampingNow) -> dict[str, Tensor]:
        return {
            name: damping.of(name, *scaling_sides(block), own=self.layers[name].rule.damping)
            for name, block in blocks.items()
        }

    def _turn(self, names: Iterable[str]) -> dict[str, Rung]:
        """Bring those of these layers that are in 'ekfac' to the bases of their factors as they are now."""
        bases, rungs = refreshed(self._factors_of_bases(names), self.bases)
        for name, rung in rungs.items():
            if rung != Rung.PREVIOUS:
                self._turn_to(name, bases[name])
        return rungs

    def _step(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Bring them one step nearer, on the step path; which of them are too far for that, 0-d bool."""
        far = {}
        for name, block in self._factors_of_bases(names).items():
            far[name] = ~near(block, self.bases[name])
            self._turn_to(name, stepped(block, self.bases[name]))
        return far

    def _take_bases(self, names: Iterable[str], ranks: Ranks) -> None:
        """Go on in the bases that the owners of these layers have turned to, where they are in 'ekfac'."""
        turned = [name for name in names if self.layers[name].turns]
        self._stale.update(turned)
        for name, bases in ranks.bases(turned, self.bases).items():
            self._turn_to(name, bases)

    def _factors_of_bases(self, names: Iterable[str]) -> dict[str, KroneckerBlock]:
        """The factors that bases are made of, of those layers that are in one."""
        layers = {name: self.layers[name] for name in names if self.layers[name].turns}
        return {
            name: KroneckerBlock(layer.layout, *layer.factors(*self.average.factors(name)), name=name)
            for name, layer in layers.items()
        }

    def _turn_to(self, name: str, bases: Bases) -> None:
        """Go on in other bases, with what was averaged in those before, where it is kept here."""
        layer, G = self.layers[name], self.average.G.get(name)
        # Products depend on the order in memory to the last bit, and what was sent or loaded is in this one.
        of_A, of_G = (None if basis is None else basis.contiguous() for basis in bases)
        bases = of_A, of_G
        if G is not None:
            assert isinstance(layer.gradient_sums, EigenSquares)
            if name in self.bases:
                turned = layer.gradient_sums.turned(G, self.bases[name], bases, layer.layout)
            else:
                values = diagonals_in(self._factors_of_bases([name])[name], bases)
                turned = layer.gradient_sums.started(G, values, layer.layout)
            self.average.G[name] = turned
        self.bases[name] = bases

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
            self.average.restricted(layers, without=changed, needed=draws_needed(layers), storage=storage_of(layers)),
            self.health.restricted(layers, without=changed),
            {name: inverse for name, inverse in self.inverses.items() if name not in changed},
        )
        fresh._unused = self._unused - changed
        fresh._stale = self._stale & fresh.bases.keys()
        fresh.references = {name: pair for name, pair in self.references.items() if name in fresh.inverses}
        return fresh._knowing(self, without=changed)

    def with_those(self, names: Iterable[str], *, of: Factors) -> Factors:
        """The same, but of these layers what ``of`` has."""
        taken = set(names)
        for name in taken:
            self.average.load_layer(name, of.average.layer_state(name))
            self.health.failures[name] = of.health.failures.get(name, 0)
        inverses = self.inverses | {name: inverse for name, inverse in of.inverses.items() if name in taken}
        found = Factors(self.layers, self.average, self.health, inverses)
        found.references = self.references | {name: pair for name, pair in of.references.items() if name in taken}
        found.made = self.made | {name: step for name, step in of.made.items() if name in taken}
        return found

    def whole(self, ranks: Ranks) -> Factors:
        """The same with all averages and inverses here, on every rank; all of them call it.

        Raises:
            RankError: a rank did not take part.
        """
        if ranks.layout.replicated:
            return self
        mine = {
            name: {
                "average": self.average.layer_state(name),
                "inverse": inverse_state(self.inverses.get(name)),
                "reference": dict(zip("AG", self.references.get(name, ()), strict=False)),
                "noted": self.health.unread(name),
            }
            for name in ranks.owned()
        }
        average = MovingAverage(self.layers, self.average.weights, draws_needed(self.layers), storage_of(self.layers))
        inverses: dict[str, Block] = {}
        references: dict[str, tuple[Tensor, Tensor]] = {}
        for name, entry in ranks.union(mine, "the averages and inverses of all layers").items():
            average.load_layer(name, entry["average"])
            if entry["inverse"] is not None:
                inverses[name] = loaded_inverse(name, self.layers[name], entry["inverse"])
            if entry["reference"]:
                references[name] = entry["reference"]["A"], entry["reference"]["G"]
            self.health.told(name, entry["noted"])
        found = Factors(self.layers, average, self.health, inverses, bases=self.bases)
        found.references, found._stale = references, set(self._stale)
        return found._knowing(self)

    def placed(self, ranks: Ranks) -> Factors:
        """What this rank has of it; all must be here before."""
        if ranks.layout.replicated:
            return self
        kept = set(ranks.kept())
        found = Factors(
            self.layers,
            self.average.restricted(
                ranks.kept(), without=(), needed=draws_needed(self.layers), storage=storage_of(self.layers)
            ),
            self.health,
            {name: inverse for name, inverse in self.inverses.items() if name in ranks.worked()},
            elsewhere=set(self.ready) - kept,
            inverted=self.inverses.keys(),
            bases=self.bases,
        )
        found.references = {name: pair for name, pair in self.references.items() if name in kept}
        found._stale = set(self._stale)
        return found._knowing(self)

    def _knowing(self, of: Factors, *, without: Container[str] = ()) -> Factors:
        """The same, with what is known of when the inverses of others were made, and of the last capture."""
        self.made = {name: step for name, step in of.made.items() if name in self.layers and name not in without}
        self.examples, self.positions = of.examples, dict(of.positions)
        return self

    def metrics(self) -> dict[str, int]:
        """What failed or waits, as numbers for a logger."""
        return {
            "kfac/skipped_captures": self.health.skipped_captures,
            "kfac/failed_layers": sum(count > 0 for count in self.health.failures.values()),
            "kfac/unsettled_layers": len(self.health.unsettled),
            "kfac/plain_layers": len(self.layers) - len(self.inverted),
        }

    def summary(self) -> list[str]:
        """What there is, in words."""
        return [
            f"factors of {len(self.ready)}, inverses of {len(self.inverted)} of {len(self.layers)} layers; "
            f"{self.health.skipped_captures} captures left out",
            *waiting_for_draws(self.layers, self.inverted),
        ]


def _relative_change(new: Tensor, old: Tensor) -> Tensor:
    """The norm of the difference over that of the old one; 0 of what is zero."""
    scale = torch.linalg.vector_norm(old)
    change: Tensor = torch.linalg.vector_norm(new - old) / torch.where(scale > 0, scale, 1)
    return change
