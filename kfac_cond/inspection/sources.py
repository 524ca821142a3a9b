"""What can be inspected: a model, a KFAC in a running job, a Fisher, or a file of one; each as the same few things."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from torch import nn

from ..checks import described
from ..errors import ArgumentError, CoverageError
from ..estimate import estimate
from ..heads import Distribution
from ..layers.layer import Layer
from ..layers.layout import WeightLayout
from ..layers.rules import matches
from ..layers.survey import Row, survey
from ..options import Options
from ..structures import Fisher
from ..uses import Used, uses_in_forward
from .meter import Watched

Patterns = str | Sequence[str]


def passes_of_estimate(samples: int) -> float:
    """Of drawing labels: a forward, a third of a pass, and a backward for each draw, two thirds."""
    return (1 + 2 * samples) / 3


@dataclass(frozen=True)
class Known:
    """What is known of the model beside its Fisher.

    Args:
        layers: by name.
        forms: by layer, its form and what is to be known of it.
        used: what one forward used of each; empty where none was run.
        covered: share of the trainable numbers that can be covered.
        uncovered: the parameters that are not.
        failures: by layer, factorisations in a row that failed in training.
        without: layers that were asked for and have no block.
    """

    layers: Mapping[str, Layer] = field(default_factory=dict)
    forms: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    used: Mapping[str, Used] = field(default_factory=dict)
    covered: float | None = None
    uncovered: tuple[str, ...] = ()
    failures: Mapping[str, int] = field(default_factory=dict)
    without: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class Source:
    """What is inspected.

    Args:
        described: in a few words.
        fisher: makes or finds the Fisher of the layers asked for.
        passes: over the data that this takes.
        known: looks at the model, once the Fisher is there.
        layers: how many of them are asked for, as far as the model says; 0 where there is none.
        model: None where only its Fisher is there.
        likelihood: likewise.
        damping: that it trains with; None where it does not.
        kfac: None where it is no running job.
    """

    described: str
    fisher: Callable[[], Fisher]
    passes: float
    known: Callable[[Fisher], Known]
    layers: int = 0
    model: nn.Module | None = None
    likelihood: Distribution | str | nn.Module | None = None
    damping: float | None = None
    kfac: Any = None


def source_of(
    source: Any,
    data: Watched | None,
    likelihood: Distribution | str | nn.Module | None,
    *,
    layers: Patterns,
    samples: int,
    options: Options,
) -> Source:
    """What ``kc.inspect`` was given, seen to fit; nothing is computed yet.

    Raises:
        ArgumentError: none of the four, or without what it needs.
        CoverageError: a pattern that matches no layer.
    """
    if isinstance(source, nn.Module):
        if data is None or likelihood is None:
            raise ArgumentError(
                "a model is inspected over data: kc.inspect(model, data, likelihood). Without data, give a kc.KFAC in "
                "a running job, a kc.Fisher, or the path of a saved one"
            )
        return _of_model(source, data, likelihood, layers=layers, samples=samples, options=options)
    if callable(getattr(source, "fisher", None)) and callable(getattr(source, "precondition", None)):
        return _of_kfac(source, likelihood, layers)
    if data is not None or likelihood is not None:
        raise ArgumentError(
            f"data and a likelihood are for a model or a KFAC, and {described(source)} has no model to run: "
            "kc.inspect(model, data, likelihood)"
        )
    if isinstance(source, Fisher):
        return Source("Fisher", lambda: _chosen(source, layers), 0.0, lambda fisher: Known())
    if isinstance(source, str | os.PathLike):
        return Source(
            f"file {os.fspath(source)}", lambda: _chosen(Fisher.load(source), layers), 0.0, lambda fisher: Known()
        )
    raise ArgumentError(
        f"source is {described(source)}: expected a model, a kc.KFAC, a kc.Fisher, or the path of a file that "
        "Fisher.save wrote"
    )


def _of_model(
    model: nn.Module,
    data: Watched,
    likelihood: Distribution | str | nn.Module,
    *,
    layers: Patterns,
    samples: int,
    options: Options,
) -> Source:
    found = survey(model)
    owners = {row.path.rpartition(".")[0] for row in found.rows}
    _require_matches(layers, {*found.layers, *owners, *(row.path for row in found.rows)} - {""}, found.layers)
    asked = options.layers or layers
    wanted = replace(options, layers=None if asked == "*" else asked)

    def made() -> Fisher:
        return estimate(model, data, likelihood, samples=samples, options=wanted)

    return Source(
        type(model).__name__,
        made,
        passes_of_estimate(samples),
        lambda fisher: _looked_at(model, data.first, asked, fisher),
        layers=_number(found.layers, asked),
        model=model,
        likelihood=likelihood,
    )


def _of_kfac(kfac: Any, likelihood: Distribution | str | nn.Module | None, layers: Patterns) -> Source:
    """A KFAC's own averages, as they are now."""

    def known(fisher: Fisher) -> Known:
        table = kfac.coverage()
        return Known(
            dict(kfac.layers),
            {row.layer: (row.form, row.reason) for row in reversed(table.rows) if row.covered},
            covered=table.share,
            uncovered=_uncovered(table.rows),
            failures=dict(kfac._shared.factors.health.failures),
            without=_without(kfac.layers, layers, fisher),
        )

    return Source(
        f"KFAC at step {kfac.step}",
        lambda: _chosen(kfac.fisher(), layers),
        0.0,
        known,
        layers=_number(kfac.layers, layers),
        model=kfac._wrapped.model,
        likelihood=kfac._intake.listener.likelihood if likelihood is None else likelihood,
        damping=float(kfac.damping.at(kfac.step)),
        kfac=kfac,
    )


def _looked_at(model: nn.Module, batch: Any, asked: Patterns, fisher: Fisher) -> Known:
    """What one forward on a batch says of the layers that were asked for."""
    first = survey(model, training="kfac")
    used, functional = uses_in_forward(model, first.layers, batch)
    found = survey(model, training="kfac", functional=functional)
    rows = {row.path: row for row in found.rows}
    firsts = {name: rows[layer.layout.names[0]] for name, layer in found.layers.items()}
    every = sum(row.parameters for row in found.rows)
    covered = sum(row.parameters for row in found.rows if row.covered)
    forms = {name: (row.form, row.reason) for name, row in firsts.items()}
    without = _without(found.layers, asked, fisher)
    share = covered / every if every else None
    return Known(found.layers, forms, used, share, _uncovered(found.rows), without=without)


def _uncovered(rows: Iterable[Row]) -> tuple[str, ...]:
    return tuple(row.path for row in rows if not row.covered)


def _number(layers: Mapping[str, Layer], asked: Patterns) -> int:
    return sum(_reaches(asked, name, layer.layout) for name, layer in layers.items())


def _unknown(fisher: Fisher) -> Known:
    """Of blocks alone."""
    return Known()


def _without(layers: Mapping[str, Layer], asked: Patterns, fisher: Fisher) -> list[str]:
    return [name for name, layer in layers.items() if name not in fisher and _reaches(asked, name, layer.layout)]


def _chosen(fisher: Fisher, layers: Patterns) -> Fisher:
    """The same blocks of the layers that a pattern names: by the layer, its module or a parameter of it."""
    names = {one for name, block in fisher.items() for one in _names(name, block.layout)}
    _require_matches(layers, names, fisher)
    wanted = [name for name, block in fisher.items() if _reaches(layers, name, block.layout)]
    return copied(fisher, wanted)


def copied(fisher: Fisher, layers: Iterable[str]) -> Fisher:
    """The same blocks of some layers without what was computed of them and kept; the tensors are shared."""
    names = list(layers)
    groups = [(share, {name: of[name].to(of[name].device) for name in names}) for share, of in fisher._groups]
    return Fisher({name: fisher[name].to(fisher[name].device) for name in names}, meta=fisher.meta, groups=groups)


def _names(name: str, layout: WeightLayout) -> set[str]:
    """What a pattern may match: a layer, its parameters, and the modules that hold these."""
    return {name, *layout.names, *(one.rpartition(".")[0] for one in layout.names)} - {""}


def _reaches(patterns: Patterns, name: str, layout: WeightLayout) -> bool:
    every = [patterns] if isinstance(patterns, str) else patterns
    return any(one == "*" or matches(known, one) for known in _names(name, layout) for one in every)


def _require_matches(layers: Patterns, names: Iterable[str], shown: Iterable[str]) -> None:
    """Refuse a pattern that reaches none of the names, with those that are near it."""
    known = list(names)
    for pattern in [layers] if isinstance(layers, str) else layers:
        if pattern == "*" or any(matches(name, pattern) for name in known):
            continue
        near = get_close_matches(pattern.strip("*").strip("."), known, n=3, cutoff=0.4) or list(shown)[:3]
        raise CoverageError(
            f"layers: the pattern '{pattern}' matches none of {len(list(shown))} layers; did you mean "
            f"{' or '.join(repr(name) for name in near)}? '*' takes all of them"
        )
