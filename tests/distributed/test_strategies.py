"""Every strategy on 2, 3 and 4 ranks, with uneven data, trains as one process does."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ..reference import assert_same
from . import cases
from .spawn import run

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
WORLDS: dict[int, tuple[Any, ...]] = {2: ("replicate", "shard"), 3: ("replicate", "shard"), 4: ("shard", 0.5)}
RUNS = [(world, strategy) for world, strategies in WORLDS.items() for strategy in strategies]


def work(rank: int, world: int, strategies: tuple[Any, ...]) -> dict[Any, Any]:
    return {
        (name, strategy): cases.trained(case, strategy, rank, world)
        for name, case in cases.CASES.items()
        for strategy in strategies
    }


@pytest.fixture(scope="module")
def results() -> dict[int, list[dict[Any, Any]]]:
    return {world: run(work, world, strategies) for world, strategies in WORLDS.items()}


@cache
def one_process(case: str, world: int) -> dict[str, Any]:
    return cases.alone(cases.CASES[case], world)


@pytest.mark.parametrize(("world", "strategy"), RUNS)
@pytest.mark.parametrize("case", cases.CASES)
def test_ranks_train_as_one_process_does(results, case, world, strategy):
    expected = one_process(case, world)
    for rank in range(world):
        found = results[world][rank][case, strategy]
        assert found["plain"] == expected["plain"]
        for name, block in expected["fisher"].items():
            assert_same(found["fisher"][name], block)
        for name, parameter in expected["parameters"].items():
            assert_same(found["parameters"][name], parameter)


@pytest.mark.parametrize(("world", "strategy"), RUNS)
@pytest.mark.parametrize("case", cases.CASES)
def test_ranks_stay_equal_to_the_last_bit(results, case, world, strategy):
    first, *others = (results[world][rank][case, strategy]["parameters"] for rank in range(world))
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
