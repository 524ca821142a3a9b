"""The contest of optimizers: that they meet on equal terms, and how it counts. No test asserts who wins."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "examples" / "benchmarks"
PARTS = ("contenders", "problems", "runs", "tables")
SMALL = ("--small", "--seeds", "2", "--budget", "2", "--steps", "10")


@pytest.fixture
def contest(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules of the benchmark by their last word, and ``main``."""
    torch.set_default_dtype(torch.float32)
    threads, before = torch.get_num_threads(), list(sys.path)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    command = importlib.import_module("convergence")
    yield SimpleNamespace(
        main=command.main, command=command, **{part: sys.modules[f"convergence_{part}"] for part in PARTS}
    )
    for name in ("convergence", *(f"convergence_{part}" for part in PARTS)):
        sys.modules.pop(name)
    sys.path[:] = before
    torch.set_num_threads(threads)


def trial(contest, values: list[float], *, seed: int = 0, said: str = "", **settings: float) -> Any:
    """A run with these held-out losses at steps 0, 10, 20 ..., a second each ten; accuracies are their tenths."""
    steps = [10 * place for place in range(len(values))]
    curve = sys.modules["example_results"].Curve(
        steps, [step / 10 for step in steps], [2 * one for one in values], values, [], [one / 10 for one in values]
    )
    return contest.runs.Trial("language_model", "adamw", settings, seed, 100, said, curve)


# -- equal terms -------------------------------------------------------------------------------------------------------


def test_of_every_optimizer_equally_many_settings_are_tried(contest):
    tried = {
        (who, name): len({tuple(sorted(one.items())) for one in contender.grids[name]})
        for who, contender in contest.contenders.CONTENDERS.items()
        for name in contest.problems.PROBLEMS
    }
    own = {key: number for key, number in tried.items() if key[0] != "natural"}
    assert set(own.values()) == {contest.contenders.BUDGET}
    # What needs no tuning has none.
    assert all(number == 1 for key, number in tried.items() if key[0] == "natural")


@pytest.mark.parametrize("name", ["autoencoder", "classifier", "language_model"])
def test_weights_and_batches_of_a_seed_are_the_same_for_all(contest, name):
    problem, runs = contest.problems.SMALL[name], []
    task = problem.make("digits")
    for who in ("sgd", "adam", "kfac"):
        contender = contest.contenders.CONTENDERS[who]
        one = contest.runs.Trial(name, who, dict(contender.grids[name][0]), 7, 1)
        runs.append(contest.runs.run(task, one, contender, problem, 1).curve)
    assert len({one.train_loss[0] for one in runs}) == 1
    assert len({one.train_loss[1] for one in runs}) == 3
    assert torch.equal(task.data.batch(3, 4, seed=7)[0], problem.make("digits").data.batch(3, 4, seed=7)[0])


def test_the_full_problems_are_those_that_are_said(contest):
    shapes = {}
    for name, problem in contest.problems.PROBLEMS.items():
        torch.manual_seed(0)
        task = problem.make("digits")
        shapes[name] = (task.batch, problem.steps, sum(p.numel() for p in task.model().parameters()))
    assert shapes == {
        "autoencoder": (500, 500, 2_837_314),
        "language_model": (32, 600, 875_520),
        "classifier": (128, 300, 278_474),
    }


# -- what it prints and keeps ------------------------------------------------------------------------------------------


def test_a_small_contest_prints_and_keeps_everything_and_goes_on(contest, monkeypatch, capsys, tmp_path):
    out, picture = tmp_path / "all.json", tmp_path / "all.png"
    given = [*SMALL, "--contenders", "adam", "adamw", "kfac", "--out", str(out), "--picture", str(picture)]
    assert contest.main(given) == 0
    told = capsys.readouterr().out
    assert told.count("AdamW at the end") == 2
    assert told.count("Adam at the end") == 1
    found = json.loads(out.read_text())
    assert list(found) == ["versions", "data", "small", "budget", "grids", "machine", "trials"]
    assert {len(grid) for by_problem in found["grids"].values() for grid in by_problem.values()} == {2}
    seeds = [(one["problem"], one["contender"], one["seed"]) for one in found["trials"]]
    for problem in contest.problems.PROBLEMS:
        for who in ("adam", "adamw", "kfac"):
            assert [seed for *key, seed in seeds if key == [problem, who]] == [100, 100, 0, 1]
    assert all(one["curve"]["steps"] == [0, 5, 10] for one in found["trials"])
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    monkeypatch.setattr(contest.runs, "run", lambda *given: pytest.fail("it is known"))
    assert contest.main([*given, "--resume"]) == 0
    assert json.loads(out.read_text()) == found
    assert capsys.readouterr().out.count("AdamW at the end") == 2


def test_a_library_that_is_absent_is_a_row(contest, monkeypatch, capsys):
    monkeypatch.setattr(contest.contenders.importlib.util, "find_spec", lambda name: None)
    absent = ["soap", "shampoo", "singd", "kfac-pytorch"]
    assert contest.main([*SMALL, "--problems", "language_model", "--contenders", *absent]) == 0
    rows = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if line.endswith("  not installed")]
    assert rows == ["SOAP", "Shampoo", "SINGD", "kfac-pytorch"]


def test_an_optimizer_that_fails_says_why(contest, monkeypatch, capsys):
    def refuses(setup):
        raise TypeError("takes no such layer\nand says more")

    adam = contest.contenders.CONTENDERS["adam"]
    monkeypatch.setitem(contest.contenders.CONTENDERS, "adam", replace(adam, build=refuses))
    assert contest.main([*SMALL, "--problems", "language_model", "--contenders", "adam"]) == 0
    assert "lr 0.003: TypeError: takes no such layer; lr 0.009: TypeError" in capsys.readouterr().out


def test_one_that_diverges_says_when_and_is_not_chosen(contest, monkeypatch, capsys, tmp_path):
    grids = {"language_model": [{"lr": 1e38}, {"lr": 0.1}]}
    sgd = contest.contenders.CONTENDERS["sgd"]
    monkeypatch.setitem(contest.contenders.CONTENDERS, "sgd", replace(sgd, grids=grids))
    out = tmp_path / "all.json"
    assert contest.main([*SMALL, "--problems", "language_model", "--contenders", "sgd", "--out", str(out)]) == 0
    assert "lr 1e+38, seed 100: diverged before step 5" in capsys.readouterr().out
    found = json.loads(out.read_text())["trials"]
    assert found[0]["curve"]["train_loss"][1] is None
    assert [one["settings"]["lr"] for one in found] == [1e38, 0.1, 0.1, 0.1]


# -- how it counts -----------------------------------------------------------------------------------------------------


def test_the_best_is_the_least_loss_or_the_most_accuracy(contest):
    tried = [trial(contest, [5, 3], lr=1), trial(contest, [5, 2], lr=2), trial(contest, [5, 1], lr=3, said="failed")]
    assert contest.runs.chosen(tried, "held_out_loss") == {"lr": 2}
    assert contest.runs.chosen(tried, "held_out_accuracy") == {"lr": 1}
    assert contest.runs.chosen(tried[2:], "held_out_loss") is None
    assert tried[2].worth("held_out_loss") == math.inf


def test_steps_and_seconds_are_those_of_the_first_evaluation_that_is_as_good(contest):
    trials = [trial(contest, [5, 4, 2]), trial(contest, [5, 2, 1], seed=1), trial(contest, [5, 4, 3], seed=2)]
    assert contest.runs.reached(trials, "held_out_loss", 2.0) == contest.runs.Reached(15, 1.5, 2)
    assert contest.runs.reached(trials, "held_out_accuracy", 0.45).steps == 0
    assert contest.runs.reached(trials, "held_out_loss", 0.5) is None
    assert contest.runs.at_step(trials, "train_loss", 10) == pytest.approx(2 * 10 / 3)
    assert contest.runs.at_step(trials, "held_out_loss", None) == 2.0
    assert contest.runs.at_step(trials, "held_out_loss", 15) is None


def test_a_cell_says_steps_their_share_seconds_and_how_many_seeds(contest):
    problem = contest.problems.PROBLEMS["language_model"]
    trials = [trial(contest, [5, 4, 2]), trial(contest, [5, 2, 1], seed=1), trial(contest, [5, 4, 3], seed=2)]
    assert contest.tables.cell(trials, problem, 2.0) == "15 (2 %), 1.5 s, 2 of 3 seeds"
    assert contest.tables.cell(trials, problem, 4.0) == "10 (2 %), 1.0 s"
    assert contest.tables.cell(trials, problem, 0.1) == "never"


def test_peers_that_are_there_train(contest):
    names = ("soap", "shampoo", "singd", "kfac-pytorch", "muon")
    there = {who: one for who in names if (one := contest.contenders.CONTENDERS[who]).installed}
    for name, problem in contest.problems.SMALL.items():
        task = problem.make("digits")
        for who, contender in there.items():
            one = contest.runs.Trial(name, who, dict(contender.grids[name][0]), 0, 2)
            found = contest.runs.run(task, one, contender, problem, 1)
            assert not found.said, (who, name)
            assert found.curve.train_loss[0] != found.curve.train_loss[-1]
