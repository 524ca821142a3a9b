"""The command line: wrong arguments, missing pieces and interruptions end with a message and a status."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import kfac_cond
from kfac_cond import cli


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert (stopped.value.code, capsys.readouterr().out) == (0, f"kfac-cond {kfac_cond.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["train"], "invalid choice"),
        (["demo", "--steps", "0"], "'0': expected a whole number >= 1"),
        (["demo", "--steps", "many"], "'many': expected a whole number >= 1"),
        (["demo", "--seeds", "-2"], "'-2': expected a whole number >= 1"),
        (["demo", "--task", "regression"], "invalid choice: 'regression'"),
        (["demo", "--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("module", cli.DEMO_REQUIRES)
def test_missing_dependency(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    status = cli.main(["demo", "--out", str(tmp_path / "out")])
    expected = f"the demo needs {cli.DEMO_REQUIRES[module]}: pip install 'kfac-cond[demo]'\n"
    assert (status, capsys.readouterr().err) == (2, expected)


def test_missing_examples(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "DEMO_FILES", ("nowhere.py",))
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "reinstall kfac-cond" in capsys.readouterr().err


def test_examples_inside_the_package_come_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inside = tmp_path / "kfac_cond" / "_examples"
    for folder in (inside, tmp_path / "examples"):
        folder.mkdir(parents=True)
        for name in cli.DEMO_FILES:
            (folder / name).touch()
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "kfac_cond" / "cli.py"))
    assert cli._examples() == inside.resolve()


def test_a_foreign_folder_called_examples_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "demo.py").touch()
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "kfac_cond" / "cli.py"))
    assert cli._examples() is None


def test_unwritable_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "results"
    assert cli.main(["demo", "--steps", "1", "--out", str(out)]) == 2
    shown = capsys.readouterr()
    assert shown.err == f"cannot save in '{out}': Not a directory. Choose another folder with --out DIR.\n"
    assert shown.out == ""


def test_interrupted_before_anything(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_examples", interrupt)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_loading_leaves_the_import_path_alone(tmp_path: Path) -> None:
    (tmp_path / "sibling_of_demo.py").write_text("value = 7\n")
    (tmp_path / "script.py").write_text("from sibling_of_demo import value\n")
    before = list(sys.path)
    assert cli._load(tmp_path / "script.py").value == 7
    assert sys.path == before
