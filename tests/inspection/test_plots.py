"""Pictures on matplotlib axes: what is drawn is what was found."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import kfac_cond as kc

from ..helpers import classifier
from .made_up import real_report

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _without_a_window(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    matplotlib.use("Agg")
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def test_a_spectrum_has_each_eigenvalue_in_a_bin() -> None:
    report = real_report()
    ax = kc.plots.spectrum(report["0"], damping=1e-2)
    for patch, counts in zip(ax.patches, (report["0"].spectrum.histogram()[1], None, None), strict=True):
        heights = patch.get_data().values
        assert sum(heights) == pytest.approx(1.0)
        assert counts is None or list(heights) == pytest.approx(list(counts / 56))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["block", "A", "G", "damping 0.01"]
    assert list(ax.lines[0].get_xdata()) == [-2.0, -2.0]
    assert ax.get_title() == "0"


def test_a_picture_is_drawn_on_the_axes_that_are_given() -> None:
    import matplotlib.pyplot as plt

    _, ax = plt.subplots()
    assert kc.plots.spectrum(real_report()["0"].spectrum, ax=ax) is ax
    assert kc.plots.effective_dimension(real_report(), ax=ax) is ax


def test_heat_maps_are_of_the_sizes_of_the_entries_on_one_scale() -> None:
    exact, kfac = kc.estimate(
        classifier(), [torch.randn(30, 3)], "categorical", structure=["block", "kfac"], kind="exact"
    )
    axes = kc.plots.heat_map(exact["0"], kfac["0"])
    dense = [exact["0"].to_dense(), kfac["0"].to_dense()]
    high = float(torch.stack([*dense, dense[0] - dense[1]]).abs().max())
    for ax, matrix in zip(axes, [*dense, dense[0] - dense[1]], strict=True):
        assert np.allclose(ax.images[0].get_array() ** 2 * high, matrix.abs().numpy())
    share = float((dense[0] - dense[1]).norm() / dense[0].norm())
    assert axes[2].get_title() == f"difference ({100 * share:.0f} % of the norm)"


def test_a_large_matrix_is_shown_in_bins() -> None:
    matrix = torch.rand(500, 500)
    axes = kc.plots.heat_map(matrix, 0 * matrix)
    assert axes[0].images[0].get_array().shape == (200, 200)


def test_dimensions_by_depth() -> None:
    report = real_report(damping=3e-3)
    heights = [bar.get_height() for bar in kc.plots.effective_dimension(report).patches]
    assert heights == pytest.approx([one.effective_dimension(3e-3) / one.parameters for one in report.values()])
    other = [bar.get_height() for bar in kc.plots.effective_dimension(report, 1.0).patches]
    assert other == pytest.approx([one.effective_dimension(1.0) / one.parameters for one in report.values()])


def records(layers: int) -> list[tuple[int, dict[str, float]]]:
    return [
        (
            step,
            {"kfac/damping": 1.0, "kfac_trace/a": 9.0} | {f"kfac_kl_share/{n}": 1.0 + n * step for n in range(layers)},
        )
        for step in (0, 10, 20)
    ]


def stacked(ax: Any) -> list[float]:
    """The thickness of each layer of the stack at its last step."""
    found = []
    for collection in ax.collections:
        vertices = collection.get_paths()[0].vertices
        last = vertices[vertices[:, 0] == vertices[:, 0].max()][:, 1]
        found.append(float(last.max() - last.min()))
    return found


def test_shares_of_the_divergence_over_training() -> None:
    ax = kc.plots.kl_shares(records(3))
    assert stacked(ax) == pytest.approx([1 / 63, 21 / 63, 41 / 63])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["2", "1", "0"]


def test_readings_of_a_monitor_are_taken_as_they_are() -> None:
    readings = [SimpleNamespace(step=step, flat=lambda numbers=numbers: numbers) for step, numbers in records(2)]
    assert stacked(kc.plots.kl_shares(readings)) == pytest.approx(stacked(kc.plots.kl_shares(records(2))))


def test_small_shares_of_many_layers_are_drawn_together() -> None:
    ax = kc.plots.kl_shares(records(12))
    assert ax.get_legend().get_texts()[0].get_text() == "3 others"
    assert sum(stacked(ax)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: kc.plots.heat_map(torch.eye(3), torch.eye(4)), r"shapes \(3, 3\) and \(4, 4\), expected two of one"),
        (lambda: kc.plots.heat_map(torch.eye(3), torch.eye(3), axes=[1]), "got 1 axes, expected 3"),
        (lambda: kc.plots.effective_dimension(real_report(damping=None)), "the report has no damping: pass one"),
        (
            lambda: kc.plots.kl_shares([(0, {"kfac_trace/a": 1.0})]),
            "no record has numbers tagged 'kfac_kl_share/LAYER'",
        ),
        (lambda: kc.plots.kl_shares([3]), r"a record is 3: expected \(step, numbers by tag\)"),
    ],
)
def test_what_cannot_be_drawn(draw: Any, message: str) -> None:
    with pytest.raises(kc.ArgumentError, match=message):
        draw()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib.pyplot", None)
        without.delattr(matplotlib, "pyplot", raising=False)
        with pytest.raises(ImportError, match=re.escape("pip install 'kfac-cond[inspect]'")):
            kc.plots.spectrum(real_report()["0"])
