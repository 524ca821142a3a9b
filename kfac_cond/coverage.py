"""What is covered, how and at what cost: a row for every trainable parameter, before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import nn

from .checks import check_module
from .costs import Costing, capture_flops, factor_bytes, inverse_bytes, refresh_flops, sum_bytes
from .errors import CoverageError
from .layers.layer import Layer
from .layers.survey import Row, Survey, survey
from .tables import fitted, in_bytes, in_flops, table
from .uses import Used, uses_in_forward
from .wrapping import refuse_unfit


@dataclass(frozen=True)
class CoverageRow(Row):
    """One trainable parameter, with what its layer costs.

    A layer's numbers stand in the row of its first parameter, so that columns add up; the others have zero there.

    Args:
        path: canonical name of the parameter, where it is held first.
        kind: of its layer; in the universal form, and where it is not covered, the type of the module that holds it.
        parameters: how many numbers it is.
        covered: whether a block covers it.
        reason: why it is not covered, or what is to be known of its form.
        remedy: what to do about that.
        form: 'kronecker', 'universal' or 'none'.
        layer: name of the layer that covers it; empty where none does, or where the model itself is the layer.
        d_in: columns of the layer's matrix, which A is the side of; the bias is one of them.
        d_out: rows of it, the side of G.
        groups: number of such matrices.
        structure: what the layer's block is stored as.
        factor_bytes: of the averages of A and G.
        sum_bytes: of what one capture sums for them, until its step.
        inverse_bytes: of what gradients are preconditioned with.
        refresh_flops: operations of one refresh of the inverses.
        uses: how often a forward calls the layer's module; None where no batch was given, and in the universal form.
        capture_flops: operations of adding the batch to A and G for one draw of labels; None where no batch was given,
            and where ``reason`` says why the call cannot be captured.
    """

    layer: str = ""
    d_in: int = 0
    d_out: int = 0
    groups: int = 1
    structure: str = ""
    factor_bytes: int = 0
    sum_bytes: int = 0
    inverse_bytes: int = 0
    refresh_flops: int = 0
    uses: int | None = None
    capture_flops: int | None = None


class Coverage:
    """A table of all trainable parameters of a model.

    Args:
        rows: one a parameter.
    """

    def __init__(self, rows: tuple[CoverageRow, ...]) -> None:
        self.rows = rows

    def without(self, paths: Iterable[str], reason: str, remedy: str) -> Coverage:
        """The same table with these parameters not covered, for a reason."""
        silent = set(paths)
        return Coverage(
            tuple(
                CoverageRow(row.path, row.kind, row.parameters, False, reason, remedy) if row.path in silent else row
                for row in self.rows
            )
        )

    def noted(self, paths: Iterable[str], reason: str) -> Coverage:
        """The same table with one thing more to know of these parameters."""
        known = set(paths)
        return Coverage(
            tuple(
                replace(row, reason="; ".join(filter(None, (reason, row.reason)))) if row.path in known else row
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

    @property
    def factor_bytes(self) -> int:
        """Bytes of all averages."""
        return sum(row.factor_bytes for row in self.rows)

    @property
    def sum_bytes(self) -> int:
        """Bytes of the sums of one capture."""
        return sum(row.sum_bytes for row in self.rows)

    @property
    def inverse_bytes(self) -> int:
        """Bytes of all inverses."""
        return sum(row.inverse_bytes for row in self.rows)

    @property
    def refresh_flops(self) -> int:
        """Operations of one refresh of all inverses."""
        return sum(row.refresh_flops for row in self.rows)

    @property
    def capture_flops(self) -> int | None:
        """Operations of adding the batch to the factors of all layers, for one draw; None without a batch."""
        counted = [row.capture_flops for row in self.rows if row.capture_flops is not None]
        return sum(counted) if counted else None

    def require_own_forms(self) -> Coverage:
        """Itself, where every parameter is covered by a form of its layer's own.

        Raises:
            CoverageError: with every parameter that is not.
        """
        others = [row for row in self.rows if row.form != "kronecker"]
        if others:
            named = "\n".join(f"  {row.path} ({row.kind}): {_note(row)}" for row in others)
            raise CoverageError(
                f"{len(others)} of {len(self.rows)} parameters are not covered by a form of their own, and strict=True "
                f"asks for that. Write a kind for their modules (kc.register_layer), or leave out strict:\n{named}"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        sizes = ("factor_bytes", "sum_bytes", "inverse_bytes")
        totals = ("share", "parameters", "covered", *sizes, "refresh_flops", "capture_flops")
        return {**{name: getattr(self, name) for name in totals}, "rows": [asdict(row) for row in self.rows]}

    def to_pandas(self) -> Any:
        """The rows as a pandas DataFrame."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("Coverage.to_pandas() needs pandas: pip install pandas") from error
        return pandas.DataFrame([asdict(row) for row in self.rows])

    def __str__(self) -> str:
        lines = [_Line.of(rows) for rows in _by_layer(self.rows)]
        called = any(row.uses is not None for row in self.rows)
        head = ("parameter", "kind", "form", "in x out", "structure", "factors", "inverses", *["uses"] * called)
        cells, notes = [line.cells[: len(head)] for line in lines], [line.note for line in lines]
        return "\n".join((table(head, cells, notes, right={3, 5, 6, 7}), *map(fitted, self._totals())))

    def _totals(self) -> Iterable[str]:
        universal = sum(row.parameters for row in self.rows if row.form == "universal")
        yield (
            f"{self.covered:,} of {self.parameters:,} trainable numbers are covered: {100 * self.share:.2f} %"
            + (f", {universal:,} of them in the universal form" if universal else "")
        )
        yield (
            f"memory: {in_bytes(self.factor_bytes)} of factors, {in_bytes(self.inverse_bytes)} of inverses, and "
            f"{in_bytes(self.sum_bytes)} from a capture to its step"
        )
        of_batch = self.capture_flops
        yield (
            f"a refresh of the inverses takes {in_flops(self.refresh_flops)}"
            + ("" if of_batch is None else f", the factors of this batch {in_flops(of_batch)} a draw")
        )

    def __repr__(self) -> str:
        return f"Coverage(share={self.share:.4f}, rows={len(self.rows)})"


@dataclass(frozen=True)
class _Line:
    """The parameters of one layer as text, or one that no layer covers."""

    cells: tuple[str, ...]
    note: str

    @classmethod
    def of(cls, rows: Sequence[CoverageRow]) -> _Line:
        first, *others = rows
        path = ", ".join((first.path, *(_beside(first.path, row.path) for row in others)))
        if first.covered:
            size = f"{first.d_in:,} x {first.d_out:,}"
            size = size if first.groups == 1 else f"{first.groups:,} of {size}"
            costs = in_bytes(first.factor_bytes), in_bytes(first.inverse_bytes)
        else:
            size, costs = f"{first.parameters:,} numbers", ("", "")
        uses = "" if first.uses is None else f"{first.uses:,}"
        return cls((path, first.kind, first.form, size, first.structure, *costs, uses), _note(first))


def _by_layer(rows: Iterable[CoverageRow]) -> list[list[CoverageRow]]:
    """Rows of one layer together, where the first of them stands; each that no layer covers by itself."""
    found: dict[tuple[bool, str], list[CoverageRow]] = {}
    for row in rows:
        found.setdefault((row.covered, row.layer if row.covered else row.path), []).append(row)
    # The numbers of a layer are in the row of its weight, wherever that stands.
    return [sorted(of_one, key=lambda row: not row.d_in) for of_one in found.values()]


def _beside(first: str, path: str) -> str:
    """A parameter's name after that of another one: the last part of it, where both are in one module."""
    owner, _, attribute = path.rpartition(".")
    return attribute if owner == first.rpartition(".")[0] else path


def _note(row: Row) -> str:
    """Why a parameter is not covered, or what is to be known of it, and what to do."""
    return "; remedy: ".join(part for part in (row.reason, row.remedy) if part)


def coverage(
    model: nn.Module,
    batch: Any = None,
    *,
    rules: Mapping[str, Mapping[str, Any]] | None = None,
    strict: bool = False,
) -> Coverage:
    """What a preconditioner would cover of ``model``, how, and at what cost, before anything is allocated.

    A model on the meta device will do. Costs are those of training with ``kc.KFAC``: float32 or wider, one head, the
    damping rule 'factored'.

    Args:
        model: any module.
        batch: what a loader yields. With it the model is run once, as in training, to count what is used and to see
            which weights are used without a call of their module; buffers and the random state are the same afterwards.
        rules: settings by pattern, as for ``KFAC``.
        strict: refuse a model of which anything is not covered by a form of its layer's own.

    Returns:
        The table; ``print`` it, or read ``.share`` and ``.rows``.

    Raises:
        ArgumentError: not a module, a batch of another kind, or rules that do not fit the model.
        CoverageError: a replicating or a quantised part; with ``strict``, naming each parameter that is not covered by
            a form of its own.

    Examples:
        >>> import torch, kfac_cond as kc
        >>> table = kc.coverage(torch.nn.Linear(3, 2), torch.zeros(5, 3))
        >>> table.share, table.rows[0].uses, table.factor_bytes
        (1.0, 1, 96)
    """
    check_module(model)
    refuse_unfit(model)
    found = survey(model, rules, training="kfac")
    used = None
    if batch is not None:
        used, functional = uses_in_forward(model, found.layers, batch)
        found = survey(model, rules, training="kfac", functional=functional)
    costed = _costed(found.rows, found.layers, Costing(), used)
    return costed.require_own_forms() if strict else costed


def coverage_of_wrapped(
    fresh: Survey, layers: Mapping[str, Layer], costing: Costing, *, missing: Sequence[str], graded: Set[str]
) -> Coverage:
    """The table of a model as it is now against the ``layers`` that were wrapped.

    Args:
        fresh: the model as it is now.
        layers: the layers that have hooks, by name.
        costing: what costs depend on.
        missing: the layers that no score has reached.
        graded: layers that had a gradient while they were missing; the other missing ones are unused.
    """

    def parameters(names: Iterable[str]) -> list[str]:
        return [path for name in names if name in fresh.layers for path in fresh.layers[name].layout.names]

    changed = [name for name, layer in fresh.layers.items() if layers.get(name) != layer]
    found = _costed(fresh.rows, fresh.layers, costing, None).without(
        parameters(changed), "its layer changed since it was wrapped", "kfac.refresh()"
    )
    silent = ("no score has reached its layer", "see the warning of the first capture; exclude it if that is meant")
    unreached, unused = ([name for name in missing if (name in graded) is had] for had in (True, False))
    return found.without(parameters(unreached), *silent).noted(parameters(unused), "not used in a captured forward yet")


def _costed(
    rows: Iterable[Row], layers: Mapping[str, Layer], costing: Costing, used: Mapping[str, Used] | None
) -> Coverage:
    """Rows with the costs of their layers; ``used`` is what one forward used, or None where none was run."""
    layer_of = {path: layer for layer in layers.values() for path in layer.layout.names}
    return Coverage(tuple(_costed_row(row, layer_of.get(row.path), costing, used) for row in rows))


def _costed_row(row: Row, layer: Layer | None, costing: Costing, used: Mapping[str, Used] | None) -> CoverageRow:
    plain = CoverageRow(**{field.name: getattr(row, field.name) for field in fields(row)})
    if layer is None:
        return plain
    named = replace(plain, layer=layer.name, structure=layer.rule.structure or costing.structure)
    if row.path != layer.layout.names[0]:
        return named
    return _with_uses(
        replace(
            named,
            d_in=layer.layout.d_in,
            d_out=layer.layout.d_out,
            groups=layer.layout.groups,
            factor_bytes=factor_bytes(layer, costing),
            sum_bytes=sum_bytes(layer, costing),
            inverse_bytes=inverse_bytes(layer, costing),
            refresh_flops=refresh_flops(layer, costing),
        ),
        layer,
        used,
    )


def _with_uses(row: CoverageRow, layer: Layer, used: Mapping[str, Used] | None) -> CoverageRow:
    """The row with what one forward used of its layer."""
    if used is None:
        return row
    mine = used.get(layer.name, _UNCALLED)
    reason, remedy = row.reason, row.remedy
    if mine.refused:
        reason, remedy = mine.refused, ""
    elif mine.calls == 0 and layer.modules:
        reason = "; ".join(filter(None, ("not called in this forward", reason)))
        remedy = "; ".join(filter(None, ("exclude it by a rule, where no forward calls it", remedy)))
    return replace(
        row,
        reason=reason,
        remedy=remedy,
        uses=mine.calls if layer.modules else None,
        capture_flops=None if mine.refused else capture_flops(layer, mine.rows, mine.examples, mine.saved),
    )


_UNCALLED = Used()
