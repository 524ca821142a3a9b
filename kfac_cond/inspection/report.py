"""A report: a mapping from layer name to what was found of the layer, and what was found of the whole."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from ..structures import Fisher
from ..structures.sampling import Estimated, LayerError
from .plain import flat, plain, written
from .spectra import Spectrum, log_histogram

if TYPE_CHECKING:
    from .approximation import ApproximationError
    from .divergence import LayerKL, WholeKL
    from .empirical import AgainstEmpirical
    from .findings import Finding
    from .off_diagonal import BlockDiagonality
    from .sampling_check import SamplingCheck
    from .signal import Signal
    from .staleness import Staleness
    from .updates import UpdateGeometry

VERSION = 1
TOP = 10
"""Largest eigenvalues that are written out."""


@dataclass(frozen=True)
class Counts:
    """What covers a layer, and what was counted of it; cost: a forward of one batch for ``uses``, else nothing.

    Args:
        form: 'kronecker' for a form of the layer's own, 'universal' for that of any parameter; empty where no model was
            given.
        note: what is to be known of its form.
        uses: calls of its module in one forward of the first batch; None where none was run, and in the universal form.
        positions: that A is a mean over, in all data; None of what is made of whole gradients, and of a moving average.
        terms: M, the loss terms of all data that G is divided by; None where there are several heads, or an average.
        examples: N, of all data; None of a moving average.
    """

    form: str = ""
    note: str = ""
    uses: int | None = None
    positions: float | None = None
    terms: float | None = None
    examples: int | None = None


@dataclass(frozen=True)
class Numerics:
    """How well a layer's block can be computed with.

    Args:
        asymmetry: |S - S^T| / |S| in the Frobenius norm, the larger of the two sides S (of the matrix itself where it
            is stored whole); no unit, 0 for a moment that was summed in triangles. Cost: d^2.
        negative_mass: the sum of the sizes of negative eigenvalues over that of all, the larger of the two sides'; no
            unit, round-off in a moment, which has none. Cost: nothing beside the spectrum.
        residual: the largest of |(F + lambda)^-1 (F + lambda) v - v| / |v| over seeded normal vectors v, in the dtype
            that the block is stored in; no unit. None where nothing was inverted. Cost: one inverse.
        damping: the lambda of it, in the units of F.
        failures: factorisations in a row that failed in training; None where nothing was trained.

    Source: Higham 2002 (Accuracy and Stability of Numerical Algorithms), section 14.1, for residuals of inverses.
    """

    asymmetry: float
    negative_mass: float
    residual: float | None = None
    damping: float | None = None
    failures: int | None = None


@dataclass(frozen=True)
class Cost:
    """What a layer costs, by its shapes and as measured here.

    Args:
        held: bytes of what is stored of the block, measured.
        factor_bytes: of its moving averages in training, predicted; None where no model was given, as the next two.
        inverse_bytes: of the inverse of F + lambda, predicted.
        refresh_flops: floating-point operations of making it, predicted.
        capture_flops: those of adding the first batch to the factors, for one draw of labels, predicted; None where no
            forward was run.
        held_by_inverse: bytes of that inverse, measured; None where nothing was inverted.
        milliseconds: of making it, measured.
        predicted_milliseconds: the operations, at the rate of the middle one of those of all layers: a layer that takes
            many times as long is slow for another reason than its size.

    Cost: the inverse that is timed, from 'standard' on; nothing beside it.
    Source: Golub & Van Loan 2013 (Matrix Computations), sections 4.2 and 8.3, for the operations.
    """

    held: int
    factor_bytes: int | None = None
    inverse_bytes: int | None = None
    refresh_flops: int | None = None
    capture_flops: int | None = None
    held_by_inverse: int | None = None
    milliseconds: float | None = None
    predicted_milliseconds: float | None = None


@dataclass(frozen=True, eq=False, repr=False)
class LayerReport:
    """What was found of one layer; a section is None where the level or the source does not give it.

    Args:
        name: of the layer.
        kind: of the layer ('linear', 'conv2d' ...), or empty where only its block is known.
        shape: of the layer's matrix: rows, columns (the bias is one), after the number of groups where there are any.
        parameters: how many.
        depth: its place among the layers, from 0.
        counts: what was counted.
        spectrum: of its block.
        sampling: standard errors of its trace and largest eigenvalue, that of drawing labels.
        health: how well its block can be computed with.
        cost: bytes and milliseconds.
        kl: predicted and measured divergence of a step, and the layer's share of an update's.
        approximation: error of Kronecker and other forms against the exact block.
        empirical: the conditional Fisher against that of the data's labels.
        signal: gradient signal to noise.
        update: geometry of the update.
        staleness: how old the factors are and how far they have moved.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    depth: int
    counts: Counts | None = None
    spectrum: Spectrum | None = None
    sampling: LayerError | None = None
    health: Numerics | None = None
    cost: Cost | None = None
    kl: LayerKL | None = None
    approximation: ApproximationError | None = None
    empirical: AgainstEmpirical | None = None
    signal: Signal | None = None
    update: UpdateGeometry | None = None
    staleness: Staleness | None = None

    def effective_dimension(self, damping: float) -> float:
        """d_eff of the layer's block; see ``Spectrum.effective_dimension``."""
        return self._spectrum().effective_dimension(damping)

    def damping_for(self, share: float) -> float:
        """The damping that keeps a share of it; see ``Spectrum.damping_for``."""
        return self._spectrum().damping_for(share)

    def damping_for_trace(self, share: float) -> float:
        """The damping that keeps a share of the trace; see ``Spectrum.damping_for_trace``."""
        return self._spectrum().damping_for_trace(share)

    def share_below(self, damping: float) -> float:
        """The share of eigenvalues below the damping; see ``Spectrum.share_below``."""
        return self._spectrum().share_below(damping)

    def condition(self, damping: float = 0.0) -> float:
        """The condition number; see ``Spectrum.condition``."""
        return self._spectrum().condition(damping)

    @property
    def trace_per_example(self) -> float | None:
        """tr F M / N, of the Fisher of an example's terms together; None where examples were not counted."""
        if self.spectrum is None or self.counts is None or not self.counts.examples or self.counts.terms is None:
            return None
        return self.spectrum.trace * self.counts.terms / self.counts.examples

    def to_dict(self, lambdas: Sequence[float] = ()) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, of the sections that are there.

        Args:
            lambdas: dampings at which curves are written out.
        """
        found: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Spectrum):
                found[field.name] = _of_spectrum(value, lambdas)
            elif value is not None:
                found[field.name] = plain(value)
        if self.trace_per_example is not None:
            found["spectrum"]["per_example"] = self.trace_per_example
        return found

    def __repr__(self) -> str:
        from .text import layer_text

        return layer_text(self)

    def _spectrum(self) -> Spectrum:
        if self.spectrum is None:
            raise ArgumentError(f"layer '{self.name}': the report has no spectrum of it (see report.problems)")
        return self.spectrum


@dataclass(frozen=True)
class Calibration:
    """Dampings of the whole model, against its spectra.

    Args:
        lambdas: a grid of dampings, ascending.
        effective_dimension: of the whole model at each; no unit, at most ``rank``.
        share_below: share of all eigenvalues below each.
        rank: the number of eigenvalues above round-off, of all layers.
        keeps_half: the one damping that keeps half of the effective dimension of the whole.
        keeps_most: that keeps 90 % of it.
        layers_apart: the largest over the smallest of the layers' own dampings that keep 90 % of their trace; where
            it is large, no one damping serves all layers. None of fewer than two layers.
        keeps_trace: the damping at which the Fisher, not the damping, decides directions of 90 % of the trace.
    """

    lambdas: tuple[float, ...]
    effective_dimension: tuple[float, ...]
    share_below: tuple[float, ...]
    rank: int
    keeps_half: float
    keeps_most: float
    layers_apart: float | None
    keeps_trace: float = math.inf


@dataclass(frozen=True, repr=False)
class Whole:
    """What was found of the whole model.

    Args:
        parameters: of all layers of the report.
        trace: tr F of all layers together, per loss term.
        effective_dimension: d_eff of all layers together at the report's damping; None without one.
        covered: share of the model's trainable numbers that can be covered; None where no model was given.
        uncovered: the parameters that cannot, or that a rule excludes.
        calibration: of dampings against all spectra.
        trace_error: of the whole trace, by drawing labels.
        kl: predicted against measured divergence.
        sampling: check of the drawn labels themselves.
        block_diagonality: share of the Fisher outside the layers' blocks.
        signal: gradient signal to noise of all layers together.
        unused: layers that were asked for and have no block, since no forward used them.
    """

    parameters: int
    trace: float | None = None
    effective_dimension: float | None = None
    covered: float | None = None
    uncovered: tuple[str, ...] = ()
    calibration: Calibration | None = None
    trace_error: Estimated | None = None
    kl: WholeKL | None = None
    sampling: SamplingCheck | None = None
    block_diagonality: BlockDiagonality | None = None
    signal: Signal | None = None
    unused: tuple[str, ...] = ()

    def __repr__(self) -> str:
        from .text import whole_text

        return whole_text(self)


class Report(Mapping[str, LayerReport]):
    """What the conditional Fisher says about each layer: a mapping from layer name to ``LayerReport``; ``print`` it.

    Args:
        layers: by name, in the model's order.
        whole: of the model.
        meta: how it was made: level, likelihood, kind, structure, samples, counts.
        damping: lambda that curves are read at; None where none was given.
        fisher: the blocks it was made of.
        problems: what could not be found, by section, with the reason.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerReport],
        whole: Whole,
        *,
        meta: Mapping[str, Any],
        damping: float | None = None,
        fisher: Fisher | None = None,
        problems: Mapping[str, str] | None = None,
    ) -> None:
        self._layers = dict(layers)
        self.whole, self.meta, self.damping, self.fisher = whole, dict(meta), damping, fisher
        self.problems = dict(problems or {})

    def __getitem__(self, layer: str) -> LayerReport:
        try:
            return self._layers[layer]
        except KeyError:
            near = get_close_matches(str(layer), self._layers, n=3) or list(self._layers)[:3]
            raise KeyError(f"no layer '{layer}' among {len(self)}; did you mean {', '.join(near)}?") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def lambdas(self) -> tuple[float, ...]:
        """The dampings at which curves are written out."""
        return () if self.whole.calibration is None else self.whole.calibration.lambdas

    def findings(self) -> list[Finding]:
        """Plain sentences with severity, layer, number, threshold and what to do, the most severe first."""
        from .findings import findings

        return findings(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained page to look at in a browser; it needs no network.

        Args:
            path: of the HTML file; one that is there is replaced in one step.

        Raises:
            ImportError: without what it is built with, with what to install.
            OSError: it could not be written.
        """
        from .page import report_page, save_page

        save_page(report_page(self), path)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers, strings, lists and dicts; spectra as their largest values and curves."""
        return {
            "version": VERSION,
            "meta": plain(self.meta),
            "damping": self.damping,
            "lambdas": list(self.lambdas),
            "whole": {key: value for key, value in plain(self.whole).items() if value is not None},
            "layers": [layer.to_dict(self.lambdas) for layer in self.values()],
            "findings": [asdict(finding) for finding in self.findings()],
            "problems": dict(self.problems),
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """``to_dict`` as JSON, numbers that are not finite as null.

        Args:
            path: of a file to write as well.
        """
        return written(self.to_dict(), path)

    def to_pandas(self) -> Any:
        """A row for each layer, a column for each number, named by its section ('spectrum.trace'); a DataFrame."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("Report.to_pandas() needs pandas: pip install pandas") from error
        rows = [flat(layer.to_dict()) for layer in self.values()]
        return pandas.DataFrame(rows).set_index("name")

    def __repr__(self) -> str:
        from .text import report_text

        return report_text(self)


def _of_spectrum(spectrum: Spectrum, lambdas: Sequence[float]) -> dict[str, Any]:
    numbers = ("trace", "per_parameter", "largest", "smallest", "blame", "stable_rank", "participation", "rank")
    found: dict[str, Any] = {name: getattr(spectrum, name) for name in numbers}
    found |= {
        "condition": spectrum.condition(),
        "dead_inputs": list(spectrum.dead_inputs),
        "dead_outputs": list(spectrum.dead_outputs),
        "top": spectrum.top(TOP).tolist(),
        "histogram": _histogram(*spectrum.histogram()),
        "effective_dimension": [spectrum.effective_dimension(damping) for damping in lambdas],
        "share_below": [spectrum.share_below(damping) for damping in lambdas],
    }
    for side in "AG":
        values = getattr(spectrum, side)
        if values is not None:
            found[side] = {"top": values[:TOP].tolist(), "histogram": _histogram(*log_histogram(values))}
    return found


def _histogram(edges: Any, counts: Any) -> dict[str, list[float]]:
    return {"edges": edges.tolist(), "counts": counts.tolist()}
