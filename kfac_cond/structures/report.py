"""The short table that a Fisher prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Block

MOST_ROWS = 30
"""Layers shown in full; of more, the first and the last."""


def fisher_table(blocks: Mapping[str, Block], meta: Mapping[str, Any]) -> str:
    """How the Fisher was estimated in one line, then layer, shape, trace and the sides kept as diagonals of each block.

    Args:
        blocks: layer name -> block.
        meta: what ``Fisher.meta`` holds; a mapping or a sequence inside it is written out.
    """
    rows = [
        (name, " x ".join(map(str, block.layout.matrix_shape)), _trace(block), " and ".join(block.diagonal_sides))
        for name, block in blocks.items()
    ]
    # A column of its own only where there is such a block.
    diagonal = "diagonal" if any(row[-1] for row in rows) else ""
    left_out = len(rows) - MOST_ROWS
    if left_out > 1:
        half = MOST_ROWS // 2
        rows = [*rows[:half], (f"... {left_out} more layers", "", "", ""), *rows[-half:]]
    rows = [("layer", "shape", "trace", diagonal), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{name:<{widths[0]}}  {shape:>{widths[1]}}  {trace:>{widths[2]}}  {sides}".rstrip()
        for name, shape, trace, sides in rows
    ]
    parameters = sum(block.layout.numel for block in blocks.values())
    total = f"{len(blocks)} layer{'s'[: len(blocks) != 1]}, {parameters} parameters"
    facts = [f"{key} {_written(value)}" for key, value in meta.items()]
    return "\n".join([f"Fisher of {total}", *([", ".join(facts)] if facts else []), *lines])


def _trace(block: Block) -> str:
    """The trace as text; a block on the meta device has none, and of one known by its products it would take many."""
    return "-" if block.iterative or block.device.type == "meta" else f"{float(block.trace()):.3g}"


def _written(value: Any) -> str:
    """A value of meta as text."""
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{key} {item}" for key, item in value.items()) + ")"
    if isinstance(value, tuple | list):
        return " ".join(map(str, value))
    return str(value)
