"""What is covered: a row for every trainable parameter, with the reason and the remedy where it is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from .checks import check_module
from .layers.survey import Layer, Row, Survey, survey


class Coverage:
    """A table of all trainable parameters of a model.

    Args:
        rows: one a parameter.
    """

    def __init__(self, rows: tuple[Row, ...]) -> None:
        self.rows = rows

    def without(self, paths: Iterable[str], reason: str, remedy: str) -> Coverage:
        """The same table with these parameters not covered, for a reason."""
        silent = set(paths)
        return Coverage(
            tuple(
                replace(row, covered=False, reason=reason, remedy=remedy, form="none") if row.path in silent else row
                for row in self.rows
            )
        )

    @property
    def parameters(self) -> int:
        """Number of trainable numbers in the model."""
        return sum(row.parameters for row in self.rows)

    @property
    def covered(self) -> int:
        """Number of trainable numbers that a layer's block covers."""
        return sum(row.parameters for row in self.rows if row.covered)

    @property
    def share(self) -> float:
        """Covered share of the trainable numbers, from 0 to 1; 0 where there are none."""
        return self.covered / self.parameters if self.parameters else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return {
            "share": self.share,
            "parameters": self.parameters,
            "covered": self.covered,
            "rows": [asdict(row) for row in self.rows],
        }

    def to_pandas(self) -> Any:
        """The rows as a pandas DataFrame."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("Coverage.to_pandas() needs pandas: pip install pandas") from error
        return pandas.DataFrame([asdict(row) for row in self.rows])

    def __str__(self) -> str:
        head = ("parameter", "kind", "numbers", "covered", "reason", "remedy")
        body = [
            (row.path, row.kind, f"{row.parameters:,}", "yes" if row.covered else "no", row.reason, row.remedy)
            for row in self.rows
        ]
        widths = [max(len(cells[column]) for cells in (head, *body)) for column in range(len(head))]
        lines = [
            "  ".join(
                cell.rjust(width) if column == 2 else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ).rstrip()
            for cells in (head, *body)
        ]
        share = f"{self.covered:,} of {self.parameters:,} trainable numbers are covered: {100 * self.share:.2f} %"
        return "\n".join((lines[0], "-" * max(map(len, lines)), *lines[1:], share))

    def __repr__(self) -> str:
        return f"Coverage(share={self.share:.4f}, rows={len(self.rows)})"


def coverage(model: nn.Module, *, rules: Mapping[str, Mapping[str, Any]] | None = None) -> Coverage:
    """What a preconditioner would cover of ``model``, before anything is allocated.

    Args:
        model: any module.
        rules: settings by pattern, as for ``KFAC``.

    Returns:
        The table; ``print`` it, or read ``.share`` and ``.rows``.

    Raises:
        ArgumentError: not a module, or rules that do not fit it.
    """
    check_module(model)
    return Coverage(survey(model, rules, training="kfac").rows)


def coverage_of_wrapped(fresh: Survey, layers: Mapping[str, Layer], unreached: Iterable[str]) -> Coverage:
    """The table of a model as it is now against the ``layers`` that were wrapped.

    Args:
        fresh: the model as it is now.
        layers: the layers that have hooks, by name.
        unreached: the layers that should have taken part in a capture by now and did not.
    """

    def parameters(names: Iterable[str]) -> list[str]:
        return [path for name in names if name in fresh.layers for path in fresh.layers[name].layout.names]

    changed = [name for name, layer in fresh.layers.items() if layers.get(name) != layer]
    found = Coverage(fresh.rows).without(
        parameters(changed), "its layer changed since it was wrapped", "kfac.refresh()"
    )
    silent = ("no score has reached its layer", "see the warning of the first capture; exclude it if that is meant")
    return found.without(parameters(unreached), *silent)
