"""Rules of the whole: what is covered, whether draws and scale are right, and what no layer says alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import log, sqrt
from typing import TYPE_CHECKING

from ..findings import Finding
from ..limits import (
    APART,
    COUPLED,
    NOT_QUADRATIC,
    SAMPLING,
    SCALE,
    SMALL_BATCH,
    UNCOVERED,
    UNDERPREDICTED,
    UNUSED,
)
from .steps import SURE, is_a_job

if TYPE_CHECKING:
    from ..divergence import WholeKL
    from ..report import LayerReport, Report

SHOWN = 3
"""Names that are written out."""
DIRECTIONS = 2
"""Random directions that ``WholeKL.scale`` is measured along."""


def uncovered(report: Report) -> Iterator[Finding]:
    """Parameters that no block covers."""
    share, names = report.whole.covered, report.whole.uncovered
    if share is None or not names:
        return
    listed = ", ".join(names[:SHOWN]) + " ..." * (len(names) > SHOWN)
    yield UNCOVERED.found(
        None,
        1 - share,
        f"{100 * (1 - share):.2g} % of the trainable numbers have no block ({listed})",
        "kc.coverage(model, batch) says why, and what to do of each; until then the plain gradient trains them",
    )


def unused(report: Report) -> Iterator[Finding]:
    """Layers that no forward used."""
    for name in report.whole.unused:
        yield UNUSED.found(
            name,
            1,
            "no forward over the data used it, so it has no block",
            "freeze or remove it if it is not needed; else give data that reach it, and call its module rather than "
            "use its weight in another way",
        )


def sampling_check(report: Report) -> Iterator[Finding]:
    """Whether labels are drawn from p."""
    check = report.whole.sampling
    if check is None or check.probability >= SAMPLING.value:
        return
    of_head = f" of head '{check.head}'" if check.head else ""
    yield SAMPLING.found(
        None,
        check.probability,
        f"the labels drawn{of_head} are not from p(y | outputs): z is {check.z_output:.1f} at output {check.output}, "
        f"{check.z_scale:.1f} along the scale of the outputs, and the output Fisher of the draws is "
        f"{check.fisher_ratio:.2f} times its closed form",
        "look for labels drawn at another temperature (kc.Tempered), a variance or class weights that the likelihood "
        "does not know, or outputs that are probabilities where logits are expected",
    )


def wrong_scale(report: Report) -> Iterator[Finding]:
    """Whether F is off by a factor."""
    scale = None if report.whole.kl is None else report.whole.kl.scale
    spectra = [layer.spectrum for layer in report.values() if layer.spectrum is not None]
    trace = sum(one.trace for one in spectra)
    if scale is None or scale <= 0.0 or trace == 0.0:
        return
    # z^T F z of a normal z has the variance 2 tr F^2; that of drawing labels is in F.
    squares = sum(float(one.values**2 @ one.counts) for one in spectra)
    of_labels = 0.0 if report.whole.trace_error is None else report.whole.trace_error.relative
    error = sqrt(2 * squares / (DIRECTIONS * trace**2) + of_labels**2)
    if abs(log(scale)) <= max(log(SCALE.value), SURE * error):
        return
    yield SCALE.found(
        None,
        scale,
        f"along random directions the measured KL is {scale:.2g} times what F predicts, and a right F would be within "
        f"a factor of {1 + SURE * error:.2g}",
        _why_off(report),
    )


def _why_off(report: Report) -> str:
    """What to look for where F is off by a factor: what is likely first."""
    wrong = (
        "look for a reduction ('sum' for 'mean'), a temperature or a variance that F was made with and the model does "
        "not have, or factors of another model"
    )
    if is_a_job(report):
        return (
            "its factors are averages over past steps, and the model may have moved on since: forget faster, "
            f"Schedule(decay=...), or lower the learning rate; if they have settled, {wrong}"
        )
    if report.meta.get("structure") in ("kfac", "kpsvd") and any(map(_has_positions, report.values())):
        return (
            "'kfac' leaves out what the positions of convolutions and sequences add up to: level='full' says how much, "
            f"layer by layer, and structure='ekfac' has the exact trace; if that is not it, {wrong}"
        )
    return wrong


def _has_positions(layer: LayerReport) -> bool:
    counts = layer.counts
    return counts is not None and (counts.positions or 0.0) > (counts.examples or 0.0)


def divergence(report: Report) -> Iterator[Finding]:
    """Whether the update changes the predictions as F and the damping say."""
    kl = report.whole.kl
    if kl is None:
        return
    ratio = _over_damped(kl)
    if ratio is not None and kl.damping is not None and ratio > UNDERPREDICTED.value:
        yield UNDERPREDICTED.found(
            None,
            ratio,
            f"the update at damping {kl.damping:.2g} changes the predictions {kl.ratio:.3g} times as much as F says, "
            f"and {ratio:.3g} times as much as F and the damping together: it goes where F is too small",
            f"raise the damping, say to {ratio * kl.damping:.1g}, at which the two come about even; use "
            f"structure='ekfac'; or shorten steps by the KL that is measured, not the one that is predicted",
        )
    if kl.remainder is not None and kl.remainder > NOT_QUADRATIC.value:
        yield NOT_QUADRATIC.found(
            None,
            kl.remainder,
            f"even a short step along the update is not quadratic: measured over predicted KL changes by "
            f"{100 * kl.remainder:.0f} % between half of it and all",
            "raise the damping, so that the update keeps to directions that F knows, and take the predicted KL for no "
            "bound",
        )


def _over_damped(kl: WholeKL) -> float | None:
    """Measured KL over 1/2 u^T (F + lambda) u; of a natural step half of decrease and KL together."""
    if kl.measured is None or kl.decrease is None or not kl.decrease + kl.predicted > 0.0:
        return None
    return 2 * kl.measured / (kl.decrease + kl.predicted)


def small_batch(report: Report) -> Iterator[Finding]:
    """Whether a batch's gradient is mostly noise."""
    signal = report.whole.signal
    if signal is None or signal.ratio >= SMALL_BATCH.value or not signal.plain.noise > 0.0:
        return
    needed = signal.plain.scale
    advice = (
        f"a batch of {needed:.0f} has as much signal as noise"
        if 2 * signal.plain.signal_error < signal.plain.signal
        else f"no signal is found in {signal.examples:,} examples; a batch of {signal.plain.scale_least:.0f} at least "
        f"would be needed"
    )
    yield SMALL_BATCH.found(
        None,
        max(signal.ratio, 0.0),
        f"the gradient of {signal.batch:.0f} examples is {100 * max(signal.ratio, 0.0):.2g} % signal to noise, in "
        f"squares",
        f"{advice}: larger batches, accumulation or momentum, or a lower learning rate near the end of training",
    )


def coupled(report: Report) -> Iterator[Finding]:
    """Whether most of the Fisher is outside of the blocks."""
    found = report.whole.block_diagonality
    if found is None or found.share - SURE * (found.standard_error or 0.0) <= COUPLED.value:
        return
    yield COUPLED.found(
        None,
        found.share,
        f"{100 * found.share:.0f} % of the squared norm of the Fisher is outside the layers' blocks",
        "layers move together: a step that each layer takes as if alone overshoots. Bound it with a trust region, or "
        "use exact products: kc.NaturalGradient(direction='exact'), kc.implicit",
    )


def apart(report: Report) -> Iterator[Finding]:
    """Whether layers call for dampings that are far apart."""
    spectra = {name: layer.spectrum for name, layer in report.items() if layer.spectrum is not None}
    own = {name: one.damping_for_trace(0.9) for name, one in spectra.items() if one.trace > 0.0}
    if len(own) < 2:
        return
    least, most = min(own, key=own.__getitem__), max(own, key=own.__getitem__)
    if own[most] <= APART.value * own[least]:
        return
    yield APART.found(
        None,
        own[most] / own[least],
        f"90 % of the trace are kept at a damping of {own[most]:.1g} in `{most}` and of {own[least]:.1g} in `{least}`: "
        f"one damping does not serve both",
        "give layers dampings of their own, rules={pattern: dict(damping=...)}, or one that is relative to each "
        "block's mean eigenvalue, kc.Damping(..., relative=True)",
    )


RULES: tuple[Callable[[Report], Iterator[Finding]], ...] = (
    sampling_check,
    uncovered,
    unused,
    wrong_scale,
    divergence,
    small_batch,
    coupled,
    apart,
)
