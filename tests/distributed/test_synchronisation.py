"""Nothing on the step path of several ranks waits for the device; the process group is one that sends nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

import kfac_cond as kc

from ..test_synchronisation import Reads, convolutional

fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")


@pytest.fixture(autouse=True)
def _two_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def counts(
    strategy: str | float, device: str, *, number: int = 11, stagger: bool = False, structure: str = "kfac"
) -> list[int]:
    """The reads of each step; factors at every second, inverses at every tenth."""
    model = convolutional().to(device)
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = kc.Schedule(factors=2, inverses=10, stagger=stagger)
    kfac = kc.KFAC(model, criterion, schedule=schedule, structure=structure, trust_region=kc.KLClip(1e-3))
    kfac.distribute(kc.Plan(strategy=strategy))
    kfac.attach(optimizer)
    inputs, labels = torch.randn(5, 3, device=device), torch.zeros(5, dtype=torch.long, device=device)
    found = []
    for _ in range(number):
        with Reads() as reads:
            optimizer.zero_grad()
            criterion(model(inputs), labels).backward()
            optimizer.step()
        found.append(reads.counts.total())
    return found


@pytest.mark.parametrize("strategy", ["replicate", "shard"])
def test_steps_that_do_not_refresh_read_nothing(strategy):
    """But where graphs are looked at for other uses of weights, after 0, 1, 3, 7 ... captures."""
    assert counts(strategy, "cpu")[3:6] == [0, 0, 0]


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("strategy", ["replicate", "shard", 0.5])
def test_nor_do_steps_that_refresh_layers_by_themselves(strategy, structure):
    """Of four ranks, where a fraction sends inverses to those that keep no averages."""
    dist.destroy_process_group()
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=4)
    assert counts(strategy, "cpu", stagger=True, structure=structure)[3:6] == [0, 0, 0]


def test_a_world_that_changes_under_shared_layers_is_named():
    model = convolutional()
    kfac = kc.KFAC(model, "categorical")
    kfac.distribute(kc.Plan(strategy="shard"))
    dist.destroy_process_group()
    with pytest.raises(kc.RankError, match="1 ranks where there were 2"):
        kfac.update(model(torch.randn(5, 3)))
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=2)


@pytest.mark.parametrize("strategy", ["replicate", "shard"])
def test_steps_on_the_meta_device_run(strategy):
    """There ``item``, ``cpu`` and ``nonzero`` raise."""
    assert counts(strategy, "meta") == [0] * 11
