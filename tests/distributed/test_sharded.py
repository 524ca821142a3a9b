"""Models that ``fully_shard`` cut train as one process does, and their gradients are left to the last bit."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import kfac_cond as kc

from ..reference import assert_same
from . import cases
from .spawn import run

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
WORLD = 2
EVERY = ("mixed", "tkfac", "diagonal", "exact damping", "clipped", "heads", "raw", "tokens", "accumulated")
#: How a model is sharded: what besides the whole, what is let go after the forward, and whether KFAC comes first.
WAYS: dict[str, dict[str, bool]] = {
    "blocks": {"blocks": True, "reshard": True, "wrapped": False},
    "kept": {"blocks": True, "reshard": False, "wrapped": False},
    "wrapped first": {"blocks": True, "reshard": True, "wrapped": True},
    "whole": {"blocks": False, "reshard": True, "wrapped": False},
}
RUNS = [
    *((name, "blocks", strategy) for name in EVERY for strategy in ("replicate", "shard")),
    *((name, way, "shard") for name in ("mixed", "raw", "accumulated") for way in WAYS if way != "blocks"),
    *(("attention", way, "shard") for way in ("blocks", "wrapped first", "whole")),
    ("functional", "whole", "replicate"),
]


def sharded(model: nn.Module, *, blocks: bool, reshard: bool, **options: Any) -> None:
    """Each child by itself, and the rest with the whole; or all of it at once."""
    from torch.distributed.fsdp import fully_shard

    for child in model.children() if blocks else ():
        fully_shard(child, reshard_after_forward=reshard, **options)
    fully_shard(model, reshard_after_forward=reshard, **options)


class Attending(nn.Module):
    """A module of several parts, which runs again."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(3, 1, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.unflatten(-1, (2, 3))
        return self.out(self.attention(x, x, x)[0].mean(1))


CASES = {**cases.CASES, "attention": cases.Case(Attending)}


class Run(cases.Run):
    """A sharded model in training, with its K-FAC attached, or without one."""

    def __init__(self, case: cases.Case, way: str, *, with_kfac: bool = True, **sharding: Any) -> None:
        torch.manual_seed(3)
        self.case, self.model = case, case.model()
        self.called = self.model
        options = {"damping": 0.1, "schedule": kc.Schedule(factors=1, inverses=2, decay=0.6), **case.options}
        blocks, reshard, wrapped = WAYS[way].values()
        if not wrapped:
            sharded(self.model, blocks=blocks, reshard=reshard, **sharding)
        if with_kfac:
            self.kfac = kc.KFAC(self.model, case.likelihood(), data=kc.Data(seed=5), **options)
        if wrapped:
            sharded(self.model, blocks=blocks, reshard=reshard, **sharding)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=cases.RATE)
        if with_kfac:
            self.kfac.attach(self.optimizer)

    def gradients(self, number: int, rank: int) -> None:
        """Leave the gradients of one step."""
        x, y, drawn = cases.data(number)
        self.optimizer.zero_grad()
        micro = cases.pieces(cases.shards(dist.get_world_size())[rank], self.case.micro)
        for index, rows in enumerate(micro):
            self.model.set_requires_gradient_sync(index == len(micro) - 1)
            outputs = self.model(x[rows])
            if hasattr(self, "kfac"):
                cases.tell(self.case, self.kfac, outputs, y[rows], drawn[rows], torch.arange(cases.N)[rows])
            loss = nn.functional.cross_entropy(outputs, y[rows], reduction="sum") / cases.N * dist.get_world_size()
            loss.backward()

    def whole(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().full_tensor().clone() for name, p in self.model.named_parameters()}


def trained(name: str, way: str, strategy: Any, rank: int, **sharding: Any) -> dict[str, Any]:
    own = Run(CASES[name], way, **sharding)
    own.kfac.distribute(kc.Plan(strategy=strategy))
    for number in range(cases.STEPS):
        own.gradients(number, rank)
        own.optimizer.step()
    ended = own.ended()
    table = {row.path: row.reason for row in own.kfac.coverage().rows}
    return {**ended, "parameters": own.whole(), "rows": table}


def untouched(name: str, way: str, rank: int) -> bool:
    """Whether the gradients of a step with a capture in it are those without one, to the last bit."""
    found = []
    for with_kfac in (True, False):
        own = Run(CASES[name], way, with_kfac=with_kfac)
        own.gradients(0, rank)
        found.append([None if p.grad is None else p.grad.to_local() for p in own.model.parameters()])
    return all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))


def stepped_whole(rank: int) -> dict[str, torch.Tensor]:
    """A step after a backward that leaves the parameters whole."""
    own = Run(CASES["mixed"], "blocks")
    own.model.set_reshard_after_backward(False)
    own.gradients(0, rank)
    own.optimizer.step()
    return own.whole()


def refused(rank: int) -> dict[str, str]:
    """What is said of what is not covered: FSDP1, a gradient that is a part of a maximum, products."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor, Partial

    found = {}
    own = Run(CASES["mixed"], "blocks")
    own.gradients(0, rank)
    weight = own.model.out.weight
    weight.grad = DTensor.from_local(torch.ones(3, 4), weight.device_mesh, [Partial("max")])
    before = own.model.inner.weight.grad.to_local().clone()
    try:
        own.optimizer.step()
    except kc.ArgumentError as error:
        found["partial"] = str(error)
    found["unchanged"] = torch.equal(own.model.inner.weight.grad.to_local(), before)
    try:
        kc.implicit(own.model, [cases.data(0)[0]], "categorical")
    except kc.CoverageError as error:
        found["implicit"] = str(error)
    inside = nn.Sequential(nn.Sequential(nn.Linear(6, 4), nn.Tanh()), nn.Linear(4, 3))
    sharded(inside, blocks=False, reshard=True)
    kfac = kc.KFAC(inside[0], "categorical")
    try:
        inside(cases.data(0)[0])
    except kc.CaptureError as error:
        found["inside"] = str(error)
    kfac.remove()
    flat = FullyShardedDataParallel(nn.Linear(6, 3), device_id=torch.device("cpu"))
    try:
        kc.KFAC(flat, "categorical")
    except kc.CoverageError as error:
        found["FSDP1"] = str(error)
    return found


def work(rank: int, world: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {key: trained(*key, rank) for key in RUNS}
    for name in ("mixed", "raw", "accumulated"):
        for way in WAYS:
            found["untouched", name, way] = untouched(name, way, rank)
    found["stepped whole"], found["refused"] = stepped_whole(rank), refused(rank)
    return found


def on_four(rank: int, world: int) -> dict[str, Any]:
    """More ranks than a parameter has rows, so that shards are empty; and shards that are repeated on a mesh."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("repeated", "cut"))
    return {
        "empty": trained("mixed", "blocks", "shard", rank),
        "repeated": trained("mixed", "blocks", 0.5, rank, mesh=mesh),
    }


@cache
def four() -> list[dict[str, Any]]:
    return run(on_four, 4)


@cache
def results() -> list[dict[Any, Any]]:
    return run(work, WORLD)


@cache
def one_process(case: str, world: int = WORLD) -> dict[str, Any]:
    return cases.alone(CASES[case], world)


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["plain"] == expected["plain"]
    assert found["fisher"].keys() == expected["fisher"].keys()
    for name, block in expected["fisher"].items():
        assert_same(found["fisher"][name], block)
    for name, parameter in expected["parameters"].items():
        assert_same(found["parameters"][name], parameter)


@pytest.mark.parametrize(("case", "way", "strategy"), RUNS)
def test_shards_train_as_one_process_does(case, way, strategy):
    for result in results():
        compare(result[case, way, strategy], one_process(case))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["empty", "repeated"])
def test_shards_of_four_ranks_train_as_one_process_does(how):
    for result in four():
        compare(result[how], one_process("mixed", 4))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ["mixed", "raw", "accumulated"])
def test_a_capture_leaves_the_gradients_to_the_last_bit(case, way):
    assert all(result["untouched", case, way] for result in results())


def test_a_backward_that_leaves_parameters_whole_is_followed_by_the_same_step():
    own = cases.Run(CASES["mixed"], distributed=False)
    own.step(0, cases.shards(WORLD), world=1)
    for result in results():
        for name, parameter in own.model.named_parameters():
            assert_same(result["stepped whole"][name], parameter.detach())


def test_the_table_says_how_a_sharded_parameter_is_covered():
    rows = results()[0]["raw", "blocks", "shard"]["rows"]
    assert all("its gradient is brought together" in reason for reason in rows.values())
    assert rows["scale"].startswith("universal form")


def test_a_gradient_that_is_part_of_a_maximum_is_refused_before_anything_is_written():
    for result in results():
        assert "the gradient of 'out.weight' is a DTensor with placements" in result["refused"]["partial"]
        assert result["refused"]["unchanged"]


def test_products_with_sharded_parameters_are_refused():
    assert "has no place in the Fisher: it is a sharded DTensor" in results()[0]["refused"]["implicit"]


def test_a_module_inside_of_the_one_that_was_sharded_is_refused():
    said = results()[0]["refused"]["inside"]
    assert said.startswith("layer '0' is whole in a call, where it was a part on a mesh when it was wrapped")
    assert said.endswith("Give it the module that fully_shard was called on.")


def test_the_first_fsdp_is_refused_with_what_to_use():
    assert "use torch.distributed.fsdp.fully_shard (FSDP2)" in results()[0]["refused"]["FSDP1"]
