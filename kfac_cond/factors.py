"""What a preconditioner keeps of its layers: moving averages, and the inverses that are made of them now and then."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from torch import Tensor

from .damping import DampingNow
from .health import Flags, Health
from .layers.layer import Layer, draws_needed
from .statistics import MovingAverage, Statistics, statistic_dtype
from .structures import Block, DiagonalBlock, KroneckerBlock, averaged, damped_inverses_of, unread_inverses_of


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

    def blocks(self, names: Iterable[str] | None = None) -> dict[str, KroneckerBlock | DiagonalBlock]:
        """The averages as blocks; of these layers, or of all that have any."""
        names = self.ready if names is None else names
        return {name: averaged(self.layers[name], *self.average.factors(name)) for name in names}

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
        due = set(usable).difference(() if only is None else self.inverses.keys() - self.health.kept)
        due.update(name for name in usable if only is None or name in only)
        blocks = self.blocks([name for name in usable if name in due])
        inverses, rungs = damped_inverses_of(
            blocks, self._dampings(blocks, damping), rule=damping.rule, previous=self.inverses
        )
        self.health.climbed(rungs)
        self.inverses = {name: inverses[name] if name in inverses else self.inverses[name] for name in usable}

    def refresh_unread(self, names: Iterable[str], damping: DampingNow) -> None:
        """Invert those of these averages that were inverted before, on the step path: what fails stays as it was.

        The next ``refresh`` reads which did.
        """
        blocks = self.blocks([name for name in names if name in self.inverses])
        if not blocks:
            return
        inverses, failed = unread_inverses_of(
            blocks, self._dampings(blocks, damping), rule=damping.rule, previous=self.inverses
        )
        self.health.replaced(failed)
        self.inverses |= inverses

    def _dampings(self, blocks: Mapping[str, KroneckerBlock | DiagonalBlock], damping: DampingNow) -> dict[str, Tensor]:
        return {
            name: damping.of(name, *block.sides, own=self.layers[name].rule.damping) for name, block in blocks.items()
        }

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
        return fresh

    def summary(self) -> list[str]:
        """What there is, in words."""
        return [
            f"factors of {len(self.ready)}, inverses of {len(self.inverses)} of {len(self.layers)} layers; "
            f"{self.health.skipped_captures} captures left out",
            *_waiting_for_draws(self.layers, self.inverses),
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
