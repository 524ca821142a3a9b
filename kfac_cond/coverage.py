"""What is covered, how and at what cost: a row for every trainable parameter, before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_module
from .costs import Plan, capture_flops, factor_bytes, inverse_bytes, refresh_flops
from .data import call_model
from .errors import CoverageError
from .guards import EagerForwards, kept_state
from .hooks import hook_owners
from .layers.survey import Layer, Row, survey
from .tables import in_bytes, in_flops, table


@dataclass(frozen=True)
class CoverageRow(Row):
    """One trainable parameter, with what its layer costs.

    A layer's numbers stand in the row of its first parameter, so that columns add up; the others have zero there.

    Args:
        path, kind, parameters, covered, reason, remedy, form: of the parameter; ``parameters`` is how many numbers.
        layer: name of the layer that covers it; empty where none does, or where the model itself is the layer.
        d_in: columns of the layer's matrix, which A is the side of; the bias is one of them.
        d_out: rows of it, the side of G.
        groups: number of such matrices.
        structure: what the layer's block is stored as.
        factor_bytes: of the averages of A and G; a capture that waits for its step holds as much once more.
        inverse_bytes: of what gradients are preconditioned with.
        refresh_flops: operations of one refresh of the inverses.
        uses: how often a forward calls the layer; None where no batch was given, or the form has no calls.
        capture_flops: operations of adding the batch to A and G; None where ``uses`` is.
    """

    layer: str = ""
    d_in: int = 0
    d_out: int = 0
    groups: int = 1
    structure: str = ""
    factor_bytes: int = 0
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

    @property
    def parameters(self) -> int:
        """Number of trainable numbers in the model."""
        return sum(row.parameters for row in self.rows)

    @property
    def covered(self) -> int:
        """Number of trainable numbers that a block covers."""
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
    def inverse_bytes(self) -> int:
        """Bytes of all inverses."""
        return sum(row.inverse_bytes for row in self.rows)

    @property
    def refresh_flops(self) -> int:
        """Operations of one refresh of all inverses."""
        return sum(row.refresh_flops for row in self.rows)

    @property
    def capture_flops(self) -> int | None:
        """Operations of adding the batch to the factors of all layers that it used; None without a batch."""
        counted = [row.capture_flops for row in self.rows if row.capture_flops is not None]
        return sum(counted) if counted else None

    def require_own_forms(self) -> Coverage:
        """Itself, where every parameter is covered by a form of its layer's own.

        Raises:
            CoverageError: with every parameter that is not.
        """
        others = [row for row in self.rows if row.form != "kronecker"]
        if others:
            named = "\n".join(f"  {row.path} ({row.kind}): {row.reason}. {row.remedy}".rstrip() for row in others)
            raise CoverageError(
                f"{len(others)} of {len(self.rows)} parameters are not covered by a form of their own, and strict=True "
                f"asks for that. Write a kind for their modules (kc.register_layer), or leave out strict:\n{named}"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        totals = ("share", "parameters", "covered", "factor_bytes", "inverse_bytes", "refresh_flops", "capture_flops")
        return {**{name: getattr(self, name) for name in totals}, "rows": [asdict(row) for row in self.rows]}

    def to_pandas(self) -> Any:
        """The rows as a pandas DataFrame."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("Coverage.to_pandas() needs pandas: pip install pandas") from error
        return pandas.DataFrame([asdict(row) for row in self.rows])

    def __str__(self) -> str:
        head = ("parameter", "kind", "form", "numbers", "in x out", "structure", "factors", "inverses", "uses")
        cells = [_cells(row) for row in self.rows]
        notes = [". ".join(part for part in (row.reason, row.remedy) if part) for row in self.rows]
        return "\n".join((table(head, cells, notes, right={3, 4, 6, 7, 8}), *self._totals()))

    def _totals(self) -> Iterable[str]:
        yield f"{self.covered:,} of {self.parameters:,} trainable numbers are covered: {100 * self.share:.2f} %"
        yield (
            f"held: {in_bytes(self.factor_bytes)} of factors, {in_bytes(self.inverse_bytes)} of inverses; "
            f"a refresh takes {in_flops(self.refresh_flops)}"
            + ("" if self.capture_flops is None else f", the factors of this batch {in_flops(self.capture_flops)}")
        )

    def __repr__(self) -> str:
        return f"Coverage(share={self.share:.4f}, rows={len(self.rows)})"


def _cells(row: CoverageRow) -> tuple[str, ...]:
    """A row as text."""
    known = (row.path, row.kind, row.form, f"{row.parameters:,}")
    if not row.d_in:
        return (*known, "", "", "", "", "")
    size = f"{row.d_in:,} x {row.d_out:,}"
    return (
        *known,
        size if row.groups == 1 else f"{row.groups:,} of {size}",
        row.structure,
        in_bytes(row.factor_bytes),
        in_bytes(row.inverse_bytes),
        "" if row.uses is None else f"{row.uses:,}",
    )


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
        batch: what a loader yields. With it the model is run once, without gradients, to count what is used; buffers
            and the random state are the same afterwards.
        rules: settings by pattern, as for ``KFAC``.
        strict: refuse a model of which anything is not covered by a form of its layer's own.

    Returns:
        The table; ``print`` it, or read ``.share`` and ``.rows``.

    Raises:
        ArgumentError: not a module, a batch of another kind, or rules that do not fit the model.
        CoverageError: with ``strict``, naming each parameter that is not covered by a form of its own.

    Examples:
        >>> import torch, kfac_cond as kc
        >>> table = kc.coverage(torch.nn.Linear(3, 2), torch.zeros(5, 3))
        >>> table.share, table.rows[0].uses, table.factor_bytes
        (1.0, 1, 96)
    """
    check_module(model)
    found = survey(model, rules)
    costed = _costed(found.rows, found.layers, Plan(), _uses(model, found.layers, batch))
    return costed.require_own_forms() if strict else costed


def coverage_of_wrapped(
    model: nn.Module,
    rules: Mapping[str, Mapping[str, Any]],
    layers: Mapping[str, Layer],
    unreached: Iterable[str],
    plan: Plan,
) -> Coverage:
    """The table of a model as it is now against the ``layers`` that were wrapped.

    Args:
        model: the model.
        rules: the settings it was wrapped with.
        layers: the layers that have hooks, by name.
        unreached: the layers that should have taken part in a capture by now and did not.
        plan: what costs depend on.
    """
    fresh = survey(model, rules)

    def parameters(names: Iterable[str]) -> list[str]:
        return [path for name in names if name in fresh.layers for path in fresh.layers[name].layout.names]

    changed = [name for name, layer in fresh.layers.items() if layers.get(name) != layer]
    found = _costed(fresh.rows, fresh.layers, plan, {}).without(
        parameters(changed), "its layer changed since it was wrapped", "kfac.refresh()"
    )
    silent = ("no score has reached its layer", "see the warning of the first capture; exclude it if that is meant")
    return found.without(parameters(unreached), *silent)


def _costed(
    rows: Iterable[Row], layers: Mapping[str, Layer], plan: Plan, uses: Mapping[str, tuple[int, int]]
) -> Coverage:
    """Rows with the costs of their layers; ``uses`` are (calls, positions) by layer."""
    layer_of = {path: layer for layer in layers.values() for path in layer.layout.names}
    return Coverage(tuple(_costed_row(row, layer_of.get(row.path), plan, uses) for row in rows))


def _costed_row(row: Row, layer: Layer | None, plan: Plan, uses: Mapping[str, tuple[int, int]]) -> CoverageRow:
    plain = CoverageRow(**{field.name: getattr(row, field.name) for field in fields(row)})
    if layer is None:
        return plain
    named = replace(plain, layer=layer.name, structure=layer.rule.structure or "kfac")
    if row.path != layer.layout.names[0]:
        return named
    calls, positions = uses.get(layer.name, (None, None))
    if calls == 0 and not row.reason:
        named = replace(named, reason="not called in this forward", remedy="none needed where others call it")
    return replace(
        named,
        d_in=layer.layout.d_in,
        d_out=layer.layout.d_out,
        groups=layer.layout.groups,
        factor_bytes=factor_bytes(layer, plan),
        inverse_bytes=inverse_bytes(layer, plan),
        refresh_flops=refresh_flops(layer, plan),
        uses=calls,
        capture_flops=None if positions is None else capture_flops(layer, positions),
    )


# -- what one forward uses --------------------------------------------------------------------------------------------


def _uses(model: nn.Module, layers: Mapping[str, Layer], batch: Any) -> dict[str, tuple[int, int]]:
    """By layer the number of calls in one forward, and the positions they add to the factors; none without a batch."""
    if batch is None:
        return {}
    counts = {name: (0, 0) for name, layer in layers.items() if layer.modules}

    def count(name: str, module: nn.Module, output: Any) -> None:
        calls, positions = counts[name]
        counts[name] = (calls + 1, positions + _positions(layers[name], module, output))

    eager = EagerForwards(model)
    with ExitStack() as stack:
        for owner in hook_owners(model):
            stack.enter_context(owner.paused())
        stack.enter_context(kept_state(model))
        for name in counts:
            for module in dict.fromkeys(layers[name].modules):
                # In front of the hooks of others, which may put something else in the place of the output.
                handle = module.register_forward_hook(
                    lambda module, args, output, name=name: count(name, module, output), prepend=True
                )
                stack.callback(handle.remove)
        eager.enter()
        stack.callback(eager.leave)
        stack.enter_context(torch.no_grad())
        call_model(model, batch)
    return counts


def _positions(layer: Layer, module: nn.Module, output: Any) -> int:
    """The rows that one call adds to A and to G."""
    if not isinstance(output, Tensor):
        return 0
    shape = layer.kind.output_gradients(module, output.detach().to("meta")).shape
    return shape[-3] * shape[-2] if layer.sharing == "expand" else shape[-3]
