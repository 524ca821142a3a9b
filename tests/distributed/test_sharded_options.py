"""Options of ``fully_shard``: precision, offload, clipping, activation checkpointing, compiled blocks, estimates."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kfac_cond as kc
from kfac_cond import gradients
from kfac_cond.layers import layer as layers
from kfac_cond.layers.shards import device_of

from ..reference import assert_same
from ..test_state import build
from ..training import batches, network, train
from . import cases
from .cases import CASES, Case, shards
from .spawn import run
from .test_sharded import WAYS, Run, sharded

fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")

WORLD = 2
LIMIT = 1e-2
"""Norm that gradients are clipped to."""


class Recomputed(cases.Mixed):
    """Its forward is run again in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Tied(nn.Module):
    """A weight that serves as a table and, without a call of its module, as the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(3, 4), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table((x.abs() * 10).long() % 3).flatten(1)
        return nn.functional.linear(self.inner(h).tanh(), self.table.weight)


class Offloaded(Run):
    """Shards that are kept on the CPU."""

    def __init__(self, case: Case, way: str) -> None:
        from torch.distributed.fsdp import CPUOffloadPolicy

        super().__init__(case, way, offload_policy=CPUOffloadPolicy(pin_memory=False))


def stepped(own: cases.Run, rank: int, *, clipped: bool = False) -> dict[str, Any]:
    """A few steps, with what they end with."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    for number in range(cases.STEPS):
        if isinstance(own, Run):
            own.gradients(number, rank)
        else:
            own.gradients_of_all(number, world)  # type: ignore[attr-defined]
        if clipped:
            nn.utils.clip_grad_norm_(own.model.parameters(), LIMIT)
        own.optimizer.step()
    whole = own.whole() if isinstance(own, Run) else {name: p.detach() for name, p in own.model.named_parameters()}
    return {**own.ended(), "parameters": whole}


class Alone(cases.Run):
    """One process on the examples of all ranks."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, distributed=False)

    def gradients_of_all(self, number: int, world: int) -> None:
        """Leave the gradients of one step."""
        x, y, drawn = cases.data(number)
        self.optimizer.zero_grad()
        for rows in shards(WORLD):
            outputs = self.model(x[rows])
            cases.tell(self.case, self.kfac, outputs, y[rows], drawn[rows], torch.arange(cases.N)[rows])
            (nn.functional.cross_entropy(outputs, y[rows], reduction="sum") / cases.N).backward()


def mixed_precision(rank: int) -> dict[str, Any]:
    """Forwards in bfloat16, gradients added in float32: what the sums and the parameters are kept in."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = {}
    torch.set_default_dtype(torch.float32)
    for name, options in {"lower": {"mp_policy": policy}, "single": {}}.items():
        own = Run(CASES["mixed"], "blocks", **options)
        own.kfac.distribute(kc.Plan(strategy="shard"))
        with mock.patch.object(cases, "data", single):
            found[name] = stepped(own, rank)
        found[name]["dtypes"] = {p.dtype for p in own.model.parameters()} | {
            tensor.dtype for block in own.kfac.fisher().values() for tensor in (block.A, block.G)
        }
    torch.set_default_dtype(torch.float64)
    return found


def single(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """``cases.data`` in float32."""
    x, y, drawn = plain_data(step)
    return x.float(), y, drawn


plain_data = cases.data


def compiled(rank: int) -> dict[str, Any]:
    """Blocks that were compiled, each by itself, before they are cut."""
    torch.manual_seed(3)
    own = Run.__new__(Run)
    own.case, own.model = CASES["mixed"], cases.Mixed()
    own.model.inner = torch.compile(own.model.inner, backend="eager")
    own.called = own.model
    sharded(own.model, blocks=True, reshard=True)
    schedule = kc.Schedule(factors=1, inverses=2, decay=0.6)
    own.kfac = kc.KFAC(own.model, kc.Categorical(), damping=0.1, schedule=schedule)
    own.optimizer = torch.optim.SGD(own.model.parameters(), lr=cases.RATE)
    own.kfac.attach(own.optimizer)
    return stepped(own, rank)


def tied(rank: int) -> dict[str, Any]:
    """Wrapped first, and then cut as one."""
    with mock.patch.dict(WAYS, {"then": {"blocks": False, "reshard": True, "wrapped": True}}):
        return stepped(Run(Case(Tied), "then"), rank)


def estimated() -> dict[str, Any]:
    """The Fisher of a sharded model, and of the same one whole; each rank by its own on the same data."""
    found = {}
    for name in ("whole", "sharded"):
        torch.manual_seed(3)
        model = cases.Mixed()
        if name == "sharded":
            sharded(model, blocks=True, reshard=True)
        fisher = kc.estimate(model, [cases.data(0)[0]], "categorical")
        found[name] = {key: block.to_dense() for key, block in fisher.items()}
    return found


def work(rank: int, world: int) -> dict[str, Any]:
    return {
        "offloaded": stepped(Offloaded(CASES["mixed"], "blocks"), rank),
        "clipped": stepped(Run(CASES["mixed"], "blocks"), rank, clipped=True),
        "recomputed": stepped(Run(Case(Recomputed), "whole"), rank),
        "tied, wrapped first": tied(rank),
        "compiled": compiled(rank),
        "mixed precision": mixed_precision(rank),
        "estimated": estimated(),
    }


@cache
def results() -> list[dict[str, Any]]:
    return run(work, WORLD)


def close(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-10) -> None:
    for part in ("fisher", "parameters"):
        renamed = {name.replace("_orig_mod.", ""): one for name, one in found[part].items()}
        assert renamed.keys() == expected[part].keys()
        for name, one in expected[part].items():
            assert_same(renamed[name], one, tolerance=tolerance)


@pytest.mark.parametrize("how", ["offloaded", "recomputed", "compiled"])
def test_it_trains_as_one_process_does(how):
    for result in results():
        close(result[how], stepped(Alone(CASES["mixed"]), 0))


def test_gradients_are_clipped_before_the_step_as_those_of_one_process():
    expected = stepped(Alone(CASES["mixed"]), 0, clipped=True)
    plain = stepped(Alone(CASES["mixed"]), 0)
    assert not torch.equal(expected["parameters"]["out.weight"], plain["parameters"]["out.weight"])
    for result in results():
        close(result["clipped"], expected)


def test_a_weight_used_without_a_call_is_seen_where_the_wrapping_came_first():
    expected = stepped(Alone(Case(Tied)), 0)
    for result in results():
        close(result["tied, wrapped first"], expected)


def test_lower_precision_in_forwards_leaves_sums_and_parameters_in_single():
    for result in results():
        lower, plain = result["mixed precision"].values()
        assert lower["dtypes"] == {torch.float32}
        close(lower, plain, tolerance=0.1)
        assert not torch.equal(lower["fisher"]["out"], plain["fisher"]["out"])


def test_the_fisher_of_a_sharded_model_is_that_of_the_whole():
    for result in results():
        whole, cut = result["estimated"].values()
        assert whole.keys() == cut.keys()
        for name, block in whole.items():
            assert_same(cut[name], block)


@pytest.fixture
def elsewhere() -> Iterator[Any]:
    """A shard on the CPU, of a mesh that says that it is of GPUs."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=2)
    shard = DTensor.from_local(torch.ones(2, 3), init_device_mesh("cpu", (2,)), [Shard(0)], run_check=False)
    with mock.patch.object(DeviceMesh, "device_type", "cuda"):
        yield shard
    dist.destroy_process_group()


def test_an_offloaded_shard_computes_on_the_device_of_its_mesh(elsewhere):
    assert device_of(elsewhere) == torch.device("cuda")
    assert device_of(torch.ones(2)) == torch.device("cpu")


def refreshed() -> kc.KFAC:
    kfac, criterion, optimizer = build(model := network())
    train(model, criterion, optimizer, batches(4))
    return kfac


def test_what_is_loaded_is_where_a_layer_computes():
    """The meta device for a GPU, where a parameter is on the CPU between calls."""
    kfac, state = build(network())[0], refreshed().state_dict()
    with mock.patch.object(layers, "device_of", return_value=torch.device("meta")):
        kfac.load_state_dict(state)
    for name in kfac.layers:
        assert all(one.device.type == "meta" for one in kfac._shared.factors.average.factors(name))
        assert kfac._shared.factors.inverses[name].device.type == "meta"


def test_an_offloaded_gradient_is_brought_together_where_its_mesh_is(elsewhere):
    with mock.patch.object(type(elsewhere), "to", autospec=True, side_effect=RuntimeError("moved")) as moved:
        with pytest.raises(RuntimeError, match="moved"):
            gradients.whole(elsewhere)
    assert moved.call_args.args[-1] == torch.device("cuda")
