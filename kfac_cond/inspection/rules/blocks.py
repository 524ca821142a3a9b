"""Rules of what a layer's block says by itself: its spectrum, what it can be computed with, and what it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import isnan
from typing import TYPE_CHECKING, Any

from ..calibration import cosine_expected
from ..findings import Finding
from ..limits import (
    ASYMMETRY,
    DEAD_INPUTS,
    DEAD_OUTPUTS,
    DEFICIENT,
    FAILED,
    FEW_POSITIONS,
    ILL_CONDITIONED,
    LABEL_NOISE,
    NEGATIVE,
    NO_CURVATURE,
    NO_INVERSE,
    NOT_FINITE,
    RESIDUAL,
    SGD,
)
from ..plain import flat

if TYPE_CHECKING:
    from ..report import LayerReport, Report
    from ..spectra import Spectrum

MOSTLY = 0.9
"""Share of eigenvalues below the damping from which on the damping, not a flat spectrum, makes steps those of SGD."""
PRECISION = 0.1
"""Relative standard error that the advised number of draws comes to."""
SHOWN = 5
"""Indices that are written out."""
BLAME = {None: "", "A": "; side A (inputs) is to blame", "G": "; side G (output gradients) is to blame"}
"""In words."""


def damping_of(layer: LayerReport, report: Report) -> float | None:
    """That which the report is read at, or where none was given, that which the layer was inverted with."""
    return layer.health.damping if report.damping is None and layer.health is not None else report.damping


def advised(spectrum: Spectrum) -> str:
    """A damping to try in a layer, in words."""
    of_trace, of_dimension = spectrum.damping_for_trace(0.9), spectrum.damping_for(0.9)
    return (
        f"try {of_trace:.1g}, the damping that keeps 90 % of its trace ({of_dimension:.1g} keeps 90 % of its effective "
        f"dimension)"
    )


def acts_as_sgd(layer: LayerReport, report: Report) -> Iterator[Finding]:
    """Whether the damping, and not the block, makes the layer's steps."""
    at, spectrum = damping_of(layer, report), layer.spectrum
    if not at or spectrum is None or spectrum.trace == 0.0 or layer.parameters == 1:
        return
    below = spectrum.share_below(at)
    measured = None if layer.update is None or layer.update.damping != at else layer.update.cosine
    cosine = cosine_expected(spectrum, at) if measured is None else measured
    if below < MOSTLY or cosine < SGD.value:
        return
    share = "all" if below == 1.0 else f"{100 * below:.3g} % of"
    yield SGD.found(
        layer.name,
        cosine,
        f"{share} eigenvalues lie below damping {at:.2g}, and the cosine of its update and its gradient is "
        f"{cosine:.3f}; K-FAC acts as SGD there",
        advised(spectrum),
    )


def ill_conditioned(layer: LayerReport, report: Report) -> Iterator[Finding]:
    """Whether the damping is below the round-off of the spectrum."""
    at, spectrum = damping_of(layer, report), layer.spectrum
    if at is None or spectrum is None or spectrum.trace == 0.0:
        return
    noise = spectrum.round_off * spectrum.largest
    if at >= noise:
        return
    yield ILL_CONDITIONED.found(
        layer.name,
        at / noise,
        f"the condition number of F + {at:.2g} is {spectrum.condition(at):.2g}, beyond the "
        f"{1 / spectrum.round_off:.2g} that its precision resolves{BLAME[spectrum.blame]}; the smallest "
        "directions are divided by round-off",
        f"raise the damping above {noise:.1g}: {advised(spectrum)}",
    )


def rank_deficient(layer: LayerReport, report: Report) -> Iterator[Finding]:
    """Whether most directions have no curvature."""
    spectrum = layer.spectrum
    if spectrum is None or spectrum.trace == 0.0 or spectrum.rank >= DEFICIENT.value * spectrum.size:
        return
    yield DEFICIENT.found(
        layer.name,
        spectrum.rank / spectrum.size,
        f"{spectrum.rank:,} of {spectrum.size:,} eigenvalues are above round-off{BLAME[spectrum.blame]}",
        "estimate over more data if examples are fewer than the sides are wide; else the layer has directions that "
        "change no prediction, and the damping alone bounds steps along them",
    )


def no_curvature(layer: LayerReport, report: Report) -> Iterator[Finding]:
    """Whether the block is zero."""
    if layer.spectrum is None or layer.spectrum.trace > 0.0:
        return
    yield NO_CURVATURE.found(
        layer.name,
        0.0,
        "its Fisher is zero: nothing that it does changes the predictions",
        "look for a detached output, units that are all dead or saturated, or a loss that leaves its head out; "
        "K-FAC would divide its gradient by the damping alone",
    )


def dead(layer: LayerReport, report: Report) -> Iterator[Finding]:
    """Inputs that are always zero, and outputs that no score reaches."""
    spectrum = layer.spectrum
    if spectrum is None or spectrum.trace == 0.0 or len(layer.shape) < 2:
        return
    inputs, outputs = layer.shape[-1], layer.shape[-2]
    groups = layer.parameters // (inputs * outputs) or 1
    for limit, found, every, what, advice in (
        (
            DEAD_INPUTS,
            spectrum.dead_inputs,
            groups * inputs,
            "inputs are always zero",
            "of data they are constant features, which may be left out; of a hidden layer the units before are dead: a "
            "lower learning rate, or another initialisation or activation",
        ),
        (
            DEAD_OUTPUTS,
            spectrum.dead_outputs,
            groups * outputs,
            f"{'numbers' if inputs == 1 else 'outputs'} have no effect on any prediction, and so no gradient",
            "prune them or start them anew; a lower learning rate, or an activation that does not die",
        ),
    ):
        if len(found) > limit.value * every:
            yield limit.found(
                layer.name, len(found) / every, f"{len(found)} of {every} {what} ({_listed(found)})", advice
            )


def label_noise(layer: LayerReport, report: Report) -> Iterator[Finding]:
    """Whether drawing labels leaves the trace uncertain."""
    if layer.sampling is None or not layer.sampling.trace.relative > LABEL_NOISE.value:
        return
    trace = layer.sampling.trace
    yield LABEL_NOISE.found(
        layer.name,
        trace.relative,
        f"drawing labels leaves its trace uncertain by {100 * trace.relative:.0f} % with {trace.draws} draws a term",
        f"samples={trace.draws_needed(PRECISION)} brings it to {100 * PRECISION:.0f} %, and so do as many times more "
        f"examples; kind='exact' needs no draws",
    )


def few_positions(layer: LayerReport, report: Report) -> Iterator[Finding]:
    """Whether the factors are averages of fewer positions than they have rows."""
    side = max(layer.shape[-2:])
    staleness, counts = layer.staleness, layer.counts
    positions = staleness.effective_positions if staleness is not None else counts.positions if counts else None
    if positions is None or positions >= side:
        return
    yield FEW_POSITIONS.found(
        layer.name,
        positions,
        f"its factors are averages of about {positions:.0f} positions, and have a side of {side}: they are singular, "
        f"and in the rest the damping decides",
        "estimate over more data; in training a decay nearer to 1 or larger batches, and early in a run it goes by "
        "itself",
        threshold=side,
    )


def numerics(layer: LayerReport, report: Report) -> Iterator[Finding]:
    """What a second moment and its inverse cannot be but for round-off."""
    health = layer.health
    if health is None:
        return
    if health.asymmetry > ASYMMETRY.value:
        yield ASYMMETRY.found(
            layer.name,
            health.asymmetry,
            f"a side differs from its transpose by {health.asymmetry:.2g} of its length",
            "second moments are symmetric: estimate again with Options(dtype=torch.float32), and look for factors that "
            "were edited or merged by hand",
        )
    if health.negative_mass > NEGATIVE.value:
        yield NEGATIVE.found(
            layer.name,
            health.negative_mass,
            f"{100 * health.negative_mass:.2g} % of its spectrum is negative, and counted as zero",
            "keep statistics in float32 or wider, Options(dtype=torch.float32); what was subtracted or edited is no "
            "second moment",
        )
    if health.residual is not None and health.residual > RESIDUAL.value:
        yield RESIDUAL.found(
            layer.name,
            health.residual,
            f"(F + {health.damping:.2g})^-1 is off by {100 * health.residual:.2g} % of a vector",
            "raise the damping, or compute in float64: Options(dtype=torch.float64)",
        )


def failed(layer: LayerReport, report: Report) -> Iterator[Finding]:
    """Factorisations that failed, in training or here."""
    if layer.health is not None and layer.health.failures:
        yield FAILED.found(
            layer.name,
            layer.health.failures,
            f"its last {layer.health.failures} factorisations failed, and an older inverse stands in",
            "raise the damping; look for too high a learning rate or fp16 overflow",
        )
    why = report.problems.get(f"the inverse of {layer.name}")
    if why is not None:
        yield NO_INVERSE.found(layer.name, 1, f"it has no inverse: {why}", "raise the damping")


def not_finite(layer: LayerReport, report: Report) -> Iterator[Finding]:
    """Numbers that are none."""
    bad = [key for key, value in flat(layer.to_dict()).items() if _is_bad(key, value)]
    if bad:
        yield NOT_FINITE.found(
            layer.name,
            len(bad),
            f"{', '.join(bad[:SHOWN])}{' ...' * (len(bad) > SHOWN)} not finite",
            "look for NaN or infinite weights, inputs or labels, or too high a learning rate",
        )


def _is_bad(key: str, value: Any) -> bool:
    """NaN is; an infinite condition number or noise scale is an answer, an infinite length is none."""
    return isinstance(value, float) and (isnan(value) or (value == float("inf") and key.endswith("_norm")))


def _listed(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices[:SHOWN])) + " ..." * (len(indices) > SHOWN)


RULES: tuple[Callable[[LayerReport, Report], Iterator[Finding]], ...] = (
    not_finite,
    no_curvature,
    dead,
    acts_as_sgd,
    ill_conditioned,
    rank_deficient,
    few_positions,
    label_noise,
    numerics,
    failed,
)
