"""The sections of a report that go through the data: what makes each, at which level, in how many passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from ..heads import Distribution
from ..options import Options
from ..structures import Fisher
from . import approximation, divergence, empirical, off_diagonal, sampling_check, signal, updates
from .meter import Watched
from .proposals import Proposal, propose
from .sources import Source

Level = Literal["quick", "standard", "full"]
LEVELS = ("quick", "standard", "full")


@dataclass(frozen=True)
class Size:
    """What the cost of a section depends on.

    Args:
        layers: of the report.
        samples: label draws a term.
        held_out: whether there are batches that F does not come from.
    """

    layers: int
    samples: int
    held_out: bool = False


class Job:
    """What a section is made from.

    Args:
        given: the source; without a model there is nothing that goes through data.
        data: batches, as often as they are gone through; None where none were given.
        fisher: of the layers of the report.
        damping: lambda of the report; where none was given, the default of ``kc.KFAC``.
        samples: label draws a term.
        options: of the inspection.
    """

    def __init__(
        self, given: Source, data: Watched | None, fisher: Fisher, *, damping: float, samples: int, options: Options
    ) -> None:
        self.kfac, self.fisher, self.damping, self.samples = given.kfac, fisher, damping, samples
        #: Of estimates, which show no progress of their own.
        self.options = replace(options, progress=False, partial=None, draws=None, held_out=None)
        self.held_out = options.held_out
        self._given, self._data = given, data

    @property
    def over_data(self) -> tuple[nn.Module, Watched, Distribution | str | nn.Module]:
        """(model, data, likelihood); of a section that goes through data all three are there."""
        model, likelihood = self._given.model, self._given.likelihood
        assert model is not None and likelihood is not None and self._data is not None
        return model, self._data, likelihood

    @cached_property
    def proposal(self) -> Proposal:
        """The natural-gradient step at the damping, with the gradient that it comes from: one pass, whoever asks."""
        return propose(*self.over_data, self.fisher, damping=self.damping, options=self.options)

    @property
    def gradient(self) -> Mapping[str, Tensor] | None:
        """That of the loss at the data's labels; None without data or labels."""
        if self._data is None or self.proposal.labels != "data":
            return None
        return self.proposal.gradient


Found = tuple[Any, Mapping[str, Any]]
"""(of the whole model or None, by layer)."""


@dataclass(frozen=True)
class Section:
    """One section.

    Args:
        name: of its field of ``LayerReport``, where it says something of layers.
        level: the lowest that has it.
        passes: over the data that it takes, a forward and a backward each.
        measure: makes it.
        whole: the name of its field of ``Whole``, where it says something of that; empty for the same name.
        needs: 'data' of a model or a KFAC, or a 'kfac' alone.
    """

    name: str
    level: Level
    passes: Callable[[Size], float]
    measure: Callable[[Job], Found]
    whole: str = ""
    needs: Literal["data", "kfac"] = "data"


def _kl(job: Job) -> Found:
    return divergence.measure(
        *job.over_data, job.fisher, proposal=job.proposal, held_out=job.held_out, options=job.options
    )


def _sampling(job: Job) -> Found:
    check = sampling_check.measure(*job.over_data, job.fisher, samples=job.samples, options=job.options)
    return check, {}


def _signal(job: Job) -> Found:
    return signal.measure(*job.over_data, job.fisher, damping=job.damping, picks=job.options.data)


def _update(job: Job) -> Found:
    return None, updates.measure(
        *job.over_data, job.fisher, damping=job.damping, gradient=job.gradient, picks=job.options.data
    )


def _empirical(job: Job) -> Found:
    return None, empirical.measure(
        *job.over_data, job.fisher, damping=job.damping, gradient=job.gradient, options=job.options
    )


def _approximation(job: Job) -> Found:
    # An error without that of drawing needs two draws, one with a standard error three.
    samples = max(job.samples, 3)
    return None, approximation.measure(*job.over_data, job.fisher, samples=samples, options=job.options)


def _block_diagonality(job: Job) -> Found:
    return off_diagonal.measure(*job.over_data, job.fisher, options=job.options), {}


def _staleness(job: Job) -> Found:
    # It knows what trains, which a job that is inspected has loaded already.
    from . import staleness

    found = staleness.measure(job.kfac, gradient=job.gradient)
    return None, {name: one for name, one in found.items() if name in job.fisher}


SECTIONS: tuple[Section, ...] = (
    # First, and with the one pass of the proposal that others have a use for.
    Section("kl", "standard", lambda size: divergence.passes(size.layers, held_out=size.held_out), _kl),
    Section("sampling check", "standard", lambda size: sampling_check.PASSES, _sampling, whole="sampling"),
    Section("update", "standard", lambda size: 0.0, _update),
    Section("signal", "standard", lambda size: signal.PASSES, _signal),
    Section("empirical", "standard", lambda size: empirical.PASSES - updates.PASSES, _empirical),
    Section("staleness", "standard", lambda size: 0.0, _staleness, needs="kfac"),
    Section("approximation", "full", lambda size: approximation.passes(max(size.samples, 3)), _approximation),
    Section(
        "block diagonality",
        "full",
        lambda size: off_diagonal.passes(off_diagonal.PROBES),
        _block_diagonality,
        whole="block_diagonality",
    ),
)


def of_level(level: Level) -> Sequence[Section]:
    """The sections that a level has, each with those of the levels below."""
    return [section for section in SECTIONS if LEVELS.index(section.level) <= LEVELS.index(level)]
