"""What a preconditioner keeps of its layers: moving averages, and the inverses that are made of them now and then."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

import torch
from torch import Tensor

from .damping import DampingNow
from .health import Flags, Health
from .layers.layer import Layer, draws_needed
from .layers.summed import IDENTITIES, Bases, EigenSquares
from .linalg.ladder import Rung, read_status
from .statistics import MovingAverage, Statistics, statistic_dtype
from .structures import (
    Block,
    EigenBlock,
    KroneckerBlock,
    Trained,
    averaged,
    damped_inverse,
    damped_inverses_of,
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
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        average: MovingAverage,
        health: Health,
        inverses: Mapping[str, Block] | None = None,
    ) -> None:
        self.layers, self.average, self.health = layers, average, health
        self.inverses: dict[str, Block] = dict(inverses or {})
        # What the last refresh left out it is not to be repeated for.
        self._unused = set(average.ready) - self.inverses.keys() if self.inverses else set()
        #: The bases that layers in 'ekfac' are in, those of their inverses.
        self.bases: dict[str, Bases] = {
            name: (inverse.basis_A, inverse.basis_G)
            for name, inverse in self.inverses.items()
            if isinstance(inverse, EigenBlock) and isinstance(layers[name].gradient_sums, EigenSquares)
        }
        self._moved = False
        self._refreshed: list[str] = []
        #: The factors that inverses were made of, (A, G) with one head, where it is looked at how far they have moved.
        self.references: dict[str, tuple[Tensor, Tensor]] = {}

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
        """The layers that have averages."""
        return self.average.ready

    @property
    def waiting(self) -> set[str]:
        """The layers that have averages, and no inverse that a refresh would not leave out."""
        return set(self.ready) - self.inverses.keys() - self._unused

    def add(self, statistics: Statistics, flags: Flags, *, decay: float) -> None:
        """Bring one capture into the averages."""
        self.health.add(flags)
        self.average.update(statistics, decay=decay)
        self._moved = True

    def blocks(self, names: Iterable[str] | None = None) -> dict[str, Trained]:
        """The averages as blocks; of these layers, or of all that have any."""
        names = self.ready if names is None else names
        bases = {name: self.bases.get(name, IDENTITIES) for name in names}
        return {name: averaged(self.layers[name], *self.average.factors(name), of) for name, of in bases.items()}

    def refresh(self, damping: DampingNow, *, only: Container[str] | None = None) -> None:
        """Invert averages anew; nothing where none is usable yet.

        Args:
            damping: of the step.
            only: these layers, and whichever has no inverse or could not be inverted at a step of its own; all, for
                None.

        Raises:
            LikelihoodError, NumericalError: what was captured, or cannot be inverted, is not to go on with.
        """
        if not self.health.read(first=not self.inverses):
            return
        self._unused = self.average.unused()
        usable = [name for name in self.ready if name not in self._unused]
        again = self.health.unsettled | (set(usable) - self.inverses.keys())
        due = [name for name in usable if only is None or name in only or name in again]
        turned = self._turn(due)
        blocks = self.blocks(due)
        inverses, rungs = damped_inverses_of(
            blocks, self._dampings(blocks, damping), rule=damping.rule, previous=self.inverses
        )
        self._refreshed = due
        # Before what failed may stop the run: the averages are in the bases of these.
        self.inverses = {name: inverses[name] if name in inverses else self.inverses[name] for name in usable}
        self.health.climbed({name: max(rung, turned.get(name, rung)) for name, rung in rungs.items()})

    def refresh_unread(self, names: Iterable[str], damping: DampingNow) -> None:
        """Invert those of these averages that were inverted before, on the step path: what fails stays as it was.

        The next ``refresh`` reads which did.
        """
        due = [name for name in names if name in self.inverses]
        if not due:
            return
        self.health.noted("unsettled", self._step(due))
        blocks = self.blocks(due)
        inverses, failed = unread_inverses_of(
            blocks, self._dampings(blocks, damping), rule=damping.rule, previous=self.inverses
        )
        self.health.noted("unsettled", failed)
        self.inverses |= inverses

    def remember(self) -> None:
        """Keep what the inverses that are new since the last call were made of."""
        for name in self._refreshed:
            A, G = self.average.factors(name)
            self.references[name] = A, G.unsqueeze(0)
        self._refreshed = []

    def changed(self, share: float) -> set[str]:
        """The layers whose factors have changed by more than a share of what their inverses were made of.

        Read from the device in one transfer.
        """
        flags = {}
        for name, (A, G) in self.references.items():
            now = self.average.factors(name)
            changes = [_relative_change(new, old.to(new)) for new, old in zip(now, (A, G[0]), strict=True)]
            flags[name] = (torch.stack(changes) > share).any().reshape(1)
        moved = read_status(list(flags.values()))
        return {name for name, flag in zip(flags, moved, strict=True) if flag}

    def rescale(self, damping: DampingNow) -> None:
        """After a capture the inverses in 'ekfac' anew, in the bases that they are in; nothing is read."""
        if self._moved:
            blocks = self.blocks([name for name in self.bases if name in self.inverses])
            for name, added in self._dampings(blocks, damping).items():
                block = blocks[name]
                assert isinstance(block, EigenBlock)
                self.inverses[name], _ = damped_inverse(block, added)
        self._moved = False

    def _dampings(self, blocks: Mapping[str, Trained], damping: DampingNow) -> dict[str, Tensor]:
        return {
            name: damping.of(name, *scaling_sides(block), own=self.layers[name].rule.damping)
            for name, block in blocks.items()
        }

    def _turn(self, names: Iterable[str]) -> dict[str, Rung]:
        """Bring those of these layers that are in 'ekfac' to the bases of their factors as they are now."""
        anew, followed, rungs = refreshed(self._factors_of_bases(names), self.bases)
        for name, ((values_A, basis_A), (values_G, basis_G)) in anew.items():
            self._turn_to(name, (basis_A, basis_G), (values_A, values_G))
        for name, bases in followed.items():
            self._turn_to(name, bases)
        return rungs

    def _step(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Bring them one step nearer, on the step path; which of them are too far for that, 0-d bool."""
        far = {}
        for name, block in self._factors_of_bases(names).items():
            far[name] = ~near(block, self.bases[name])
            self._turn_to(name, stepped(block, self.bases[name]))
        return far

    def _factors_of_bases(self, names: Iterable[str]) -> dict[str, KroneckerBlock]:
        """The factors that bases are made of, of those layers that are in one."""
        layers = {name: layer for name in names if isinstance((layer := self.layers[name]).gradient_sums, EigenSquares)}
        return {
            name: KroneckerBlock(layer.layout, *layer.factors(*self.average.factors(name)), name=name)
            for name, layer in layers.items()
        }

    def _turn_to(self, name: str, bases: Bases, values: tuple[Tensor, Tensor] | None = None) -> None:
        """Go on in other bases, with what was averaged in those before; the first ones come with their eigenvalues."""
        layer, G = self.layers[name], self.average.G[name]
        assert isinstance(layer.gradient_sums, EigenSquares)
        if name in self.bases:
            self.average.G[name] = layer.gradient_sums.turned(G, self.bases[name], bases, layer.layout)
        elif values is not None:
            self.average.G[name] = layer.gradient_sums.started(G, values, layer.layout)
        self.bases[name] = bases

    def inverse_of(self, name: str, like: Tensor) -> Block | None:
        """The layer's inverse, where its gradient is and in the dtype of its statistics; None where there is none."""
        inverse, dtype = self.inverses.get(name), statistic_dtype(like.dtype)
        if inverse is not None and (inverse.device, inverse.dtype) != (like.device, dtype):
            inverse = self.inverses[name] = inverse.to(like.device).to(dtype)
        return inverse

    def restricted(self, layers: Mapping[str, Layer], *, without: Iterable[str]) -> Factors:
        """The same for these layers, starting anew for those in ``without`` and for new ones."""
        changed = set(without)
        fresh = Factors(
            layers,
            self.average.restricted(layers, without=changed, needed=draws_needed(layers)),
            self.health.restricted(layers, without=changed),
            {name: inverse for name, inverse in self.inverses.items() if name not in changed},
        )
        fresh._unused = self._unused - changed
        fresh.references = {name: pair for name, pair in self.references.items() if name in fresh.inverses}
        return fresh

    def summary(self) -> list[str]:
        """What there is, in words."""
        return [
            f"factors of {len(self.ready)}, inverses of {len(self.inverses)} of {len(self.layers)} layers; "
            f"{self.health.skipped_captures} captures left out",
            *_waiting_for_draws(self.layers, self.inverses),
        ]


def _relative_change(new: Tensor, old: Tensor) -> Tensor:
    """The norm of the difference over that of the old one; 0 of what is zero."""
    scale = torch.linalg.vector_norm(old)
    change: Tensor = torch.linalg.vector_norm(new - old) / torch.where(scale > 0, scale, 1)
    return change


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
