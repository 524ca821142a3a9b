"""Findings: what a report says in plain sentences, each with a number, its threshold and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .report import Report

Severity = Literal["info", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One thing that a report says.

    Args:
        severity: 'error' where results are wrong, 'warning' where they are poor, 'info' where it is good to know.
        layer: the layer's name; empty for the whole model.
        code: the rule's name, for machines.
        message: a sentence.
        number: that was found.
        threshold: that it was held against.
        advice: what to do.
    """

    severity: Severity
    layer: str
    code: str
    message: str
    number: float
    threshold: float
    advice: str


RULES: tuple[Callable[[Report], Iterable[Finding]], ...] = ()


def findings(report: Report) -> list[Finding]:
    """All findings of all rules, the most severe first."""
    found = [one for rule in RULES for one in rule(report)]
    return sorted(found, key=lambda one: ("error", "warning", "info").index(one.severity))
