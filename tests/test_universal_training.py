"""Training with parameters in the universal form: what is averaged, from when on it counts, and what is left alone."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kfac_cond as kc
from kfac_cond.averages import MovingAverage
from kfac_cond.layers.layer import draws_needed
from kfac_cond.layers.universal import MIN_DRAWS
from kfac_cond.statistics import LayerSums, Slots, Statistics

from .reference import assert_same
from .training import HostReads


class Small(nn.Module):
    """A linear layer between a scale and a functional weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3) + 0.5)
        self.body = nn.Linear(3, 4)
        self.out = nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(torch.tanh(self.body(x * self.scale)), self.out)


class Functional(nn.Module):
    """Nothing but raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(4, 3))
        self.out = nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(torch.tanh(functional.linear(x, self.inner)), self.out)


class ViT(nn.Module):
    """A class token, a positional table and layer scales around one attention block."""

    def __init__(self, *, width: int = 16, tokens: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.patch = nn.Linear(5, width)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.table = nn.Parameter(0.02 * torch.randn(1, tokens + 1, width))
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.gamma = nn.Parameter(0.1 * torch.ones(width))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.table
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        h = h + self.gamma * functional.scaled_dot_product_attention(q, k, v)
        return self.head(h[:, 0])


def batch(seed: int = 0, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, generator=generator), torch.randint(2, (size,), generator=generator)


def summed_gradient(model: nn.Module, inputs: Tensor, labels: Tensor, name: str) -> Tensor:
    loss = functional.cross_entropy(model(inputs), labels, reduction="sum")
    return torch.autograd.grad(loss, model.get_parameter(name))[0]


def step(kfac: kc.KFAC, model: nn.Module, *micro: tuple[Tensor, Tensor]) -> None:
    """One step over micro-batches, each with its drawn labels."""
    model.zero_grad()
    for inputs, draws in micro:
        outputs = model(inputs)
        kfac.update(outputs, draws=draws)
        functional.cross_entropy(outputs, draws, reduction="sum").backward()
    kfac.precondition()


@pytest.mark.parametrize("make", [Small, Functional])
def test_moments_are_averaged_apart_and_combined_where_they_are_read(make):
    model = make()
    kfac = kc.KFAC(model, "categorical", schedule=kc.Schedule(factors=1, inverses=1, decay=0.5))
    seen = [batch(0), batch(1, size=3)]
    for one in seen:
        step(kfac, model, one)
    D = [summed_gradient(model, *one, "out") for one in seen]
    R = (0.5 * D[0] @ D[0].T / 6 + D[1] @ D[1].T / 3) / 1.5
    C = (0.5 * D[0].T @ D[0] / 6 + D[1].T @ D[1] / 3) / 1.5
    block = kfac.fisher()["out"]
    assert_same(block.G, R)
    assert_same(block.A, C / C.trace())
    assert_same(block.trace(), R.trace())


def test_micro_batches_are_squared_one_by_one():
    model = Small()
    kfac = kc.KFAC(model, "categorical", schedule=kc.Schedule(factors=1, inverses=1))
    parts = [batch(0), batch(1, size=3)]
    step(kfac, model, *parts)
    D = [summed_gradient(model, *one, "out") for one in parts]
    assert_same(kfac.fisher()["out"].G, sum(one @ one.T for one in D) / 9)
    scale = [summed_gradient(model, *one, "scale") for one in parts]
    assert_same(kfac.fisher()["scale"].G, sum(one.square() for one in scale) / 9)


def test_forwards_of_a_model_without_layers_are_told_apart():
    model = Functional()
    kfac = kc.KFAC(model, "categorical", schedule=kc.Schedule(factors=1, inverses=1))
    parts = [batch(0), batch(1, size=3)]
    outputs = [model(inputs) for inputs, _ in parts]
    for one, (_, draws) in zip(outputs, parts, strict=True):
        kfac.update(one, draws=draws)
    sum(one.sum() for one in outputs).backward()
    kfac.precondition()
    D = [summed_gradient(model, *one, "inner") for one in parts]
    assert_same(kfac.fisher()["inner"].G, sum(one @ one.T for one in D) / 9)


def test_one_forward_is_captured_once():
    model, criterion = Functional(), nn.CrossEntropyLoss()
    kfac = kc.KFAC(model, criterion)
    kfac.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    inputs, labels = batch()
    outputs = model(inputs)
    criterion(outputs, labels)
    with pytest.raises(kc.CaptureError, match="called twice on one forward"):
        criterion(outputs, labels)


def test_outputs_of_a_model_that_shares_a_parameter_are_not_ours():
    model, other, criterion = Functional(), Functional(), nn.CrossEntropyLoss()
    other.out = model.out
    kfac = kc.KFAC(model, criterion, schedule=kc.Schedule(factors=1, inverses=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    kfac.attach(optimizer)
    inputs, labels = batch()
    plain = model(inputs)
    criterion(other(inputs), labels)
    criterion(plain, labels).backward()
    optimizer.step()
    assert len(kfac.fisher()) == 2


@pytest.mark.parametrize("decay", [0.5, 0.95])
def test_a_parameter_is_preconditioned_from_the_effective_draw_that_is_needed(decay):
    model = Small()
    kfac = kc.KFAC(model, "categorical", schedule=kc.Schedule(factors=1, inverses=1, decay=decay))
    weight = squares = 0.0
    reached = []
    for seed in range(20):
        one = batch(seed)
        weight, squares = decay * weight + 1, decay**2 * squares + 1
        plain = summed_gradient(model, *one, "out")
        step(kfac, model, one)
        enough = weight**2 / squares >= MIN_DRAWS
        assert torch.equal(model.out.grad, plain) != enough
        assert (f"{2 * enough} of them preconditioned") in repr(kfac)
        reached.append(enough)
    # With a decay of one half there are never more than three.
    assert any(reached) == (decay == 0.95)
    assert not reached[0]


def test_what_is_preconditioned_is_the_damped_inverse():
    model = Small()
    damping = kc.Damping(0.1, rule="exact")
    kfac = kc.KFAC(model, "categorical", damping=damping, schedule=kc.Schedule(factors=1, inverses=1))
    for seed in range(15):
        one = batch(seed)
        plain = {name: summed_gradient(model, *one, name) for name in ("out", "scale")}
        step(kfac, model, one)
    for name, gradient in plain.items():
        F = kfac.fisher()[name].to_dense()
        expected = torch.linalg.solve(F + 0.1 * torch.eye(len(F)), gradient.flatten())
        assert_same(model.get_parameter(name).grad.flatten(), expected)


def test_a_capture_that_is_not_finite_is_no_draw():
    average = MovingAverage(["p"], needed={"p": 2})
    for value, enough in ((1.0, False), (float("nan"), False), (1.0, False), (1.0, True)):
        sums = LayerSums(torch.zeros(()), torch.ones(()), torch.full((1, 3), value))
        finite = torch.tensor(value == value)
        average.update(Statistics({"p": sums}, torch.ones(1), Slots(), 1, finite), decay=0.9)
        assert average.unused() == (set() if enough else {"p"})
    assert_same(average.draws["p"], torch.tensor(1 + 0.9 + 0.81))


def test_a_capture_without_the_parameter_is_no_draw():
    average = MovingAverage(["p"], needed={"p": 2})
    sums = LayerSums(torch.zeros(()), torch.ones(()), torch.ones(1, 3))
    for layers in ({}, {"p": sums}, {}):
        average.update(Statistics(layers, torch.ones(1), Slots(), 1, torch.tensor(True)), decay=0.5)
    assert (float(average.draws["p"]), float(average.draws_squared["p"])) == (0.5, 0.25)
    assert average.unused() == {"p"}


def test_gradients_and_hooks_of_accumulation_see_nothing():
    model = Small()
    inputs, labels = batch()
    seen: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    kfac = kc.KFAC(model, "categorical")
    outputs = model(inputs)
    kfac.update(outputs)
    assert not seen
    assert all(parameter.grad is None for parameter in model.parameters())
    functional.cross_entropy(outputs, labels).backward()
    assert sorted(seen) == sorted(name for name, _ in model.named_parameters())
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    kfac.remove()
    model.zero_grad()
    functional.cross_entropy(model(inputs), labels).backward()
    assert all(torch.equal(found[name], p.grad) for name, p in model.named_parameters())


def test_an_unused_parameter_is_named(caplog):
    model = Small()
    model.idle = nn.Parameter(torch.zeros(3))
    kfac = kc.KFAC(model, "categorical")
    step(kfac, model, batch())
    assert "reaches 1 of 3 parameters in the universal form: idle" in caplog.text
    assert [row.path for row in kfac.coverage().rows if row.reason.startswith("not used")] == ["idle"]


@pytest.mark.parametrize(
    "change", [lambda m: m.scale.requires_grad_(False), lambda m: setattr(m, "scale", nn.Parameter(torch.ones(1)))]
)
def test_a_parameter_that_changed_is_refused_until_refresh(change):
    model = Small()
    kfac = kc.KFAC(model, "categorical", schedule=kc.Schedule(factors=1, inverses=1))
    step(kfac, model, batch())
    change(model)
    with pytest.raises(kc.ModelChangedError, match="scale"):
        step(kfac, model, batch())
    kfac.refresh()
    step(kfac, model, batch())
    assert ("scale" in kfac.layers) == model.scale.requires_grad


def test_a_resumed_run_is_bitwise_the_same():
    def run(steps: int, kfac: kc.KFAC, optimizer: torch.optim.Optimizer, model: nn.Module, start: int = 0) -> None:
        for seed in range(start, steps):
            optimizer.zero_grad()
            inputs, labels = batch(seed)
            criterion(model(inputs), labels).backward()
            optimizer.step()

    def wrapped(model: nn.Module) -> tuple[kc.KFAC, torch.optim.Optimizer]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kfac = kc.KFAC(model, criterion, schedule=kc.Schedule(factors=1, inverses=4), data=kc.Data(seed=0))
        kfac.attach(optimizer)
        return kfac, optimizer

    criterion, model = nn.CrossEntropyLoss(), Small()
    kfac, optimizer = wrapped(model)
    run(9, kfac, optimizer, model)
    other = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(kfac.state_dict(), file)
    file.seek(0)
    run(20, kfac, optimizer, model, start=9)
    resumed, second = wrapped(other)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(20, resumed, second, other, start=9)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(resumed.fisher()["out"].A, kfac.fisher()["out"].A)


def test_a_state_without_the_counts_is_refused():
    model = Small()
    kfac = kc.KFAC(model, "categorical")
    step(kfac, model, batch())
    state = kfac.state_dict()
    del dict(state["layers"])["out"]["average"]["draws"]
    with pytest.raises(kc.StateError, match=r"layer 'out': .*expected .*draws"):
        kfac.load_state_dict(state)


def test_two_heads_are_averaged_apart():
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.a, self.b = (nn.Parameter(torch.randn(2, 3)) for _ in range(3))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = torch.tanh(functional.linear(x, self.shared))
            return {"a": h @ self.a, "b": h @ self.b}

    model = Heads()
    likelihood = kc.Product({"a": kc.Categorical(), "b": kc.Categorical()}, weights={"a": 1.0, "b": 0.5})
    kfac = kc.KFAC(model, likelihood, schedule=kc.Schedule(factors=1, inverses=1))
    inputs, _ = batch()
    labels = {name: torch.randint(3, (6,)) for name in "ab"}
    outputs = model(inputs)
    kfac.update(outputs, draws=labels)
    sum(one.sum() for one in outputs.values()).backward()
    kfac.precondition()
    expected = torch.zeros(2, 2)
    for name, weight in (("a", 1.0), ("b", 0.5)):
        loss = functional.cross_entropy(model(inputs)[name], labels[name], reduction="sum")
        (D,) = torch.autograd.grad(loss, model.shared)
        expected = expected + weight * D @ D.T / 6
    assert_same(kfac.fisher()["shared"].G, expected)


def test_nothing_is_read_on_the_host_at_a_step_between_refreshes():
    model, criterion = Small(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion, schedule=kc.Schedule(factors=1, inverses=14))
    kfac.attach(optimizer)
    for seed in range(16):
        inputs, labels = batch(seed)
        with HostReads() as reads:
            optimizer.zero_grad()
            criterion(model(inputs), labels).backward()
            optimizer.step()
        if seed not in (0, 14):
            assert reads.count == 0, seed


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_vision_transformer_trains(name):
    torch.manual_seed(0)
    model, criterion = ViT().float(), nn.CrossEntropyLoss()
    inputs = torch.randn(96, 4, 5, dtype=torch.float32)
    labels = (inputs[:, :, 0].sum(1) > 0).long() + (inputs[:, :, 1].sum(1) > 1).long()
    makers: dict[str, Any] = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.1),
        "adam": lambda: torch.optim.Adam(model.parameters(), lr=1e-2),
    }
    optimizer = makers[name]()
    kfac = kc.KFAC(model, criterion, damping=1e-1, schedule=kc.Schedule(factors=1, inverses=5))
    assert kfac.coverage().share == 1.0
    assert set(draws_needed(kfac.layers)) == {"token", "table", "gamma"}
    kfac.attach(optimizer)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = criterion(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert losses[-1] < 0.5 * losses[0]
    assert "3 of them preconditioned" in repr(kfac)
