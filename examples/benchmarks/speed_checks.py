"""What a contender of ``speed.py`` must agree with before it is timed: the plain formula in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from speed_jobs import Run
from speed_models import Pair, Task, moments, pairs, square, with_bias
from torch import Tensor, nn

DRAWS = 8
"""Times that factors of labels drawn elsewhere are averaged before they are compared."""
DEVIATIONS = 5.0
"""Standard deviations that such an average may be off."""
TOLERANCE = 2e-3
"""In float32, of a norm relative to that of the reference."""


class DisagreementError(Exception):
    """What was computed is not what was to be timed."""


def apart(found: Tensor, reference: Tensor) -> float:
    """The norm of the difference relative to that of the reference."""
    return float((found.double() - reference).norm() / reference.norm())


@cache
def doubled(task: Task) -> Task:
    """The same in float64."""
    inputs = task.inputs.double() if task.inputs.is_floating_point() else task.inputs
    return Task(copy.deepcopy(task.model).double(), inputs, task.labels)


@cache
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


def check_factors(task: Task, run: Run) -> str:
    """Compare the factors with the plain formula in float64, or with what is to be expected of them.

    Raises:
        DisagreementError: a layer's are off.
    """
    assert run.factors is not None
    run.go()
    if run.labels is not None and run.sharing == "expand":
        reference = doubled(task)
        compare(run.factors(), moments(reference.model, reference.inputs, run.labels))
        return "A and G for the same labels"
    expected, total, times = exact(doubled(task), run.sharing), dict(run.factors()), DRAWS
    total = {name: (A, G.double()) for name, (A, G) in total.items()}
    for _ in range(times - 1):
        run.go()
        total = {name: (A, total[name][1] + G) for name, (A, G) in run.factors().items()}
    _compare_drawn({name: (A, G / times) for name, (A, G) in total.items()}, expected, times)
    return f"A; the mean of {times} G of its own draws with the expectation"


def compare(found: Mapping[str, Pair], expected: Mapping[str, Pair]) -> None:
    """Compare A and G of all layers; where a contender's A is without the bias, without it.

    Raises:
        DisagreementError: they are off, or of other layers.
    """
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
    compare(of_inputs, {name: (A, G) for name, (A, G, _, _) in expected.items()})
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
    run.go()
    _compare_step(task, run)
    return "A, G, and the update as the damped solve of both"


def check_training(task: Task, run: Run) -> str:
    """Compare the first loss, and what ``check_step`` does where the first step can be read.

    Raises:
        DisagreementError: one of them is off.
    """
    reference = doubled(task)
    expected, found = float(reference.loss(reference.model).detach()), float(run.go())
    if not abs(found - expected) <= TOLERANCE * abs(expected):
        raise DisagreementError(f"the first loss is {found:.4f}, expected {expected:.4f}")
    if run.solve is None:
        return "the first loss"
    _compare_step(task, run)
    return "the first loss, A, G, and the update as the damped solve of both"


def _compare_step(task: Task, run: Run) -> None:
    assert run.factors is not None and run.solve is not None and run.model is not None
    found, reference = run.factors(), doubled(task)
    if run.labels is None:
        _compare_drawn(found, exact(reference), 1)
    else:
        compare(found, moments(reference.model, reference.inputs, run.labels))
    reference.model.zero_grad()
    reference.loss(reference.model).backward()
    for name, (A, G) in found.items():
        gradient = matrix(reference.model.get_submodule(name))
        expected = run.solve(name, A.double(), G.double(), gradient)
        written = matrix(run.model.get_submodule(name))
        if not apart(written, expected) <= TOLERANCE:
            ratio = float((written * expected).sum() / expected.square().sum())
            raise DisagreementError(f"{name}: the update is {apart(written, expected):.1e} off, ratio {ratio:.4f}")


def matrix(module: nn.Module) -> Tensor:
    """The gradient of a layer as [d_out, d_in], with the bias as one more column."""
    weight = module.weight.grad.flatten(1)
    return weight if module.bias is None else torch.cat([weight, module.bias.grad[:, None]], 1)


CHECKS = {"factors": check_factors, "step": check_step, "training": check_training}
