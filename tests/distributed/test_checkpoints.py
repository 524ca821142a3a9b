"""``torch.distributed.checkpoint`` on several ranks, of models that ``fully_shard`` cut and of whole ones."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import kfac_cond as kc

from ..reference import assert_same
from . import cases, test_sharded
from .spawn import run

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
    pytest.mark.filterwarnings("ignore"),
]

SAVED, LAST = 3, 6
RUNS = [("ddp", "replicate"), ("ddp", "shard"), ("fsdp", "shard")]


class Application:
    """A model and its optimizer, as torch's documents have them saved."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        found = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.model, self.optimizer, **found)


class Run:
    """A run with momentum; its labels are drawn, or given so that they are the same on any number of ranks.

    Args:
        way: 'ddp', 'fsdp' or 'alone'.
        strategy: of the plan.
        drawn: whether labels are drawn.
    """

    def __init__(self, way: str, strategy: Any, *, drawn: bool) -> None:
        torch.manual_seed(3)
        self.model, self.drawn = cases.Mixed(), drawn
        self.called: nn.Module = self.model
        if way == "fsdp":
            test_sharded.sharded(self.model, blocks=True, reshard=True)
        elif way == "ddp":
            self.called = nn.parallel.DistributedDataParallel(self.model)
        schedule = kc.Schedule(factors=1, inverses=2, decay=0.6)
        self.kfac = kc.KFAC(self.called, kc.Categorical(), damping=0.1, schedule=schedule, data=kc.Data(seed=5))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=cases.RATE, momentum=0.9)
        self.kfac.attach(self.optimizer)
        self.kfac.distribute(kc.Plan(strategy=strategy))

    @property
    def parts(self) -> dict[str, Any]:
        return {"application": Application(self.model, self.optimizer), "kfac": self.kfac}

    def train(self, numbers: range, rank: int, world: int) -> Run:
        for number in numbers:
            x, y, labels = (one[: cases.N // 4 * 4] for one in cases.data(number))
            self.optimizer.zero_grad()
            outputs = self.called(x[rank::world])
            self.kfac.update(outputs, draws=None if self.drawn else labels[rank::world])
            nn.functional.cross_entropy(outputs, y[rank::world]).backward()
            self.optimizer.step()
        return self

    def ended(self) -> dict[str, Tensor]:
        whole = {name: getattr(p, "full_tensor", p.detach)() for name, p in self.model.named_parameters()}
        return {name: p.detach().clone() for name, p in whole.items()}


def saved(way: str, strategy: Any, rank: int, world: int, folder: str, *, drawn: bool = False) -> dict[str, Any]:
    """Runs that save in the middle, waiting for it or not, and those that go on from there."""
    found = {}
    # Messages of a save that is not waited for must not meet those of the training.
    group = dist.new_group(backend="gloo")
    for how in ("waited for", "not waited for"):
        place = Path(folder) / f"{way} {strategy} {how} {drawn}"
        own = Run(way, strategy, drawn=drawn).train(range(SAVED), rank, world)
        if how == "waited for":
            dcp.save(own.parts, checkpoint_id=place)
            own.train(range(SAVED, LAST), rank, world)
        else:
            pending = dcp.async_save(own.parts, checkpoint_id=place, process_group=group)
            own.train(range(SAVED, LAST), rank, world)
            pending.result(timeout=30)
        found[how] = own.ended(), loaded(way, strategy, rank, world, place, drawn=drawn)
    return found


def loaded(way: str, strategy: Any, rank: int, world: int, place: Path, *, drawn: bool = False) -> dict[str, Tensor]:
    """A run that has begun otherwise, and goes on from a checkpoint."""
    own = Run(way, strategy, drawn=drawn).train(range(1), rank, world)
    dcp.load(own.parts, checkpoint_id=place)
    return own.train(range(SAVED, LAST), rank, world).ended()


def on_two(rank: int, world: int, folder: str) -> dict[Any, Any]:
    found: dict[Any, Any] = {one: saved(*one, rank, world, folder) for one in RUNS}
    found["drawn"] = saved("ddp", "shard", rank, world, folder, drawn=True)
    return found


def on_four(rank: int, world: int, folder: str) -> dict[Any, Any]:
    return {one: loaded(*one, rank, world, Path(folder) / "{} {} waited for False".format(*one)) for one in RUNS}


@cache
def folder() -> str:
    return mkdtemp()


@cache
def two() -> list[dict[Any, Any]]:
    return run(on_two, 2, folder())


@cache
def four() -> list[dict[Any, Any]]:
    return run(on_four, 4, folder())


@pytest.mark.parametrize("how", ["waited for", "not waited for"])
@pytest.mark.parametrize("one", [*RUNS, "drawn"])
def test_at_as_many_ranks_it_goes_on_to_the_last_bit(one, how):
    for result in two():
        ended, resumed = result[one][how]
        assert all(torch.equal(resumed[name], parameter) for name, parameter in ended.items())


@pytest.mark.slow
@pytest.mark.parametrize("one", RUNS)
def test_at_twice_as_many_it_goes_on_to_rounding(one):
    ended, _ = two()[0][one]["waited for"]
    for result in four():
        for name, parameter in ended.items():
            assert_same(result[one][name], parameter, tolerance=1e-12)


@pytest.mark.parametrize("how", ["waited for", "not waited for"])
@pytest.mark.parametrize("one", RUNS)
def test_in_one_process_it_goes_on_to_rounding(one, how):
    ended, _ = two()[0][one][how]
    found = loaded("alone", "replicate", 0, 1, Path(folder()) / "{} {} {how} False".format(*one, how=how))
    for name, parameter in ended.items():
        assert_same(found[name], parameter, tolerance=1e-12)
