"""The commands that look inside: what they print, and what they say and return where something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import kfac_cond as kc
from kfac_cond import cli

ZOO = """
import torch

def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).float()

def broken():
    raise ValueError("no weights\\nhere")

model, number = build(), 3
data = [torch.randn(8, 4).float() for _ in range(3)]
wide, nothing = [torch.randn(8, 5).float()], []

def batches():
    yield from data
"""


@pytest.fixture(autouse=True)
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "zoo.py").write_text(ZOO)
    (tmp_path / "torn.py").write_text("import absent_package")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "zoo", raising=False)
    return tmp_path


@pytest.fixture
def saved(zoo: Path) -> Path:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    kc.estimate(model, [torch.randn(9, 4)], "categorical").save(zoo / "f.safetensors")
    return Path("f.safetensors")


OVER_DATA = ["--data", "zoo:batches", "--likelihood", "categorical"]


def test_saved_factors(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(saved)]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0] == "Report of file f.safetensors: 2 layers, 51 parameters"
    assert shown.err == ""


def test_a_layer_of_saved_factors_as_json(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(saved), "--layer", "2", "--json", "--damping", "1e-2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert ([layer["name"] for layer in found["layers"]], found["damping"]) == (["2"], 0.01)
    fisher = kc.Fisher.load(saved)
    assert found["layers"][0]["spectrum"]["trace"] == pytest.approx(float(fisher["2"].trace()), rel=1e-6)


@pytest.mark.parametrize("model", ["zoo:build", "zoo:model"])
def test_a_model_over_data(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", model, *OVER_DATA, "--samples", "2", "--level", "quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["meta"]["examples"], found["meta"]["samples"], found["meta"]["level"]) == (24, 2, "quick")


def test_held_out_batches(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["inspect", "zoo:model", *OVER_DATA, "--held-out", "zoo:data", "--json"]
    assert cli.main([*arguments[:2], "--data", "zoo:data", *arguments[4:]]) == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["kl"]["held_out"] > 0.0


def test_coverage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["coverage", "zoo:build"]) == 0
    assert "51 of 51 trainable numbers are covered" in capsys.readouterr().out
    assert cli.main(["coverage", "zoo:build", "--data", "zoo:batches", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["share"], found["rows"][0]["uses"]) == (1.0, 1)


def test_strict_coverage_fails_where_something_has_no_form(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (zoo / "raw.py").write_text(
        "import torch\n\nclass Raw(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.scale = torch.nn.Parameter(torch.ones(3))\n"
    )
    assert cli.main(["coverage", "raw:Raw"]) == 0
    assert cli.main(["coverage", "raw:Raw", "--strict"]) == 1
    assert "not covered by a form of their own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["inspect", "nowhere.safetensors"], 1, "there is no file nowhere.safetensors"),
        (["inspect", "zoo.py"], 1, "zoo.py is no safetensors file, or is truncated"),
        (["inspect", "f.safetensors", "--layer", "up*"], 1, "the pattern 'up*' matches none of 2 layers"),
        (["inspect", "f.safetensors", "--level", "full"], 1, "came without data"),
        (["inspect", "f.safetensors", *OVER_DATA], 2, "f.safetensors is a file"),
        (["inspect", "zoo:build"], 2, "give --data package.module:data and --likelihood NAME as well"),
        (["inspect", "zoo:build", "--data", "zoo", "--likelihood", "categorical"], 2, "expected package.module:object"),
        (["inspect", "zoo:absent", *OVER_DATA], 1, "zoo:absent: zoo has no 'absent'"),
        (["inspect", "zoo:number", *OVER_DATA], 1, "zoo:number is 3: expected a torch.nn.Module"),
        (["inspect", "zoo:broken", *OVER_DATA], 1, "zoo:broken() failed: ValueError: no weights here"),
        (["inspect", "absent_module:build", *OVER_DATA], 1, "absent_module cannot be imported: ModuleNotFoundError"),
        (["inspect", "torn:build", *OVER_DATA], 1, "torn cannot be imported: ModuleNotFoundError"),
        (["inspect", "zoo:build", "--data", "zoo:data", "--likelihood", "poison"], 1, "no likelihood named 'poison'"),
        (["inspect", "zoo:build", "--data", "zoo:nothing", "--likelihood", "categorical"], 1, "there are 0 examples"),
        (["inspect", "zoo:build", "--data", "zoo:wide", "--likelihood", "categorical"], 1, "RuntimeError: mat1 and"),
        (["coverage", "zoo"], 2, "'zoo': expected package.module:build_model"),
        (["coverage", "zoo:build", "--data", "zoo:nothing"], 1, "zoo:nothing yielded no batch"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], status: int, message: str, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == status
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith("kfac-cond: ") and len(shown.err.splitlines()) == 1
    assert shown.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect"], "SOURCE"),
        (["inspect", "f", "--samples", "0"], "'0': expected a whole number >= 1"),
        (["inspect", "f", "--damping", "-1"], "expected a finite number >= 0"),
        (["inspect", "f", "--damping", "much"], "'much': expected a finite number >= 0"),
        (["inspect", "f", "--level", "deep"], "invalid choice: 'deep'"),
        (["coverage"], "package.module:build_model"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_with_a_traceback_errors_are_raised() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        cli.main(["inspect", "zoo:build", "--data", "zoo:wide", "--likelihood", "categorical", "--traceback"])


def test_a_missing_package_is_status_two(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert cli.main(["inspect", str(saved)]) == 2
    assert "pip install 'kfac-cond[files]'" in capsys.readouterr().err


def test_the_page_is_written_where_it_was_asked_for(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[Path] = []
    monkeypatch.setattr(kc.Report, "save", lambda self, path: written.append(path))
    assert cli.main(["inspect", str(saved), "--html", "out.html"]) == 0
    assert written == [Path("out.html")]
    assert capsys.readouterr().err == "the page is in out.html\n"


def test_in_a_process_of_its_own(saved: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kfac_cond.cli", "inspect", str(saved), "--layer", "nope"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(kc.__file__).parents[1]), "PATH": ""},
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("kfac-cond: layers: the pattern 'nope'")
