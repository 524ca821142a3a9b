"""``kfac-cond compare A B``: a table, a page or JSON; a message and a status where something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import kfac_cond as kc
from kfac_cond import cli


@pytest.fixture
def saved(tmp_path: Path) -> tuple[str, str]:
    pytest.importorskip("safetensors")
    paths = []
    for index in range(2):
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        paths.append(str(tmp_path / f"{index}.safetensors"))
        kc.estimate(model, [torch.randn(20, 4)], "categorical").save(paths[-1])
    return paths[0], paths[1]


def test_a_table(saved: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *saved]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{kc.compare(*map(kc.Fisher.load, saved))}\n"
    assert shown.err == ""


def test_json(saved: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *saved, "--json", "--damping", "0.1", "--top", "2"]) == 0
    expected = kc.compare(*map(kc.Fisher.load, saved), damping=0.1, top=2)
    assert json.loads(capsys.readouterr().out) == json.loads(expected.to_json())


def test_a_page(saved: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotly")
    assert cli.main(["compare", *saved, "--html", str(tmp_path / "two.html")]) == 0
    assert (tmp_path / "two.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "Comparison of 2 layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.safetensors", "{b}"], "kfac-cond: there is no file nowhere.safetensors"),
        (["{broken}", "{b}"], "broken.safetensors"),
        (["{a}", "{other}"], "kfac-cond: the two have no layer in common"),
        (["{a}", "{b}", "--html", "{a}/page.html"], "Not a directory"),
    ],
)
def test_what_cannot_be_done(
    arguments: list[str],
    message: str,
    saved: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(Path(saved[0]).read_bytes()[:100])
    other = tmp_path / "other.safetensors"
    kc.estimate(nn.Linear(4, 5), [torch.randn(20, 4)], "categorical").save(other)
    filled = [one.format(a=saved[0], b=saved[1], broken=broken, other=other) for one in arguments]
    assert cli.main(["compare", *filled]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("arguments", [["--top", "0"], ["--damping", "-1"], []])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", "a.safetensors", *arguments])
    assert stopped.value.code == 2
    assert "usage: kfac-cond compare" in capsys.readouterr().err
