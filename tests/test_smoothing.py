"""Averages of gradients and iterates, where steps follow the noise of their batches."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.smoothing import POWER, Smoothing

from .reference import assert_same
from .training import network, parameters_of


def noise(number: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches with labels that say nothing: each wants another step."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(number):
        yield torch.randn(20, 30, generator=generator), torch.randn(20, 1, generator=generator)


def of_noise(average: float = 0.7) -> tuple[nn.Linear, kc.NaturalGradient]:
    torch.manual_seed(0)
    model = nn.Linear(30, 1)
    # Zero is best: there is nothing to learn from the start.
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    direction = kc.Direction(average=average)
    return model, kc.NaturalGradient(model, kc.Gaussian(), direction=direction, damping=1e-2)


def iterate_of(optimizer: kc.NaturalGradient, model: nn.Module) -> Tensor:
    """theta, where the parameters hold its average."""
    return nn.utils.parameters_to_vector([p.detach() + optimizer.state[p]["ahead"] for p in model.parameters()])


def test_parameters_are_the_weighted_average_of_the_iterates_since_it_began():
    """The k-th of them weighs as k (k + 1) ... (k + p - 1)."""
    model, optimizer = of_noise()
    iterates = []
    for x, y in noise(14):
        optimizer.step(x, y)
        if optimizer.metrics()["averaged"]:
            iterates.append(iterate_of(optimizer, model))
    weights = torch.tensor([math.gamma(k + POWER) / math.gamma(k) for k in range(1, len(iterates) + 1)])
    assert len(iterates) == 10
    assert_same(parameters_of(model), weights @ torch.stack(iterates) / weights.sum())


def test_directions_are_of_the_averaged_gradient_and_lengths_of_the_batch():
    """With F = I the direction is the gradient itself."""
    parameters = [nn.Parameter(torch.randn(4))]
    state = {parameters[0]: {}}
    smoothing = Smoothing(0.7, parameters, lambda: state)
    gradients = [torch.randn(4) for _ in range(3)]
    assert smoothing.smooth([gradients[0]])[0] is gradients[0]
    smoothing.keep()
    smoothing.judge(0.0)
    expected = gradients[0]
    for at, g in enumerate(gradients):
        expected = g if at == 0 else 0.7 * expected + 0.3 * g
        assert_same(smoothing.smooth([g])[0], expected)
        # Asked twice, as where several gammas are tried, it is the same.
        assert_same(smoothing.smooth([g])[0], expected)
        smoothing.keep()


@pytest.mark.parametrize(
    ("seen", "averaging"),
    [
        ([0.26], False),
        ([0.24], True),
        ([0.24, 0.74], True),
        ([-1.0, 0.76], False),
        ([0.0, 1.0, 0.5], False),
        ([math.nan], False),
    ],
)
def test_it_begins_below_a_quarter_and_ends_above_three(seen, averaging):
    parameters = [nn.Parameter(torch.zeros(1))]
    state = {parameters[0]: {}}
    smoothing = Smoothing(0.5, parameters, lambda: state)
    for fresh in seen:
        smoothing.judge(fresh)
    assert bool(smoothing.count) is averaging


def test_there_is_none_on_one_and_the_same_batch():
    found = []
    for average in (0.7, 0.0):
        torch.manual_seed(2)
        model, x, y = network(), torch.randn(40, 3), torch.randint(2, (40,))
        optimizer = kc.NaturalGradient(model, "categorical", direction=kc.Direction(average=average))
        for _ in range(20):
            optimizer.step(x, y)
            assert optimizer.metrics()["averaged"] == 0
        found.append(parameters_of(model))
    assert torch.equal(*found)


def test_none_is_asked_for():
    model, optimizer = of_noise(average=0.0)
    for x, y in noise(12):
        optimizer.step(x, y)
        assert optimizer.metrics()["averaged"] == 0
    assert all("ahead" not in optimizer.state[p] for p in model.parameters())


def test_once_it_ends_the_parameters_are_the_iterate():
    model, optimizer = of_noise()
    *first, last = noise(9)
    for x, y in first:
        optimizer.step(x, y)
    assert optimizer.metrics()["averaged"] > 0
    for _ in range(20):
        optimizer.step(*last)
    assert optimizer.metrics()["averaged"] == 0
    assert all({"ahead", "smooth"}.isdisjoint(optimizer.state[p]) for p in model.parameters())


def test_the_average_is_nearer_to_the_minimum_than_the_iterate():
    """Labels that are noise: zero is best."""
    model, optimizer = of_noise()
    for x, y in noise(60):
        optimizer.step(x, y)
    assert parameters_of(model).norm() < 0.7 * iterate_of(optimizer, model).norm()


def test_a_step_that_is_taken_back_leaves_the_average_and_the_iterate_as_they_were():
    model, optimizer = of_noise()
    for x, y in noise(12):
        optimizer.step(x, y)
    before, iterate, smooth = (
        parameters_of(model),
        iterate_of(optimizer, model),
        {p: optimizer.state[p]["smooth"].clone() for p in model.parameters()},
    )
    x[0, 0] = math.nan
    optimizer.step(x, y)
    assert optimizer.metrics()["rejected"] == 1
    assert torch.equal(parameters_of(model), before)
    assert torch.equal(iterate_of(optimizer, model), iterate)
    assert all(torch.equal(optimizer.state[p]["smooth"], one) for p, one in smooth.items())


def test_what_is_raised_leaves_the_average_as_it_was():
    model, optimizer = of_noise()
    for x, y in noise(12):
        optimizer.step(x, y)
    before = parameters_of(model)

    def closure() -> Tensor:
        assert not torch.equal(parameters_of(model), before)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(parameters_of(model), before)


def test_a_run_goes_on_bitwise_with_its_averages():
    batches = list(noise(16))
    model, optimizer = of_noise()
    for x, y in batches[:11]:
        optimizer.step(x, y)
    other, resumed = of_noise()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for x, y in batches[11:]:
        optimizer.step(x, y)
        resumed.step(x, y)
    assert resumed.metrics()["averaged"] == optimizer.metrics()["averaged"] > 5
    assert torch.equal(parameters_of(model), parameters_of(other))


def test_a_share_out_of_range_is_refused():
    with pytest.raises(kc.ArgumentError, match=r"Direction\(average=1\.0\): expected a number in \[0, 1\)"):
        kc.Direction(average=1.0)
