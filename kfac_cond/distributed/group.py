"""The few collectives that are used, all of which gloo and NCCL both have, on one process group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..errors import ArgumentError, RankError


def is_initialised() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


class Started:
    """A collective under way.

    Args:
        work: to wait for; None for one that is over.
        what: it does, for messages.
    """

    def __init__(self, work: Any, what: str) -> None:
        self._work, self._what = work, what

    def wait(self) -> None:
        """Until what follows may use the result: for CPU tensors the process waits, for others their stream does.

        Raises:
            RankError: a rank did not take part, or ended.
        """
        if self._work is not None:
            with reached_by_all(self._what):
                self._work.wait()


class Group:
    """The ranks of one process group, this one among them, counted from 0 within it.

    Args:
        group: the process group; None for the default one, or for a process by itself where there is none.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        there = is_initialised()
        self.rank = dist.get_rank(group) if there else 0
        self.size = dist.get_world_size(group) if there else 1
        if self.rank < 0:
            raise ArgumentError(
                f"rank {dist.get_rank()} is not in the process group given to kc.Plan(mesh=...): each rank passes a "
                f"group that it is part of, with the ranks that train the same model on other data"
            )

    @classmethod
    def alone(cls) -> Group:
        """A rank by itself, whatever others there are; nothing is sent."""
        one = cls.__new__(cls)
        one.group, one.rank, one.size = None, 0, 1
        return one

    @property
    def ranks(self) -> list[int]:
        """The numbers of its ranks among all processes."""
        return [self._named(rank) for rank in range(self.size)]

    def all_reduce(self, buffer: Tensor, what: str, *, largest: bool = False) -> Started:
        """Add a buffer over the ranks, in place on all of them; or take the largest of each entry."""
        op = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
        with reached_by_all(what):
            return Started(dist.all_reduce(buffer, op=op, group=self.group, async_op=True), what)

    def reduce(self, buffer: Tensor, to: int, what: str) -> Started:
        """Add a buffer over the ranks, in place on one of them; it is spoilt on the others."""
        with reached_by_all(what):
            return Started(dist.reduce(buffer, self._named(to), group=self.group, async_op=True), what)

    def broadcast(self, buffer: Tensor, of: int, what: str) -> Started:
        """Give the buffer of one rank to all."""
        with reached_by_all(what):
            return Started(dist.broadcast(buffer, self._named(of), group=self.group, async_op=True), what)

    def all_to_all(
        self, received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int], what: str
    ) -> Started:
        """Give each rank its stretch of a buffer, and take the stretches of all ranks; sizes are by rank."""
        with reached_by_all(what):
            work = dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=self.group, async_op=True)
            return Started(work, what)

    def objects(self, mine: Any, what: str) -> list[Any]:
        """The picklable objects of all ranks, in their order."""
        found: list[Any] = [None] * self.size
        with reached_by_all(what):
            dist.all_gather_object(found, mine, group=self.group)
        return found

    def part(self, ranks: list[int]) -> Group:
        """A group of some of its ranks, this one among them, with the same timeout; its members alone call it."""
        named = [self._named(rank) for rank in ranks]
        # Torch gives a new group the timeout of its own, half an hour, whatever that of the others is.
        return Group(dist.new_group(named, timeout=self._timeout, use_local_synchronization=True))

    @property
    def _timeout(self) -> timedelta | None:
        """How long its collectives wait; None where its backend does not say."""
        group: Any = self.group or dist.group.WORLD
        options: list[Any] = [getattr(group._get_backend(one), "options", None) for one in group._device_types]
        return min((one._timeout for one in options if hasattr(one, "_timeout")), default=None)

    def _named(self, rank: int) -> int:
        """The number of a rank among all processes."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


@contextmanager
def reached_by_all(what: str) -> Iterator[None]:
    """Name what a collective was for where it fails: a rank raised, ended, or took another way.

    Raises:
        RankError: torch gave up waiting for the others.
    """
    try:
        yield
    except RuntimeError as error:
        here = f"rank {dist.get_rank()} of {dist.get_world_size()}" if is_initialised() else "this process"
        raise RankError(
            f"{here} did not get through {what}: {str(error).splitlines()[0]}. Another rank raised an error, ended, or "
            f"did not come this far within the timeout of the process group: look for the first error among the ranks' "
            f"logs; expected is that all ranks run the same steps. Start again from the last checkpoint."
        ) from error
