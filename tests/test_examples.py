"""The examples: their data, that a stop changes nothing, and what they leave."""

from __future__ import annotations

import gzip
import importlib
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.interpolate import CubicSpline

import kfac_cond as kc

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PARTS = ("data", "tasks", "optimizers", "results", "run", "command")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules that the examples share by their last word, and the examples themselves."""
    torch.set_default_dtype(torch.float32)
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    mains = {name: importlib.import_module(name).main for name in ("autoencoder", "classifier", "language_model")}
    yield SimpleNamespace(**mains, **{part: sys.modules[f"example_{part}"] for part in PARTS})
    torch.set_num_threads(threads)


# -- data --------------------------------------------------------------------------------------------------------------


def test_a_curve_is_the_natural_spline_through_its_points(example):
    points, t = torch.randn(4, 3, 2, dtype=torch.float64), torch.linspace(-1, 1, 21, dtype=torch.float64)
    known = CubicSpline([-1, 0, 1], points.numpy(), axis=1, bc_type="natural")(t.numpy())
    torch.testing.assert_close(example.data.spline(points, t), torch.tensor(known))


def test_curves_are_of_the_seed_alone_and_dark_where_their_points_are(example):
    drawn = example.data.curves(50, seed=3)
    assert torch.equal(drawn, example.data.curves(50, seed=3))
    assert not torch.equal(drawn, example.data.curves(50, seed=4))
    assert drawn.shape == (50, 28, 28)
    assert 0 <= float(drawn.min()) <= float(drawn.max()) < 1
    points = 3 + 21 * torch.rand(50, 3, 2, generator=torch.Generator().manual_seed(3))
    x, y = points[:, 1].long().unbind(-1)
    darkest = drawn.flatten(1).amax(1)
    assert (drawn[torch.arange(50), y, x] > 0.3 * darkest).float().mean() > 0.9


def written(folder: Path, name: str, count: int, *, zipped: bool = False) -> None:
    """Images whose pixels are their number, and labels likewise."""
    for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
        values = torch.arange(count, dtype=torch.uint8).view(-1, *[1] * (len(shape) - 1)).expand(shape)
        content = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + values.numpy().tobytes()
        file = folder / f"{name}-{kind}-ubyte{'.gz' if zipped else ''}"
        file.write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.parametrize("zipped", [True, False])
def test_four_fifths_of_the_test_images_are_trained_on_where_there_are_no_others(example, tmp_path, zipped):
    written(tmp_path, "t10k", 10, zipped=zipped)
    found = example.data.images(f"mnist:{tmp_path}")
    assert found["train"][1].tolist() == list(range(8))
    assert found["held_out"][1].tolist() == [8, 9]
    assert torch.equal(found["held_out"][0], torch.tensor([8.0, 9.0])[:, None, None].expand(2, 28, 28) / 255)


def test_all_of_the_test_images_are_held_out_where_there_are_others(example, tmp_path):
    written(tmp_path, "t10k", 10)
    written(tmp_path, "train", 20, zipped=True)
    assert {name: len(labels) for name, (_, labels) in example.data.images(f"mnist:{tmp_path}").items()} == {
        "train": 20,
        "held_out": 10,
    }


def test_a_file_that_is_not_whole_is_refused(example, tmp_path):
    written(tmp_path, "t10k", 10)
    file = tmp_path / "t10k-labels-idx1-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SystemExit, match=r"labels-idx1-ubyte is no idx file of bytes, or not whole: 17 bytes"):
        example.data.images(f"mnist:{tmp_path}")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("mnist:/nowhere", "found no t10k-images-idx3-ubyte"),
        ("mnist", "expected curves, digits or mnist:PATH"),
        ("faces", "--data faces: expected curves, digits or mnist:PATH"),
    ],
)
def test_data_that_are_not_there(example, source, reason):
    with pytest.raises(SystemExit, match=reason):
        example.data.images(source)


def test_digits_without_scikit_learn(example, monkeypatch):
    monkeypatch.setattr(example.data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="needs scikit-learn: pip install"):
        example.data.images("digits")


def test_curves_have_no_classes(example):
    with pytest.raises(SystemExit, match="curves has no classes"):
        example.tasks.classifier("curves")


def test_an_epoch_has_every_example_once_and_batches_are_of_step_and_seed_alone(example):
    x = torch.arange(10)
    data = example.data.Examples({"train": (x, x), "held_out": (x, x)})
    epoch = [data.batch(step, 3, seed=1)[0] for step in range(3)]
    assert len(set(torch.cat(epoch).tolist())) == 9
    assert torch.equal(epoch[1], data.batch(1, 3, seed=1)[0])
    assert any(not torch.equal(one, data.batch(step + 3, 3, seed=1)[0]) for step, one in enumerate(epoch))
    assert torch.equal(torch.cat([inputs for inputs, _ in data.parts("held_out")]), x)


def test_the_library_is_so_many_bytes_and_windows_are_followed_by_their_targets(example):
    splits = example.data.library(300_000)
    assert sum(map(len, splits.values())) == 300_000
    assert len(splits["train"]) > 3 * len(splits["held_out"]) > 0
    assert int(splits["train"].max()) < example.tasks.BYTES
    text = example.data.Text(splits, 16, most=8)
    for inputs, targets in (text.batch(2, 4, seed=0), next(text.parts("held_out"))):
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(text.batch(2, 4, seed=0)[0], text.batch(2, 4, seed=0)[0])
    assert not torch.equal(text.batch(2, 4, seed=0)[0], text.batch(3, 4, seed=0)[0])


# -- models ------------------------------------------------------------------------------------------------------------


def test_the_autoencoder_is_that_of_the_literature(example):
    torch.manual_seed(0)
    model = example.tasks.encoder_and_decoder(example.tasks.WIDTHS)
    layers = [one for one in model if isinstance(one, torch.nn.Linear)]
    sizes = [layers[0].in_features, *(one.out_features for one in layers)]
    assert sizes == [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    kinds = [type(one).__name__ for one in model]
    assert kinds == [*["Linear", "Tanh"] * 3, *["Linear"] * 2, *["Tanh", "Linear"] * 3]
    for one in layers:
        assert float(one.weight.detach().std() * one.in_features**0.5) == pytest.approx(1.0, abs=0.02)
        assert not one.bias.any()


def test_the_loss_of_an_image_is_that_of_its_likelihood(example):
    logits, pixels = torch.randn(5, 784, dtype=torch.float64), torch.rand(5, 784, dtype=torch.float64)
    per_image = -kc.Bernoulli().log_prob(logits, pixels)
    torch.testing.assert_close(example.tasks.reconstruction_loss(logits, pixels), per_image.sum() / 5)


def test_measured_is_the_mean_over_all_examples_however_they_are_split(example):
    task = example.tasks.classifier("digits", width=2, most=700)
    torch.manual_seed(0)
    model = task.model()
    found = task.measured(model, "train", torch.device("cpu"))
    x, y = (one[:700] for one in task.data.splits["train"])
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(model(x), y).item(), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((model(x).argmax(1) == y).float().mean()))


# -- optimizers --------------------------------------------------------------------------------------------------------


def small(example, **changes: Any) -> Any:
    """A classifier's or an autoencoder's task, tiny."""
    return example.tasks.autoencoder("digits", widths=(784, 8, 4), batch=32, most=64, **changes)


def run(example, name: str, *, task: Any = None, **settings: float) -> Any:
    task = task or small(example)
    settings = example.optimizers.OPTIMIZERS[name].settings_for(task, settings)
    return example.run.Run(task, name, settings, example.run.Options(4, 2))


def test_the_penalty_is_trained_on(example):
    one = run(example, "sgd", lr=1e-3)
    before = {name: value.clone() for name, value in one.model.named_parameters()}
    x, y = one.task.data.batch(0, 32, seed=0)
    one.task.loss(one.model(x), y).backward()
    gradients = {name: value.grad.clone() for name, value in one.model.named_parameters()}
    object.__setattr__(one.task, "l2", 0.5)
    one.stepper.step(x, y)
    for name, value in one.model.named_parameters():
        # The first step of Nesterov's momentum 0.9 is 1.9 of the gradient.
        torch.testing.assert_close(value, before[name] - 1.9e-3 * (gradients[name] + 0.5 * before[name]))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_takes_a_convolution_as_one_matrix(example):
    task = example.tasks.classifier("digits", width=2, batch=8)
    one = run(example, "muon", task=task, lr=0.1)
    convolution = one.model[2]
    by_hand = torch.nn.Parameter(convolution.weight.detach().flatten(1).clone())
    x, y = task.data.batch(0, 8, seed=0)
    task.loss(one.model(x), y).backward()
    by_hand.grad = convolution.weight.grad.flatten(1).clone()
    torch.optim.Muon([by_hand], lr=0.1, weight_decay=0.01).step()
    one.stepper.step(x, y)
    torch.testing.assert_close(convolution.weight.detach().flatten(1), by_hand.detach())


def test_a_setting_that_there_is_not(example):
    with pytest.raises(SystemExit, match="SGD, Nesterov has no setting damping; it has lr"):
        run(example, "sgd", damping=1.0)


@pytest.mark.parametrize("text", ["kfac.damping", "kfac.damping=much", "nobody.lr=1", "kfac=3"])
def test_a_setting_that_is_not_understood(example, text):
    with pytest.raises(SystemExit, match=r"expected OPTIMIZER\.SETTING=NUMBER"):
        example.command.changes([text])


# -- runs --------------------------------------------------------------------------------------------------------------


def same(mine: Any, theirs: Any) -> bool:
    """Bit by bit."""
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(same(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, list | tuple):
        return len(mine) == len(theirs) and all(same(a, b) for a, b in zip(mine, theirs, strict=True))
    return torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


def resumed_is_uninterrupted(example, task: Any, name: str, path: Path) -> None:
    whole, stopped, resumed = (run(example, name, task=task) for _ in range(3))
    whole.train(4)
    stopped.train(2)
    stopped.save(path)
    resumed.resume(path)
    resumed.train(4)
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert same(whole.stepper.state_dict(), resumed.stepper.state_dict())
    for quantity in ("steps", "train_loss", "held_out_loss"):
        assert getattr(whole.curve, quantity) == getattr(resumed.curve, quantity)


def names() -> list[str]:
    """Of the optimizers that there are here."""
    return [
        "sgd",
        "adam",
        "adamw",
        *(["muon"] if hasattr(torch.optim, "Muon") else []),
        "kfac",
        "kfac-graft",
        "natural",
    ]


@pytest.mark.parametrize("name", names())
def test_a_run_that_stopped_goes_on_bitwise(example, name, tmp_path):
    assert names() == list(example.optimizers.OPTIMIZERS)
    resumed_is_uninterrupted(example, small(example), name, tmp_path / "run.pt")


@pytest.mark.parametrize("name", [name for name in names() if name in ("muon", "kfac-graft", "natural")])
def test_a_convolutional_run_that_stopped_goes_on_bitwise(example, name, tmp_path):
    task = example.tasks.classifier("digits", width=2, batch=32, most=64)
    resumed_is_uninterrupted(example, task, name, tmp_path / "run.pt")


def test_a_checkpoint_of_another_run_is_refused(example, tmp_path):
    one = run(example, "kfac", damping=1.0)
    one.train(2)
    one.save(tmp_path / "run.pt")
    with pytest.raises(SystemExit, match=r"is of a run with damping 1\.0 \(here 2\.0\)"):
        run(example, "kfac", damping=2.0).resume(tmp_path / "run.pt")


def test_a_run_that_diverges_ends(example):
    one = run(example, "sgd", lr=1e38)
    one.train(4)
    assert one.step == 2
    assert len(one.curve.train_loss) == 1


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("autoencoder", ("--data", "digits", "--widths", "784", "8", "4")),
        ("classifier", ("--width", "2", "--batch", "32")),
        ("language_model", ("--batch", "4", "--context", "8", "--width", "16", "--blocks", "1", "--text", "200000")),
    ],
)
def test_an_example_leaves_numbers_a_picture_and_checkpoints_and_goes_on(example, capsys, tmp_path, name, arguments):
    given = [*arguments, "--steps", "4", "--every", "2", "--out", str(tmp_path), "--set", "kfac.damping=0.5"]
    given += ["--optimizer", "adamw", "kfac"]
    getattr(example, name)([*given, "--until", "2"])
    assert kc.load_checkpoint(tmp_path / f"{name}_kfac.pt")["step"] == 2
    getattr(example, name)([*given, "--resume"])
    told = capsys.readouterr().out
    assert "within" in told
    assert f"saved: {tmp_path / name}.json, {tmp_path / name}.png" in told
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert list(found["runs"]) == ["adamw", "kfac"]
    for one in found["runs"].values():
        assert one["steps"] == [2, 4]
        assert len(one["held_out_loss"]) == len(one["train_loss"]) == len(one["seconds"]) == 2
        assert len(one["held_out_accuracy"]) == (2 if name == "classifier" else 0)
    assert found["runs"]["kfac"]["settings"]["damping"] == 0.5
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_without_matplotlib_there_is_no_picture_and_it_is_said(example, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(example.results.importlib.util, "find_spec", lambda name: None)
    arguments = ["--batch", "4", "--context", "8", "--width", "16", "--blocks", "1", "--text", "200000"]
    example.language_model([*arguments, "--optimizer", "adam", "--steps", "1", "--out", str(tmp_path)])
    assert "no picture: it needs matplotlib" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))


def test_a_curve_says_where_it_got(example):
    curve = example.results.Curve([1, 2, 3], [0.1, 0.2, 0.3], [3.0, 2.0, 1.0], [4.0, 3.0, 3.5], [], [0.5, 0.7, 0.6])
    assert [curve.first("train_loss", target) for target in (3.0, 2.5, 0.5)] == [0, 1, None]
    assert [curve.first("held_out_accuracy", target) for target in (0.4, 0.6, 0.8)] == [0, 1, None]
    assert [curve.within(seconds) for seconds in (0.05, 0.25, 9.0)] == [None, 3.0, 3.5]
