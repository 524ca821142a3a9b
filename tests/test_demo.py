"""The demo: what it saves and prints, that optimizers meet on equal terms, and how it counts."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kfac_cond import cli

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
OPTIMIZERS = ("SGD", "Adam", "SGD + K-FAC")
TASKS = ("autoencoder", "classifier")


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Iterator[None]:
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one short run of everything, through the command line."""
    out = tmp_path_factory.mktemp("demo") / "results"
    assert cli.main(["demo", "--steps", "3", "--seeds", "2", "--out", str(out)]) == 0
    return out


@pytest.fixture
def content(saved: Path) -> dict[str, Any]:
    """What the JSON file says."""
    return json.loads((saved / "demo.json").read_text())


# -- what it saves -----------------------------------------------------------------------------------------------------


def test_two_files(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["demo.json", "demo.png"]


def test_picture_is_a_png(saved: Path) -> None:
    assert (saved / "demo.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_json_keys(content: dict[str, Any]) -> None:
    expected = "format complete versions machine seeds learning_rate_schedule final_loss tasks"
    assert list(content) == expected.split()


def test_json_says_it_is_complete(content: dict[str, Any]) -> None:
    assert (content["complete"], content["seeds"], list(content["tasks"])) == (True, [0, 1], list(TASKS))


@pytest.mark.parametrize("task", TASKS)
def test_json_of_a_task(task: str, content: dict[str, Any]) -> None:
    found = content["tasks"][task]
    assert list(found) == ["title", "steps", "batch_size", "evaluate_every", "settings", "grid", "summary", "runs"]
    assert list(found["settings"]) == list(found["grid"]) == list(found["summary"]) == list(OPTIMIZERS)


@pytest.mark.parametrize("task", TASKS)
def test_a_run_for_each_optimizer_and_seed(task: str, content: dict[str, Any]) -> None:
    runs = {(run["optimizer"], run["seed"]) for run in content["tasks"][task]["runs"]}
    assert runs == {(name, seed) for name in OPTIMIZERS for seed in (0, 1)}


@pytest.mark.parametrize("task", TASKS)
def test_curves_are_of_one_length(task: str, content: dict[str, Any]) -> None:
    accuracies = ["train_accuracy", "test_accuracy"] if task == "classifier" else []
    for run in content["tasks"][task]["runs"]:
        assert run["steps"] == [0, 3]
        assert {len(run[name]) for name in ["seconds", "train_loss", "test_loss", *accuracies]} == {2}


# -- equal terms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_equal_weights_and_batches_for_each_optimizer(task: str, content: dict[str, Any]) -> None:
    prints = [{run["fingerprint"] for run in content["tasks"][task]["runs"] if run["seed"] == seed} for seed in (0, 1)]
    assert [len(of_seed) for of_seed in prints] == [1, 1]
    assert prints[0] != prints[1]


@pytest.mark.parametrize("task", TASKS)
def test_equal_losses_before_the_first_step(task: str, content: dict[str, Any]) -> None:
    assert len({run["train_loss"][0] for run in content["tasks"][task]["runs"] if run["seed"] == 0}) == 1


@pytest.mark.parametrize("task", TASKS)
def test_optimizers_differ_after_it(task: str, content: dict[str, Any]) -> None:
    assert len({run["train_loss"][-1] for run in content["tasks"][task]["runs"] if run["seed"] == 0}) == 3


def test_an_epoch_of_batches_meets_every_example_once() -> None:
    indices = torch.cat(list(module("demo_tasks").batches(12, 4, steps=3, seed=0)))
    assert sorted(indices.tolist()) == list(range(12))


def test_ragged_batches_are_left_out() -> None:
    assert [len(one) for one in module("demo_tasks").batches(10, 4, steps=5, seed=0)] == [4] * 5


@pytest.mark.parametrize(("seed", "same"), [(0, True), (1, False)])
def test_batches_depend_on_the_seed_alone(seed: int, same: bool) -> None:
    batches = module("demo_tasks").batches
    torch.rand(3)
    first, second = (torch.stack(list(batches(100, 10, steps=10, seed=s))) for s in (0, seed))
    assert torch.equal(first, second) is same


def test_train_and_test_images_are_disjoint() -> None:
    data = module("demo_tasks").split(reconstruct=True)
    assert torch.cdist(data.train[0], data.test[0], p=1).min() > 0
    assert (len(data.train[0]), len(data.test[0])) == (1437, 360)


def test_tuning_never_sees_a_test_image() -> None:
    split = module("demo_tasks").split
    tuning = split(reconstruct=True, tuning=True)
    assert torch.equal(torch.cat([tuning.train[0], tuning.test[0]]), split(reconstruct=True).train[0])


def test_equal_budgets_of_tuning() -> None:
    assert len({len(grid) for grid in module("demo_tasks").GRID.values()}) == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("task", TASKS)
def test_tuned_settings_are_of_the_grid(task: str, name: str) -> None:
    tasks = module("demo_tasks")
    assert tasks.TASKS[task].settings[name] in tasks.GRID[name]


def test_loss_of_the_autoencoder_is_what_its_likelihood_says() -> None:
    tasks = module("demo_tasks")
    logits, images = torch.randn(5, 64), torch.rand(5, 64)
    likelihood = tasks.autoencoder_problem().likelihood
    expected = -likelihood.log_prob(logits, images).sum() / likelihood.terms(logits)
    torch.testing.assert_close(tasks.reconstruction_loss(logits, images), expected, rtol=1e-10, atol=0)


# -- how it counts -----------------------------------------------------------------------------------------------------


def runs_of(**losses: list[list[float]]) -> dict[str, list[Any]]:
    """Handmade runs: by optimizer, one list of train losses for each seed, evaluated every 10 steps of 0.1 s."""
    found: dict[str, list[Any]] = {}
    for name, curves in zip(OPTIMIZERS, (losses["sgd"], losses["adam"], losses["kfac"]), strict=True):
        found[name] = []
        for seed, curve in enumerate(curves):
            run = module("demo_training").Run("autoencoder", name, seed)
            for mark, loss in enumerate(curve):
                run.record(10 * mark, 1.0 * mark, {"loss": loss}, {"loss": loss + 1})
            found[name].append(run)
    return found


@pytest.fixture
def handmade() -> dict[str, list[Any]]:
    """Adam ends at 1.0; SGD never gets there; K-FAC does after 10 steps, for the second seed after 20."""
    return runs_of(
        sgd=[[5, 4, 3, 2], [5, 4, 3, 2]],
        adam=[[5, 3, 2, 1], [5, 3, 2, 1]],
        kfac=[[5, 1, 0.5, 0.4], [5, 2, 0.5, 0.4]],
    )


def test_steps_and_seconds_to_adams_final_loss(handmade: dict[str, list[Any]]) -> None:
    found = module("demo_report").summaries(handmade)["SGD + K-FAC"]
    assert (found.steps, found.seconds, found.reached) == (15, 1.5, 2)


def test_adam_reaches_its_own(handmade: dict[str, list[Any]]) -> None:
    assert module("demo_report").summaries(handmade)["Adam"].steps == 30


def test_never_reached(handmade: dict[str, list[Any]]) -> None:
    found = module("demo_report").summaries(handmade)["SGD"]
    assert (found.steps, found.seconds, found.reached) == (None, None, 0)


def test_each_seed_is_held_against_adam_of_the_same_seed() -> None:
    found = module("demo_report").summaries(
        runs_of(sgd=[[9, 9, 9], [9, 9, 9]], adam=[[9, 6, 4], [9, 6, 2]], kfac=[[9, 3, 3], [9, 3, 3]])
    )
    assert (found["SGD + K-FAC"].steps, found["SGD + K-FAC"].reached) == (10, 1)


def test_the_table_says_how_many_seeds_got_there() -> None:
    report = module("demo_report")
    found = report.summaries(runs_of(sgd=[[9, 9], [9, 9]], adam=[[9, 4], [9, 2]], kfac=[[9, 3], [9, 3]]))
    assert "10 (1 of 2)" in list(report.table(found).columns[1].cells)


def test_only_seeds_that_all_have_finished_count(handmade: dict[str, list[Any]]) -> None:
    handmade["SGD + K-FAC"].pop()
    assert {one.seeds for one in module("demo_report").summaries(handmade).values()} == {1}


def test_no_summary_without_adam(handmade: dict[str, list[Any]]) -> None:
    del handmade["Adam"]
    assert module("demo_report").summaries(handmade) == {}


@pytest.mark.parametrize(("values", "expected"), [([7.0, 1.0], 1.0), ([9.0] * 38 + [1.0, 2.0], 1.5)])
def test_final_is_the_mean_of_the_last_twentieth(values: list[float], expected: float) -> None:
    assert module("demo_report").final(values) == expected


@pytest.mark.parametrize(
    ("kfac", "sentence"),
    [
        ([[5, 1, 1, 1]], r"after 10 steps, 33 % of Adam's steps, and in 1.00 s, less than Adam's 3.00 s"),
        ([[5, 5, 5, 5]], r"did not reach Adam's final training loss"),
    ],
)
def test_verdict(kfac: list[list[float]], sentence: str) -> None:
    report = module("demo_report")
    found = report.summaries(runs_of(sgd=[[5, 4, 3, 2]], adam=[[5, 3, 2, 1]], kfac=kfac))
    assert sentence in report.verdict(found)


def test_seconds_are_reported_where_they_are_more() -> None:
    report = module("demo_report")
    runs = runs_of(sgd=[[5, 4, 3, 2]], adam=[[5, 3, 2, 1]], kfac=[[5, 1, 1, 1]])
    runs["SGD + K-FAC"][0].seconds = [0.0, 7.0, 14.0, 21.0]
    assert "7.00 s, more than Adam's 3.00 s" in report.verdict(report.summaries(runs))


def test_diverged_run_is_null_in_json(tmp_path: Path) -> None:
    module("example_results").save_json(tmp_path / "x.json", {"a": [float("nan"), float("inf"), 1.0]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, None, 1.0]}


def test_diverged_run_is_drawn_all_the_same(tmp_path: Path) -> None:
    runs = runs_of(sgd=[[5, float("inf"), float("nan")]], adam=[[5, 3, 2]], kfac=[[5, 2, 1]])
    task = module("demo_tasks").TASKS["autoencoder"]
    module("demo_report").save_picture(tmp_path / "x.png", [task], {"autoencoder": runs})
    assert (tmp_path / "x.png").stat().st_size > 0


# -- what it prints ----------------------------------------------------------------------------------------------------


def demo(tmp_path: Path, *more: str) -> int:
    return cli.main(["demo", "--task", "autoencoder", "--steps", "1", "--seeds", "1", "--out", str(tmp_path), *more])


def test_logs_get_no_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    demo(tmp_path)
    assert re.findall(r"[\x00-\x09\x0b-\x1f]", capsys.readouterr().out) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_line_for_each_run_and_a_row_for_each_optimizer(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert sum(f"autoencoder, {name}, seed 0: 1 steps" in line for line in lines) == 1
    assert sum(re.match(rf"[│|] {re.escape(name)} +[│|]", line) is not None for line in lines) == 1


def test_never_is_said_in_the_table(
    handmade: dict[str, list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module("demo_display").console().print(module("demo_report").table(module("demo_report").summaries(handmade)))
    row = next(line for line in capsys.readouterr().out.splitlines() if "SGD  " in line)
    assert row.count("- (never)") == 2


# -- interrupted -------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ctrl-C in the middle of a run, some runs in; the three to warm up do not count."""

    def prepare(runs: int) -> None:
        training = module("demo_training")
        original, calls = training.train, []

        def train(*args: Any, **options: Any) -> Any:
            calls.append(args)
            if len(calls) > len(OPTIMIZERS) + runs:
                raise KeyboardInterrupt
            return original(*args, **options)

        monkeypatch.setattr(training, "train", train)

    return prepare


def test_interrupted_saves_what_was_finished(
    interrupted_after: Callable[[int], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted_after(4)
    assert demo(tmp_path, "--seeds", "2") == 130
    content = json.loads((tmp_path / "demo.json").read_text())
    assert (content["complete"], len(content["tasks"]["autoencoder"]["runs"])) == (False, 4)
    assert "interrupted after 4 of 6 runs\nsaved: " in capsys.readouterr().out


def test_interrupted_before_a_run_was_finished(
    interrupted_after: Callable[[int], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted_after(0)
    assert demo(tmp_path) == 130
    assert list(tmp_path.iterdir()) == []
    assert "nothing saved: no run was finished" in capsys.readouterr().out


# -- what it promises --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_half_of_adams_steps_are_enough_on_the_autoencoder(tmp_path: Path) -> None:
    assert cli.main(["demo", "--task", "autoencoder", "--seeds", "1", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "demo.json").read_text())["tasks"]["autoencoder"]["summary"]
    assert found["SGD + K-FAC"]["steps"] <= found["Adam"]["steps"] / 2
