"""Dampings of parameter groups: what goes before what, and what does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kfac_cond as kc

from .reference import assert_same
from .training import batches, network, train, wrapped


def groups_of(model: nn.Module, **dampings: float | None) -> list[dict]:
    """A group for each parameter, "0.weight" spelt "w0"; with a damping where one is given."""
    short = {"w0": "0.weight", "b0": "0.bias", "w2": "2.weight", "b2": "2.bias"}
    return [
        {"params": [model.get_parameter(name)], **({"damping": dampings[key]} if key in dampings else {})}
        for key, name in short.items()
    ]


def inverses(model: nn.Module, groups: list[dict], **settings) -> tuple[kc.KFAC, dict[str, float]]:
    """A K-FAC after one step, and the damping that each layer's inverse was made with."""
    optimizer = torch.optim.SGD(groups, lr=0.0)
    kfac, criterion = wrapped(model, optimizer, damping=kc.Damping(0.1, rule="exact"), **settings)
    train(model, criterion, optimizer, batches(1))
    added = {}
    for name, block in kfac.fisher().items():
        found = torch.linalg.inv(kfac._shared.factors.inverses[name].to_dense()) - block.to_dense()
        assert_same(found, found.diagonal().mean() * torch.eye(len(found)), tolerance=1e-8)
        added[name] = round(found.diagonal().mean().item(), 8)
    return kfac, added


@pytest.mark.parametrize(
    ("dampings", "rules", "expected"),
    [
        ({}, {}, {"0": 0.1, "2": 0.1}),
        ({"w0": 0.5, "b0": 0.5}, {}, {"0": 0.5, "2": 0.1}),
        ({"w0": 0.5}, {}, {"0": 0.5, "2": 0.1}),
        ({"w0": 0.5, "w2": 0.3}, {"0": {"damping": 0.7}}, {"0": 0.7, "2": 0.3}),
        ({"w0": None, "w2": 0.2}, {}, {"0": 0.1, "2": 0.2}),
    ],
)
def test_a_rule_goes_before_a_group_and_that_before_the_damping_of_all(dampings, rules, expected):
    model = network()
    data = groups_of(model, **dampings)
    assert inverses(model, data, rules=rules)[1] == pytest.approx(expected, abs=1e-7)


def test_it_may_change_as_a_learning_rate_does():
    model = network()
    optimizer = torch.optim.SGD(groups_of(model, w0=0.5), lr=0.0)
    kfac, criterion = wrapped(model, optimizer, damping=0.1)
    train(model, criterion, optimizer, batches(1))
    before = kfac._shared.factors.inverses["0"].to_dense()
    optimizer.param_groups[0]["damping"] = 5.0
    train(model, criterion, optimizer, batches(1))
    assert kfac._shared.factors.inverses["0"].to_dense().norm() < before.norm()


def test_it_is_a_share_where_the_damping_is_relative():
    model = network()
    optimizer = torch.optim.SGD(groups_of(model, w0=0.5), lr=0.0)
    kfac, criterion = wrapped(model, optimizer, damping=kc.Damping(0.1, rule="exact", relative=True))
    train(model, criterion, optimizer, batches(1))
    block = kfac.fisher()["0"]
    added = 0.5 * block.trace() / block.layout.numel
    expected = torch.linalg.inv(block.to_dense() + added * torch.eye(block.layout.numel))
    assert_same(kfac._shared.factors.inverses["0"].to_dense(), expected)


def test_groups_that_differ_within_a_layer_are_refused_by_its_name():
    model = network()
    with pytest.raises(kc.ArgumentError, match=r"layer '2' is in parameter groups of several dampings, .*2\.bias"):
        inverses(model, groups_of(model, w2=0.5, b2=0.2))


@pytest.mark.parametrize("given", [-1.0, float("nan"), "much"])
def test_what_is_no_damping_is_refused_when_attached(given):
    model = network()
    optimizer = torch.optim.SGD(groups_of(model, w0=given), lr=0.0)
    with pytest.raises(kc.ArgumentError, match=r"parameter group 0 of SGD has damping="):
        wrapped(model, optimizer)
