"""Refreshes where factors have moved: by the formula, read once a period of the factors, the same after a resume."""

from __future__ import annotations

import copy

import pytest
import torch

import kfac_cond as kc

from .linalg.conftest import ReadCounter
from .training import batches, network, parameters_of, train, wrapped

ADAPTIVE = kc.Schedule(factors=2, inverses=kc.Adaptive(0.3), decay=0.8)


def made(**options):
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    return model, optimizer, *wrapped(model, optimizer, **{"schedule": ADAPTIVE, **options})


@pytest.mark.parametrize("change", [1e-9, 0.3, 1e9])
def test_a_layer_is_refreshed_where_its_factors_have_moved(change):
    schedule = kc.Schedule(factors=2, inverses=kc.Adaptive(change), decay=0.8)
    model, optimizer, kfac, criterion = made(schedule=schedule)
    last: dict[str, tuple] = {}
    refreshed = 0
    for step, batch in enumerate(batches(24)):
        before = dict(kfac._shared.factors.inverses)
        train(model, criterion, optimizer, [batch])
        for name, block in kfac.fisher().items():
            now = block.A, block.G
            moved = name not in last or any(
                ((x - y).norm() / y.norm()).item() > change for x, y in zip(now, last[name], strict=True)
            )
            new = kfac._shared.factors.inverses[name] is not before.get(name)
            assert new == (moved and step % 2 == 0)
            if new:
                last[name] = tuple(x.clone() for x in now)
            refreshed += new
    assert {1e-9: refreshed == 24, 1e9: refreshed == 2}.get(change, 2 < refreshed < 24)


def test_it_reads_once_a_period_of_the_factors():
    model, optimizer, _, criterion = made(schedule=kc.Schedule(factors=2, inverses=kc.Adaptive(1e9)))
    counts = []
    for batch in batches(6):
        with ReadCounter() as reads:
            train(model, criterion, optimizer, [batch])
        counts.append(len(reads.names))
    # How far each has moved; the flags of the capture; which layers were used.
    assert counts[1:] == [0, 3, 0, 3, 0]


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "tkfac", "diagonal"])
def test_a_resumed_run_is_the_same_to_the_last_bit(structure):
    data = batches(16)
    model, optimizer, kfac, criterion = made(structure=structure)
    train(model, criterion, optimizer, data[:7])
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(kfac.state_dict())
    train(model, criterion, optimizer, data[7:])
    again, optimizer, other, criterion = made(structure=structure)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    train(again, criterion, optimizer, data[7:])
    assert torch.equal(parameters_of(again), parameters_of(model))


@pytest.mark.parametrize("change", [0.0, -1.0, float("nan"), "some"])
def test_what_is_no_change_is_refused(change):
    with pytest.raises(kc.ArgumentError, match="Adaptive"):
        kc.Adaptive(change)


def test_it_reads_as_words():
    assert str(ADAPTIVE) == "factors every 2 steps, inverses where factors change by 30 %"
