"""Small models, a plain way to the factors, and one step of KFAC as a user makes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .reference import assert_same

#: Capture and invert at every step, and forget what came before.
EVERY_STEP = kc.Schedule(factors=1, inverses=1, decay=0.0)


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def classifier(*, hidden: int = 4, classes: int = 3, features: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, classes))


def categorical_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Sum over terms of -log p, classes last."""
    return nn.functional.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), labels.flatten(), reduction="sum")


def plain_factors(
    model: nn.Module, inputs: Tensor, loss: Callable[[Tensor], Tensor], *, divisor: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, G) of each linear layer called once in ``model``, which must have no in-place operation; 'expand'.

    ``loss`` is the sum over terms of -log p of the outputs at the drawn labels.
    """
    seen: dict[str, tuple[Tensor, Tensor, nn.Linear]] = {}
    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (args[0], out, m)}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    value = loss(model(inputs))
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(value, [out for _, out, _ in seen.values()])
    factors = {}
    for (name, (a, _, module)), g in zip(seen.items(), gradients, strict=True):
        rows, columns = a.detach().reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
        if module.bias is not None:
            rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
        factors[name] = rows.T @ rows / len(rows), columns.T @ columns / divisor
    return factors


def assert_factors(found: kc.Fisher, expected: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    assert list(found) == list(expected)
    for name, (A, G) in expected.items():
        assert_same(found[name].A, A)
        assert_same(found[name].G, G)


def assert_same_fisher(found: kc.Fisher, expected: kc.Fisher) -> None:
    assert_factors(found, {name: (block.A, block.G) for name, block in expected.items()})


#: For tests that listen to the criterion, and to the model's forward.
listening_in_both_ways = pytest.mark.parametrize("listening", ["criterion", "forward"])


def factors_heard(model: nn.Module, listening: str, run: Callable[[nn.Module], object]) -> kc.Fisher:
    """After one step in which ``run`` is handed the criterion."""
    criterion = nn.CrossEntropyLoss()
    likelihood = criterion if listening == "criterion" else "categorical"
    return stepped(model, likelihood, lambda kfac: run(criterion))


def stepped(
    model: nn.Module, likelihood: Any, run: Callable[[kc.KFAC], object], *, seed: int = 0, **settings: Any
) -> kc.Fisher:
    """The factors after one step of KFAC attached to SGD with learning rate 0.

    ``run`` does the forwards, losses and backwards of the step; it is handed the KFAC.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    kfac = kc.KFAC(model, likelihood, **{"schedule": EVERY_STEP, "data": kc.Data(seed=seed), **settings})
    kfac.attach(optimizer)
    try:
        run(kfac)
        optimizer.step()
        return kfac.fisher()
    finally:
        kfac.remove()
        optimizer.zero_grad()


def updated(
    model: nn.Module, likelihood: Any, *batches: tuple[Tensor, Tensor | None], seed: int = 0, **settings: Any
) -> kc.Fisher:
    """The factors after one step of the explicit form over micro-batches (inputs, injected draw or None)."""

    def run(kfac: kc.KFAC) -> None:
        for inputs, draws in batches:
            outputs = model(inputs)
            kfac.update(outputs, draws=draws)
            outputs.sum().backward()

    return stepped(model, likelihood, run, seed=seed, **settings)
