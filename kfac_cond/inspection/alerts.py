"""What a reading of a training run is held against, by the limits that a report is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import isfinite
from typing import Any

from .findings import Finding, grouped
from .limits import CONCENTRATED, FAILED, FEW, FEW_POSITIONS, LARGE_STEP, NOT_FINITE, SGD, SKIPPED, STALE
from .readings import Reading


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
        yield SKIPPED.found(
            None,
            skipped,
            f"{skipped:g} captures since the last reading had statistics that are not finite and were left out",
            "look for NaN or infinite inputs, too high a learning rate, or fp16 overflow",
        )


def _not_finite(layer: str, quantities: list[str]) -> Finding:
    return NOT_FINITE.found(
        layer,
        len(quantities),
        f"{', '.join(quantities)} not finite",
        "look for NaN or infinite inputs or weights, or too high a learning rate",
    )


def _acts_as_sgd(layer: str, numbers: Mapping[str, float], side: int | None, layers: int) -> Finding | None:
    cosine = numbers.get("cosine")
    if "age" not in numbers or cosine is None or cosine < SGD.value:
        return None
    return SGD.found(
        layer,
        cosine,
        f"the cosine of its update and its gradient is {cosine:.4f}; K-FAC acts as SGD there",
        "lower the damping, or give the layer its own with rules={pattern: dict(damping=...)}; kc.inspect(kfac) says "
        "which to try",
    )


def _stale(layer: str, numbers: Mapping[str, float], side: int | None, layers: int) -> Finding | None:
    cosine = numbers.get("stale_cosine")
    if cosine is None or cosine >= STALE.value:
        return None
    return STALE.found(
        layer,
        cosine,
        f"the last refresh turned its update by a cosine of {cosine:.3f}: the inverse before was stale",
        "refresh more often, Schedule(inverses=...) or kc.Adaptive, or forget more slowly, Schedule(decay=...)",
    )


def _few_positions(layer: str, numbers: Mapping[str, float], side: int | None, layers: int) -> Finding | None:
    positions = numbers.get("effective_positions")
    if positions is None or side is None or positions >= side:
        return None
    return FEW_POSITIONS.found(
        layer,
        positions,
        f"its factors are averages of about {positions:.0f} positions, and have a side of {side}: they are singular, "
        f"and the damping decides in what is left",
        "average over more, with a decay nearer to 1 or captures of larger batches; early in a run it goes by itself",
        threshold=side,
    )


def _failed(layer: str, numbers: Mapping[str, float], side: int | None, layers: int) -> Finding | None:
    failures = numbers.get("failures", 0.0)
    if failures <= FAILED.value:
        return None
    return FAILED.found(
        layer,
        failures,
        f"its last {failures:g} factorisations failed, and an older inverse stands in",
        "raise the damping; look for too high a learning rate or fp16 overflow",
    )


def _large_step(layer: str, numbers: Mapping[str, float], side: int | None, layers: int) -> Finding | None:
    share = numbers.get("step_to_weight")
    if share is None or share <= LARGE_STEP.value:
        return None
    return LARGE_STEP.found(
        layer,
        share,
        f"one step moves it by {100 * share:.0f} % of the length of its weights",
        "bound the update, trust_region=kc.KLClip(1e-3), lower the learning rate, or raise the damping",
    )


def _concentrated(layer: str, numbers: Mapping[str, float], side: int | None, layers: int) -> Finding | None:
    share = numbers.get("kl_share")
    if share is None or share <= CONCENTRATED.value or layers < FEW:
        return None
    return CONCENTRATED.found(
        layer,
        share,
        f"{100 * share:.0f} % of the update's KL is in this layer of {layers}",
        "raise its damping with rules={pattern: dict(damping=...)}, so that a trust region does not shorten the others",
    )


_Rule = Callable[[str, Mapping[str, float], "int | None", int], "Finding | None"]
_RULES: tuple[_Rule, ...] = (_acts_as_sgd, _stale, _few_positions, _failed, _large_step, _concentrated)


def in_words(findings: list[Finding], heard: set[Any]) -> Iterator[str]:
    """A line for each rule that finds something in layers it has not spoken of before; information is left out."""
    fresh = [one for one in findings if one.severity != "info" and (one.code, one.layer) not in heard]
    heard.update((one.code, one.layer) for one in fresh)
    yield from map(str, grouped(fresh))
