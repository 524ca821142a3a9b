"""One training run of an example: the same loop, batches and initial weights whatever the optimizer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from example_optimizers import OPTIMIZERS, Entry, Setup
from example_results import Curve
from example_tasks import Task, cosine
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import kfac_cond as kc

SCHEDULES: dict[str, Callable[[int], Callable[[int], float]]] = {
    "constant": lambda steps: lambda step: 1.0,
    "cosine": cosine,
}
"""By name: of the steps of a run the factor on the learning rate at each."""


@dataclass(frozen=True)
class Ranks:
    """One process among those that share the work.

    Args:
        rank: its number.
        world: how many there are.
        device: its own.
    """

    rank: int
    world: int
    device: torch.device

    @classmethod
    def of_torchrun(cls) -> Ranks:
        """What torchrun says in the environment; one process where it says nothing."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        else:
            device = torch.device("cpu")
        if world > 1:
            dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
        return cls(rank, world, device)

    def end(self) -> None:
        """Leave together: a process group that one rank destroys while others use it aborts them."""
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()

    def say(self, text: str) -> None:
        """Print once."""
        if self.rank == 0:
            print(text, flush=True)


@dataclass(frozen=True)
class Options:
    """How long and how often.

    Args:
        steps: of the whole run, which the schedule of the rate is made for.
        every: steps between two evaluations.
        seed: of the initial weights, the batches and the labels that are drawn.
        schedule: of the learning rate, a name in ``SCHEDULES``.
        bf16: forwards under autocast in bfloat16.
    """

    steps: int
    every: int
    seed: int = 0
    schedule: str = "cosine"
    bf16: bool = False


class Run:
    """One optimizer's training.

    Args:
        task: what is trained.
        name: of the optimizer.
        settings: of the optimizer.
        options: how long and how often.
        ranks: this process.
        entry: of the optimizer; the one of that name unless given.
    """

    def __init__(
        self,
        task: Task,
        name: str,
        settings: Mapping[str, float],
        options: Options,
        *,
        ranks: Ranks | None = None,
        entry: Entry | None = None,
    ) -> None:
        torch.manual_seed(options.seed)
        self.task, self.name, self.options = task, name, options
        self.settings = dict(settings)
        self.ranks = ranks or Ranks(0, 1, torch.device("cpu"))
        self.model = task.model().to(self.ranks.device)
        called: nn.Module = DistributedDataParallel(self.model) if self.ranks.world > 1 else self.model
        rate = SCHEDULES[options.schedule](options.steps)
        setup = Setup(task, self.model, called, self.settings, rate, options.seed, self._precision)
        self.stepper = (entry or OPTIMIZERS[name]).build(setup)
        self.step, self.seconds, self.curve = 0, 0.0, Curve()

    def _precision(self) -> Any:
        return torch.autocast(self.ranks.device.type, torch.bfloat16) if self.options.bf16 else nullcontext()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Every rank is asked for its state, one writes; the file before stays until the new one is whole."""
        state = {"model": self.model.state_dict(), "stepper": self.stepper.state_dict()}
        if self.ranks.rank == 0:
            kept = {"step": self.step, "seconds": self.seconds, "curve": asdict(self.curve)}
            kc.save_checkpoint(path, **state, **kept, run=self._identity())

    def resume(self, path: Path) -> None:
        """Go on from the checkpoint; the number of ranks may be another.

        Raises:
            SystemExit: there is none, or it is of another run.
        """
        try:
            saved = kc.load_checkpoint(path)
        except FileNotFoundError:
            raise SystemExit(f"--resume: there is no {path}; start without it, or say --out") from None
        mine, theirs = self._identity(), saved["run"]
        if other := sorted(name for name in mine if mine[name] != theirs.get(name)):
            found = ", ".join(f"{name} {theirs.get(name)} (here {mine[name]})" for name in other)
            raise SystemExit(f"--resume: {path} is of a run with {found}; say the same again, or another --out")
        self.model.load_state_dict(saved["model"])
        self.stepper.load_state_dict(saved["stepper"])
        self.step, self.seconds, self.curve = saved["step"], saved["seconds"], Curve(**saved["curve"])

    def _identity(self) -> dict[str, Any]:
        """What makes the run what it is."""
        options = asdict(self.options)
        del options["every"]
        return {"task": self.task.title, "optimizer": self.name, **self.settings, **options, "batch": self.task.batch}

    # -- training -----------------------------------------------------------------------------------------------------

    def train(self, until: int, told: Callable[[Run], object] = lambda run: None) -> None:
        """Train up to that step, or to where a loss is not finite any more.

        Args:
            told: called after each evaluation.
        """
        while self.step < until:
            start = clock(self.ranks.device)
            self._one_step()
            self.seconds += clock(self.ranks.device) - start
            if self.step % self.options.every == 0 or self.step == until:
                self.measure()
                told(self)
                if not self.curve.train_loss[-1] < float("inf"):
                    return

    def _one_step(self) -> None:
        inputs, targets = (
            one[self.ranks.rank :: self.ranks.world].to(self.ranks.device)
            for one in self.task.data.batch(self.step, self.task.batch, seed=self.options.seed)
        )
        self.stepper.step(inputs, targets)
        self.step += 1

    def measure(self) -> None:
        """Add both splits' losses to the curve, unless they are there."""
        if self.step in self.curve.steps:
            return
        with self._precision():
            found = {split: self.task.measured(self.model, split, self.ranks.device) for split in ("train", "held_out")}
        self.curve.record(self.step, self.seconds, found)


def clock(device: torch.device) -> float:
    """Seconds; of this process alone where it has one thread, so that other work on the machine is not in them."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()
