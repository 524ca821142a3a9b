"""Rules of what was measured over data, layer by layer: divergences, errors, labels, updates, staleness."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import sqrt
from statistics import median
from typing import TYPE_CHECKING

from ..findings import Finding
from ..limits import (
    CONCENTRATED,
    DISPROPORTIONATE,
    DRIFTED,
    EKFAC,
    EMPIRICAL,
    FEW,
    INDEPENDENCE,
    STALE,
    SURPRISED,
)

if TYPE_CHECKING:
    from ..report import LayerReport, Report

SURE = 2.0
"""Standard errors that a number must be beyond its threshold by."""


def is_a_job(report: Report) -> bool:
    """Whether its factors are the averages of a running job, over steps at which the model was another."""
    return any(layer.staleness is not None for layer in report.values())


def concentrated(layer: LayerReport, report: Report) -> Iterator[Finding]:
    """Whether one layer has nearly all of the update's KL."""
    if layer.kl is None or len(report) < FEW or layer.kl.share <= CONCENTRATED.value:
        return
    yield CONCENTRATED.found(
        layer.name,
        layer.kl.share,
        f"{100 * layer.kl.share:.0f} % of the update's KL is in this layer of {len(report)}",
        "raise its damping with rules={pattern: dict(damping=...)}, so that a trust region does not shorten the others",
    )


def disproportionate(layer: LayerReport, report: Report) -> Iterator[Finding]:
    """Whether a step moves the layer by far more than the others."""
    every = [one.update.update_to_weight or 0.0 for one in report.values() if one.update is not None]
    if layer.update is None:
        return
    own = layer.update.update_to_weight
    if own is None or len(every) < FEW or not own > DISPROPORTIONATE.value * median(every) > 0.0:
        return
    yield DISPROPORTIONATE.found(
        layer.name,
        own / median(every),
        f"a step moves it by {own / median(every):.2g} times the share of its weights that it moves of other layers",
        f"a learning rate that suits them is too large here: raise its damping above {layer.update.damping:.1g} with "
        f"rules={{pattern: dict(damping=...)}}, or bound the update with trust_region=kc.KLClip(1e-3)",
    )


def ekfac_better(layer: LayerReport, report: Report) -> Iterator[Finding]:
    """Whether an eigen-corrected block would be much nearer to the exact one."""
    found = layer.approximation
    if found is None or not found.kfac > 0.0 or found.ekfac >= EKFAC.value * found.kfac:
        return
    error = _root((found.kfac_standard_error or 0.0) * EKFAC.value, found.ekfac_standard_error or 0.0)
    if EKFAC.value * found.kfac - found.ekfac <= SURE * error:
        return
    yield EKFAC.found(
        layer.name,
        found.ekfac / found.kfac,
        f"'kfac' is off the exact block by {100 * found.kfac:.0f} %, 'ekfac' by {100 * found.ekfac:.0f} %",
        "use structure='ekfac', or for this layer alone rules={pattern: dict(structure='ekfac')}",
    )


def independence(layer: LayerReport, report: Report) -> Iterator[Finding]:
    """Whether inputs and gradients are too dependent for a product of their moments."""
    found = layer.approximation
    if found is None or not found.independence_gap > 0.0:
        return
    gap, spread = found.independence_gap, SURE * (found.gap_standard_error or 0.0)
    if not (gap - spread > INDEPENDENCE.value or gap + spread < 1 / INDEPENDENCE.value):
        return
    adds_up = "the positions of an example add up" if gap < 1 else "large inputs come with small gradients"
    yield INDEPENDENCE.found(
        layer.name,
        gap,
        f"the trace of 'kfac' is {gap:.2g} times that of the exact block: {adds_up}",
        "use structure='ekfac', whose trace is exact"
        + (", or rules={pattern: dict(sharing='reduce')}, which adds positions up" if gap < 1 else ""),
    )


def against_empirical(layer: LayerReport, report: Report) -> Iterator[Finding]:
    """Whether the data's labels are much more or much less surprising than the model's own."""
    ratio = None if layer.empirical is None else layer.empirical.trace_ratio
    if ratio is None:
        return
    beside = " (which is an average over past steps)" if is_a_job(report) else ""
    if ratio < EMPIRICAL.value:
        yield EMPIRICAL.found(
            layer.name,
            ratio,
            f"the empirical Fisher has {100 * ratio:.2g} % of its trace{beside}: the data's labels are fitted "
            f"closer than the model's own draws",
            "draw labels, as this library does: steps by the empirical Fisher would grow as the loss falls",
        )
    if ratio > SURPRISED.value:
        yield SURPRISED.found(
            layer.name,
            ratio,
            f"the empirical Fisher has {ratio:.2g} times its trace{beside}: the data's labels surprise the model "
            f"more than it expects",
            "early in training that is so; of a trained model look for over-confidence (calibrate a temperature), "
            "wrong labels, or a variance of the likelihood that is too small",
        )


def stale(layer: LayerReport, report: Report) -> Iterator[Finding]:
    """Whether the inverse in use is of another time."""
    found = layer.staleness
    if found is None:
        return
    age = "" if found.age is None else f", made {found.age} steps ago,"
    advice = "refresh more often, Schedule(inverses=...) or kc.Adaptive, or forget more slowly, Schedule(decay=...)"
    if found.cosine is not None and found.cosine < STALE.value:
        yield STALE.found(
            layer.name,
            found.cosine,
            f"its inverse{age} turns an update by a cosine of {found.cosine:.3f} from a fresh one's: it is stale",
            advice,
        )
    drift = max(found.off_diagonal_A or 0.0, found.off_diagonal_G or 0.0)
    if found.cosine is None and drift > DRIFTED.value:
        yield DRIFTED.found(
            layer.name,
            drift,
            f"{100 * drift:.0f} % of a side is off its diagonal in the basis of its inverse{age} so the basis is no "
            f"longer its own",
            advice,
        )


def _root(*errors: float) -> float:
    return sqrt(sum(error**2 for error in errors))


RULES: tuple[Callable[[LayerReport, Report], Iterator[Finding]], ...] = (
    stale,
    disproportionate,
    against_empirical,
    concentrated,
    independence,
    ekfac_better,
)
