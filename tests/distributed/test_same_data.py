"""Ranks that compute with parts of one weight have the same data: they draw the same labels, and count once."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import kfac_cond as kc

from . import cases
from . import parallel_cases as parallel
from .parallel_cases import CASES
from .spawn import run

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
ALL = slice(0, cases.N)


class Recording(kc.Categorical):
    """Keeps the labels that it draws."""

    drawn: list[torch.Tensor]

    def sample(self, outputs: torch.Tensor, generator: Any = None) -> torch.Tensor:
        labels = super().sample(outputs, generator)
        self.drawn.append(labels)
        return labels


def labels_of(model: nn.Module, *, update: bool) -> torch.Tensor:
    """Labels drawn for one batch, the same on all ranks."""
    Recording.drawn = []
    x, _, _ = parallel.data(CASES["perceptron"], 0)
    if update:
        kfac = kc.KFAC(model, Recording(), data=kc.Data(seed=5))
        kfac.update(model(x))
        kfac.remove()
    else:
        kc.estimate(model, [x], Recording(), options=kc.Options(seed=5))
    return torch.cat(Recording.drawn)


def said_of(model: nn.Module, plan: kc.Plan | None) -> str:
    """What is said at the first capture of a model with this plan, or without one."""
    kfac = parallel.wrapped(CASES["perceptron"], model)
    try:
        if plan is not None:
            return parallel.refusal(kfac.distribute, plan)
        return parallel.refusal(parallel.gradients, CASES["perceptron"], model, kfac, 0, ALL)
    finally:
        kfac.remove()


def told(rank: int, world: int) -> dict[Any, Any]:
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel
    from torch.nn.parallel import DistributedDataParallel

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    perceptron = CASES["perceptron"]
    found: dict[Any, Any] = {}
    for update in (True, False):
        found["labels", update] = labels_of(parallel.built(perceptron, mesh["tp"]), update=update)
    found["along tp"] = said_of(parallel.built(perceptron, mesh["tp"]), kc.Plan(mesh=mesh["tp"]))
    found["everybody"] = said_of(parallel.built(perceptron, mesh["tp"]), kc.Plan(mesh=dist.group.WORLD))
    # Pairs that no mesh of all processes has.
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = DeviceMesh.from_group(pairs[rank // 2], "cpu")
    found["unknown"] = said_of(parallel.built(perceptron, pair), None)
    found["then said"] = said_of(parallel.built(perceptron, pair), kc.Plan(mesh=mesh["dp"]))
    crossed = parallel.cut(nn.Linear(3, 4), mesh["dp"], [ColwiseParallel(output_layouts=Replicate())])
    found["both"] = said_of(nn.Sequential(parallel.built(perceptron, mesh["tp"]), crossed), None)
    wide = parallel.Case(partial(parallel.Perceptron, 8), parallel.by_columns_and_rows)
    found["all four"] = said_of(parallel.built(wide, init_device_mesh("cpu", (4,))), None)
    one = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("a", "b", "tp"))
    found["of one"] = labels_of(parallel.built(perceptron, one["tp"]), update=True)

    ddp = DistributedDataParallel(parallel.built(perceptron, mesh["tp"]), device_mesh=mesh["dp"])
    found["ddp"] = parallel.refusal(kc.KFAC, ddp, "categorical")
    ddp(torch.ones(2, 6))
    found["ddp after a forward"] = parallel.refusal(kc.KFAC, ddp, "categorical")
    adapted = parallel.built(CASES["perceptron"], mesh["tp"])
    adapted.up.requires_grad_(False)
    adapted.down.requires_grad_(False)
    found["adapted"] = labels_of(adapted, update=True)
    return found


@cache
def results() -> list[dict[Any, Any]]:
    return run(told, 4)


@pytest.mark.parametrize("update", [True, False])
def test_labels_differ_along_the_data_and_agree_along_the_weights(update):
    first, same, other, too = (result["labels", update] for result in results())
    assert torch.equal(first, same) and torch.equal(other, too)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("key", "twice"), [("along tp", "[0, 1]"), ("everybody", "[0, 1]")])
def test_ranks_with_the_same_data_never_count_twice(key, twice):
    said = results()[0][key]
    assert said.startswith("ArgumentError: kc.Plan(mesh=...) has the ranks [0, 1")
    assert f"of which {twice} compute with parts of one weight" in said and "would count 2 times" in said


def test_what_a_mesh_does_not_tell_is_asked_for():
    result = results()[2]
    assert result["unknown"].startswith("ArgumentError: weights are cut over the ranks [2, 3] of 2 ranks")
    assert "kfac.distribute(kc.Plan(mesh=...))" in result["unknown"]
    assert result["then said"] == "nothing"
    assert "weights are cut over different sets of ranks, [2, 3] of 2 ranks ('tp') and [0, 2] of" in result["both"]


def test_where_all_ranks_share_one_weight_each_is_said_of():
    assert all(result["all four"] == "nothing" for result in results())


def test_labels_agree_where_no_weight_that_is_cut_trains():
    first, same, other, too = (result["adapted"] for result in results())
    assert torch.equal(first, same) and torch.equal(other, too)
    assert not torch.equal(first, other)


def test_a_mesh_of_one_rank_shares_nothing():
    drawn = [result["of one"] for result in results()]
    assert all(not torch.equal(drawn[0], other) for other in drawn[1:])


@pytest.mark.parametrize("key", ["ddp", "ddp after a forward"])
def test_plain_tensors_in_place_of_parts_are_refused(key):
    said = results()[0][key]
    assert said.startswith("CoverageError: 'DistributedDataParallel'")
    assert "use fully_shard(model, mesh=mesh['dp'])" in said
