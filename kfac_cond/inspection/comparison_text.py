"""A comparison as text that fits a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..tables import fitted, table

if TYPE_CHECKING:
    from .compare import Comparison, LayerComparison, WholeComparison

MOST_ROWS = 40
"""Layers shown in full; of more, the first and the last."""


def comparison_text(comparison: Comparison) -> str:
    """A row for each layer, the whole, the layers that one of them lacks, and what else differs."""
    moved = comparison.whole.weights is not None
    head = ["layer", "trace ratio", "d_eff", "change", "overlap", "A", "G", "cosine", "Bures"]
    head += ["moved", "forgetting"] if moved else []
    rows = [_cells(layer, moved) for layer in comparison.values()]
    notes = [layer.remark for layer in comparison.values()]
    left_out = len(rows) - MOST_ROWS
    if left_out > 1:
        half = MOST_ROWS // 2
        gap = (f"... {left_out} more layers", *[""] * (len(head) - 1))
        rows, notes = [*rows[:half], gap, *rows[-half:]], [*notes[:half], "", *notes[-half:]]
    lines = [fitted(f"Comparison of {len(comparison)} layers, at damping {comparison.damping:.3g}")]
    lines += [table(head, rows, notes, right=range(1, len(head))), fitted(_totals(comparison.whole))]
    for which, names in (("first", comparison.only_in_a), ("second", comparison.only_in_b)):
        if names:
            lines.append(fitted(f"in the {which} only: {', '.join(names)}"))
    return "\n".join([*lines, *(fitted(f"note: {note}") for note in comparison.notes)])


def _cells(layer: LayerComparison, moved: bool) -> tuple[str, ...]:
    numbers = [layer.trace_ratio, layer.dimension_a, layer.dimension_change, layer.overlap]
    numbers += [layer.overlap_A, layer.overlap_G, layer.fisher_overlap, layer.bures_relative]
    if moved:
        weights = layer.weights
        numbers += [None if weights is None else weights.relative, None if weights is None else weights.forgetting]
    return (layer.name or "(the model)", *("-" if number is None else f"{number:.3g}" for number in numbers))


def _totals(whole: WholeComparison) -> str:
    text = f"the whole: trace {whole.trace_a:.4g} to {whole.trace_b:.4g}"
    text += f"; effective dimension {whole.dimension_a:.4g} to {whole.dimension_b:.4g}"
    if whole.bures is not None:
        text += f"; Bures distance {whole.bures:.3g}"
    if whole.weights is not None:
        text += f"; weights moved by {whole.weights.norm:.3g}, forgetting risk {whole.weights.forgetting:.3g} per term"
    return text
