"""Findings: what a report says in plain sentences, each with a number, its threshold and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .report import Report

Severity = Literal["info", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
"""The most severe first."""
NAMED = 3
"""Layers that a line names before it counts the others."""


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

    def __str__(self) -> str:
        return f"{self.severity}: {self.message}; {self.advice}"


@dataclass(frozen=True)
class Limit:
    """What a number is held against: the rule's row in the table of all, whoever measures the number.

    Args:
        code: the rule's name.
        severity: of what it finds.
        value: the threshold.
        quantity: what the number is, and on which side of the threshold it is found.
        reason: why the threshold is there.
    """

    code: str
    severity: Severity
    value: float
    quantity: str
    reason: str

    def found(
        self, layer: str | None, number: float, sentence: str, advice: str, *, threshold: float | None = None
    ) -> Finding:
        """A finding of this rule.

        Args:
            layer: its name, empty where the model is the layer; None for the whole.
            number: that was measured.
            sentence: what is the matter, without the layer's name.
            advice: what to do.
            threshold: where it is not the same for all layers.
        """
        message = sentence if layer is None else f"`{layer or '(the model)'}`: {sentence}"
        held_against = self.value if threshold is None else threshold
        return Finding(self.severity, layer or "", self.code, message, float(number), float(held_against), advice)


@dataclass(frozen=True)
class Group:
    """The findings of one rule, which make one line.

    Args:
        findings: one or more, of one code, the furthest from the threshold first.
    """

    findings: tuple[Finding, ...]

    @property
    def first(self) -> Finding:
        """The one that stands for all."""
        return self.findings[0]

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of all layers; empty where it is of the whole."""
        return tuple(one.layer for one in self.findings if one.layer)

    @property
    def others(self) -> str:
        """Who has the same, beside the first: 'and so in 12 more: a, b, c ...'; empty where nobody does."""
        names = [one.layer or "(the model)" for one in self.findings[1:]]
        if not names:
            return ""
        more = " ..." if len(names) > NAMED else ""
        return f"and so in {len(names)} more: {', '.join(names[:NAMED])}{more}"

    def __str__(self) -> str:
        others = f" ({self.others})" if self.others else ""
        return f"{self.first.severity}: {self.first.message}{others}; {self.first.advice}"


def findings(report: Report) -> list[Finding]:
    """All findings of all rules, the most severe first, those of one rule together."""
    from .rules import RULES

    # What is no number is not held against anything: a rule of its own says of which layers that is so.
    found = [one for rule in RULES for one in rule(report) if not isnan(one.number)]
    return [one for group in grouped(found) for one in group.findings]


def grouped(found: Iterable[Finding]) -> list[Group]:
    """A group for each code, the most severe first; in it the furthest from the threshold first."""
    of_codes: dict[str, list[Finding]] = {}
    for one in found:
        of_codes.setdefault(one.code, []).append(one)
    groups = [Group(tuple(sorted(several, key=_nearness))) for several in of_codes.values()]
    return sorted(groups, key=lambda group: SEVERITIES.index(group.first.severity))


def _nearness(one: Finding) -> float:
    """The less, the further the number is from its threshold; without one, by the number alone."""
    if one.threshold == 0.0 or one.number <= 0.0:
        return -abs(one.number)
    ratio = one.number / one.threshold
    return -max(ratio, 1.0 / ratio)
