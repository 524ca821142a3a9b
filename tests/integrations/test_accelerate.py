"""The real Accelerate, on the CPU."""

from __future__ import annotations

import copy
import importlib
import sys

import pytest
import torch
from torch import nn

import kfac_cond as kc

from ..architectures import library
from ..training import batches, network, parameters_of

accelerate = library("accelerate")
attach = importlib.import_module("kfac_cond.integrations.accelerate").attach

pytestmark = pytest.mark.filterwarnings("ignore")
SCHEDULE = kc.Schedule(factors=2, inverses=4)


@pytest.fixture(autouse=True)
def _anew() -> None:
    """Its state is one for the whole process."""
    for one in ("AcceleratorState", "GradientState", "PartialState"):
        getattr(accelerate.state, one)._reset_state()


def wrapped(model: nn.Module, criterion: nn.Module) -> kc.KFAC:
    return kc.KFAC(model, criterion, damping=0.1, schedule=SCHEDULE, data=kc.Data(seed=3))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def prepared(model: nn.Module, accelerator, *, scaler=None):
    criterion = nn.CrossEntropyLoss()
    accelerator.scaler = scaler
    ready, optimizer = accelerator.prepare(model, sgd(model))
    kfac = wrapped(ready, criterion)
    attach(accelerator, kfac, optimizer)
    return ready, criterion, optimizer, kfac


def go(accelerator, parts, data) -> None:
    model, criterion, optimizer, _ = parts
    for inputs, labels in data:
        with accelerator.accumulate(model):
            accelerator.backward(criterion(model(inputs), labels))
            optimizer.step()
            optimizer.zero_grad()


def plain(model: nn.Module, data, *, accumulate: int = 1) -> kc.KFAC:
    criterion, optimizer = nn.CrossEntropyLoss(), sgd(model)
    kfac = wrapped(model, criterion)
    kfac.attach(optimizer)
    for number, (inputs, labels) in enumerate(data):
        if number % accumulate == 0:
            optimizer.zero_grad()
        (criterion(model(inputs), labels) / accumulate).backward()
        if (number + 1) % accumulate == 0:
            optimizer.step()
    return kfac


@pytest.mark.parametrize("accumulate", [1, 2])
def test_its_loop_is_a_plain_loop(accumulate):
    model, data = network(), batches(8)
    twin = copy.deepcopy(model)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    parts = prepared(model, accelerator)
    for first in range(0, 8, 4):
        go(accelerator, parts, data[first : first + 4])
    assert parts[3].step == 8 // accumulate
    kfac = plain(twin, data, accumulate=accumulate)
    assert torch.equal(parameters_of(model), parameters_of(twin))
    assert torch.equal(parts[3].fisher()["2"].G, kfac.fisher()["2"].G)


def test_a_gradient_scaler_changes_nothing():
    """Powers of two: bit by bit."""
    model, data = network(), batches(6)
    twin = copy.deepcopy(model)
    accelerator = accelerate.Accelerator(cpu=True)
    go(accelerator, prepared(model, accelerator, scaler=torch.amp.GradScaler("cpu")), data)
    plain(twin, data)
    assert torch.equal(parameters_of(model), parameters_of(twin))


def test_a_step_that_the_scaler_skips_is_none():
    model, data = network(), batches(4)
    accelerator = accelerate.Accelerator(cpu=True)
    parts = prepared(model, accelerator, scaler=torch.amp.GradScaler("cpu"))
    go(accelerator, parts, data[:2])
    before, step = parameters_of(model).clone(), parts[3].step
    hook = model[2].weight.register_hook(lambda gradient: gradient * torch.inf)
    go(accelerator, parts, data[2:3])
    hook.remove()
    assert parts[2].step_was_skipped
    assert torch.equal(parameters_of(model), before)
    assert parts[3].step == step
    go(accelerator, parts, data[3:])
    assert parts[3].step == step + 1


def test_bfloat16_leaves_factors_wide():
    torch.set_default_dtype(torch.float32)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    parts = prepared(network(), accelerator)
    go(accelerator, parts, [(x.float(), y) for x, y in batches(3)])
    assert parts[3].fisher()["0"].A.dtype == torch.float32
    assert torch.isfinite(parameters_of(parts[0])).all()


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resumed_is_uninterrupted(tmp_path, stop):
    start, data = network(), batches(6)
    whole = copy.deepcopy(start)
    plain(whole, data)
    accelerator = accelerate.Accelerator(cpu=True)
    go(accelerator, prepared(copy.deepcopy(start), accelerator), data[:stop])
    accelerator.save_state(str(tmp_path))
    again = accelerate.Accelerator(cpu=True)
    parts = prepared(network(), again)
    again.load_state(str(tmp_path))
    assert parts[3].step == stop
    go(again, parts, data[stop:])
    assert torch.equal(parameters_of(parts[0]), parameters_of(whole))


def test_an_optimizer_that_was_not_prepared_is_refused():
    model = network()
    kfac = wrapped(model, nn.CrossEntropyLoss())
    with pytest.raises(kc.AttachError, match=r"SGD, expected what accelerator\.prepare"):
        attach(accelerate.Accelerator(cpu=True), kfac, sgd(model))


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "kfac_cond.integrations.accelerate")
    with pytest.raises(ImportError, match=r"pip install 'kfac-cond\[accelerate\]'"):
        importlib.import_module("kfac_cond.integrations.accelerate")
