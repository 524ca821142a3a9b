"""What the conditional Fisher says about each layer: numbers with units, a table, a page and advice."""

from __future__ import annotations

from .findings import Finding
from .report import Calibration, Cost, Counts, LayerReport, Numerics, Report, Whole
from .spectra import Spectrum, spectrum_of

__all__ = [
    "Calibration",
    "Cost",
    "Counts",
    "Finding",
    "LayerReport",
    "Numerics",
    "Report",
    "Spectrum",
    "Whole",
    "spectrum_of",
]
