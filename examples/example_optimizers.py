"""The optimizers of the examples by name: how each is set up, where its settings start, and one step of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from example_tasks import Task
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import kfac_cond as kc

Settings = Mapping[str, float]


class Stepper(Protocol):
    """What trains a model, one batch at a time."""

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """One step; the loss before it, 0-d."""

    def metrics(self) -> dict[str, float]:
        """Numbers of the last step."""

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on bitwise."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from it."""


@dataclass(frozen=True)
class Setup:
    """What an optimizer is set up for.

    Args:
        task: what is trained.
        model: the module itself, whose parameters are trained.
        called: what a step calls: the same, or what is around it.
        settings: numbers of the optimizer.
        rate: the factor on the learning rate by step.
        seed: of labels that are drawn.
        within: the context that forwards run in.
    """

    task: Task
    model: nn.Module
    called: nn.Module
    settings: Settings
    rate: Callable[[int], float]
    seed: int
    within: Callable[[], Any]


# -- a step ------------------------------------------------------------------------------------------------------------


class Gradients:
    """A step by gradients: of the loss and of the l2 penalty, then whatever listens to them.

    Args:
        setup: what for.
        optimizers: each with parameters of its own.
        kfac: attached to them.
        before: called with the gradients in place.
    """

    def __init__(
        self,
        setup: Setup,
        *optimizers: Optimizer,
        kfac: kc.KFAC | None = None,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        self._setup, self._optimizers, self._kfac, self._before = setup, optimizers, kfac, before
        self._schedules = [LambdaLR(one, setup.rate) for one in optimizers]
        self._parameters = [one for one in setup.model.parameters() if one.requires_grad]
        if kfac is not None:
            kfac.attach(*optimizers)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        for one in self._parameters:
            one.grad = None
        with self._setup.within():
            outputs = self._setup.called(inputs)
        loss = self._setup.task.loss(outputs, targets)
        loss.backward()
        for one in self._parameters if self._setup.task.l2 else ():
            if one.grad is not None:
                one.grad.add_(one.detach(), alpha=self._setup.task.l2)
        self._before()
        for optimizer, schedule in zip(self._optimizers, self._schedules, strict=True):
            optimizer.step()
            schedule.step()
        return loss.detach()

    def metrics(self) -> dict[str, float]:
        return {} if self._kfac is None else _numbers(self._kfac.metrics())

    def _parts(self) -> dict[str, Any]:
        numbered = {f"optimizer{at}": one for at, one in enumerate(self._optimizers)}
        numbered |= {f"schedule{at}": one for at, one in enumerate(self._schedules)}
        return numbered if self._kfac is None else {**numbered, "kfac": self._kfac}

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])


class Whole:
    """A step by an optimizer that evaluates the model itself."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self._optimizer.step(inputs, targets)
        return loss.detach()

    def metrics(self) -> dict[str, float]:
        return _numbers(self._optimizer.metrics())

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._optimizer.load_state_dict(state)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Without what comes before the last slash."""
    return {name.rpartition("/")[2]: float(value) for name, value in metrics.items()}


# -- by name -----------------------------------------------------------------------------------------------------------


def decay(task: Task) -> float:
    """The decoupled weight decay, where the task has no penalty of its own."""
    return 0.0 if task.l2 else 0.01


def of_torch(make: Callable[..., Optimizer], setup: Setup) -> Gradients:
    """An optimizer on all parameters."""
    return Gradients(setup, make(setup.model.parameters(), **setup.settings))


def adamw(setup: Setup) -> Gradients:
    """With its decoupled decay."""
    return of_torch(partial(torch.optim.AdamW, weight_decay=decay(setup.task)), setup)


def matrices(task: Task, model: nn.Module) -> list[nn.Parameter]:
    """Weights of linear layers and convolutions, but for the layer that gives the classes."""
    layers = [one for one in model.modules() if isinstance(one, nn.Linear | nn.Conv2d)]
    last = layers[-1:] if isinstance(task.likelihood, kc.Categorical) else []
    return [one.weight for one in layers if one not in last]


def muon(setup: Setup) -> Gradients:
    """Muon on the matrices, a convolution's weight as one; AdamW on the rest, at a seventh of the rate."""
    weights = matrices(setup.task, setup.model)
    rest = [one for one in setup.model.parameters() if all(one is not other for other in weights)]
    # A view of the weight: what is done to it is done to the weight.
    flat = [nn.Parameter(one.detach().flatten(1)) for one in weights]

    def hand_over() -> None:
        for one, weight in zip(flat, weights, strict=True):
            one.grad = None if weight.grad is None else weight.grad.flatten(1)

    lr, shrink = setup.settings["lr"], decay(setup.task)
    return Gradients(
        setup,
        torch.optim.Muon(flat, lr=lr, weight_decay=shrink),
        torch.optim.AdamW(rest, lr=lr / 7, weight_decay=shrink),
        before=hand_over,
    )


def kfac(setup: Setup) -> Gradients:
    """SGD with momentum on gradients that K-FAC preconditions, within a bound on the KL divergence of an update."""
    given = setup.settings
    optimizer = torch.optim.SGD(setup.model.parameters(), lr=given["lr"], momentum=0.9)
    clip = kc.KLClip(given["max_kl"])
    return _preconditioned(setup, optimizer, damping=given["damping"], trust_region=clip)


def kfac_graft(setup: Setup) -> Gradients:
    """The direction of K-FAC, layer by layer with the length of Adam's update: rates of Adam carry over.

    Momentum is an average, as Adam's, and the damping a share of each block's mean eigenvalue.
    """
    given = setup.settings
    optimizer = torch.optim.SGD(setup.model.parameters(), lr=given["lr"], momentum=0.9, dampening=0.9)
    damping = kc.Damping(given["damping"], relative=True)
    return _preconditioned(setup, optimizer, damping=damping, trust_region=kc.Graft("adam"))


def _preconditioned(setup: Setup, optimizer: Optimizer, **options: Any) -> Gradients:
    factors, inverses = (int(setup.settings[name]) for name in ("factors", "inverses"))
    schedule = kc.Schedule(factors=factors, inverses=inverses, warmup=100)
    draws = kc.Data(seed=setup.seed)
    preconditioner = kc.KFAC(setup.called, setup.task.likelihood, schedule=schedule, data=draws, **options)
    return Gradients(setup, optimizer, kfac=preconditioner)


def natural(setup: Setup) -> Whole:
    """The natural gradient with rate, momentum and damping of its own; the settings are where they start."""
    if setup.called is not setup.model:
        raise SystemExit("--optimizer natural: it trains on one process; start it without torchrun")
    optimizer = kc.NaturalGradient(  # type: ignore[attr-defined]
        setup.model, setup.task.likelihood, l2=setup.task.l2, **setup.settings
    )
    return Whole(optimizer)


@dataclass(frozen=True)
class Entry:
    """An optimizer that can be asked for.

    Args:
        title: for people.
        build: what trains by it.
        settings: where they start on any task.
        by_task: others, by the name of a task.
    """

    title: str
    build: Callable[[Setup], Stepper]
    settings: Settings
    by_task: Mapping[str, Settings]

    def settings_for(self, task: Task, changes: Settings) -> dict[str, float]:
        """The settings, with changes.

        Raises:
            SystemExit: a change of what is no setting.
        """
        known = {**self.settings, **self.by_task.get(task.name, {})}
        if unknown := sorted(set(changes) - set(known)):
            raise SystemExit(f"{self.title} has no setting {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
        return {**known, **changes}


OPTIMIZERS: dict[str, Entry] = {
    "sgd": Entry(
        "SGD, Nesterov",
        partial(of_torch, partial(torch.optim.SGD, momentum=0.9, nesterov=True)),
        {"lr": 0.1},
        {"autoencoder": {"lr": 0.001}},
    ),
    "adam": Entry("Adam", partial(of_torch, torch.optim.Adam), {"lr": 3e-3}, {"autoencoder": {"lr": 1e-3}}),
    "adamw": Entry("AdamW", adamw, {"lr": 3e-3}, {"autoencoder": {"lr": 1e-3}}),
    "muon": Entry("Muon", muon, {"lr": 0.02}, {}),
    "kfac": Entry(
        "SGD + K-FAC",
        kfac,
        {"lr": 0.3, "damping": 1.0, "max_kl": 1e-2, "factors": 10, "inverses": 50},
        {"language_model": {"lr": 3.0}},
    ),
    "kfac-graft": Entry(
        "K-FAC, Adam's length",
        kfac_graft,
        {"lr": 3e-3, "damping": 0.1, "factors": 10, "inverses": 50},
        {"classifier": {"factors": 5, "inverses": 10}},
    ),
    "natural": Entry("Natural gradient", natural, {}, {}),
}
if not hasattr(torch.optim, "Muon"):  # torch before 2.9
    del OPTIMIZERS["muon"]
