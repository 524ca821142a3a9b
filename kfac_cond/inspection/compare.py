"""Two Fishers of the same layers beside each other: of two checkpoints, two models, two sets of data."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from ..checks import described, is_damping, is_size
from ..errors import ArgumentError
from ..files import replaced
from ..structures import Block, Fisher
from .distances import bures, fisher_overlap, in_double
from .moves import WeightChange, change_of, weights_of
from .overlap import TOP, side_overlaps, top_overlap
from .plain import finite, plain
from .report import Report
from .spectra import Spectrum, damping_for, spectrum_of

VERSION = 1
KEPT = 0.9
"""Share of the effective dimension of the first Fisher that the damping keeps where none is given."""


@dataclass(frozen=True)
class LayerComparison:
    """What changed in a layer's block from F_a to F_b; None where it is not known for the form that is stored.

    Args:
        name: of the layer.
        shape: of its matrix.
        parameters: how many.
        depth: its place among the layers of the first.
        trace_a: tr F of the first, per loss term.
        trace_b: that of the second.
        trace_ratio: tr F_b / tr F_a, no unit; None where the first is zero.
        dimension_a: effective dimension of the first at the comparison's damping.
        dimension_b: that of the second.
        dimension_change: the second less the first.
        overlap: |U_a^T U_b|^2 / k of the k largest eigenvectors of each block: from ``chance`` for unrelated ones to 1.
        overlap_A: the same of the sides A.
        overlap_G: the same of the sides G.
        directions: k, at most the rank of either.
        chance: k over the number of parameters.
        fisher_overlap: tr(F_a F_b) / (|F_a| |F_b|), from 0 to 1.
        bures: their Bures distance, in the unit of the root of F.
        bures_relative: its square over tr F_a + tr F_b, from 0 for equal to 1 for blocks with nothing in common.
        weights: what moved, where models were given.
        remark: why something is not known.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    depth: int
    trace_a: float
    trace_b: float
    trace_ratio: float | None
    dimension_a: float
    dimension_b: float
    dimension_change: float
    overlap: float | None
    overlap_A: float | None
    overlap_G: float | None
    directions: int
    chance: float
    fisher_overlap: float | None
    bures: float | None
    bures_relative: float | None
    weights: WeightChange | None = None
    remark: str = ""


@dataclass(frozen=True)
class WholeComparison:
    """The same of all layers that both have; a number is None where a layer's is not known.

    Args:
        parameters: of these layers.
        trace_a: as for a layer, and so are the five that follow.
        trace_b: of the second.
        trace_ratio: the second over the first.
        dimension_a: effective dimension of the first.
        dimension_b: that of the second.
        dimension_change: the second less the first.
        bures: of the block-diagonal matrices: the root of the sum of squares.
        weights: of all weights together.
    """

    parameters: int
    trace_a: float
    trace_b: float
    trace_ratio: float | None
    dimension_a: float
    dimension_b: float
    dimension_change: float
    bures: float | None
    weights: WeightChange | None = None


class Comparison(Mapping[str, LayerComparison]):
    """What changed from one Fisher to another: a mapping from layer name to ``LayerComparison``; ``print`` it.

    Args:
        layers: by name, in the order of the first.
        whole: of all of them.
        damping: lambda of the effective dimensions.
        only_in_a: layers that the second lacks.
        only_in_b: layers that the first lacks.
        notes: what else differs between the two, in sentences.
        meta: how each was made.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerComparison],
        whole: WholeComparison,
        *,
        damping: float,
        only_in_a: tuple[str, ...] = (),
        only_in_b: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        self._layers = dict(layers)
        self.whole, self.damping, self.notes, self.meta = whole, damping, notes, dict(meta or {})
        self.only_in_a, self.only_in_b = only_in_a, only_in_b

    def __getitem__(self, layer: str) -> LayerComparison:
        try:
            return self._layers[layer]
        except KeyError:
            near = get_close_matches(str(layer), self._layers, n=3) or list(self._layers)[:3]
            raise KeyError(f"no layer '{layer}' in both of them; did you mean {', '.join(near)}?") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained page; arguments and errors as for ``Report.save``."""
        page = import_module(".page", __package__)
        page.save_page(page.comparison_page(self), path)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers, strings, lists and dicts."""
        return {
            "version": VERSION,
            "damping": self.damping,
            "whole": plain(self.whole),
            "layers": [plain(layer) for layer in self.values()],
            "only_in_a": list(self.only_in_a),
            "only_in_b": list(self.only_in_b),
            "notes": list(self.notes),
            "meta": plain(self.meta),
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """``to_dict`` as JSON, numbers that are not finite as null.

        Args:
            path: of a file to write as well.
        """
        text = json.dumps(finite(self.to_dict()), allow_nan=False, indent=1)
        if path is not None:
            with replaced(path) as file:
                file.write_text(text + "\n", encoding="utf-8")
        return text

    def __repr__(self) -> str:
        from .comparison_text import comparison_text

        return comparison_text(self)


def compare(
    a: Fisher | Report,
    b: Fisher | Report,
    *,
    damping: float | None = None,
    top: int = TOP,
    models: tuple[nn.Module | Mapping[str, Tensor], nn.Module | Mapping[str, Tensor]] | None = None,
) -> Comparison:
    """What changed from the Fisher of one checkpoint, model or set of data to that of another, layer by layer.

    Args:
        a: a Fisher, or the report of one.
        b: of the same layers; those that one of them lacks are named, not compared.
        damping: lambda of the effective dimensions, in the units of F; by default that of the first report, or the one
            that keeps 90 % of the effective dimension of ``a``.
        top: the most eigenvectors that span the subspaces which are compared.
        models: the two models, or their state dicts: what moved, in the metric of either Fisher.

    Raises:
        ArgumentError: no layer in common, a layer of two shapes, a report that holds no Fisher, weights that do not
            belong to the layers, or an argument out of its range.
        NumericalError: a block that is not finite, by layer.

    Examples:
        >>> import torch, kfac_cond as kc
        >>> model, data = torch.nn.Linear(3, 2), [torch.randn(8, 3)]
        >>> before = kc.estimate(model, data, "categorical", kind="exact")
        >>> kc.compare(before, 2 * before)[""].trace_ratio
        2.0
    """
    if not is_size(top):
        raise ArgumentError(f"compare(top={top!r}): expected a whole number >= 1")
    first, second = _fisher_of(a, "first"), _fisher_of(b, "second")
    names = [name for name in first if name in second]
    if not names:
        raise ArgumentError(
            f"the two have no layer in common: {', '.join(list(first)[:3])} ... and {', '.join(list(second)[:3])} ...: "
            "compare Fishers of models whose layers have the same names"
        )
    _check_shapes(first, second, names)
    spectra = {name: (_spectrum(a, first, name), _spectrum(b, second, name)) for name in names}
    added = _damping(damping, a, [one for one, _ in spectra.values()])
    weights = None if models is None else (weights_of(models[0], "first"), weights_of(models[1], "second"))
    layers = {}
    for depth, name in enumerate(names):
        mine = in_double(first[name])
        theirs = in_double(second[name], mine.device)
        change = None if weights is None else change_of(mine, theirs, *weights)
        layers[name] = _layer(name, depth, mine, theirs, spectra[name], added, top, change)
    return Comparison(
        layers,
        _whole(list(layers.values())),
        damping=added,
        only_in_a=tuple(name for name in first if name not in second),
        only_in_b=tuple(name for name in second if name not in first),
        notes=_notes(first.meta, second.meta),
        meta={"a": _facts(first.meta), "b": _facts(second.meta)},
    )


def _layer(
    name: str,
    depth: int,
    mine: Block,
    theirs: Block,
    spectra: tuple[Spectrum, Spectrum],
    damping: float,
    top: int,
    change: WeightChange | None,
) -> LayerComparison:
    """One layer, its blocks in float64 on one device."""
    of_a, of_b = spectra
    dimension_a, dimension_b = of_a.effective_dimension(damping), of_b.effective_dimension(damping)
    shared, directions = top_overlap(mine, theirs, top)
    overlap_A, overlap_G = side_overlaps(mine, theirs, top)
    apart, traces = bures(mine, theirs), of_a.trace + of_b.trace
    forms = " and ".join(dict.fromkeys(type(block).__name__ for block in (mine, theirs)))
    return LayerComparison(
        name,
        mine.layout.matrix_shape,
        mine.layout.numel,
        depth,
        of_a.trace,
        of_b.trace,
        of_b.trace / of_a.trace if of_a.trace > 0 else None,
        dimension_a,
        dimension_b,
        dimension_b - dimension_a,
        shared,
        overlap_A,
        overlap_G,
        directions,
        directions / mine.layout.numel,
        fisher_overlap(mine, theirs),
        apart,
        None if apart is None or traces == 0.0 else apart**2 / traces,
        change,
        f"no Bures distance of {forms}: it has a closed form for two blocks of kfac alike" if apart is None else "",
    )


def _whole(layers: list[LayerComparison]) -> WholeComparison:
    trace_a, trace_b = sum(one.trace_a for one in layers), sum(one.trace_b for one in layers)
    dimension_a, dimension_b = sum(one.dimension_a for one in layers), sum(one.dimension_b for one in layers)
    distances = [one.bures for one in layers if one.bures is not None]
    changes = [one.weights for one in layers if one.weights is not None]
    return WholeComparison(
        sum(one.parameters for one in layers),
        trace_a,
        trace_b,
        trace_b / trace_a if trace_a > 0 else None,
        dimension_a,
        dimension_b,
        dimension_b - dimension_a,
        math.hypot(*distances) if len(distances) == len(layers) else None,
        WeightChange.together(changes) if changes else None,
    )


def _fisher_of(source: object, which: str) -> Fisher:
    fisher = source.fisher if isinstance(source, Report) else source
    if isinstance(fisher, Fisher):
        return fisher
    if isinstance(source, Report):
        raise ArgumentError(
            f"the {which} report holds no Fisher: compare reports as kc.inspect gives them, or saved Fishers "
            "(kc.Fisher.load)"
        )
    raise ArgumentError(f"the {which} is {described(source)}: expected a kc.Fisher or a kc.Report")


def _spectrum(source: Fisher | Report, fisher: Fisher, name: str) -> Spectrum:
    """That of the report, which has it already, else of the block."""
    if isinstance(source, Report) and name in source:
        found = source[name].spectrum
        if found is not None:
            return found
    return spectrum_of(fisher[name])


def _damping(given: float | None, a: Fisher | Report, spectra: list[Spectrum]) -> float:
    damping = a.damping if given is None and isinstance(a, Report) else given
    if damping is None:
        chosen = damping_for(spectra, KEPT)
        return chosen if math.isfinite(chosen) else 0.0
    if not is_damping(damping):
        raise ArgumentError(f"compare(damping={damping!r}): expected a finite number >= 0, in the units of F")
    return float(damping)


def _check_shapes(first: Fisher, second: Fisher, names: list[str]) -> None:
    """Refuse layers of one name that are not one layer."""
    for name in names:
        shapes = [fisher[name].layout.matrix_shape for fisher in (first, second)]
        if shapes[0] != shapes[1]:
            raise ArgumentError(
                f"layer '{name}' is {shapes[0]} in the first and {shapes[1]} in the second: expected the same layer in "
                "both; leave it out of one with Options(layers=...) or a rule where it is another"
            )


def _facts(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What was said of an estimate, and how much it saw."""
    counts = meta.get("counts", {})
    seen = {key: float(counts[key]) for key in ("examples", "terms") if key in counts}
    return {key: value for key, value in meta.items() if isinstance(value, str | int | float)} | seen


def _notes(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[str, ...]:
    """What of the two estimates differs that changes the scale or the noise of the numbers."""
    keys = ("likelihood", "kind", "structure", "samples", "sharing")
    return tuple(
        f"{key} is {first[key]} in the first and {second[key]} in the second"
        for key in keys
        if key in first and key in second and first[key] != second[key]
    )
