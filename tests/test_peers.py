"""Beside other libraries: every difference has a convention that explains it; skipped where they are not installed."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "examples" / "benchmarks"
SETTINGS = (
    "perceptron, classes",
    "perceptron, squared error",
    "deep linear, squared error",
    "convolutions",
    "linear layers over tokens",
    "attention, a class a token",
    "attention, pooled",
)
#: What is exact both there and here, and may differ by a factor of the loss alone.
EXACT = ("product", "dense exact", "diagonal exact", "block exact")


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("peers")
    for name in ("peers", "peer_cases"):
        sys.modules.pop(name)


def compared(peers: ModuleType, peer: str, name: str) -> dict[str, object]:
    pytest.importorskip(peer)
    (setting,) = [one for one in peers.SETTINGS if one.name == name]
    return {row.quantity: row for row in peers.rows(setting, peer)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("peer", ["curvlinops", "nngeometry", "backpack"])
def test_every_difference_is_explained(peers, peer, name):
    rows = compared(peers, peer, name)
    assert not [row for row in rows.values() if "unexplained" in row.verdict]
    # Of what both take: a refusal of everything would be no comparison.
    over_tokens = name in SETTINGS[4:]
    assert (peer == "nngeometry" and over_tokens) or any(row.ratio is not None for row in rows.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("peer", ["curvlinops", "nngeometry", "backpack"])
def test_what_is_exact_in_both_agrees(peers, peer, name):
    verdicts = {row.quantity: row.verdict for row in compared(peers, peer, name).values() if row.quantity in EXACT}
    unit = peer == "nngeometry" and "squared error" in name
    refused = peer != "curvlinops" and name in SETTINGS[4:]
    expected = f"differ: {peers.UNIT}" if unit else "refused: " if refused else "agree"
    assert verdicts
    assert all(verdict.startswith(expected) for verdict in verdicts.values()), verdicts


@pytest.mark.filterwarnings("ignore")
def test_in_a_basis_that_is_open_the_eigenvalues_alone_are_shared(peers):
    """Fewer examples than inputs: equal eigenvalues of a factor, so that each library has other eigenvectors.

    Of all matrices with its eigenvectors, each one's is the nearest to F: F minus it is orthogonal to it.
    """
    pytest.importorskip("curvlinops")
    (many,) = [one for one in peers.SETTINGS if one.name == "convolutions"]
    of = peers.Case(dataclasses.replace(many, shape=(8, 2, 4, 4)))
    joint = {"kfac_approx": "reduce", "separate_weight_and_bias": False}
    theirs = peers.curvlinops_matrix(of, "EKFAC", "exact", **joint)
    ours, F = of.matrix("ekfac", "exact", "reduce"), of.matrix("block", "exact")
    assert peers.difference(ours, theirs) > 1e-3
    for one in (ours, theirs):
        assert peers.difference(one.trace(), F.trace()) < 1e-12
        assert abs((F * one).sum() / one.square().sum() - 1) < 1e-12


def test_a_difference_without_a_convention_is_called_one(peers):
    ours = torch.eye(2)
    for one, verdict in [
        (peers.Compared("same", ours, lambda: torch.eye(2)), "agree"),
        (peers.Compared("twice", ours, lambda: 2 * torch.eye(2)), "differ: unexplained"),
        (peers.Compared("twice", ours, lambda: 2 * torch.eye(2), "half", lambda: 2 * ours), "differ: half"),
        (peers.Compared("twice", ours, lambda: 2 * torch.eye(2), "half", lambda: 3 * ours), "differ: unexplained"),
    ]:
        assert peers.judged("here", "there", one).verdict == verdict


def test_a_library_that_is_absent_is_a_line(peers, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["peers.py", "--out", str(tmp_path / "rows.json")])
    peers.main()
    assert capsys.readouterr().out.count("not installed") == 3
    assert {row["verdict"] for row in json.loads((tmp_path / "rows.json").read_text())} == {"not installed"}
