"""Pictures on matplotlib axes: each function draws on the axes it is given, or on new ones, and returns them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..checks import described
from ..errors import ArgumentError
from ..structures import Block
from .spectra import Spectrum, log_histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .report import LayerReport, Report

INSTALL = "pip install 'kfac-cond[inspect]'"
BINS = 200
"""Bins along a side of a heat map; a matrix of fewer entries has a bin for each."""

SHOWN = 9
"""Layers with a colour of their own; the others are drawn together."""

TAG = "kfac_kl_share/"
"""In front of a layer's name in the numbers of a ``kc.Monitor``."""


def spectrum(layer: LayerReport | Spectrum, *, damping: float | None = None, ax: Axes | None = None) -> Axes:
    """How many eigenvalues of a layer's block are where, on a logarithmic scale, with those of its sides as steps.

    Each as shares of its own number of eigenvalues; the leftmost bin holds what is smaller as well.

    Args:
        layer: ``report["name"]``, or its spectrum.
        damping: where a line is drawn, in the units of F.
        ax: to draw on.

    Raises:
        ArgumentError: a report of the layer that has no spectrum.
        ImportError: without matplotlib, with what to install.
    """
    found = layer if isinstance(layer, Spectrum) else layer.spectrum
    if found is None:
        raise ArgumentError(f"layer '{layer.name}': the report has no spectrum of it, so there is nothing to draw")
    ax = _axes(ax)
    edges, counts = found.histogram()
    ax.stairs(counts / counts.sum(), edges, label="block", color="C0", alpha=0.7, fill=True)
    for name, values, colour in (("A", found.A, "C1"), ("G", found.G, "C2")):
        if values is not None:
            heights, places = log_histogram(values)[::-1]
            ax.stairs(heights / heights.sum(), places, label=name, color=colour, linewidth=1.5)
    if damping is not None and damping > 0:
        ax.axvline(np.log10(damping), color="C3", linestyle=":", label=f"damping {damping:.3g}")
    ax.set(xlabel="log10 of the eigenvalue", ylabel="share of the eigenvalues", title=found.name or "the model")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return ax


def heat_map(
    exact: Block | Tensor, approximate: Block | Tensor, *, axes: Sequence[Axes] | None = None
) -> Sequence[Axes]:
    """The sizes of the entries of an exact block, of its approximation and of their difference, side by side.

    All three on one scale; of a large matrix the mean of |entry| over at most 200 x 200 bins.

    Args:
        exact: a block, of ``structure="block"`` say, or the dense matrix.
        approximate: of the same layer, in the same order of entries.
        axes: three to draw on.

    Raises:
        ArgumentError: matrices of two shapes, a block too large to become dense, or another number of axes.
        ImportError: without matplotlib, with what to install.

    Source: Martens & Grosse 2015 (arXiv:1503.05671), figure 2.
    """
    dense = [one.to_dense() if isinstance(one, Block) else one for one in (exact, approximate)]
    matrices = [one.detach().cpu().to(torch.float64) for one in dense]
    shapes = [tuple(one.shape) for one in matrices]
    if shapes[0] != shapes[1] or len(shapes[0]) != 2:
        raise ArgumentError(f"heat_map: got matrices of shapes {shapes[0]} and {shapes[1]}, expected two of one shape")
    places = _row_of_axes(axes, 3)
    difference = matrices[0] - matrices[1]
    pictures = [_binned(one.abs()) for one in (*matrices, difference)]
    high = max(float(picture.max()) for picture in pictures) or 1.0
    share = float(difference.norm() / matrices[0].norm()) if float(matrices[0].norm()) > 0 else 0.0
    titles = ("exact", "approximate", f"difference ({100 * share:.0f} % of the norm)")
    for ax, picture, title in zip(places, pictures, titles, strict=True):
        # The root of the size: a few large entries would leave the rest black.
        image = ax.imshow(np.sqrt(picture / high), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        ax.set(title=title, xticks=[], yticks=[])
    bar = places[0].figure.colorbar(image, ax=list(places), shrink=0.8, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0", f"{high / 4:.1e}", f"{high:.1e}"])
    bar.set_label("|entry|")
    return places


def effective_dimension(report: Report, damping: float | None = None, *, ax: Axes | None = None) -> Axes:
    """The effective dimension of each layer at a damping, as a share of its parameters, by depth.

    Args:
        report: of ``kc.inspect``.
        damping: in the units of F; by default the report's own.
        ax: to draw on.

    Raises:
        ArgumentError: no damping, or a report without spectra.
        ImportError: without matplotlib, with what to install.
    """
    added = report.damping if damping is None else damping
    if added is None:
        raise ArgumentError("effective_dimension: the report has no damping: pass one")
    layers = [layer for layer in report.values() if layer.spectrum is not None]
    if not layers:
        raise ArgumentError("effective_dimension: the report has no spectra, so there is nothing to draw")
    ax = _axes(ax)
    places = np.arange(len(layers))
    ax.bar(places, [layer.effective_dimension(added) / layer.parameters for layer in layers], color="C0")
    if len(layers) <= 40:
        ax.set_xticks(places, [layer.name for layer in layers], rotation=60, ha="right", rotation_mode="anchor")
    else:
        ax.set_xlabel("layer, in the order of the model")
    ax.set(ylabel="d_eff / parameters", title=f"effective dimension at damping {added:.3g}")
    return ax


def kl_shares(records: Iterable[Any], *, ax: Axes | None = None) -> Axes:
    """Each layer's share of the update's KL over training, stacked.

    Args:
        records: ``monitor.readings``, or (step, numbers by tag) as a ``kc.Monitor`` hands them to its writer. What has
            no share at a step is none there; those of a step are scaled to the sum of one.
        ax: to draw on.

    Raises:
        ArgumentError: records of another form, or none that has a share.
        ImportError: without matplotlib, with what to install.
    """
    steps, shares = _shares([_numbers(record) for record in records])
    ax = _axes(ax)
    largest = sorted(shares, key=lambda name: -float(shares[name].sum()))
    drawn = [name for name in shares if name in largest[:SHOWN]]
    heights = [shares[name] for name in drawn]
    labels, colours = list(drawn), [f"C{index}" for index in range(len(drawn))]
    if len(shares) > len(drawn):
        labels.append(f"{len(shares) - len(drawn)} others")
        colours.append("lightgray")
        heights.append(1.0 - np.sum(heights, axis=0))
    ax.stackplot(steps, heights, labels=labels, colors=colours)
    ax.set(xlabel="step", ylabel="share of the KL", ylim=(0, 1), xlim=(steps[0], max(steps[-1], steps[0] + 1)))
    handles, labels = ax.get_legend_handles_labels()
    # From the top down, as they are stacked.
    ax.legend(
        handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small"
    )
    return ax


def _numbers(record: Any) -> tuple[int, Mapping[str, float]]:
    """A step and its numbers by tag."""
    if hasattr(record, "step") and hasattr(record, "flat"):
        return record.step, record.flat()
    if isinstance(record, tuple | list) and len(record) == 2 and isinstance(record[1], Mapping):
        return record[0], record[1]
    raise ArgumentError(f"kl_shares: a record is {described(record)}: expected (step, numbers by tag), or a reading")


def _shares(records: Sequence[tuple[int, Mapping[str, float]]]) -> tuple[list[int], dict[str, Any]]:
    """Steps, and each layer's share at each of them."""
    rows = [
        (step, {tag.removeprefix(TAG): float(value) for tag, value in numbers.items() if tag.startswith(TAG)})
        for step, numbers in records
    ]
    rows = [(step, row) for step, row in rows if sum(row.values()) > 0]
    if not rows:
        raise ArgumentError(f"kl_shares: no record has numbers tagged '{TAG}LAYER': those of a kc.Monitor have")
    totals = np.array([sum(row.values()) for _, row in rows])
    names = dict.fromkeys(name for _, row in rows for name in row)
    shares = {name: np.array([row.get(name, 0.0) for _, row in rows]) / totals for name in names}
    return [step for step, _ in rows], shares


def _binned(matrix: Tensor) -> Any:
    """Means over bins, where there are more entries than bins."""
    for dimension in (0, 1):
        bins = min(matrix.shape[dimension], BINS)
        pieces = torch.tensor_split(matrix, bins, dim=dimension)
        matrix = torch.stack([piece.mean(dimension) for piece in pieces], dim=dimension)
    return matrix.numpy()


def _axes(ax: Axes | None) -> Axes:
    return ax if ax is not None else _pyplot().subplots(layout="constrained")[1]


def _row_of_axes(axes: Sequence[Axes] | None, count: int) -> Sequence[Axes]:
    if axes is None:
        made: Sequence[Axes] = _pyplot().subplots(1, count, figsize=(4 * count, 4), layout="constrained")[1]
        return made
    if len(axes) != count:
        raise ArgumentError(f"got {len(axes)} axes, expected {count}")
    return axes


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot
    except ImportError as error:
        raise ImportError(f"plots need matplotlib: {INSTALL}") from error
    return matplotlib.pyplot
