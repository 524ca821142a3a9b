"""The jobs of ``speed.py``: what is timed of this library and of plain optimizers, and what it must agree with."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from speed_models import Pair, Task, limit, moments, pairs, square, with_bias
from torch import Tensor, nn

import kfac_cond as kc

DAMPING, RATE = 0.1, 1e-3
FACTORS, INVERSES = 10, 100
"""Steps between two captures, and between two refreshes, in the job 'training'."""
NEVER = 10**9
DRAWS = 8
"""Times that factors of labels drawn elsewhere are averaged before they are compared."""
DEVIATIONS = 5.0
"""Standard deviations that such an average may be off."""
TOLERANCE = 2e-3
"""In float32, of a norm relative to that of the reference."""

Solve = Callable[[Tensor, Tensor, Tensor], Tensor]


class DisagreementError(Exception):
    """What was computed is not what was to be timed."""


@dataclass(frozen=True)
class Run:
    """What is timed of one contender, and how to read what it computed.

    Args:
        go: once through the job; in training one step, which gives the loss.
        factors: of the last time, by layer, in this library's scale: A (with the bias where it has one there) and G.
        labels: that the factors are of; None where it draws its own.
        model: whose gradients were preconditioned.
        solve: the preconditioned gradient for A, G and a gradient, as the contender says that it damps.
        sharing: 'reduce' where g is summed over positions before it is squared.
    """

    go: Callable[[], Any]
    factors: Callable[[], Mapping[str, Pair]] | None = None
    labels: Tensor | None = None
    model: nn.Module | None = None
    solve: Solve | None = None
    sharing: str = "expand"


# -- the float64 reference -------------------------------------------------------------------------------------------


def apart(found: Tensor, reference: Tensor) -> float:
    """The norm of the difference relative to that of the reference."""
    return float((found.double() - reference).norm() / reference.norm())


def doubled(task: Task) -> Task:
    """The same in float64."""
    inputs = task.inputs.double() if task.inputs.is_floating_point() else task.inputs
    return Task(copy.deepcopy(task.model).double(), inputs, task.labels)


def exact(task: Task, sharing: str = "expand") -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each layer A, the expectation of G over labels, that of its trace for one draw, and the trace's variance."""
    with torch.no_grad():
        p = task.model(task.inputs).softmax(-1)
    number, classes = p.shape
    found: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
    for c in range(classes):
        of_class = pairs(task.model, task.inputs, torch.full((number,), c))
        for name, (module, a, g) in of_class.items():
            g = g.sum(1, keepdim=True) if sharing == "reduce" else g
            traces = g.square().sum((1, 2))
            A = square(with_bias(module, a)) / a[..., 0].numel()
            terms = square(p[:, c, None, None].sqrt() * g) / number, p[:, c] * traces, p[:, c] * traces.square()
            last = found[name][1:] if name in found else (0.0, 0.0, 0.0)
            found[name] = A, *(one + more for one, more in zip(terms, last, strict=True))
    return {
        name: (A, G, mean.sum() / number, (second - mean.square()).sum() / number**2)
        for name, (A, G, mean, second) in found.items()
    }


def factored(A: Tensor, G: Tensor, gradient: Tensor) -> Tensor:
    """(G + sqrt(damping) / pi I)^-1 V (A + pi sqrt(damping) I)^-1, pi^2 the ratio of the mean eigenvalues.

    A bias that is not in A has the left factor alone.
    """
    pi = (A.diagonal().mean() / G.diagonal().mean()).sqrt()
    root = math.sqrt(DAMPING)
    A = A + pi * root * torch.eye(len(A), dtype=A.dtype)
    G = G + root / pi * torch.eye(len(G), dtype=G.dtype)
    A = torch.block_diag(A, torch.eye(gradient.shape[1] - len(A), dtype=A.dtype))
    return torch.linalg.solve(A, torch.linalg.solve(G, gradient).mT).mT


def check_factors(task: Task, run: Run) -> str:
    """Compare the factors with the plain formula in float64, or with what is to be expected of them.

    Raises:
        DisagreementError: a layer's are off.
    """
    assert run.factors is not None
    run.go()
    if run.labels is not None and run.sharing == "expand":
        reference = doubled(task)
        _compare(run.factors(), moments(reference.model, reference.inputs, run.labels))
        return "A and G for the same labels"
    expected, total, times = exact(doubled(task), run.sharing), dict(run.factors()), DRAWS
    total = {name: (A, G.double()) for name, (A, G) in total.items()}
    for _ in range(times - 1):
        run.go()
        total = {name: (A, total[name][1] + G) for name, (A, G) in run.factors().items()}
    _compare_drawn({name: (A, G / times) for name, (A, G) in total.items()}, expected, times)
    return f"A; the mean of {times} G of its own draws with the expectation"


def _compare(found: Mapping[str, Pair], expected: Mapping[str, Pair]) -> None:
    _same_layers(found, expected)
    for name, (A, G) in expected.items():
        there = len(found[name][0])
        for word, ours, plain in (("A", found[name][0], A[:there, :there]), ("G", found[name][1], G)):
            if not apart(ours, plain) <= TOLERANCE:
                ratio = float((ours * plain).sum() / plain.square().sum())
                raise DisagreementError(f"{name}: {word} is {apart(ours, plain):.1e} off, ratio {ratio:.4f}")


def _compare_drawn(found: Mapping[str, Pair], expected: Mapping[str, Any], times: int) -> None:
    """A as it is, G to within what draws allow: its trace, and itself by the bound E tr^2 on its variance."""
    _same_layers(found, expected)
    of_inputs = {name: (A, expected[name][1]) for name, (A, _) in found.items()}
    _compare(of_inputs, {name: (A, G) for name, (A, G, _, _) in expected.items()})
    for name, (_, G, trace, variance) in expected.items():
        drawn = found[name][1]
        allowed = DEVIATIONS * float((variance / times).sqrt()) + TOLERANCE * float(trace)
        if not abs(float(drawn.trace() - trace)) <= allowed:
            ratio = float(drawn.trace() / trace)
            raise DisagreementError(f"{name}: the trace of G is {ratio:.4f} of what is expected")
        if not float((drawn - G).norm()) <= DEVIATIONS * float(((variance + trace**2) / times).sqrt()):
            raise DisagreementError(f"{name}: G is {apart(drawn, G):.1e} off")


def _same_layers(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    if list(found) != list(expected):
        raise DisagreementError(f"layers {', '.join(found)}; expected {', '.join(expected)}")


def check_step(task: Task, run: Run) -> str:
    """Compare A with the plain formula, G as ``check_factors`` does, and the gradients with the damped solve of both.

    Raises:
        DisagreementError: a layer's are off.
    """
    assert run.factors is not None and run.solve is not None and run.model is not None
    run.go()
    found, reference = run.factors(), doubled(task)
    if run.labels is None:
        _compare_drawn(found, exact(reference), 1)
    else:
        _compare(found, moments(reference.model, reference.inputs, run.labels))
    reference.loss(reference.model).backward()
    for name, (A, G) in found.items():
        gradient = matrix(reference.model.get_submodule(name))
        expected = run.solve(A.double(), G.double(), gradient)
        written = matrix(run.model.get_submodule(name))
        if not apart(written, expected) <= TOLERANCE:
            ratio = float((written * expected).sum() / expected.square().sum())
            raise DisagreementError(f"{name}: the update is {apart(written, expected):.1e} off, ratio {ratio:.4f}")
    return "A, G, and the update as the damped solve of both"


def matrix(module: nn.Module) -> Tensor:
    """The gradient of a layer as [d_out, d_in], with the bias as one more column."""
    weight = module.weight.grad.flatten(1)
    return weight if module.bias is None else torch.cat([weight, module.bias.grad[:, None]], 1)


def check_training(task: Task, run: Run) -> str:
    """Compare the first loss.

    Raises:
        DisagreementError: it is off.
    """
    reference = doubled(task)
    expected, found = float(reference.loss(reference.model)), float(run.go())
    if not abs(found - expected) <= TOLERANCE * abs(expected):
        raise DisagreementError(f"the first loss is {found:.4f}, expected {expected:.4f}")
    return "the first loss"


CHECKS = {"factors": check_factors, "step": check_step, "training": check_training}


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


def estimated(task: Task, labels: Tensor | None) -> Run:
    """Factors of one batch with one draw of labels."""
    found: list[kc.Fisher] = []
    draws = None if labels is None else [[labels]]

    def go() -> None:
        options = kc.Options(progress=False, draws=draws)
        found[:] = [kc.estimate(task.model, [(task.inputs, task.labels)], "categorical", options=options)]

    return Run(go, lambda: {name: (block.A, block.G) for name, block in found[0].items()}, labels)


def preconditioned(factors: int, inverses: int, task: Task, labels: Tensor | None) -> Run:
    """A training step; labels are drawn, since what is timed draws them."""
    model, criterion = copy.deepcopy(task.model), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    schedule = kc.Schedule(factors=factors, inverses=inverses)
    kfac = kc.KFAC(model, criterion, damping=DAMPING, schedule=schedule)
    kfac.attach(optimizer)

    def go() -> Tensor:
        optimizer.zero_grad()
        loss = criterion(model(task.inputs), task.labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def read() -> Mapping[str, Pair]:
        return {name: (block.A, block.G) for name, block in kfac.fisher().items()}

    return Run(go, read, None, model, factored)


ours = {
    "factors": estimated,
    "step": partial(preconditioned, 1, 1),
    "training": partial(preconditioned, FACTORS, INVERSES),
}
