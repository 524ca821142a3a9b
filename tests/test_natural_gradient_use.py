"""The self-tuning natural gradient in use: ways to call it, likelihoods, invariance, resume, arguments."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .reference import assert_same
from .test_natural_gradient import FIXED, PRECISE, WORDS, classes
from .training import HostReads, network, parameters_of

# -- ways to call it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", WORDS)
def test_a_closure_is_the_same_step(word):
    x, y = torch.randn(20, 3), torch.randint(2, (20,))
    criterion, found = nn.CrossEntropyLoss(), []
    for way in ("inputs", "closure"):
        torch.manual_seed(1)
        model = network()
        optimizer = kc.NaturalGradient(model, criterion, direction=word, l2=0.01)

        def closure(model=model, optimizer=optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            return loss

        for _ in range(4):
            loss = optimizer.step(x, y) if way == "inputs" else optimizer.step(closure)
        found.append((loss, parameters_of(model)))
    assert_same(found[1][0], found[0][0])
    assert_same(found[1][1], found[0][1])


def test_a_closure_that_calls_the_model_twice_is_refused():
    model, x, y = classes()
    optimizer, before = kc.NaturalGradient(model, "categorical"), parameters_of(model)

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(model(x[:5]), y[:5]) + nn.functional.cross_entropy(model(x[5:]), y[5:])
        loss.backward()
        return loss

    with pytest.raises(kc.CaptureError, match=r"called Sequential 2 times .*step\(inputs, targets\)"):
        optimizer.step(closure)
    assert torch.equal(parameters_of(model), before)


def test_a_closure_that_hands_other_outputs_to_the_criterion_is_refused():
    model, x, y = classes()
    criterion = nn.CrossEntropyLoss()
    optimizer = kc.NaturalGradient(model, criterion)
    with pytest.raises(kc.CaptureError, match="another tensor than the model returned"):
        optimizer.step(lambda: criterion(2 * model(x), y))


def test_a_closure_that_returns_nothing_is_refused():
    model, x, _ = classes()
    with pytest.raises(kc.ArgumentError, match=r"closure returned .*expected the loss"):
        kc.NaturalGradient(model, "categorical").step(lambda: model(x))


def test_a_mapping_of_keyword_arguments_is_the_call():
    class Keyed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, *, features: Tensor) -> Tensor:
            return self.inner(features)

    model, (_, x, y) = Keyed(), classes()
    optimizer = kc.NaturalGradient(model, "categorical")
    losses = [float(optimizer.step({"features": x}, y)) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_gradients_and_hooks_of_others_are_left_alone():
    model, x, y = classes()
    marks = [torch.randn_like(p) for p in model.parameters()]
    for p, mark in zip(model.parameters(), marks, strict=True):
        p.grad = mark
    optimizer = kc.NaturalGradient(model, "categorical")
    optimizer.step(x, y)
    assert all(p.grad is mark for p, mark in zip(model.parameters(), marks, strict=True))
    optimizer.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("likelihood", "labels"),
    [
        (kc.Gaussian(0.3), torch.zeros(20, 4, dtype=torch.float64)),
        (kc.Bernoulli(), torch.ones(20, 4, dtype=torch.float64)),
        (kc.HeteroscedasticGaussian(), torch.zeros(20, 2, dtype=torch.float64)),
        (kc.Poisson(), torch.ones(20, 4, dtype=torch.float64)),
        (nn.MSELoss(), torch.zeros(20, 4, dtype=torch.float64)),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)), torch.arange(20) % 4),
    ],
    ids=["gaussian", "bernoulli", "predicted variance", "poisson", "mse", "weighted classes"],
)
def test_many_likelihoods(likelihood, labels):
    model, x = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)), torch.randn(20, 3)
    optimizer = kc.NaturalGradient(model, likelihood)
    losses = [float(optimizer.step(x, labels)) for _ in range(10)]
    assert losses[-1] < losses[0]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(losses))


def test_what_the_preconditioner_leaves_out_has_a_rate_of_its_own():
    model, x, y = classes()
    direction = kc.Direction(rules={"0": {"exclude": True}})
    optimizer = kc.NaturalGradient(model, "categorical", direction=direction)
    start = parameters_of(model)
    losses = [float(optimizer.step(x, y)) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert ((parameters_of(model) - start) != 0).all()


def test_burn_in_takes_factors_in_and_moves_nothing():
    model, x, y = classes()
    optimizer = kc.NaturalGradient(model, "categorical", direction=kc.Direction(burn_in=2))
    before = parameters_of(model)
    for _ in range(2):
        optimizer.step(x, y)
        assert torch.equal(parameters_of(model), before)
    assert optimizer._kfac.fisher()["0"].A.shape == (4, 4)
    # Trials of lambda are left for where parameters may move.
    assert not optimizer._steps.calibrated
    optimizer.step(x, y)
    assert optimizer._steps.calibrated
    assert not torch.equal(parameters_of(model), before)


# -- invariance, resume, reads --------------------------------------------------------------------------------------


class Mapped(nn.Module):
    """A linear layer of inputs a = P x + p."""

    def __init__(self, layer: nn.Linear, P: Tensor, p: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(*layer.weight.shape[::-1])
        self.register_buffer("P", P)
        self.register_buffer("p", p)
        with torch.no_grad():
            self.layer.weight.copy_(layer.weight @ torch.linalg.inv(P))
            self.layer.bias.copy_(layer.bias - self.layer.weight @ p)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x @ self.P.mT + self.p)


@pytest.mark.parametrize("word", ["kfac", "exact"])
def test_steps_are_the_same_function_in_affinely_mapped_inputs(word):
    x, y = torch.randn(60, 3), torch.randn(60, 2)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    P, p = torch.randn(3, 3) + 3 * torch.eye(3), torch.randn(3)
    mapped = nn.Sequential(Mapped(plain[0], P, p), *map(copy.deepcopy, plain[1:]))
    outputs = []
    for model in (plain, mapped):
        optimizer = kc.NaturalGradient(
            model,
            kc.Gaussian(),
            direction=kc.Direction(word, iteration=PRECISE),
            damping=kc.LevenbergMarquardt(0.0, **FIXED),
            schedule=kc.Schedule(factors=1, inverses=1),
            data=kc.Data(seed=5),
        )
        for _ in range(3):
            optimizer.step(x, y)
        outputs.append(model(x).detach())
    assert_same(outputs[1], outputs[0], tolerance=1e-8)


@pytest.mark.parametrize("word", [*WORDS, "searched"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(word, tmp_path):
    torch.manual_seed(2)
    data = [(torch.randn(20, 3), torch.randint(2, (20,))) for _ in range(9)]

    def made() -> tuple[nn.Module, kc.NaturalGradient]:
        torch.manual_seed(1)
        model = network()
        direction = kc.Direction(factor_damping=kc.FactorDamping(3)) if word == "searched" else word
        return model, kc.NaturalGradient(model, nn.CrossEntropyLoss(), direction=direction, l2=1e-4)

    model, optimizer = made()
    for index, (x, y) in enumerate(data):
        if index == 4:
            kc.save_checkpoint(tmp_path / "run.pt", model=model, optimizer=optimizer)
        optimizer.step(x, y)
    saved = kc.load_checkpoint(tmp_path / "run.pt")
    resumed, again = made()
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    for x, y in data[4:]:
        again.step(x, y)
    assert torch.equal(parameters_of(resumed), parameters_of(model))
    assert str(again.metrics()) == str(optimizer.metrics())


def test_a_state_of_another_direction_is_refused():
    model, x, y = classes()
    optimizer = kc.NaturalGradient(model, "categorical")
    optimizer.step(x, y)
    saved = optimizer.state_dict()
    optimizer.remove()
    other = kc.NaturalGradient(model, "categorical", direction="ekfac")
    with pytest.raises(kc.StateError, match=r"of direction 'kfac' .*this one of 'ekfac'"):
        other.load_state_dict(saved)
    with pytest.raises(kc.StateError, match="not a NaturalGradient state"):
        other.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())


def test_the_host_reads_once_a_step_where_nothing_is_inverted():
    """Two losses and what was predicted, in one transfer; a list of numbers on the CPU is no dispatched read."""
    model, x, y = classes()
    optimizer = kc.NaturalGradient(model, "categorical", damping=1.0)
    optimizer.step(x, y)
    with HostReads() as reads:
        optimizer.step(x, y)
    assert reads.count <= 1


# -- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"direction": "newton"}, "direction='newton': expected one of kfac"),
        ({"direction": 3}, r"direction is 3: expected a word, or kc\.Direction"),
        ({"damping": -1.0}, r"damping is -1\.0: expected a number to start from"),
        ({"damping": kc.Damping(1.0)}, r"damping is Damping: expected .*kc\.LevenbergMarquardt"),
        ({"l2": -0.1}, r"l2=-0\.1: expected a finite number >= 0"),
        ({"schedule": 5}, r"schedule is 5: expected kc\.Schedule"),
        ({"trust_region": 1e-3}, r"trust_region is 0\.001: expected kc\.KLClip"),
    ],
)
def test_arguments_out_of_range_are_refused_and_nothing_stays_on_the_model(arguments, match):
    model = network()
    with pytest.raises(kc.ArgumentError, match=match):
        kc.NaturalGradient(model, "categorical", **arguments)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"share": 0.0}, r"Direction\(share=0\.0\)"),
        ({"burn_in": -1}, r"Direction\(burn_in=-1\)"),
        ({"factor_damping": 0.1}, r"Direction\(factor_damping=0\.1\)"),
        ({"iteration": 10}, r"Direction\(iteration=10\)"),
    ],
)
def test_settings_of_a_direction_out_of_range_are_refused(arguments, match):
    with pytest.raises(kc.ArgumentError, match=match):
        kc.Direction(**arguments)


@pytest.mark.parametrize("likelihood", [nn.CrossEntropyLoss(), kc.Categorical()])
def test_a_loss_without_targets_is_refused(likelihood):
    model, x, _ = classes()
    with pytest.raises(kc.LikelihoodError, match=r"no targets for .*call step\(inputs, targets\)"):
        kc.NaturalGradient(model, likelihood).step(x)


def test_autocast_is_refused():
    model, x, y = classes()
    optimizer = kc.NaturalGradient(model, "categorical")
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(kc.ArgumentError, match="under autocast on cpu"):
        optimizer.step(x, y)
    optimizer.step(x, y)


def test_several_ranks_are_refused(monkeypatch):
    monkeypatch.setattr(kc.Plan, "world", property(lambda self: 2))
    model = network()
    with pytest.raises(kc.CoverageError, match=r"NaturalGradient of Sequential on several ranks.*kc\.KFAC"):
        kc.NaturalGradient(model, "categorical")
    assert not any(module._forward_hooks for module in model.modules())


def test_a_second_parameter_group_is_refused():
    optimizer = kc.NaturalGradient(network(), "categorical")
    with pytest.raises(kc.ArgumentError, match="one parameter group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


def test_a_model_is_wrapped_once():
    model = network()
    optimizer = kc.NaturalGradient(model, "categorical")
    with pytest.raises(kc.AttachError, match="already wrapped"):
        kc.NaturalGradient(model, "categorical")
    optimizer.remove()
    kc.NaturalGradient(model, "categorical")


def test_l2_may_change_between_steps():
    model, x, y = classes()
    optimizer = kc.NaturalGradient(model, "categorical", damping=1.0)
    optimizer.param_groups[0]["l2"] = 0.5
    squares = sum(p.square().sum() for p in model.parameters()).detach()
    expected = nn.functional.cross_entropy(model(x), y).detach() + 0.25 * squares
    assert_same(optimizer.step(x, y), expected)
