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
#: On more ranks those cases whose traffic differs.
SOME = ("mixed", "heads", "raw", "unused", "functional", "accumulated")
WORLDS: dict[int, tuple[tuple[Any, ...], tuple[str, ...]]] = {
    2: (("replicate", "shard"), tuple(cases.CASES)),
    3: (("replicate", "shard"), SOME[:3]),
    4: (("shard", 0.5), SOME),
}
RUNS = [
    (world, strategy, name)
    for world, (strategies, names) in WORLDS.items()
    for strategy in strategies
    for name in names
]


def work(rank: int, world: int) -> dict[Any, Any]:
    strategies, names = WORLDS[world]
    return {
        (name, strategy): cases.trained(cases.CASES[name], strategy, rank, world)
        for name in names
        for strategy in strategies
    }


@cache
def results(world: int) -> list[dict[Any, Any]]:
    return run(work, world)


@cache
def one_process(case: str, world: int) -> dict[str, Any]:
    return cases.alone(cases.CASES[case], world)


@pytest.mark.parametrize(("world", "strategy", "case"), RUNS)
def test_ranks_train_as_one_process_does(world, strategy, case):
    expected = one_process(case, world)
    for rank in range(world):
        found = results(world)[rank][case, strategy]
        assert found["plain"] == expected["plain"]
        assert found["fisher"].keys() == expected["fisher"].keys()
        for name, block in expected["fisher"].items():
            assert_same(found["fisher"][name], block)
        for name, parameter in expected["parameters"].items():
            assert_same(found["parameters"][name], parameter)


@pytest.mark.parametrize(("world", "strategy", "case"), RUNS)
def test_ranks_stay_equal_to_the_last_bit(world, strategy, case):
    first, *others = (results(world)[rank][case, strategy]["parameters"] for rank in range(world))
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
