"""One call to look inside: what the conditional Fisher says about each layer of a model, a running job or a file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import monotonic
from typing import Any

from torch import nn

from ..checks import is_damping, is_size, settings_of
from ..errors import ArgumentError
from ..heads import Distribution
from ..options import Batches, Options
from .meter import Meter, Watched
from .report import Report
from .sections import LEVELS, Job, Level, Section, Size, of_level
from .sources import Patterns, Source, source_of
from .work import Work

logger = logging.getLogger("kfac_cond")


def inspect(
    source: Any,
    data: Batches | None = None,
    likelihood: Distribution | str | nn.Module | None = None,
    *,
    level: Level = "standard",
    layers: Patterns = "*",
    samples: int = 4,
    damping: float | None = None,
    options: Options | None = None,
) -> Report:
    """What the conditional Fisher says about each layer: numbers, a table, a page and advice.

    What is inspected is left as it was. Before anything is computed its cost is said, in passes over the data (a
    forward and a backward each): on standard error where progress is shown, else in the log, at INFO. Of a job on
    several ranks, whose layers are shared out among them, all call it.

    Args:
        source: a model; a ``kc.KFAC`` in a running job, whose moving averages are taken as they are; a ``kc.Fisher``;
            or the path of a file that ``Fisher.save`` wrote.
        data: of a model, as for ``kc.estimate``. With a KFAC they are needed only for what goes through data.
        likelihood: of a model, as for ``kc.estimate``; a KFAC has its own.
        level: 'quick' is one estimate, and what its blocks say; 'standard' adds what takes a few passes, and inverts
            every block once; 'full' adds what compares with the exact Fisher.
        layers: pattern or patterns (``fnmatch``) of the layers wanted.
        samples: label draws a term; with 2 or more the error of drawing them is known.
        damping: lambda, in the units of F, that the report is read at; None takes that of a KFAC, and leaves it open
            elsewhere: what needs one then uses the default of ``kc.KFAC``, 1e-2.
        options: see ``kc.Options``; ``progress`` is that of the inspection, ``held_out`` other batches, on which what
            the Fisher predicts is measured as well.

    Returns:
        A ``Report``: a mapping from layer name to what was found of it. What could not be found is in
        ``report.problems``, by name, with the reason.

    Raises:
        ArgumentError: a source that is none of these, an argument out of its range, or data without an example.
        CoverageError: a pattern that matches no layer.
        NumericalError: weights, inputs or blocks that are not finite, by layer.
        StateError: a file that is truncated, damaged, or of another version.
        NotReadyError: a KFAC that has captured nothing yet.

    Examples:
        >>> import torch, kfac_cond as kc
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> report = kc.inspect(model, [torch.randn(8, 3)], "categorical", level="quick")
        >>> report["0"].shape, report["0"].spectrum.size
        ((4, 4), 16)
    """
    start = monotonic()
    options = settings_of(options, Options, "options")
    _check(level, layers, samples, damping, options, data)
    watched = None if data is None else Watched(data)
    quiet = replace(options, progress=False, held_out=None)
    given = source_of(source, watched, likelihood, layers=layers, samples=samples, options=quiet)
    sections = _sections(level, given, watched)
    size = Size(given.layers, samples, options.held_out is not None)
    parts = {section.name: section.passes(size) for section in sections}
    total = given.passes + sum(parts.values())
    meter = Meter(total, show=options.progress)
    _say(meter, level, given, parts)
    with meter.running():
        if watched is not None:
            watched.meter = meter
        with meter.stage("estimate" if given.passes else "factors", given.passes):
            work = Work(given.fisher(), given.damping if damping is None else damping)
        with meter.stage("spectra", 0.0):
            work.look(given.known, meter, invert=level != "quick", seed=options.seed or 0)
        job = Job(given, watched, work.fisher, damping=work.at, samples=samples, options=options)
        for section in sections:
            with meter.stage(section.name, parts[section.name]):
                work.add(section, job)
    facts = {"level": level, "source": given.described, "passes": total, "seconds": round(monotonic() - start, 3)}
    if watched is None and level != "quick":
        facts["note"] = "without data, what the blocks say alone"
    return work.report(facts)


def _sections(level: Level, given: Source, data: Watched | None) -> Sequence[Section]:
    """The sections of a level that what was given is enough for."""
    if data is None and level == "full":
        raise ArgumentError(
            f"level='full' compares with the exact Fisher of a model over data, and {given.described} came without "
            "data: kc.inspect(model, data, likelihood, level='full'), or level='standard'"
        )
    there = {"data": data is not None, "kfac": given.kfac is not None}
    sections = [section for section in of_level(level) if there[section.needs]]
    if data is not None and data.once and any(section.needs == "data" for section in sections):
        raise ArgumentError(
            f"level={level!r} goes through the data several times, and an iterator can be gone through once: pass a "
            "list, a loader, or a function that yields the batches, or level='quick'"
        )
    return sections


def _say(meter: Meter, level: Level, given: Source, of_sections: Mapping[str, float]) -> None:
    """What it will cost, before anything is computed."""
    parts = {**({"estimate": given.passes} if given.passes else {}), **of_sections}
    listed = ", ".join(f"{name} {passes:.3g}" for name, passes in parts.items())
    text = f"inspection of {given.described}, level '{level}': " + (
        f"about {meter.total:.3g} passes over the data, a forward and a backward each ({listed})"
        if parts
        else "no pass over data"
    )
    logger.info("%s", text)
    meter.say(text)


def _check(
    level: str, layers: Patterns, samples: int, damping: float | None, options: Options, data: Batches | None
) -> None:
    if level not in LEVELS:
        raise ArgumentError(f"level={level!r}: expected one of {', '.join(LEVELS)}")
    if not is_size(samples):
        raise ArgumentError(f"samples={samples!r}: expected a whole number >= 1")
    if not (damping is None or is_damping(damping)):
        raise ArgumentError(f"damping={damping!r}: expected a finite number >= 0, or None")
    patterns = [layers] if isinstance(layers, str) else layers
    if not (isinstance(patterns, Sequence) and patterns and all(isinstance(one, str) for one in patterns)):
        raise ArgumentError(f"layers={layers!r}: expected a pattern, or a list of patterns")
    if options.held_out is not None and data is None:
        raise ArgumentError(
            "Options(held_out=...) without data: expected the batches that the Fisher comes from as well"
        )
    if options.held_out is not None and level == "quick":
        raise ArgumentError(
            "Options(held_out=...) at level='quick', which measures no KL: expected 'standard' or 'full'"
        )
    if options.layers is not None and layers != "*":
        raise ArgumentError("layers are given twice, also by options: give them by layers= alone")
