"""Weights that are used without a call of their module: seen in the first forward, universal from then on."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_cond as kc

from .helpers import EVERY_STEP
from .reference import assert_same, categorical_log_prob, example_gradients
from .training import batches, parameters_of, train


class Functional(nn.Module):
    """A linear layer that is called, and one whose weight and bias are taken from it."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.taken, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.called(x).tanh()
        return self.head(F.linear(h, self.taken.weight, self.taken.bias).tanh())


class Both(Functional):
    """A layer that is called, and its weight used once more."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.taken(self.called(x).tanh()).tanh()
        return self.head(F.linear(h, self.taken.weight).tanh())


class Unhooked(Functional):
    """A forward that is called directly, past the hooks of its module."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.taken.forward(self.called(x).tanh()).tanh())


class Differentiated(Functional):
    """A forward that is a derivative, as forces are of an energy: its backward takes the weight in once more."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.called(x).tanh()
        (force,) = torch.autograd.grad(self.taken(h).tanh().sum(), h, create_graph=True)
        return self.head(force)


class Attending(Functional):
    """A projection whose weight torch's own attention takes."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.called(x)[None]
        weight, bias = self.taken.weight.repeat(3, 1), self.taken.bias.repeat(3)
        found, _ = F.multi_head_attention_forward(
            h, h, h, 4, 2, weight, bias, None, None, False, 0.0, torch.eye(4), None
        )
        return self.head(found[0])


class Beside(nn.Module):
    """A module of several weights that is called, and the first rows of one of them used once more."""

    def __init__(self, module: nn.Module, weight: str) -> None:
        super().__init__()
        self.module, self.weight, self.head = module, weight, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for _ in range(2):
            h = self.module(h, h, h)[0] if isinstance(self.module, nn.MultiheadAttention) else self.module(h)[0]
        return self.head((h @ self.module.get_parameter(self.weight)[:4].T).tanh())


BESIDE = {
    "in_proj_weight": lambda: nn.MultiheadAttention(4, 2),
    "out_proj.weight": lambda: nn.MultiheadAttention(4, 2),
    "weight_ih_l0": lambda: nn.LSTM(4, 4),
    "weight_hh_l1": lambda: nn.GRU(4, 4, num_layers=2),
    "weight_ih_l1": lambda: nn.RNN(4, 4, num_layers=2),
    "weight_hh_l0": lambda: nn.LSTM(4, 6, proj_size=4),
}

MODELS = [Functional, Both, Unhooked, Differentiated, Attending]


def step(kfac: kc.KFAC, model: nn.Module, inputs: Tensor, **draws: Tensor) -> None:
    model.zero_grad()
    outputs = model(inputs)
    kfac.update(outputs, **draws)
    outputs.square().sum().backward()
    kfac.precondition()


@pytest.mark.parametrize("make", MODELS)
def test_training_covers_its_parameters_from_the_second_capture_on(make, caplog):
    model, inputs = make(), torch.randn(5, 3)
    kfac = kc.KFAC(model, "categorical", schedule=EVERY_STEP)
    assert list(kfac.layers) == ["called", "taken", "head"]
    step(kfac, model, inputs)
    assert list(kfac.layers) == ["called", "taken.weight", "taken.bias", "head"]
    assert "1 of 3 layers have a weight that is used without a call of their module: taken." in caplog.text
    caplog.clear()
    draws = torch.randint(2, (5,))
    step(kfac, model, inputs, draws=draws)
    assert caplog.text == ""
    rows = {row.path: row for row in kfac.coverage().rows}
    assert kfac.coverage().share == 1.0
    assert rows["taken.weight"].form == "universal"
    assert "its weight is used without a call of its module" in rows["taken.weight"].reason
    loss = F.cross_entropy(model(inputs), draws, reduction="sum")
    (D,) = torch.autograd.grad(loss, [model.taken.weight])
    block = kfac.fisher()["taken.weight"]
    assert_same(block.G, D @ D.T / 5)
    assert_same(block.A, D.T @ D / D.square().sum())


@pytest.mark.parametrize("make", MODELS)
def test_the_table_of_a_batch_knows_of_it(make):
    rows = {row.path: row for row in kc.coverage(make(), torch.randn(5, 3)).rows}
    assert [rows[f"taken.{part}"].form for part in ("weight", "bias")] == ["universal", "universal"]
    assert "its weight is used without a call of its module" in rows["taken.weight"].reason
    assert {rows[f"{name}.weight"].form for name in ("called", "head")} == {"kronecker"}


@pytest.mark.parametrize("make", MODELS)
def test_the_first_capture_takes_nothing_wrong_in(make):
    model, inputs = make(), torch.randn(5, 3)
    kfac = kc.KFAC(model, "categorical", schedule=EVERY_STEP)
    step(kfac, model, inputs)
    assert list(kfac.fisher()) == ["called", "head"]


@pytest.mark.parametrize("structure", ["kfac", "diagonal", "block"])
@pytest.mark.parametrize("make", MODELS[:-1])
def test_an_estimate_is_right_from_the_first_batch_on(make, structure):
    model, inputs, labels = make(), torch.randn(6, 3), torch.randint(2, (6,))
    data = [(inputs[:2], labels[:2]), (inputs[2:], labels[2:])]
    found = kc.estimate(model, data, "categorical", structure=structure, kind="empirical")
    assert list(found) == ["called", "taken.weight", "taken.bias", "head"]
    D = example_gradients(model, inputs, labels, categorical_log_prob, [model.taken.weight])
    block = found["taken.weight"]
    if structure == "kfac":
        V = D.reshape(6, 4, 4)
        assert_same(block.G, torch.einsum("noi, npi -> op", V, V) / 6)
    elif structure == "diagonal":
        assert_same(block.values.flatten(), D.square().sum(0) / 6)
    else:
        assert_same(block.to_dense(), D.T @ D / 6)


@pytest.mark.parametrize("weight", BESIDE)
def test_a_weight_of_several_is_seen_beside_the_calls_of_its_module(weight):
    module = BESIDE[weight]()
    rows = {row.path: row.form for row in kc.coverage(Beside(module, weight), torch.randn(5, 4)).rows}
    assert rows[f"module.{weight}"] == "universal"
    # What is used in the calls alone keeps its form.
    assert set(rows.values()) == {"universal", "kronecker"}


def test_a_weight_that_autocast_casts_once_is_seen_beside_the_calls():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = {row.path: row.form for row in kc.coverage(Both().float(), torch.randn(5, 3).float()).rows}
    assert rows["taken.weight"] == "universal"
    assert rows["called.weight"] == "kronecker"


def test_a_weight_of_a_registered_kind_is_seen_beside_the_calls_of_its_module():
    class Halved(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight / 2, self.bias)

    class HalvedKind(kc.LayerKind):
        def activations(self, module: nn.Module, inputs: Tensor) -> Tensor:
            return inputs[:, None] / 2

        def output_gradients(self, module: nn.Module, gradient: Tensor) -> Tensor:
            return gradient[:, None]

    kc.register_layer(Halved, HalvedKind)
    model = Both()
    model.taken, model.called = Halved(4, 4), Halved(3, 4)
    try:
        rows = {row.path: row.form for row in kc.coverage(model, torch.randn(5, 3)).rows}
    finally:
        kc.unregister_layer(Halved)
    assert rows["taken.weight"] == "universal"
    assert rows["called.weight"] == "kronecker"


def test_a_pattern_of_layers_reaches_its_parameters():
    found = kc.estimate(Functional(), [torch.randn(4, 3)], "categorical", options=kc.Options(layers="tak*"))
    assert list(found) == ["taken.weight", "taken.bias"]
    found = kc.estimate(Functional(), [torch.randn(4, 3)], "categorical", options=kc.Options(layers=["taken", "head"]))
    assert list(found) == ["taken.weight", "taken.bias", "head"]


def test_an_interrupted_estimate_goes_on_with_it(tmp_path):
    model, data = Functional(), [torch.randn(4, 3) for _ in range(4)]

    class Interrupted(Exception):
        pass

    def some():
        yield from data[:2]
        raise Interrupted

    options = kc.Options(seed=1, partial=tmp_path / "partial.pt")
    with pytest.raises(Interrupted):
        kc.estimate(model, some, "categorical", options=options)
    found = kc.estimate(model, data, "categorical", options=options)
    expected = kc.estimate(model, data, "categorical", options=kc.Options(seed=1))
    assert list(found) == list(expected)
    assert all(torch.equal(block.G, expected[name].G) for name, block in found.items())


def test_rules_of_the_module_still_hold():
    model, inputs = Functional(), torch.randn(5, 3)
    kfac = kc.KFAC(model, "categorical", rules={"taken": {"damping": 0.7}, "head": {"damping": 0.2}})
    step(kfac, model, inputs)
    assert kfac.layers["taken.weight"].rule.damping == 0.7
    model = Functional()
    kfac = kc.KFAC(model, "categorical", rules={"taken": {"exclude": True}})
    step(kfac, model, inputs)
    assert list(kfac.layers) == ["called", "head"]


def test_a_layer_that_a_forward_leaves_out_keeps_its_form(caplog):
    class Branching(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.called(x).tanh())

    model = Branching()
    kfac = kc.KFAC(model, "categorical", schedule=EVERY_STEP)
    step(kfac, model, torch.randn(5, 3))
    assert list(kfac.layers) == ["called", "taken", "head"]
    assert "did not take part in the first forward: taken" in caplog.text


class Later(Functional):
    """One that takes the weight only once it is switched on."""

    on = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.on else self.head(self.called(x).tanh())


def test_an_estimate_refuses_what_is_used_only_later():
    model = Later()

    def data():
        yield torch.randn(5, 3)
        model.on = True
        yield torch.randn(5, 3)

    with pytest.raises(kc.CaptureError, match="batch 1 uses the weight of taken without a call of its module"):
        kc.estimate(model, data, "categorical")


def test_what_is_used_only_later_is_seen_later():
    model = Later()
    kfac = kc.KFAC(model, "categorical", schedule=EVERY_STEP)
    step(kfac, model, torch.randn(5, 3))
    model.on = True
    for _ in range(3):
        step(kfac, model, torch.randn(5, 3))
    assert list(kfac.layers) == ["called", "taken.weight", "taken.bias", "head"]


@pytest.mark.parametrize("uses", [1, 2])
def test_calls_alone_are_no_other_use(uses, caplog):
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm, self.conv = nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv1d(1, 1, 3, padding=1)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.recurrent, self.cell = nn.GRU(4, 2, num_layers=2, bidirectional=True), nn.GRUCell(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(uses):
                x = self.cell(self.recurrent(x[None])[0][0], x)
                x = self.norm(self.layer(x)).tanh()
                x = self.conv(x[:, None])
                x = self.attention(x, x, x)[0][:, 0]
            return x

    model = Reused()
    kfac = kc.KFAC(model, "categorical", schedule=EVERY_STEP)
    before = list(kfac.layers)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(kfac, model, torch.randn(5, 4, dtype=torch.float32).to(torch.get_default_dtype()))
    step(kfac, model, torch.randn(5, 4))
    assert list(kfac.layers) == before


def test_a_resumed_run_knows_of_it(caplog):
    caplog.set_level(logging.WARNING)
    criterion, data = nn.CrossEntropyLoss(), batches(8)

    def made() -> tuple[nn.Module, torch.optim.Optimizer, kc.KFAC]:
        torch.manual_seed(0)
        model = Functional()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kfac = kc.KFAC(model, criterion, schedule=kc.Schedule(factors=1, inverses=2), data=kc.Data(seed=1))
        kfac.attach(optimizer)
        return model, optimizer, kfac

    model, optimizer, kfac = made()
    train(model, criterion, optimizer, data[:4])
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(kfac.state_dict())
    train(model, criterion, optimizer, data[4:])
    again, optimizer, kfac = made()
    again.load_state_dict(weights)
    kfac.load_state_dict(state)
    train(again, criterion, optimizer, data[4:])
    assert torch.equal(parameters_of(again), parameters_of(model))


def test_a_state_that_does_not_fit_changes_nothing():
    model = Functional()
    kfac = kc.KFAC(model, "categorical")
    step(kfac, model, torch.randn(5, 3))
    state = kfac.state_dict()
    state["layers"] = tuple(pair for pair in state["layers"] if pair[0] != "head")
    other = kc.KFAC(Functional(), "categorical")
    with pytest.raises(kc.StateError, match="layers missing in it \\['head'\\]"):
        other.load_state_dict(state)
    assert list(other.layers) == ["called", "taken", "head"]
