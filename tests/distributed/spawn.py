"""Processes that work together under gloo, with a limit on their time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = 80.0
"""Seconds until processes are killed."""


def run(work: Callable[..., Any], world: int, *args: Any, timeout: float = 40.0) -> list[Any]:
    """What ``work(rank, world, *args)`` gave on each rank, in order.

    Args:
        work: a function of a module, whose results can be saved.
        world: number of ranks.
        args: handed on.
        timeout: of the process group, in seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _rank, args=(folder, work, world, args, timeout), nprocs=world, join=False, start_method="spawn"
        )
        deadline = time.monotonic() + LIMIT
        # It returns after each process that ends, and raises what one of them raised.
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                for process in context.processes:
                    process.kill()
                pytest.fail(f"the ranks did not end within {LIMIT} s")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def ended(work: Callable[..., Any], world: int, *args: Any, timeout: float = 40.0) -> list[Any]:
    """What ``work`` gave on each rank, None for one that ended without; ranks may raise or be killed, none may hang."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        arguments = (folder, work, world, args, timeout)
        processes = [context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(world)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + LIMIT
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        assert not hanging, f"ranks {hanging} did not end within {LIMIT} s"
        paths = [Path(folder) / f"{rank}.pt" for rank in range(world)]
        return [torch.load(path, weights_only=False) if path.exists() else None for path in paths]


def _rank(rank: int, folder: str, work: Callable[..., Any], world: int, args: tuple[Any, ...], timeout: float) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    torch.save(work(rank, world, *args), Path(folder) / f"{rank}.pt")
    if dist.is_initialized():
        # Without it a rank that ends early takes the connections of the others with it.
        dist.barrier()
        dist.destroy_process_group()
