"""Tables and numbers as text that fits a terminal."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Collection, Sequence

SHORTEST = 24
"""Columns that the first column keeps, however narrow the terminal."""


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str], *, right: Collection[int] = ()
) -> str:
    """Rows under a head; what is too long in the first column goes on below it, at a dot.

    Where the terminal is too narrow for that, each row is a name with a paragraph below it.

    Args:
        head: the names of the columns.
        rows: a cell a column.
        notes: a text for each row, or an empty one. Equal ones are written once, below the table, under a number.
        right: the columns that are aligned to the right.
    """
    wide = _terminal()
    numbers = {note: f"[{number}]" for number, note in enumerate(dict.fromkeys(filter(None, notes)), start=1)}
    cells = [(*row, numbers.get(note, "")) for row, note in zip(rows, notes, strict=True)]
    head = (*head, "")
    widths = [max(len(row[column]) for row in (head, *cells)) for column in range(len(head))]
    first = wide - sum(widths[1:]) - 2 * (len(head) - 1)
    if first >= min(SHORTEST, widths[0]):
        lines = _columns(head, cells, [min(widths[0], first), *widths[1:]], right)
    else:
        lines = [line for row in cells for line in _paragraph(head, row, wide, right)]
    for note, number in numbers.items():
        lines += textwrap.wrap(f"{number} {note}", wide, subsequent_indent=" " * (len(number) + 1))
    return "\n".join(lines)


def fitted(text: str) -> str:
    """A text in lines that fit."""
    return textwrap.fill(text, _terminal(), subsequent_indent="    ")


def in_bytes(number: int) -> str:
    """A number of bytes in a unit in which it is short."""
    return _scaled(number, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def in_flops(number: int) -> str:
    """A number of floating-point operations likewise."""
    return _scaled(number, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def _terminal() -> int:
    return shutil.get_terminal_size((120, 24)).columns


def _scaled(number: int, base: int, units: Sequence[str]) -> str:
    value, index = float(number), 0
    while value >= base and index < len(units) - 1:
        value, index = value / base, index + 1
    return f"{value:.0f} {units[0]}" if index == 0 else f"{value:.1f} {units[index]}"


def _columns(
    head: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int], right: Collection[int]
) -> list[str]:
    lines = [_line(head, widths, right), "-" * (sum(widths) + 2 * (len(widths) - 1))]
    for name, *others in rows:
        start, *rest = _parts(name, widths[0])
        lines += [_line((start, *others), widths, right), *rest]
    return lines


def _paragraph(head: Sequence[str], row: Sequence[str], wide: int, right: Collection[int]) -> list[str]:
    """A name and what is said of it; numbers say what they are."""
    cells = [f"{head[column]} {cell}" if column in right else cell for column, cell in enumerate(row) if cell]
    said = ", ".join(cells[1:])
    return [*_parts(row[0], wide), *textwrap.wrap(said, wide, initial_indent="    ", subsequent_indent="    ")]


def _line(cells: Sequence[str], widths: Sequence[int], right: Collection[int]) -> str:
    padded = [
        cell.rjust(width) if column in right else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()


def _parts(path: str, width: int) -> list[str]:
    """A dotted name as lines of at most ``width``, unless a part is longer; those after the first are indented."""
    lines = [""]
    for part in re.findall(r"[^.]*\.?", path):
        if lines[-1].strip() and len(lines[-1]) + len(part) > width:
            lines.append("  ")
        lines[-1] += part
    return lines
