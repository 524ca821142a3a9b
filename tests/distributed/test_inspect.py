"""A running job on several ranks, inspected: every rank reads what one process would."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch.distributed as dist

import kfac_cond as kc

from . import cases
from .spawn import run

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
STRATEGIES = ("replicate", "shard")


def inspected(strategy: str, rank: int, world: int) -> dict[str, Any]:
    own = cases.Run(cases.CASES["mixed"], distributed=world > 1)
    if world > 1:
        own.kfac.distribute(kc.Plan(strategy=strategy))
    for number in range(cases.STEPS):
        own.step(number, [cases.shards(world)[rank] if world > 1 else slice(None)], world=world)
    report = kc.inspect(own.kfac)
    numbers = {
        name: (one.spectrum.trace, one.effective_dimension(1e-2), one.health.residual is not None, one.staleness.age)
        for name, one in report.items()
    }
    return {"numbers": numbers, "trace": report.whole.trace, "problems": report.problems}


def work(rank: int, world: int) -> dict[str, Any]:
    return {strategy: inspected(strategy, rank, world) for strategy in STRATEGIES}


@cache
def results() -> list[dict[str, Any]]:
    return run(work, 2)


@cache
def one_process() -> dict[str, Any]:
    return inspected("replicate", 0, 1)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_rank_reads_what_one_process_does(strategy: str, rank: int) -> None:
    expected, found = one_process(), results()[rank][strategy]
    assert found["problems"] == expected["problems"] == {}
    assert found["trace"] == pytest.approx(expected["trace"])
    assert found["numbers"].keys() == expected["numbers"].keys()
    for name, numbers in expected["numbers"].items():
        assert found["numbers"][name] == pytest.approx(numbers)
