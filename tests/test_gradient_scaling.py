"""Mixed precision: torch.amp.GradScaler before plain and fused optimizers, and steps it skips."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .reference import assert_same
from .training import (
    HostReads,
    batches,
    network,
    parameters_of,
    train,
    wrapped,
)

SCALED = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "fused adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
}


def scaled_run(name: str, data, *, scale: float, clip: bool = False, **options) -> tuple[Tensor, kc.KFAC]:
    torch.manual_seed(0)
    model = network().float()
    optimizer = SCALED[name](model.parameters())
    kfac, criterion = wrapped(model, optimizer, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    for inputs, labels in data:
        optimizer.zero_grad()
        scaler.scale(criterion(model(inputs.float()), labels)).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()
    return parameters_of(model), kfac


@pytest.mark.parametrize("clip", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("trust_region", [None, kc.KLClip(1e-4)], ids=["plain", "trust-region"])
@pytest.mark.parametrize("name", SCALED)
def test_the_scale_of_the_loss_changes_nothing(name, trust_region, clip):
    found, _ = scaled_run(name, batches(4), scale=1024.0, trust_region=trust_region, clip=clip)
    expected, _ = scaled_run(name, batches(4), scale=1.0, trust_region=trust_region, clip=clip)
    assert_same(found, expected, tolerance=1e-5)


@pytest.mark.parametrize("trust_region", [None, kc.KLClip(1e-4)], ids=["plain", "trust-region"])
@pytest.mark.parametrize("name", SCALED)
def test_an_overflow_changes_nothing(name, trust_region):
    data = batches(1)
    torch.manual_seed(0)
    model = network().float()
    optimizer = SCALED[name](model.parameters())
    kfac, criterion = wrapped(model, optimizer, trust_region=trust_region)
    train(model, criterion, optimizer, [(inputs.float(), labels) for inputs, labels in data])
    before, factors = parameters_of(model), kfac.fisher()["0"].A
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    optimizer.zero_grad()
    scaler.scale(criterion(1e6 * model(1e6 * data[0][0].float()), data[0][1])).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(parameters_of(model), before)
    assert torch.equal(kfac.fisher()["0"].A, factors)
    assert kfac.step == 1


@pytest.mark.parametrize("name", ["fused sgd", "fused adam"])
def test_an_overflow_between_due_steps_is_taken_back(name):
    torch.manual_seed(0)
    model = network().float()
    optimizer = SCALED[name](model.parameters())
    kfac, criterion = wrapped(model, optimizer, schedule=kc.Schedule(factors=100, inverses=100))
    data = [(inputs.float(), labels) for inputs, labels in batches(2)]
    train(model, criterion, optimizer, data)
    before = parameters_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    optimizer.zero_grad()
    scaler.scale(1e30 * criterion(model(data[0][0]), data[0][1])).backward()
    scaler.step(optimizer)
    assert torch.equal(parameters_of(model), before)
    assert kfac.step == 2


def test_a_fused_step_between_due_ones_reads_nothing():
    torch.manual_seed(0)
    model = network().float()
    optimizer = SCALED["fused sgd"](model.parameters())
    _, criterion = wrapped(model, optimizer, schedule=kc.Schedule(factors=100, inverses=100))
    data = [(inputs.float(), labels) for inputs, labels in batches(2)]
    train(model, criterion, optimizer, data)
    criterion(model(data[0][0]), data[0][1]).backward()
    optimizer.found_inf, optimizer.grad_scale = (
        torch.zeros((), dtype=torch.float32),
        torch.ones((), dtype=torch.float32),
    )
    with HostReads() as reads:
        optimizer.step()
    assert reads.count == 0
