"""What the conditional Fisher says about each layer: numbers with units, a table, a page and advice."""

from __future__ import annotations

from . import plots
from .compare import Comparison, compare
from .findings import Finding
from .inspect import inspect
from .report import Calibration, Cost, Counts, LayerReport, Numerics, Report, Whole
from .spectra import Spectrum, spectrum_of

__all__ = [
    "Calibration",
    "Comparison",
    "Cost",
    "Counts",
    "Finding",
    "LayerReport",
    "Numerics",
    "Report",
    "Spectrum",
    "Whole",
    "compare",
    "inspect",
    "plots",
    "spectrum_of",
]
