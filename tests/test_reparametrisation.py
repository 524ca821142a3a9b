"""ORACLES 18: under affine maps of a layer's input and output, a finite undamped step gives the same function."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .reference import assert_same

SIZES = (3, 4, 3, 2)
EXAMPLES = 40


class Mapped(nn.Module):
    """s = Q layer(P a + p) + q, started at the function of a given layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        d_out, d_in = layer.weight.shape
        P, p = torch.randn(d_in, d_in) + 3 * torch.eye(d_in), torch.randn(d_in)
        Q, q = torch.randn(d_out, d_out) + 3 * torch.eye(d_out), torch.randn(d_out)
        for name, value in (("P", P), ("p", p), ("Q", Q), ("q", q)):
            self.register_buffer(name, value)
        self.layer = nn.Linear(d_in, d_out)
        inner = layer.weight.detach() @ torch.linalg.inv(P)
        with torch.no_grad():
            self.layer.weight.copy_(torch.linalg.solve(Q, inner))
            self.layer.bias.copy_(torch.linalg.solve(Q, layer.bias - q - inner @ p))

    def forward(self, a: Tensor) -> Tensor:
        return self.layer(a @ self.P.mT + self.p) @ self.Q.mT + self.q


def network() -> nn.Sequential:
    modules: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(SIZES):
        modules += [nn.Linear(d_in, d_out), nn.Tanh()]
    return nn.Sequential(*modules[:-1])


def reparametrised(model: nn.Sequential, layers: tuple[int, ...]) -> nn.Sequential:
    return nn.Sequential(
        *[Mapped(module) if index in layers else copy.deepcopy(module) for index, module in enumerate(model)]
    )


def steps_of(model: nn.Module, damping: kc.Damping, *, trust_region: kc.KLClip | None, steps: int = 2) -> Tensor:
    """The function on held-out inputs after some steps on given data and given draws."""
    generator = torch.Generator().manual_seed(4)
    kfac = kc.KFAC(
        model, "bernoulli", damping=damping, schedule=kc.Schedule(factors=1, inverses=1), trust_region=trust_region
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(steps):
        inputs = torch.randn(EXAMPLES, SIZES[0], generator=generator)
        labels, drawn = torch.rand(2, EXAMPLES, SIZES[-1], generator=generator).round()
        optimizer.zero_grad()
        outputs = model(inputs)
        kfac.update(outputs, draws=drawn)
        nn.functional.binary_cross_entropy_with_logits(outputs, labels).backward()
        kfac.precondition(lr=0.5)
        optimizer.step()
    return model(torch.randn(10, SIZES[0], generator=generator)).detach()


LAYERS = [(0,), (2,), (4,), (0, 2, 4)]
RULES = ["factored", "exact"]


@pytest.mark.parametrize("trust_region", [None, kc.KLClip(1e-3)], ids=["", "trust-region"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layers", LAYERS)
def test_an_undamped_step_gives_the_same_function(layers, rule, trust_region):
    model = network()
    other = reparametrised(model, layers)
    damping = kc.Damping(0.0, rule=rule)
    expected = steps_of(model, damping, trust_region=trust_region)
    assert_same(steps_of(other, damping, trust_region=trust_region), expected, tolerance=1e-8)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layers", LAYERS)
def test_a_damped_step_does_not(layers, rule):
    model = network()
    other = reparametrised(model, layers)
    damping = kc.Damping(0.1, rule=rule)
    difference = steps_of(other, damping, trust_region=None) - steps_of(model, damping, trust_region=None)
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("layers", LAYERS)
def test_both_start_at_the_same_function(layers):
    model, inputs = network(), torch.randn(5, 3)
    assert_same(reparametrised(model, layers)(inputs), model(inputs))
