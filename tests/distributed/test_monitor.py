"""On every rank a monitor reads what one process would, whoever has the factors and the weights; rank 0 writes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

import kfac_cond as kc

from . import cases, test_sharded
from .spawn import run

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
#: A model, how its weights are, and how its layers are shared out.
RUNS = [
    ("mixed", "whole", "replicate"),
    ("mixed", "whole", "shard"),
    ("mixed", "cut", "replicate"),
    ("mixed", "cut", "shard"),
    ("exact damping", "whole", "shard"),
    ("clipped", "cut", "shard"),
]
#: Counted on a rank and taken for all: the ranks' batches differ in size here.
APPROXIMATE = "effective_examples"


def monitored(case: str, weights: str, strategy: str, rank: int, world: int, *, on: range) -> dict[str, Any]:
    if weights == "cut":
        own: Any = test_sharded.Run(cases.CASES[case], "blocks")
    else:
        own = cases.Run(cases.CASES[case], distributed=world > 1)
    if world > 1:
        own.kfac.distribute(kc.Plan(strategy=strategy))
    calls: list[int] = []
    monitor = kc.Monitor(own.kfac, every=3, writer=lambda step, numbers: calls.append(step)) if rank in on else None
    for number in range(cases.STEPS):
        if weights == "cut":
            own.gradients(number, rank)
            own.optimizer.step()
        else:
            rows = cases.shards(world)[rank] if world > 1 else slice(None)
            own.step(number, [rows], world=world)
    if monitor is not None:
        monitor.flush()
    named = own.model.named_parameters()
    parameters = {name: p.detach().full_tensor() if weights == "cut" else p.detach().clone() for name, p in named}
    readings = [] if monitor is None else [(one.step, one.whole, one.layers) for one in monitor.readings]
    return {"readings": readings, "calls": calls, "parameters": parameters}


def work(rank: int, world: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {one: monitored(*one, rank, world, on=range(world)) for one in RUNS}
    found["without"] = monitored("mixed", "whole", "shard", rank, world, on=range(0))
    found["first alone"] = monitored("mixed", "whole", "replicate", rank, world, on=range(1))
    return found


@cache
def results() -> list[dict[Any, Any]]:
    return run(work, 2)


@cache
def one_process(case: str) -> dict[str, Any]:
    return monitored(case, "whole", "replicate", 0, 1, on=range(1))


@pytest.mark.parametrize("one", RUNS, ids=lambda one: "-".join(one))
def test_every_rank_reads_what_one_process_does(one):
    expected = one_process(one[0])["readings"]
    for rank in range(2):
        found = results()[rank][one]["readings"]
        assert [step for step, *_ in found] == [step for step, *_ in expected] == [0, 3]
        for (_, whole, layers), (_, whole_expected, layers_expected) in zip(found, expected, strict=True):
            assert whole["kl"] == pytest.approx(whole_expected["kl"])
            assert layers.keys() == layers_expected.keys()
            for name, numbers in layers_expected.items():
                exact = {key: value for key, value in numbers.items() if key != APPROXIMATE}
                other = {key: value for key, value in layers[name].items() if key != APPROXIMATE}
                assert other == pytest.approx(exact, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("one", RUNS, ids=lambda one: "-".join(one))
def test_rank_0_writes(one):
    assert results()[0][one]["calls"] == [0, 3]
    assert results()[1][one]["calls"] == []


def test_training_is_bitwise_what_it_is_without():
    for rank in range(2):
        plain, watched = (results()[rank][key]["parameters"] for key in ("without", ("mixed", "whole", "shard")))
        assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_where_nothing_is_shared_out_one_rank_may_have_it_alone():
    assert results()[0]["first alone"]["calls"] == [0, 3]
