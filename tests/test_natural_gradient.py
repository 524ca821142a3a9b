"""The self-tuning natural gradient: each rule of a step on problems with a known answer."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .reference import assert_same
from .training import network, parameters_of

WORDS = ["kfac", "ekfac", "tkfac", "diagonal", "exact", "gram"]
PRECISE = kc.Iteration(tolerance=1e-13, limit=500)
FIXED = {"every": None, "least": 0.0}


def regression(outputs: int = 2, examples: int = 30) -> tuple[nn.Linear, Tensor, Tensor]:
    return nn.Linear(3, outputs), torch.randn(examples, 3), torch.randn(examples, outputs)


def classes(examples: int = 40) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Labels that no linear function tells apart."""
    return network(), torch.randn(examples, 3), torch.randint(2, (examples,))


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    """The smallest mean of half the squared error over [x, 1]."""
    full = torch.cat([x, torch.ones(len(x), 1)], 1)
    best = torch.linalg.lstsq(full, y).solution
    return (full @ best - y).square().sum() / (2 * len(x))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return ((model(x) - y).square().sum() / (2 * len(x))).detach()


# -- the step of a known answer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "outputs"), [("kfac", 1), ("ekfac", 1), ("exact", 3), ("gram", 3)])
def test_one_step_solves_a_linear_layer_with_squared_error(word, outputs):
    """With one output G is a number, and the rate makes it exact."""
    model, x, y = regression(outputs)
    direction = kc.Direction(word, iteration=PRECISE)
    optimizer = kc.NaturalGradient(
        model, kc.Gaussian(), direction=direction, damping=kc.LevenbergMarquardt(0.0, **FIXED)
    )
    optimizer.step(x, y)
    assert_same(loss_of(model, x, y), least_squares(x, y), tolerance=1e-9)


@pytest.mark.parametrize("word", WORDS)
def test_the_ratio_is_one_on_least_squares_whatever_the_damping(word):
    """It is taken without lambda: with it the model would say less than the step gains."""
    model, x, y = regression()
    optimizer = kc.NaturalGradient(model, kc.Gaussian(), direction=word, damping=2.0, l2=0.1)
    for _ in range(4):
        optimizer.step(x, y)
        assert optimizer.metrics()["ratio"] == pytest.approx(1.0, abs=1e-9)
        assert optimizer.metrics()["fresh"] == pytest.approx(1.0, abs=1e-9)
        assert optimizer.damping.value == 2.0
    optimizer.step(x, y)
    assert optimizer.damping.value == pytest.approx(2.0 * 0.95**5)


def test_what_a_step_added_to_the_next_batch_is_exact_on_least_squares():
    """From the model of the next batch alone, at no cost: no loss is computed anywhere for it."""
    model, x, y = regression(examples=40)
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]
    optimizer = kc.NaturalGradient(model, kc.Gaussian(), damping=0.1)
    before = loss_of(model, *batches[1])
    optimizer.step(*batches[0])
    added = loss_of(model, *batches[1]) - before
    predicted = optimizer.metrics()["predicted"]
    optimizer.step(*batches[1])
    assert optimizer.metrics()["fresh"] == pytest.approx(float(added) / predicted, abs=1e-10)


def test_damping_has_an_end_where_steps_fit_their_own_batch_alone():
    """Labels that are noise: every batch wants another step."""
    model = nn.Linear(30, 1)
    rule = kc.LevenbergMarquardt(1e-3, every=1, decay=0.5, fresh=0.9)
    optimizer = kc.NaturalGradient(model, kc.Gaussian(), damping=rule)
    for _ in range(40):
        optimizer.step(torch.randn(20, 30), torch.randn(20, 1))
        assert optimizer.metrics()["ratio"] == pytest.approx(1.0)
    # It may halve twice before anything is known of a next batch.
    assert 2.5e-7 <= rule.value <= 1e-6


def test_the_first_step_has_the_rate_of_the_1x1_solution():
    model, x, y = regression()
    optimizer = kc.NaturalGradient(model, kc.Gaussian(), direction="gram", damping=0.5, l2=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    loss = (model(x) - y).square().sum() / (2 * len(x))
    g = [a + 0.1 * p for a, p in zip(torch.autograd.grad(loss, list(model.parameters())), before, strict=True)]
    optimizer.step(x, y)
    rate = optimizer.metrics()["rate"]
    delta = [(p.detach() - b) / rate for p, b in zip(model.parameters(), before, strict=True)]
    pushed = x @ delta[0].mT + delta[1]
    form = pushed.square().sum() / len(x) + 0.6 * sum(d.square().sum() for d in delta)
    slope = sum((a * d).sum() for a, d in zip(g, delta, strict=True))
    assert rate == pytest.approx(float(-slope / form), abs=1e-10)
    assert optimizer.metrics()["momentum"] == 0.0
    optimizer.step(x, y)
    assert optimizer.metrics()["momentum"] != 0.0


def test_softmax_regression_converges_quadratically():
    torch.manual_seed(3)
    model, x, y = nn.Linear(3, 3), torch.randn(60, 3), torch.randint(3, (60,))
    reference = nn.Linear(3, 3)
    found = torch.optim.LBFGS(reference.parameters(), lr=1.0, max_iter=500, tolerance_grad=1e-15, tolerance_change=0)

    def closure() -> Tensor:
        found.zero_grad()
        loss = nn.functional.cross_entropy(reference(x), y)
        loss.backward()
        return loss

    found.step(closure)
    best = reference(x).log_softmax(1).detach()
    damping = kc.LevenbergMarquardt(1e-12, **FIXED)
    optimizer = kc.NaturalGradient(
        model, "categorical", direction=kc.Direction("exact", iteration=PRECISE), damping=damping
    )
    errors = []
    for _ in range(7):
        optimizer.step(x, y)
        errors.append(float((model(x).log_softmax(1) - best).detach().abs().max()))
    # Each error is of the order of the square of the one before, down to round-off.
    pairs = [(a, b) for a, b in itertools.pairwise(errors[1:]) if b > 1e-11]
    assert errors[-1] < 1e-7
    assert all(b < 2 * a**2 for a, b in pairs), errors


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("l2", [0.0, 1e-3])
def test_full_batch_losses_never_rise(word, l2):
    model, x, y = classes()
    optimizer = kc.NaturalGradient(model, nn.CrossEntropyLoss(), direction=word, l2=l2)
    losses = [float(optimizer.step(x, y)) for _ in range(25)]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(losses)), losses
    assert losses[-1] < losses[0] - 0.05


def test_the_loss_returned_is_the_objective_before_the_step():
    model, x, y = classes()
    squares = sum(p.square().sum() for p in model.parameters())
    expected = nn.functional.cross_entropy(model(x), y) + 0.2 / 2 * squares
    found = kc.NaturalGradient(model, "categorical", damping=1.0, l2=0.2).step(x, y)
    assert found.shape == ()
    assert_same(found, expected.detach())


def test_exact_and_gram_are_one_direction():
    x, y = torch.randn(12, 3), torch.randint(2, (12,))
    found = []
    for word in ("exact", "gram"):
        torch.manual_seed(1)
        model = network()
        direction = kc.Direction(word, iteration=PRECISE)
        optimizer = kc.NaturalGradient(model, "categorical", direction=direction, damping=0.01)
        for _ in range(3):
            optimizer.step(x, y)
        found.append(parameters_of(model))
    assert_same(found[1], found[0], tolerance=1e-8)


# -- steps that are too bold ----------------------------------------------------------------------------------------


def steep(factor: float) -> tuple[nn.Linear, kc.NaturalGradient, object]:
    """A closure whose loss is ``factor`` times as curved as the Fisher of the likelihood says."""
    model, x, y = nn.Linear(3, 1), torch.randn(20, 3), torch.randn(20, 1)
    optimizer = kc.NaturalGradient(model, kc.Gaussian(factor), damping=kc.LevenbergMarquardt(1e-12, least=1e-13))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().sum() / 40
        loss.backward()
        return loss

    return model, optimizer, closure


def test_a_step_that_is_too_bold_is_taken_back_and_damping_grows():
    model, optimizer, closure = steep(1e9)
    before = parameters_of(model)
    optimizer.step(closure)
    assert torch.equal(parameters_of(model), before)
    assert optimizer.metrics()["rejected"] == 1
    assert optimizer.damping.value == pytest.approx(1.5e-12)
    assert all("previous" not in state for state in optimizer.state.values())


@pytest.mark.parametrize("factor", [4.0, 30.0])
def test_a_step_that_is_bold_is_shortened(factor):
    """The parabola through the two losses and the slope is the loss itself: its minimum is found at once."""
    model, optimizer, closure = steep(factor)
    before = float(closure().detach())
    start = parameters_of(model)
    optimizer.step(closure)
    assert optimizer.metrics()["rejected"] == 0
    assert optimizer.metrics()["length"] == pytest.approx(max(1 / factor, 0.1) if factor < 20 else 0.1 * 10 / 30)
    assert float(closure().detach()) < before
    assert optimizer.damping.value == pytest.approx(1.5e-12)
    step = nn.utils.parameters_to_vector([optimizer.state[p]["previous"] for p in model.parameters()])
    assert_same(step, parameters_of(model) - start)


@pytest.mark.parametrize("word", ["kfac", "ekfac", "exact"])
def test_a_loss_that_is_not_a_number_leaves_parameters_as_they_were(word):
    model, x, y = classes()
    optimizer = kc.NaturalGradient(model, "categorical", direction=word, damping=1.0)
    optimizer.step(x, y)
    before = parameters_of(model)
    x[3, 1] = math.nan
    loss = optimizer.step(x, y)
    assert loss.isnan()
    assert torch.equal(parameters_of(model), before)
    assert optimizer.metrics()["rejected"] == 1
    optimizer.step(x[4:], y[4:])
    assert parameters_of(model).isfinite().all()
    assert not torch.equal(parameters_of(model), before)


def test_a_loss_after_the_step_that_is_not_a_number_counts_as_higher():
    """The loss overflows at the step's end: a shorter one is taken."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = kc.NaturalGradient(model, kc.Gaussian(1e4), damping=1e-8)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 1)).mean().log() + 1 / model.weight.sum()
        loss = loss if float(loss.detach()) > 0 else loss * math.nan
        (loss + model.weight.sum()).backward()
        return loss + model.weight.sum()

    optimizer.step(closure)
    assert model.weight.isfinite().all()


@pytest.mark.parametrize("damping", [1.0, None], ids=["step", "trial"])
def test_what_is_raised_after_a_step_leaves_parameters_as_they_were(damping):
    model, x, y = classes()
    optimizer, before = kc.NaturalGradient(model, "categorical", damping=damping), parameters_of(model)

    def closure() -> Tensor:
        if not torch.equal(parameters_of(model), before):
            raise KeyboardInterrupt
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(parameters_of(model), before)


def test_a_step_without_a_gradient_stays_where_it_is():
    model, x, _ = regression()
    optimizer, before = kc.NaturalGradient(model, kc.Gaussian()), parameters_of(model)
    optimizer.step(x, model(x).detach())
    assert_same(parameters_of(model), before)
    losses = [float(optimizer.step(x, torch.ones(30, 2))) for _ in range(8)]
    assert losses[-1] < losses[0]


def test_a_step_that_is_not_looked_at_is_not_taken_back():
    model, x, y = classes()
    rule = kc.LevenbergMarquardt(1.0, every=4, check=2)
    optimizer = kc.NaturalGradient(model, "categorical", damping=rule)
    ratios = []
    for _ in range(4):
        optimizer.step(x, y)
        ratios.append(math.isnan(optimizer.metrics()["ratio"]))
    assert ratios == [True, False, True, False]


# -- bounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["kfac", "gram"])
def test_a_clipped_step_makes_the_kl_that_was_allowed_to_first_order_in_its_length(word):
    errors = []
    for max_kl in (1e-6, 1e-8):
        torch.manual_seed(0)
        model, x, y = classes()
        before = model(x).detach()
        optimizer = kc.NaturalGradient(
            model, "categorical", direction=word, damping=1e-3, trust_region=kc.KLClip(max_kl)
        )
        optimizer.step(x, y)
        measured = kc.Categorical().kl(before, model(x)).detach() / len(x)
        errors.append(abs(float(measured) / max_kl - 1))
    assert errors[0] < 0.1
    # The length is the root of the KL: a tenth of it, a tenth of the error.
    assert 7 < errors[0] / errors[1] < 14


def test_a_constrained_step_has_the_length_that_was_allowed():
    model, x, y = classes()
    before = parameters_of(model)
    region = kc.NormConstraint(1e-3)
    kc.NaturalGradient(model, "categorical", damping=1e-3, trust_region=region).step(x, y)
    assert float((parameters_of(model) - before).norm()) == pytest.approx(1e-3)


def test_what_scales_layers_one_by_one_is_refused():
    with pytest.raises(kc.ArgumentError, match=r"trust_region is Graft: expected kc\.KLClip\(max_kl\)"):
        kc.NaturalGradient(network(), "categorical", trust_region=kc.Graft("sgd"))
