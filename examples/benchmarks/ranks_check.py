"""Two ranks under gloo: what they hand to collectives and what leaves their sockets, beside what the plan says."""

from __future__ import annotations

import os
import socket
import stat
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.distributed.layout import Message
from kfac_cond.tables import table

WORLD = 2
STRATEGIES = ("replicate", "shard")
"""Of two ranks a fraction is one of these."""
CAPTURES, REFRESHES, PLAIN = (1, 4), (1, 3), 2
"""Steps with a capture and with a refresh; the first of both makes the first inverses. One step has neither."""
ENVELOPE = 512
"""Bytes that gloo adds to each message, at most, and that are left of the barriers around a phase."""


@dataclass(frozen=True)
class Phase:
    """A capture, a refresh or a step.

    Args:
        name: of the three.
        planned: bytes of the tensors of its collectives, by the plan.
        handed: those that were handed to torch.distributed.
        ring: that a rank sends on average, by the plan.
        gloo: the same by gloo's own way to reduce.
        sent: that left the sockets of a rank; None where the system does not say.
    """

    name: str
    planned: tuple[int, ...]
    handed: tuple[int, ...]
    ring: int
    gloo: int
    sent: int | None

    @property
    def agrees(self) -> bool:
        """Whether every tensor is as planned, and sockets sent what gloo does with these."""
        allowed = ENVELOPE * (1 + len(self.planned))
        return self.planned == self.handed and (self.sent is None or abs(self.sent - self.gloo) <= allowed)


def network() -> nn.Module:
    """Convolutions with a norm, and linear layers, of a few hundred kilobytes each."""
    convolutions = (nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU())
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(384, 200), nn.ReLU(), nn.Linear(200, 10))


def check() -> int:
    """Print a line for each phase and strategy; 1 where one does not agree, else 0."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(folder,), nprocs=WORLD)
        ranks = [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(WORLD)]
    phases = [
        (strategy, together(several))
        for strategy in STRATEGIES
        for several in zip(*(rank[strategy] for rank in ranks), strict=True)
    ]
    for strategy, one in phases:
        sent = "unknown" if one.sent is None else f"{one.sent:,}"
        numbers = f"{sum(one.planned):,}", f"{sum(one.handed):,}", f"{one.ring:,}", f"{one.gloo:,}", sent
        rows.append((strategy, one.name, *numbers, "yes" if one.agrees else "NO"))
    head = ("strategy", "", "planned", "handed over", "a ring sends", "gloo sends", "sockets sent", "agrees")
    print(table(head, rows, [""] * len(rows), right=range(2, 7)))
    return int(not all(one.agrees for _, one in phases))


def together(several: tuple[Phase, ...]) -> Phase:
    """The phase of all ranks, which all have the same collectives; what sockets sent is the average."""
    first = several[0]
    handed = first.handed if all(one.handed == first.handed for one in several) else ()
    sent = [one.sent for one in several if one.sent is not None]
    return Phase(first.name, first.planned, handed, first.ring, first.gloo, sum(sent) // len(sent) if sent else None)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meet = {"init_method": f"file://{folder}/rendezvous", "rank": rank, "world_size": WORLD}
    dist.init_process_group("gloo", timeout=timedelta(seconds=60), **meet)
    torch.save({strategy: measured(strategy, rank) for strategy in STRATEGIES}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def measured(strategy: Any, rank: int) -> list[Phase]:
    """The phases of a short run; both ranks have the same data, so that no gradient need be averaged."""
    torch.manual_seed(0)
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = kc.Schedule(factors=lambda step: step in CAPTURES, inverses=lambda step: step in REFRESHES)
    kfac = kc.KFAC(model, criterion, schedule=schedule, damping=0.1)
    kfac.distribute(kc.Plan(strategy=strategy))
    kfac.attach(optimizer)
    inputs, labels = torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
    seen = []
    for _ in range(1 + max(*CAPTURES, *REFRESHES)):
        dist.barrier()
        before = socket_bytes()
        with handed() as sizes:
            optimizer.zero_grad()
            criterion(model(inputs), labels).backward()
            optimizer.step()
        dist.barrier()
        after = socket_bytes()
        seen.append((sizes, None if before is None or after is None else after - before))
    plan = kfac.plan()
    plain, plain_sent = seen[PLAIN]
    # Whatever a capture or a refresh sends comes before what its step does.
    messages = {
        CAPTURES[-1]: plan.capture_messages,
        REFRESHES[-1]: plan.refresh_messages(rank),
        PLAIN: plan.step_messages,
    }
    names = {CAPTURES[-1]: "capture", REFRESHES[-1]: "refresh", PLAIN: "step"}
    found = []
    for number, name in names.items():
        sizes, sent = seen[number]
        alone = number == PLAIN
        found.append(
            Phase(
                name,
                tuple(one.nbytes for one in messages[number]),
                tuple(sizes if alone else sizes[: len(sizes) - len(plain)]),
                round(sum(one.sent for one in messages[number])),
                round(sum(by_gloo(one) for one in messages[number])),
                sent if sent is None or plain_sent is None or alone else sent - plain_sent,
            )
        )
    return found


def by_gloo(message: Message) -> float:
    """Bytes that a rank sends on average: its reduce scatters sums as a ring does, then gathers them on one rank."""
    return message.sent * (1 + 1 / message.ranks if message.kind == "reduce" else 1)


@contextmanager
def handed() -> Iterator[list[int]]:
    """The bytes of the tensor of every collective."""
    sizes: list[int] = []

    def counting(plain: Any) -> Any:
        def collective(tensor: Tensor, *args: Any, **options: Any) -> Any:
            sizes.append(tensor.nbytes)
            return plain(tensor, *args, **options)

        return collective

    with ExitStack() as stack:
        for name in ("all_reduce", "reduce", "broadcast"):
            stack.enter_context(mock.patch.object(dist, name, counting(getattr(dist, name))))
        yield sizes


ACKNOWLEDGED = 120
"""Where Linux has the bytes that the other end has acknowledged, in what TCP_INFO gives."""


def socket_bytes() -> int | None:
    """Bytes that have left this process's TCP connections and arrived; None where the system does not say."""
    if not (hasattr(socket, "TCP_INFO") and os.path.isdir("/proc/self/fd")):
        return None
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as one:
                    if one.family in (socket.AF_INET, socket.AF_INET6):
                        info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                        total += struct.unpack_from("=Q", info, ACKNOWLEDGED)[0]
        except OSError:
            # Closed since it was listed, or not of TCP.
            continue
    return total
