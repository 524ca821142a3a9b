"""The benchmark of speed: its models, what contenders are compared with, its tables. No test asserts a time."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kfac_cond as kc

BENCHMARKS = Path(__file__).resolve().parent.parent / "examples" / "benchmarks"
PARTS = ("models", "jobs", "checks", "factors", "peers", "times", "sweeps", "picture")
HERE = ("forward and backward", "SGD", "plain products", "kfac_cond", "AdamW")
"""Contenders that need nothing but torch and this library."""


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules of the benchmark by their last word, and ``main``."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    command = importlib.import_module("speed")
    yield SimpleNamespace(main=command.main, **{part: sys.modules[f"speed_{part}"] for part in PARTS})
    for name in ("speed", *(f"speed_{part}" for part in PARTS)):
        sys.modules.pop(name)


@pytest.fixture
def task(speed):
    return speed.models.SMALL["mlp"].task()


def drawn(task) -> torch.Tensor:
    return torch.distributions.Categorical(logits=task.model(task.inputs).detach()).sample()


def altered(run, part: int, by: float):
    """The run with one of the factors of every layer scaled."""

    def read():
        scale = [by if index == part else 1.0 for index in range(2)]
        return {
            name: tuple(s * one for s, one in zip(scale, pair, strict=True)) for name, pair in run.factors().items()
        }

    return dataclasses.replace(run, factors=read)


# -- models ------------------------------------------------------------------------------------------------------------

LAYERS = {
    "mlp": [(1024, 784), (1024, 1024), (512, 1024), (10, 512)],
    "cnn": [(32, 3, 3, 3), (64, 32, 3, 3), (64, 64, 3, 3), (128, 64, 3, 3), (128, 128, 3, 3), (10, 128)],
    "transformer": [(256, 48), *[*[(256, 256)] * 4, (1024, 256), (256, 1024)] * 4, (10, 256)],
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_models_are_those_that_are_said(speed, name):
    with torch.device("meta"):
        model, inputs = speed.models.MODELS[name].make(), torch.empty(speed.models.MODELS[name].shape)
    assert [tuple(p.shape) for p in model.parameters() if p.ndim > 1] == LAYERS[name]
    assert model(inputs).shape == (len(inputs), 10)
    strides = [one.stride for one in model.modules() if isinstance(one, torch.nn.Conv2d)]
    assert strides == ([(1, 1), (1, 1), (2, 2), (1, 1), (2, 2)] if name == "cnn" else [])


@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet-18", 11_181_642), ("gpt", 35_862_528), ("vit-tiny", 5_377_738)]
)
def test_the_networks_have_their_sizes(speed, name, parameters):
    with torch.device("meta"):
        model = speed.models.NETWORKS[name].make()
    assert sum(p.numel() for p in model.parameters()) == parameters


# -- what contenders are compared with ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_the_plain_formula_is_what_the_library_says_in_float64(speed, name):
    task = speed.checks.doubled(speed.models.SMALL[name].task())
    labels = drawn(task)
    options = kc.Options(progress=False, draws=[[labels]])
    fisher = kc.estimate(task.model, [task.inputs], "categorical", options=options)
    plain = speed.models.moments(task.model, task.inputs, labels)
    assert list(plain) == list(fisher)
    for layer, (A, G) in plain.items():
        torch.testing.assert_close(fisher[layer].A, A)
        torch.testing.assert_close(fisher[layer].G, G)


@pytest.mark.parametrize("name", LAYERS)
def test_the_expectation_and_its_variance_are_those_over_all_labels(speed, name):
    whole = speed.checks.doubled(speed.models.SMALL[name].task())
    task = speed.models.Task(whole.model, whole.inputs[:3], whole.labels[:3])
    fisher = kc.estimate(task.model, [task.inputs], "categorical", kind="exact", options=kc.Options(progress=False))
    p = task.model(task.inputs).detach().softmax(-1)
    one_by_one = [
        [speed.models.moments(task.model, x, torch.tensor([c])) for c in range(10)] for x in task.inputs.split(1)
    ]
    for layer, (_, G, trace, variance) in speed.checks.exact(task).items():
        torch.testing.assert_close(G, fisher[layer].G)
        torch.testing.assert_close(trace, G.trace())
        traces = torch.stack([torch.stack([found[layer][1].trace() for found in row]) for row in one_by_one])
        of_examples = (p * traces.square()).sum(1) - (p * traces).sum(1).square()
        torch.testing.assert_close(variance, of_examples.sum() / 9)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("job", ["factors", "step", "training"])
def test_this_library_agrees(speed, name, job):
    task = speed.models.SMALL[name].task()
    assert speed.checks.CHECKS[job](task, speed.jobs.ours[job](task, drawn(task)))


@pytest.mark.parametrize(("part", "word"), [(0, "A"), (1, "G")])
@pytest.mark.parametrize("handed", [True, False])
def test_a_factor_of_two_is_seen(speed, task, part, word, handed):
    run = altered(speed.jobs.estimated(task, drawn(task) if handed else None), part, 2.0)
    ratio = rf"{word} is .*ratio 2\.0000" if handed or word == "A" else "the trace of G is [12]"
    with pytest.raises(speed.checks.DisagreementError, match=ratio):
        speed.checks.check_factors(task, run)


def test_a_wrong_update_is_seen(speed, task):
    run = speed.jobs.preconditioned(1, 1, task, None)
    wrong = dataclasses.replace(run, solve=lambda *given: 0.5 * run.solve(*given))
    with pytest.raises(speed.checks.DisagreementError, match=r"the update is .* ratio 2\.0"):
        speed.checks.check_step(task, wrong)


def test_a_wrong_loss_is_seen(speed, task):
    with pytest.raises(speed.checks.DisagreementError, match="the first loss is"):
        speed.checks.check_training(task, speed.jobs.Run(lambda: 7.0))


def test_a_layer_that_is_missing_is_seen(speed, task):
    run = speed.jobs.estimated(task, None)
    some = dataclasses.replace(run, factors=lambda: dict(list(run.factors().items())[1:]))
    with pytest.raises(speed.checks.DisagreementError, match="layers 2, 4, 6; expected 0, 2, 4, 6"):
        speed.checks.check_factors(task, some)


# -- tables ------------------------------------------------------------------------------------------------------------


def printed(speed, monkeypatch, contenders, *given: str) -> None:
    monkeypatch.setattr(speed.times, "CONTENDERS", contenders)
    assert speed.main(["--small", "--threads", str(torch.get_num_threads()), *given]) == 0


def test_a_small_run_prints_and_writes_every_job(speed, monkeypatch, capsys, tmp_path):
    contenders = {name: one for name, one in speed.peers.CONTENDERS.items() if name in HERE}
    given = ["--jobs", "factors", "step", "training", "--repeats", "2", "--steps", "3", "--out", str(tmp_path / "all")]
    printed(speed, monkeypatch, contenders, *given, "--picture", str(tmp_path / "all.png"))
    table = capsys.readouterr().out
    found = json.loads((tmp_path / "all").read_text())
    rows = {(one["job"], one["model"]): [] for one in found["cells"]}
    for one in found["cells"]:
        rows[one["job"], one["model"]].append(one["contender"])
        assert one["low"] <= one["ratio"] <= one["high"], one
        assert one["rounds"] == (3 if one["job"] == "training" else 2)
    for model in LAYERS:
        assert rows["factors", model] == ["forward and backward", "plain products", "kfac_cond"]
        assert rows["step", model] == ["forward and backward", "kfac_cond"]
        assert rows["training", model] == ["SGD", "kfac_cond", "AdamW"]
    assert table.count("1.00 (1.00-1.00)") == 9
    assert table.count("agrees: A and G for the same labels") == 1
    assert "failed" not in table
    assert (tmp_path / "all.png").stat().st_size > 0


def test_memory_is_that_of_a_fresh_process(speed, monkeypatch, capsys):
    printed(speed, monkeypatch, {"SGD": speed.peers.CONTENDERS["SGD"]}, "--jobs", "memory", "--models", "mlp")
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("SGD")]
    assert int(row.split()[1]) >= 0


def test_a_library_that_is_absent_is_a_row(speed, monkeypatch, capsys):
    monkeypatch.setattr(speed.jobs.importlib.util, "find_spec", lambda _: None)
    given = ["--jobs", "factors", "step", "--models", "mlp", "--repeats", "1"]
    printed(speed, monkeypatch, speed.peers.CONTENDERS, *given)
    lines = capsys.readouterr().out.splitlines()
    absent = [line.rsplit("  ", 1)[0].strip() for line in lines if line.endswith("  not installed")]
    steps = ["ASDL", "kfac-pytorch, inverse", "kfac-pytorch, eigen"]
    assert absent == ["ASDL", "NNGeometry", "curvlinops", "BackPACK", "kronfluence", *steps]


def test_another_package_of_the_same_name_is_not_the_library(speed, monkeypatch, tmp_path):
    (tmp_path / "namesake").mkdir()
    (tmp_path / "namesake" / "__init__.py").write_text("import a_module_that_nobody_has")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not speed.jobs.Contender({}, "namesake.part").installed


def test_a_library_that_fails_is_a_row_with_its_first_line(speed, monkeypatch, capsys):
    def refuses(task, labels):
        raise TypeError("takes no such layer\nand says more")

    def breaks(task, labels):
        return dataclasses.replace(speed.jobs.estimated(task, labels), go=lambda: 1 / 0)

    some = {name: speed.peers.CONTENDERS[name] for name in HERE[:1]}
    some |= {"early": speed.jobs.Contender({"factors": refuses})}
    some |= {"late": speed.jobs.Contender({"factors": breaks}, checked=False)}
    printed(speed, monkeypatch, some, "--jobs", "factors", "--models", "mlp", "--repeats", "1")
    table = capsys.readouterr().out
    assert "mlp: TypeError: takes no such layer\n" in table
    assert "mlp: ZeroDivisionError: division by zero" in table


def test_kinds_of_steps_count_by_their_share(speed):
    kinds = [speed.times.kind(step) for step in range(200)]
    assert {kind: kinds.count(kind) / 200 for kind in kinds} == speed.times.SHARES
    seconds = [{"between": 1.0, "capture": 2.0, "refresh": 30.0}[kind] for kind in kinds]
    assert speed.times.of_kinds(seconds, kinds, 0.5) == pytest.approx(sum(seconds) / 200)
    assert speed.times.of_kinds([1.0, 2.0, 4.0], ["between"] * 3, 0.5) == 2.0


def test_no_round_is_begun_after_the_budget(speed):
    run = speed.jobs.Run(lambda: None)
    for least in (1, 3):
        seconds, failed = speed.times.timed({"one": run, "other": run}, 5, warm=1, budget=0.0, least=least)
        assert {name: len(values) for name, values in seconds.items()} == {"one": least, "other": least}
        assert not failed


# -- sweeps and networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_an_exponent_is_the_slope_of_the_larger_half(speed, power):
    sizes = [1, 2, 4, 8, 16]
    assert speed.sweeps.exponent(sizes, [9.0, 9.0, *(one**power for one in sizes[2:])]) == pytest.approx(power)
    assert math.isnan(speed.sweeps.exponent([4], [1.0]))


def test_sizes_beyond_the_budget_are_left_out_and_named(speed, monkeypatch):
    monkeypatch.setattr(speed.sweeps, "seconds_of", lambda quantity, size: (size**2 / 1e6, size / 1e6))
    one = speed.sweeps.Sweep("width", "factors", (1, 2, 10**12), lambda size: size, 2.0)
    found = speed.sweeps.swept(one, budget=60.0)
    assert (found.sizes, found.left_out) == ([1, 2], [10**12])
    assert "exponent 2.00, at most 2 or that of a forward and backward, 1.00 (" in speed.sweeps.said(found)
    assert "left out to stay within the budget: 1000000000000" in speed.sweeps.said(found)
    assert "ABOVE IT" in speed.sweeps.said(dataclasses.replace(found, exponent=2.3))
    for other in ({"exponent": math.nan}, {"exponent": 2.3, "plain": 2.2}):
        assert "ABOVE IT" not in speed.sweeps.said(dataclasses.replace(found, **other))


@pytest.mark.parametrize("index", range(6))
def test_every_sweep_runs_at_its_smallest_size(speed, index):
    one = speed.sweeps.planned(small=True)[index]
    assert min(speed.sweeps.seconds_of(one.quantity, one.setting(one.at[0]))) > 0


@pytest.mark.parametrize("name", ["resnet-18", "gpt", "vit-tiny"])
def test_a_network_is_compared_and_timed(speed, name):
    line = speed.sweeps.line(name, speed.models.SMALL_NETWORKS[name], repeats=1, budget=60.0)
    assert min(line.plain, line.factors, line.training, line.largest) > 0
    assert (line.square > 0) == (name == "gpt")


def test_a_head_over_a_vocabulary_has_no_square_of_it(speed):
    setting = speed.models.SMALL_NETWORKS["gpt"]
    square = 4 * setting.vocabulary**2
    task = setting.task()
    for rules, held in ((speed.sweeps.sides(setting), False), (None, True)):
        with speed.sweeps.Largest() as largest:
            speed.jobs.estimated(task, None, rules).go()
            speed.jobs.preconditioned(1, 1, task, None, rules).go()
        assert (largest.bytes >= square) == held
