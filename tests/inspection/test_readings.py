"""Numbers on their way to the host: nobody waits, and none is taken for another."""

from __future__ import annotations

from math import inf, nan
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kfac_cond as kc
from kfac_cond.inspection import readings
from kfac_cond.inspection.readings import Arriving, Measured

from ..training import batches


class Queue:
    """A device whose work is done when ``finish`` is called, as torch's modules of devices look."""

    def __init__(self) -> None:
        self.done, self.waited = False, 0
        self.current_stream = lambda device: "the stream of " + str(device)
        queue = self

        class Event:
            def record(self, stream: str) -> None:
                assert stream == "the stream of cuda:0"

            def query(self) -> bool:
                return queue.done

            def synchronize(self) -> None:
                queue.waited += 1

        self.Event = Event


class OnDevice:
    """A vector there, of which copies begin at once."""

    device, shape, dtype = torch.device("cuda", 0), torch.Size((2,)), torch.float64
    is_meta = False


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    queue, pinned = Queue(), []

    class Pinned:
        is_meta, device = False, torch.device("cpu")

        def copy_(self, vector: OnDevice, *, non_blocking: bool) -> None:
            assert non_blocking

        def tolist(self) -> list[float]:
            return [1.0, 2.0]

    def empty(shape: torch.Size, *, dtype: torch.dtype, pin_memory: bool) -> Pinned:
        assert pin_memory
        pinned.append(Pinned())
        return pinned[-1]

    fakes = SimpleNamespace(empty=empty, get_device_module=lambda device: queue, Tensor=torch.Tensor)
    monkeypatch.setattr(readings, "torch", fakes)
    return queue


def test_a_vector_arrives_when_its_event_says_so(queue):
    arriving = Arriving(OnDevice())
    assert not arriving.arrived
    assert queue.waited == 0
    queue.done = True
    assert arriving.arrived
    assert queue.waited == 0
    assert arriving.numbers() == [1.0, 2.0]


def test_whoever_asks_before_that_waits(queue):
    assert Arriving(OnDevice()).numbers() == [1.0, 2.0]
    assert queue.waited == 1


def test_on_the_cpu_it_is_there_at_once_and_on_meta_never():
    assert Arriving(torch.tensor([3.0])).numbers() == [3.0]
    assert Arriving(torch.tensor([3.0], device="meta")).numbers() is None


def test_numbers_are_named_and_what_there_is_not_is_absent():
    measured = Measured(torch.device("cpu"))
    measured.add("fc", ("trace", "kl", "age"), {"trace": torch.tensor(2.0), "kl": torch.tensor(nan)})
    measured.add_row("fc", "A", 3, torch.tensor([1.0, 0.0, 4.0]))
    measured.add_row("fc", "G", 2, None)
    measured.add("out", ("trace",), {"trace": torch.tensor([[5]])})
    single, rows = measured.named(measured.vector().tolist())
    assert single == {"fc": {"trace": 2.0, "kl": inf}, "out": {"trace": 5.0}}
    assert rows == {"fc": {"A": (1.0, 0.0, 4.0)}}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_step_of_a_device_waits():
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).cuda()
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion, schedule=kc.Schedule(factors=2, inverses=100))
    kfac.attach(optimizer)
    monitor = kc.Monitor(kfac, every=3)
    data = [(x.cuda(), y.cuda()) for x, y in batches(12)]
    for number, (x, y) in enumerate(data):
        torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    monitor.flush()
    assert [one.step for one in monitor.readings] == [0, 3, 6, 9]
