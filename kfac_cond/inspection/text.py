"""A report as text that fits a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..tables import fitted, table
from .findings import grouped
from .plain import flat, plain

if TYPE_CHECKING:
    from .report import LayerReport, Report, Whole

MOST_ROWS = 40
"""Layers shown in full; of more, the first and the last."""
MOST_FINDINGS = 8
"""Findings shown below the table."""


def report_text(report: Report) -> str:
    """How it was made, a row for each layer, the whole, and what could not be found."""
    at = report.damping
    head = ["layer", "kind", "shape", "trace", "largest", "condition" if at is None else f"cond({at:g})", "rank"]
    head += [] if at is None else [f"d_eff({at:g})", "below"]
    rows = [_cells(layer, at) for layer in report.values()]
    left_out = len(rows) - MOST_ROWS
    if left_out > 1:
        half = MOST_ROWS // 2
        rows = [*rows[:half], (f"... {left_out} more layers", *[""] * (len(head) - 1)), *rows[-half:]]
    # A column of kinds only where they are known.
    shown = [column for column in range(len(head)) if column != 1 or any(row[1] for row in rows)]
    cells = [[row[column] for column in shown] for row in rows]
    numbers = [index for index, column in enumerate(shown) if column > 2]
    lines = [
        *map(fitted, _facts(report)),
        table([head[column] for column in shown], cells, [""] * len(rows), right=numbers),
    ]
    if report.whole.trace is not None:
        lines.append(fitted(_totals(report)))
    if report.whole.uncovered:
        lines.append(fitted(f"not covered: {', '.join(report.whole.uncovered)}"))
    lines += map(fitted, _findings(report))
    lines += [fitted(f"not found: {section}: {why}") for section, why in report.problems.items()]
    return _printable("\n".join(lines))


def _facts(report: Report) -> Iterator[str]:
    """What was looked at and how, from what is known of it."""
    meta, number = report.meta, len(report)
    of = f" of {meta['source']}" if "source" in meta else ""
    yield f"Report{of}: {number} layer{'s' * (number != 1)}, {report.whole.parameters:,} parameters"
    known = {
        "likelihood": "{}",
        "kind": "kind {}",
        "structure": "structure {}",
        "samples": "{} draws a term",
        "examples": "{} examples",
        "terms": "{:g} loss terms",
        "level": "level {}",
        "passes": "{:.3g} passes",
        "seconds": "{:.3g} s",
        "note": "{}",
    }
    said = [text.format(meta[key]) for key, text in known.items() if meta.get(key) is not None]
    if said:
        yield ", ".join(said)


def _findings(report: Report) -> Iterator[str]:
    """A line for each of the most severe rules that found something, and how many more there are."""
    found = grouped(report.findings())
    yield from map(str, found[:MOST_FINDINGS])
    if len(found) > MOST_FINDINGS:
        yield f"... {len(found) - MOST_FINDINGS} more findings: report.findings()"


def layer_text(layer: LayerReport) -> str:
    """What was found of one layer, a number a line."""
    start = f"{layer.name or '(the model)'}: {layer.kind} {' x '.join(map(str, layer.shape))}, depth {layer.depth}"
    numbers = {key: value for key, value in flat(layer.to_dict()).items() if "." in key}
    return _printable("\n".join([start, *_numbers(numbers)]))


def whole_text(whole: Whole) -> str:
    """What was found of the whole model likewise."""
    return "\n".join(["the whole model", *_numbers(flat(plain(whole)))])


def _numbers(found: Mapping[str, Any]) -> list[str]:
    known = {key: value for key, value in found.items() if value not in (None, "")}
    wide = max(map(len, known), default=0)
    return [f"  {key:<{wide}}  {_written(value)}" for key, value in known.items()]


def _printable(text: str) -> str:
    """The same text, what would steer a terminal written out: names come from files of others."""
    return "".join(one if one.isprintable() or one == "\n" else repr(one)[1:-1] for one in text)


def _written(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _totals(report: Report) -> str:
    whole = report.whole
    text = f"trace {whole.trace:.4g}"
    if whole.trace_error is not None:
        text += f" +- {whole.trace_error.error:.2g}"
    if whole.calibration is not None and whole.calibration.rank:
        found = whole.calibration
        text += (
            f"; damping {found.keeps_trace:.2g} keeps 90 % of it, {found.keeps_most:.2g} 90 % of the effective "
            f"dimension, whose most is {found.rank:,}"
        )
    if whole.effective_dimension is not None and report.damping is not None:
        text += f"; at damping {report.damping:g} that is {whole.effective_dimension:.4g}"
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
