"""A page as a file: data that no name can end, pictures of factors that fit, written whole or not at all."""

from __future__ import annotations

import json
import math
import re
import sys
from base64 import b64decode
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kfac_cond as kc
from kfac_cond.inspection.page import maps, report_page, save_page
from kfac_cond.inspection.page.island import island
from kfac_cond.inspection.page.meanings import of_report, of_section

from .made_up import HOSTILE, made_up, real_report

pytest.importorskip("plotly")
pytest.importorskip("jinja2")


@pytest.mark.parametrize("name", [*HOSTILE, "\u2028", "\x00\x1f\x7f", "\ud800", "é €", '\\"'])
def test_an_island_is_the_same_data_and_holds_no_markup(name: str) -> None:
    text = island({"layers": [{name: name}]})
    assert json.loads(text) == {"layers": [{name: name}]}
    assert not re.search("[<>&'\u2028\u2029\x00-\x1f]", text)
    text.encode("utf-8")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, None),
        (math.inf, sys.float_info.max),
        (-math.inf, -sys.float_info.max),
        (1 / 3, 0.33333333),
        (np.float64(1e-300), 1e-300),
        (True, True),
        ((1, "a"), [1, "a"]),
        (12345678901, 12345678901),
    ],
)
def test_numbers_of_an_island(value: Any, expected: Any) -> None:
    assert json.loads(island(value)) == expected


def test_names_in_the_page_are_escaped() -> None:
    report, _ = made_up(HOSTILE)
    report.data["meta"]["source"] = HOSTILE[0]
    html = report_page(report)
    for name in HOSTILE[:3]:
        assert name not in html


def test_the_scripts_are_those_of_the_policy_and_no_others() -> None:
    html = report_page(made_up(2)[0])
    scripts = re.findall(r"<script(?: id=\"page\"| type=\"text/plain\" id=\"drawing\")>(.*?)</script>", html, re.S)
    assert len(scripts) == 2
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    hashes = [
        b64decode(one) for one in re.findall(r"sha256-([^&]*)&#39;|sha256-([^']*)'", policy[1]) for one in one if one
    ]
    assert hashes == [sha256(script.encode()).digest() for script in scripts]
    assert "default-src 'none'" in policy[1]


def test_the_same_report_gives_the_same_page() -> None:
    assert report_page(real_report(damping=1e-3)).startswith("<!doctype html>")
    report = real_report()
    assert report_page(report) == report_page(report)


def test_what_numbers_mean_is_what_their_classes_say() -> None:
    found = of_report(real_report())
    assert ("per parameter", "tr F / P, the mean eigenvalue: the scale that a relative damping is in.") in found[
        "spectrum"
    ]
    assert dict(found["whole calibration"])["rank"].startswith("the number of eigenvalues above round-off")
    report = real_report()
    report.whole = replace(report.whole, block_diagonality=report.whole.calibration)
    assert not {"calibration", "block diagonality"} & set(dict(of_report(report)["whole"]))


def test_the_meanings_of_a_section_and_of_what_is_in_it() -> None:
    @dataclass
    class Inner:
        """Of a thing.

        Args:
            low_end: the least,
                over ``all``.
        """

        low_end: float = 0.0

    @dataclass
    class Outer:
        """Of things.

        Args:
            first, second: things.

        Source: none.
        """

        first: Inner
        second: Inner

    assert of_section(Outer(Inner(), Inner())) == [
        ("first, second", "things."),
        ("first and second: low end", "the least, over all."),
    ]


def decoded(found: dict[str, Any]) -> Tensor:
    """The means in the bins of a map."""
    values = torch.frombuffer(bytearray(b64decode(found["bytes"])), dtype=torch.uint8).to(torch.float64)
    logs = found["low"] + (values - 1) * (found["high"] - found["low"]) / 254
    means = torch.where(values == 0, 0.0, 10.0**logs)
    return means if found["diagonal"] else means.reshape(found["bins"], found["bins"])


@pytest.mark.parametrize("size", [5, 64, 100])
def test_a_map_has_the_mean_sizes_of_the_entries(size: int) -> None:
    matrix = torch.randn(size, size)
    bins = min(size, 64)
    pieces = torch.tensor_split(torch.arange(size), bins)
    expected = torch.stack(
        [torch.stack([matrix[rows][:, columns].abs().mean() for columns in pieces]) for rows in pieces]
    )
    found = maps.binned(matrix)
    # Half a step of a byte over six decades.
    assert torch.allclose(
        decoded(found), expected, rtol=10 ** (6 / 254 / 2) - 1 + 1e-9, atol=1e-6 * float(expected.max())
    )


def test_a_map_of_a_diagonal_and_of_nothing() -> None:
    found = maps.binned(torch.tensor([1.0, 0.0, 10.0]))
    assert found["diagonal"] is True
    assert torch.allclose(decoded(found), torch.tensor([1.0, 0.0, 10.0]), rtol=0.03)
    assert decoded(maps.binned(torch.zeros(3, 3))).abs().max() == 0.0


def test_maps_stop_at_the_budget_with_those_that_matter_first(monkeypatch: pytest.MonkeyPatch) -> None:
    fisher = real_report().fisher
    assert fisher is not None
    one = sum(len(side["bytes"]) for side in maps.factor_maps(fisher, ["2"])["2"].values())
    monkeypatch.setattr(maps, "BUDGET", one)
    assert list(maps.factor_maps(fisher, ["2", "0"])) == ["2"]


def test_blocks_without_factors_have_no_maps() -> None:
    model = torch.nn.Linear(3, 2)
    data = [torch.randn(8, 3)]
    diagonal, ekfac = kc.estimate(model, data, "categorical", structure=["diagonal", "ekfac"])
    assert maps.factor_maps(diagonal, [""]) == {}
    assert set(maps.factor_maps(ekfac, [""])[""]) == {"A", "G"}
    assert maps.factor_maps(ekfac.inverse(damping=1.0), [""]) == {}


def test_a_page_that_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fisher.html"
    path.write_text("before")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        save_page("<!doctype html>", path)
    assert [one.name for one in tmp_path.iterdir()] == ["fisher.html"]
    assert path.read_text() == "before"


def test_a_name_that_no_file_can_hold_is_written_all_the_same(tmp_path: Path) -> None:
    report, _ = made_up(["\ud800", "b"])
    save_page(report_page(report), tmp_path / "fisher.html")
    assert (tmp_path / "fisher.html").read_text(encoding="utf-8").endswith("</html>")


@pytest.mark.parametrize("module", ["jinja2", "plotly.offline"])
def test_what_is_missing_is_named(module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=re.escape("pip install 'kfac-cond[inspect]'")):
        real_report().save(tmp_path / "fisher.html")
    assert list(tmp_path.iterdir()) == []
