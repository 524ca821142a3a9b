"""Factors from some of the positions: right on average, the same for A and G, drawn from the library's own streams."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import kfac_cond as kc

from .helpers import EVERY_STEP, Apply
from .reference import assert_same
from .training import backward_of, batches, parameters_of, train

POOL = Apply(lambda h: h.mean(1))


def tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), POOL)


def words() -> nn.Module:
    return nn.Sequential(
        Apply(lambda x: (x[..., 0] * 9).abs().long() % 5), nn.Embedding(5, 3, padding_idx=0), POOL, nn.Linear(3, 2)
    )


def fisher(model: nn.Module, inputs: Tensor, draws: Tensor, **settings: Any) -> kc.Fisher:
    kfac = kc.KFAC(model, "categorical", schedule=EVERY_STEP, **settings)
    backward_of(kfac, model, inputs, draws, draws=draws)
    kfac.precondition()
    found = kfac.fisher()
    kfac.remove()
    return found


def masks(real: Tensor) -> kc.Data:
    return kc.Data(positions=lambda *call: real)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("make", "name"), [(tokens, "0"), (tokens, "2"), (words, "1")])
def test_it_is_right_on_average_over_all_choices(monkeypatch, make, name, padded):
    """Every half of six positions, once each."""
    model, inputs, draws = make(), torch.randn(2, 3, 3), torch.tensor([0, 1])
    real = torch.tensor([[True, True, False], [True, False, False]]) if padded else torch.ones(2, 3, dtype=torch.bool)
    whole = fisher(model, inputs, draws, data=masks(real))[name]
    found = []
    for half in itertools.combinations(range(6), 3):
        rest = [index for index in range(6) if index not in half]
        monkeypatch.setattr(torch, "randperm", lambda n, order=(*half, *rest), **_: torch.tensor(order))
        found.append(fisher(model, inputs, draws, data=masks(real), rules={name: {"fraction": 0.5}})[name])
    assert len(found) == 20
    assert_same(sum(one.A for one in found) / 20, whole.A)
    assert_same(sum(one.G for one in found) / 20, whole.G)
    assert not torch.allclose(found[0].G, whole.G)


def test_a_and_g_are_of_the_same_positions(monkeypatch):
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.tensor([4, 1, 0, 2, 3, 5]))
    model, inputs, draws = tokens(), torch.randn(2, 3, 3), torch.tensor([0, 1])
    block = fisher(model, inputs, draws, rules={"0": {"fraction": 0.34}})["0"]
    seen = {}
    handle = model[0].register_forward_hook(lambda m, args, out: seen.update(out=out))
    loss = nn.functional.cross_entropy(model(inputs), draws, reduction="sum")
    handle.remove()
    (g,) = torch.autograd.grad(loss, [seen["out"]])
    a = torch.cat([inputs, torch.ones(2, 3, 1)], -1).flatten(0, 1)[[4, 1]]
    assert_same(block.A, a.T @ a / 2)
    g = g.flatten(0, 1)[[4, 1]]
    assert_same(block.G, g.T @ g / 2 * 3)


def test_groups_and_pixels():
    inputs, draws = torch.randn(4, 6), torch.tensor([0, 1, 1, 0])
    model = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(8, 2))
    whole = fisher(model, inputs, draws)["1"]
    found = [
        fisher(model, inputs, draws, rules={"1": {"fraction": 0.5}}, data=kc.Data(seed=s))["1"] for s in range(100)
    ]
    for side in ("A", "G"):
        all_of_it = torch.stack([getattr(one, side) for one in found])
        error = all_of_it.std(0) / 10
        assert ((all_of_it.mean(0) - getattr(whole, side)).abs() <= 4.5 * error + 1e-12).all()


def test_a_fraction_of_one_is_everything():
    model, inputs, draws = tokens(), torch.randn(2, 3, 3), torch.tensor([0, 1])
    whole, same = fisher(model, inputs, draws), fisher(model, inputs, draws, rules={"*": {"fraction": 1.0}})
    for name, block in whole.items():
        assert torch.equal(block.A, same[name].A)
        assert torch.equal(block.G, same[name].G)


def test_the_global_stream_is_not_touched_and_labels_are_those_drawn_without():
    model, inputs, found = tokens(), torch.randn(2, 3, 3), []
    for rules in ({}, {"0": {"fraction": 0.5}}):
        kfac = kc.KFAC(model, "categorical", schedule=EVERY_STEP, rules=rules, data=kc.Data(seed=1))
        before = torch.get_rng_state()
        backward_of(kfac, model, inputs, torch.tensor([0, 1]))
        assert torch.equal(torch.get_rng_state(), before)
        kfac.precondition()
        found.append(kfac.fisher()["2"].G)
        kfac.remove()
    assert torch.equal(*found)


def test_calls_of_a_layer_choose_anew():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    kfac = kc.KFAC(model, "categorical", schedule=EVERY_STEP, rules={"0": {"fraction": 0.5}})
    inputs, draws = torch.randn(8, 3), torch.randint(2, (8,))
    found = []
    for _ in range(3):
        backward_of(kfac, model, inputs, draws, draws=draws)
        kfac.precondition()
        found.append(kfac.fisher()["0"].A)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_it_saves_work():
    """The products of the factors are of as many rows as are chosen."""
    rows, d = 64, 32

    def flops(**settings: Any) -> int:
        model = nn.Sequential(nn.Linear(d, d, bias=False), nn.Tanh(), nn.Linear(d, 2, bias=False))
        kfac = kc.KFAC(model, "categorical", schedule=EVERY_STEP, **settings)
        outputs = model(torch.randn(rows, d))
        kfac.remove()
        kfac = kc.KFAC(model, "categorical", schedule=EVERY_STEP, **settings)
        with FlopCounterMode(display=False) as counter:
            outputs = model(torch.randn(rows, d))
            kfac.update(outputs)
        return counter.get_total_flops()

    assert flops() - flops(rules={"0": {"fraction": 0.25}}) == 0.75 * 2 * rows * (d * d + d * d)


def test_the_table_counts_the_work_that_is_left():
    model, inputs = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(8, 3)
    whole, share = (kc.coverage(model, inputs, rules=rules) for rules in (None, {"*": {"fraction": 0.25}}))
    assert share.capture_flops == whole.capture_flops / 4


@pytest.mark.parametrize("at", [3, 4])
def test_a_resumed_run_is_the_same_to_the_last_bit(at):
    data, criterion = batches(8), nn.CrossEntropyLoss()

    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule = kc.Schedule(factors=2, inverses=4)
        kfac = kc.KFAC(model, criterion, schedule=schedule, rules={"*": {"fraction": 0.5}}, data=kc.Data(seed=1))
        kfac.attach(optimizer)
        return model, optimizer, kfac

    model, optimizer, kfac = made()
    train(model, criterion, optimizer, data[:at])
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(kfac.state_dict())
    train(model, criterion, optimizer, data[at:])
    again, optimizer, kfac = made()
    again.load_state_dict(weights)
    kfac.load_state_dict(state)
    train(again, criterion, optimizer, data[at:])
    assert torch.equal(parameters_of(again), parameters_of(model))


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ({"0": {"fraction": 0.5, "sharing": "reduce"}}, "its positions are averaged first"),
        ({"0": {"fraction": 0.5, "structure": "ekfac"}}, "gradients of whole examples"),
        ({"0": {"fraction": 0.5, "structure": "tkfac"}}, "gradients of whole examples"),
        ({"*": {"fraction": 0.5}}, r"layer '1' has fraction=0\.5, .* gradients of whole examples"),
    ],
)
def test_what_needs_whole_examples_refuses_by_name(rules, why):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    with pytest.raises(kc.ArgumentError, match=why):
        kc.KFAC(model, "categorical", rules=rules)
    kc.KFAC(model, "categorical", rules={"*": {"fraction": 0.5}, "1": {"fraction": None}})


def test_an_estimate_refuses_it():
    with pytest.raises(kc.ArgumentError, match="an estimate takes all positions"):
        kc.estimate(tokens(), [torch.randn(2, 3, 3)], "categorical", rules={"0": {"fraction": 0.5}})


@pytest.mark.parametrize("value", [0.0, 1.5, "half", True])
def test_what_is_no_share_is_refused(value):
    with pytest.raises(kc.ArgumentError, match=r"fraction=.* expected a number in \(0, 1\]"):
        kc.KFAC(tokens(), "categorical", rules={"0": {"fraction": value}})
