"""The sections of a report that go through the data: what makes each, at which level, in how many passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..heads import Distribution
from ..options import Options
from ..structures import Fisher
from .meter import Watched

Level = Literal["quick", "standard", "full"]
LEVELS = ("quick", "standard", "full")


@dataclass(frozen=True)
class Size:
    """What the cost of a section depends on.

    Args:
        layers: of the report.
        samples: label draws a term.
    """

    layers: int
    samples: int


@dataclass(frozen=True, eq=False)
class Job:
    """What a section is made from.

    Args:
        model: in the mode it is in.
        data: batches, as often as they are gone through.
        likelihood: of the loss, or the criterion.
        fisher: of the layers of the report.
        damping: lambda of the report; where none was given, the one that keeps 90 % of the effective dimension.
        samples: label draws a term.
        options: of estimates; without progress of their own.
        kfac: that the factors came from, in a running job.
    """

    model: nn.Module
    data: Watched
    likelihood: Distribution | str | nn.Module
    fisher: Fisher
    damping: float
    samples: int
    options: Options
    kfac: Any = None


Found = tuple[Any, Mapping[str, Any]]
"""(of the whole model or None, by layer)."""


@dataclass(frozen=True)
class Section:
    """One section.

    Args:
        name: of its field of ``LayerReport``.
        level: the lowest that has it.
        passes: over the data that it takes, a forward and a backward each.
        measure: makes it.
        whole: the name of its field of ``Whole``, where it says something of that; empty for the same name.
    """

    name: str
    level: Level
    passes: Callable[[Size], float]
    measure: Callable[[Job], Found]
    whole: str = ""


SECTIONS: tuple[Section, ...] = ()


def passes_of_estimate(samples: int) -> float:
    """Of drawing labels: a forward, a third of a pass, and a backward for each draw, two thirds."""
    return (1 + 2 * samples) / 3


def of_level(level: Level) -> Sequence[Section]:
    """The sections that a level has, each with those of the levels below."""
    return [section for section in SECTIONS if LEVELS.index(section.level) <= LEVELS.index(level)]
