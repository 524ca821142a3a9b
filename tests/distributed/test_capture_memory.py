"""What a capture takes on a rank beside its sums; the process group is one that sends nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import kfac_cond as kc
from kfac_cond.distributed import reduce
from kfac_cond.distributed.reduce import Reduction

from ..memory import Allocated

fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
LAYERS, WIDTH = 8, 64


@pytest.fixture(autouse=True)
def _two_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def captured(strategy: str) -> kc.KFAC:
    """With the sums of layers of one size gathered, and not sent."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    kfac = kc.KFAC(model, "categorical")
    kfac.distribute(kc.Plan(strategy=strategy))
    outputs = model(torch.randn(5, WIDTH))
    kfac.update(outputs)
    outputs.sum().backward()
    return kfac


@pytest.mark.parametrize("strategy", ["replicate", "shard"])
def test_sums_are_packed_into_the_buffer_that_is_sent(strategy):
    """And into no other: beside it there is a part of one layer at a time."""
    kfac = captured(strategy)
    with Allocated() as memory:
        kfac._intake._send_off()
    buffer = sum(one.nbytes for one in kfac.plan().capture_messages)
    assert buffer <= memory.most <= (1 + 1 / LAYERS) * buffer


@pytest.mark.parametrize("strategy", ["replicate", "shard"])
def test_a_ranks_own_sums_are_gone_before_those_of_all_are_unpacked(strategy, monkeypatch):
    kfac = captured(strategy)
    kfac._intake._send_off()
    (sent,) = kfac._intake._sent
    assert isinstance(sent, Reduction)
    own = [StorageWeakRef(sums.G.untyped_storage()) for sums in sent.captured.statistics.layers.values()]
    assert len(own) == LAYERS and not any(one.expired() for one in own)
    del sent
    unpacked, seen = reduce.unpacked_sums, []

    def watching(*args: Any) -> Any:
        seen.append([one.expired() for one in own])
        return unpacked(*args)

    monkeypatch.setattr(reduce, "unpacked_sums", watching)
    kfac.precondition()
    assert seen and all(map(all, seen))
