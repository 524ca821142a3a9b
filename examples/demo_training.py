"""One training run of the demo: same loop, batches and initial weights whatever the optimizer."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from demo_tasks import Problem, Settings, Split, Task, batches
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


@dataclass
class Run:
    """What a run left.

    Args:
        task: name of the task.
        optimizer: name of the optimizer.
        seed: of initial weights, batches and K-FAC's label draws.
        fingerprint: of the initial weights and of every batch drawn so far; equal for equal seeds.
        steps: at which the losses were evaluated.
        seconds: of training up to each of them; evaluation is not counted.
        train_loss: on the full training set.
        test_loss: on the full test set.
        train_accuracy: of a classifier, on the full training set.
        test_accuracy: of a classifier, on the full test set.
    """

    task: str
    optimizer: str
    seed: int
    fingerprint: str = ""
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)

    def record(self, step: int, seconds: float, train: dict[str, float], test: dict[str, float]) -> None:
        """Add one evaluation."""
        self.steps.append(step)
        self.seconds.append(seconds)
        for split, numbers in (("train", train), ("test", test)):
            for name, value in numbers.items():
                getattr(self, f"{split}_{name}").append(value)


def cosine(steps: int) -> Callable[[int], float]:
    """The factor on the learning rate at each step, from 1 to 0: the same schedule for every optimizer."""
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


def train(
    task: Task,
    name: str,
    settings: Settings,
    *,
    data: Split,
    seed: int,
    steps: int,
    told: Callable[[Run], Any] = lambda run: None,
) -> Run:
    """Train one fresh model.

    Args:
        task: what to train.
        name: of the optimizer.
        settings: of the optimizer.
        data: to train and test on.
        seed: of everything random in it.
        steps: how many.
        told: called after each evaluation with the run so far.
    """
    torch.manual_seed(seed)
    problem = task.problem()
    optimizer = settings.build(problem)
    schedule = LambdaLR(optimizer, cosine(steps))
    inputs, targets = data.train
    run, seconds, seen = Run(task.name, name, seed), 0.0, hashlib.sha256(_bytes(problem.model))
    _evaluate(run, problem, data, step=0, seconds=0.0, seen=seen)
    for step, indices in enumerate(batches(len(inputs), task.batch_size, steps=steps, seed=seed), start=1):
        x, y = inputs[indices], targets[indices]
        seen.update(indices.numpy().tobytes())
        start = time.perf_counter()
        optimizer.zero_grad()
        problem.loss(problem.model(x), y).backward()
        optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - start
        if step % task.evaluate_every == 0 or step == steps:
            _evaluate(run, problem, data, step=step, seconds=seconds, seen=seen)
            told(run)
    return run


def _evaluate(run: Run, problem: Problem, data: Split, *, step: int, seconds: float, seen: Any) -> None:
    run.record(step, seconds, _numbers(problem, *data.train), _numbers(problem, *data.test))
    run.fingerprint = seen.hexdigest()[:16]


@torch.no_grad()
def _numbers(problem: Problem, x: Tensor, y: Tensor) -> dict[str, float]:
    """Loss, and accuracy where targets are classes."""
    problem.model.eval()
    outputs = problem.model(x)
    numbers = {"loss": problem.loss(outputs, y).item()}
    if not y.is_floating_point():
        numbers["accuracy"] = (outputs.argmax(dim=1) == y).float().mean().item()
    problem.model.train()
    return numbers


def _bytes(model: nn.Module) -> bytes:
    return b"".join(value.detach().numpy().tobytes() for value in model.state_dict().values())
