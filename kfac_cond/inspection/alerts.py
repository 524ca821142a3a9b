"""What a reading of a training run is held against: each rule with its threshold and the reason for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import isfinite
from typing import Any

from .findings import Finding
from .readings import Reading

SGD = 0.99
"""Cosine of update and gradient, eight degrees: beyond it what a layer is preconditioned with is a number."""
STALE = 0.9
"""Cosine of the updates before and after a refresh, 26 degrees: below it a tenth of each step was of another time."""
STEP = 0.3
"""Share of the weights' length that one step moves: a few such steps, and nothing is left of what the layer was. Plain
training moves about a thousandth; of a small layer a first step of K-FAC may well move a tenth."""
CONCENTRATED = 0.9
"""Share of an update's KL in one of at least ``FEW`` layers: a trust region then shortens all for the sake of one."""
FEW = 4
NOT_FINITE = "not-finite"


def alerts(reading: Reading, sides: Mapping[str, int]) -> Iterator[Finding]:
    """The findings of a reading.

    Args:
        reading: without findings.
        sides: of layers whose factors are moments of positions, the larger side that is kept whole.
    """
    for layer, numbers in reading.layers.items():
        bad = [quantity for quantity, value in numbers.items() if not isfinite(value)]
        if bad:
            yield _not_finite(layer, bad)
            continue
        for rule in _RULES:
            found = rule(layer, numbers, sides.get(layer), len(reading.layers))
            if found is not None:
                yield found
    skipped = reading.whole.get("new_skipped_captures", 0.0)
    if skipped > 0:
        yield Finding(
            "warning",
            "",
            "skipped-captures",
            f"{skipped:g} captures since the last reading had statistics that are not finite and were left out",
            skipped,
            0.0,
            "look for NaN or infinite inputs, too high a learning rate, or fp16 overflow",
        )


def _not_finite(layer: str, quantities: list[str]) -> Finding:
    return Finding(
        "error",
        layer,
        NOT_FINITE,
        f"`{layer}`: {', '.join(quantities)} not finite",
        float(len(quantities)),
        0.0,
        "look for NaN or infinite inputs or weights, or too high a learning rate",
    )


def _acts_as_sgd(layer: str, numbers: Mapping[str, float], side: int | None, layers: int) -> Finding | None:
    cosine = numbers.get("cosine")
    if "age" not in numbers or cosine is None or cosine < SGD:
        return None
    return Finding(
        "warning",
        layer,
        "acts-as-sgd",
        f"`{layer}`: the cosine of its update and its gradient is {cosine:.4f}; K-FAC acts as SGD there",
        cosine,
        SGD,
        "lower the damping, or give the layer its own with rules={pattern: dict(damping=...)}; kc.inspect(kfac) says "
        "which keeps 90 % of the effective dimension",
    )


def _stale(layer: str, numbers: Mapping[str, float], side: int | None, layers: int) -> Finding | None:
    cosine = numbers.get("stale_cosine")
    if cosine is None or cosine >= STALE:
        return None
    return Finding(
        "warning",
        layer,
        "stale",
        f"`{layer}`: the last refresh turned its update by a cosine of {cosine:.3f}: the inverse before was stale",
        cosine,
        STALE,
        "refresh more often, Schedule(inverses=...) or kc.Adaptive, or forget more slowly, Schedule(decay=...)",
    )


def _few_positions(layer: str, numbers: Mapping[str, float], side: int | None, layers: int) -> Finding | None:
    positions = numbers.get("effective_positions")
    if positions is None or side is None or positions >= side:
        return None
    return Finding(
        "info",
        layer,
        "few-positions",
        f"`{layer}`: its factors are averages of about {positions:.0f} positions, and have a side of {side}: they are "
        f"singular, and the damping decides in what is left",
        positions,
        float(side),
        "average over more, with a decay nearer to 1 or captures of larger batches; early in a run it goes by itself",
    )


def _failed(layer: str, numbers: Mapping[str, float], side: int | None, layers: int) -> Finding | None:
    failures = numbers.get("failures", 0.0)
    if failures <= 0:
        return None
    return Finding(
        "warning",
        layer,
        "failed",
        f"`{layer}`: its last {failures:g} factorisations failed, and an older inverse stands in",
        failures,
        0.0,
        "raise the damping; look for too high a learning rate or fp16 overflow",
    )


def _large_step(layer: str, numbers: Mapping[str, float], side: int | None, layers: int) -> Finding | None:
    share = numbers.get("step_to_weight")
    if share is None or share <= STEP:
        return None
    return Finding(
        "warning",
        layer,
        "large-step",
        f"`{layer}`: one step moves it by {100 * share:.0f} % of the length of its weights",
        share,
        STEP,
        "bound the update, trust_region=kc.KLClip(1e-3), lower the learning rate, or raise the damping",
    )


def _concentrated(layer: str, numbers: Mapping[str, float], side: int | None, layers: int) -> Finding | None:
    share = numbers.get("kl_share")
    if share is None or share <= CONCENTRATED or layers < FEW:
        return None
    return Finding(
        "info",
        layer,
        "kl-concentrated",
        f"`{layer}`: {100 * share:.0f} % of the update's KL is in this layer of {layers}",
        share,
        CONCENTRATED,
        "raise its damping with rules={pattern: dict(damping=...)}, so that a trust region does not shorten the others",
    )


_Rule = Callable[[str, Mapping[str, float], "int | None", int], "Finding | None"]
_RULES: tuple[_Rule, ...] = (_acts_as_sgd, _stale, _few_positions, _failed, _large_step, _concentrated)


def in_words(findings: list[Finding], heard: set[Any]) -> Iterator[str]:
    """A line for each rule that finds something in layers it has not spoken of before; information is left out."""
    fresh: dict[str, list[Finding]] = {}
    for one in findings:
        if one.severity != "info" and (one.code, one.layer) not in heard:
            heard.add((one.code, one.layer))
            fresh.setdefault(one.code, []).append(one)
    for several in fresh.values():
        others = f" (and so in {len(several) - 1} more)" if len(several) > 1 else ""
        yield f"{several[0].message}{others}: {several[0].advice}"
