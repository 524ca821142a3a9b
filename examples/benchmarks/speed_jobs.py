"""The jobs of ``speed.py``: what is timed of this library and of plain optimizers."""

from __future__ import annotations

import copy
import importlib.util
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from speed_models import Pair, Task, factored, limit
from torch import Tensor, nn

import kfac_cond as kc

DAMPING, RATE = 0.1, 1e-3
FACTORS, INVERSES = 10, 100
"""Steps between two captures, and between two refreshes, in the job 'training'."""
NEVER = 10**9

Solve = Callable[[str, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Run:
    """What is timed of one contender, and how to read what it computed.

    Args:
        go: once through the job; in training one step, which gives the loss.
        factors: of the last time, by layer, in this library's scale: A (with the bias where it has one there) and G.
        labels: that the factors are of; None where it draws its own.
        model: whose gradients were preconditioned.
        solve: the preconditioned gradient for a layer's name, A, G and gradient, by the contender's own damping.
        sharing: 'reduce' where g is summed over positions before it is squared.
    """

    go: Callable[[], Any]
    factors: Callable[[], Mapping[str, Pair]] | None = None
    labels: Tensor | None = None
    model: nn.Module | None = None
    solve: Solve | None = None
    sharing: str = "expand"


Rules = Mapping[str, Mapping[str, Any]] | None
Builder = Callable[[Task, Tensor | None], Run]
"""A run of a job; with labels, of factors for them where the library can be handed labels."""


@dataclass(frozen=True)
class Contender:
    """A row of the tables.

    Args:
        builders: by job.
        module: that must be there to be imported; none for what comes with torch.
        checked: whether it is a library that must agree with the plain formula before it is timed.
    """

    builders: Mapping[str, Builder]
    module: str = ""
    checked: bool = True

    @property
    def installed(self) -> bool:
        """Whether its module is there."""
        try:
            return not self.module or importlib.util.find_spec(self.module) is not None
        except ImportError:  # the package is another one of the same name
            return False


# -- what everything is beside -----------------------------------------------------------------------------------------


def plain(task: Task, labels: Tensor | None) -> Run:
    """A forward and a backward."""

    def go() -> Tensor:
        task.model.zero_grad()
        loss = task.loss(task.model)
        loss.backward()
        return loss

    return Run(go)


def products(task: Task, labels: Tensor | None) -> Run:
    """What is called the limit."""
    return Run(lambda: limit(task))


def stepper(
    task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, between: Callable[[], None] = lambda: None
) -> Callable[[], Tensor]:
    """A training step, with something between the backward and the optimizer's step."""

    def go() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss(model)
        loss.backward()
        between()
        optimizer.step()
        return loss.detach()

    return go


def trained_by(make: Callable[[Any], torch.optim.Optimizer], task: Task, labels: Tensor | None) -> Run:
    """A training step of an optimizer on the parameters."""
    model = copy.deepcopy(task.model)
    return Run(stepper(task, model, make(model.parameters())))


sgd = partial(trained_by, partial(torch.optim.SGD, lr=RATE))
adamw = partial(trained_by, partial(torch.optim.AdamW, lr=RATE))


# -- this library ------------------------------------------------------------------------------------------------------


def estimated(task: Task, labels: Tensor | None, rules: Rules = None) -> Run:
    """Factors of one batch with one draw of labels."""
    found: list[kc.Fisher] = []
    draws, seeds = None if labels is None else [[labels]], itertools.count()

    def go() -> None:
        # Another seed each time: labels are the library's own, and the global generator is not advanced.
        options = kc.Options(progress=False, draws=draws, seed=next(seeds))
        found[:] = [kc.estimate(task.model, [(task.inputs, task.labels)], "categorical", rules=rules, options=options)]

    return Run(go, lambda: {name: (block.A, block.G) for name, block in found[0].items()}, labels)


def preconditioned(factors: int, inverses: int, task: Task, labels: Tensor | None, rules: Rules = None) -> Run:
    """A training step; labels are drawn, since what is timed draws them."""
    model, criterion = copy.deepcopy(task.model), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    schedule = kc.Schedule(factors=factors, inverses=inverses)
    kfac = kc.KFAC(model, criterion, damping=DAMPING, schedule=schedule, rules=rules)
    kfac.attach(optimizer)

    def go() -> Tensor:
        optimizer.zero_grad()
        loss = criterion(model(task.inputs).flatten(0, -2), task.labels.flatten())
        loss.backward()
        optimizer.step()
        return loss.detach()

    def read() -> Mapping[str, Pair]:
        return {name: (block.A, block.G) for name, block in kfac.fisher().items()}

    return Run(go, read, None, model, lambda name, *rest: factored(*rest, DAMPING))


ours = {
    "factors": estimated,
    "step": partial(preconditioned, 1, 1),
    "training": partial(preconditioned, FACTORS, INVERSES),
}
