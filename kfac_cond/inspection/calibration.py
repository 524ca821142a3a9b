"""Dampings of a whole model, held against the spectra of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, isfinite, log10

import numpy as np

from .report import Calibration
from .spectra import Spectrum, damping_for, damping_for_trace

POINTS = 61
"""Dampings of a grid: five for each factor of ten."""
DECADES = 12
"""How far a grid goes down from the largest eigenvalue."""


def grid(spectra: Sequence[Spectrum]) -> tuple[float, ...]:
    """Dampings from the power of ten above the largest eigenvalue down; from 1 where all are zero."""
    largest = max(one.largest for one in spectra)
    top = ceil(log10(largest)) if largest > 0.0 else 0
    return tuple(float(10.0**exponent) for exponent in np.linspace(top - DECADES, top, POINTS))


def calibrated(spectra: Sequence[Spectrum]) -> Calibration:
    """The effective dimension of all layers together over a grid of dampings, and the dampings that keep a share of it.

    Cost: nothing beside the spectra.
    """
    lambdas = grid(spectra)
    size = sum(one.size for one in spectra)
    own = [kept for one in spectra if isfinite(kept := one.damping_for_trace(0.9))]
    return Calibration(
        lambdas,
        tuple(sum(one.effective_dimension(damping) for one in spectra) for damping in lambdas),
        tuple(sum(one.share_below(damping) * one.size for one in spectra) / size for damping in lambdas),
        sum(one.rank for one in spectra),
        damping_for(spectra, 0.5),
        damping_for(spectra, 0.9),
        max(own) / min(own) if len(own) > 1 else None,
        damping_for_trace(spectra, 0.9),
    )


def cosine_expected(spectrum: Spectrum, damping: float) -> float:
    """tr F P / sqrt(tr F tr F P^2), P = (F + damping)^-1: the cosine of g and P g, of moments over g with E g g^T = F.

    Such a g is the gradient of a term at a drawn label, so this is what the cosine of a preconditioned and a plain
    gradient comes to where no gradient is at hand; 1 where F is zero.
    """
    P = 1.0 / (spectrum.values + damping)
    masses = spectrum.values * spectrum.counts
    if masses.sum() == 0.0:
        return 1.0
    return float((masses @ P) / np.sqrt(masses.sum() * (masses @ P**2)))
