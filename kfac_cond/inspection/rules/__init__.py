"""The rules behind ``report.findings()``: each a function of a report that yields what is beyond its limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from ..findings import Finding
from . import blocks, steps, whole

if TYPE_CHECKING:
    from ..report import LayerReport, Report

Rule = Callable[["Report"], Iterable[Finding]]


def _of_every_layer(rule: Callable[[LayerReport, Report], Iterator[Finding]]) -> Rule:
    """A rule of layers as one of reports."""

    def found(report: Report) -> Iterator[Finding]:
        for layer in report.values():
            yield from rule(layer, report)

    return found


RULES: tuple[Rule, ...] = (*whole.RULES, *map(_of_every_layer, (*blocks.RULES, *steps.RULES)))
"""All of them."""
