"""A report as text that fits a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..tables import fitted, table

if TYPE_CHECKING:
    from .report import LayerReport, Report

MOST_ROWS = 40
"""Layers shown in full; of more, the first and the last."""


def report_text(report: Report) -> str:
    """How it was made, a row for each layer, the whole, and what could not be found."""
    head = ["layer", "kind", "shape", "trace", "largest", "condition", "rank"]
    head += [] if report.damping is None else [f"d_eff({report.damping:g})", "below"]
    rows = [_cells(layer, report.damping) for layer in report.values()]
    left_out = len(rows) - MOST_ROWS
    if left_out > 1:
        half = MOST_ROWS // 2
        rows = [*rows[:half], (f"... {left_out} more layers", *[""] * (len(head) - 1)), *rows[-half:]]
    facts = ", ".join(f"{key} {value}" for key, value in report.meta.items() if isinstance(value, str | int | float))
    whole = report.whole
    lines = [fitted(f"Report of {len(report)} layers, {whole.parameters:,} parameters: {facts}")]
    lines.append(table(head, rows, [""] * len(rows), right=range(3, len(head))))
    if whole.trace is not None:
        lines.append(fitted(_totals(report)))
    lines += [fitted(f"not found: {section}: {why}") for section, why in report.problems.items()]
    return "\n".join(lines)


def _totals(report: Report) -> str:
    whole = report.whole
    text = f"trace {whole.trace:.4g}"
    if whole.trace_error is not None:
        text += f" +- {whole.trace_error.error:.2g}"
    if whole.calibration is not None:
        kept, rank = whole.calibration.keeps_most, whole.calibration.rank
        text += f"; damping {kept:.2g} keeps 90 % of the effective dimension, whose most is {rank:,}"
    if whole.effective_dimension is not None and report.damping is not None:
        text += f"; at damping {report.damping:g} it is {whole.effective_dimension:.4g}"
    return text


def _cells(layer: LayerReport, damping: float | None) -> tuple[str, ...]:
    start = (layer.name or "(the model)", layer.kind, " x ".join(map(str, layer.shape)))
    spectrum = layer.spectrum
    if spectrum is None:
        return (*start, *["-"] * (4 if damping is None else 6))
    numbers = (spectrum.trace, spectrum.largest, spectrum.condition(0.0 if damping is None else damping))
    cells = (*start, *(f"{number:.3g}" for number in numbers), f"{spectrum.rank:,}")
    if damping is None:
        return cells
    return (*cells, f"{spectrum.effective_dimension(damping):.4g}", f"{100 * spectrum.share_below(damping):.0f} %")
