"""The KL clip: its formula with the one half, and the KL that a clipped step really makes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.trust_region import LayerUpdate, measures_layers

from .reference import assert_same
from .training import HostReads, batches, network, train


def updates_of(*, rate: float | Tensor = 0.5) -> list[LayerUpdate]:
    """Two layers with a positive definite relation between gradient and update."""
    gradients = [torch.randn(3, 4), torch.randn(2, 3, 3)]
    return [LayerUpdate(g, 2 * g, rate) for g in gradients]


def product_of(updates: list[LayerUpdate]) -> Tensor:
    return sum((one.rate**2 * (one.gradient * one.update).sum() for one in updates), torch.zeros(()))


@pytest.mark.parametrize("max_kl", [1e-6, 1e-3, 0.1])
def test_nu_is_the_formula_with_the_half(max_kl):
    updates = updates_of()
    assert_same(kc.KLClip(max_kl).scale(updates), (2 * max_kl / product_of(updates)).sqrt())


def test_nu_is_never_more_than_one():
    assert kc.KLClip(1e6).scale(updates_of()) == 1


@pytest.mark.parametrize("sign", [0.0, -1.0], ids=["zero", "negative"])
def test_a_sum_that_is_not_positive_shortens_nothing(sign):
    updates = [LayerUpdate(one.gradient, sign * one.update, 0.5) for one in updates_of()]
    assert kc.KLClip(1e-3).scale(updates) == 1


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_rate_gives_a_0d_factor(shape):
    updates = updates_of(rate=torch.full(shape, 0.5))
    found = kc.KLClip(1e-3).scale(updates)
    assert found.shape == ()
    assert_same(found, (2e-3 / (0.25 * sum((u.gradient * u.update).sum() for u in updates))).sqrt())


def test_layers_have_rates_of_their_own():
    first, second = updates_of()
    updates = [first, LayerUpdate(second.gradient, second.update, 0.01)]
    assert_same(kc.KLClip(1e-3).scale(updates), (2e-3 / product_of(updates)).sqrt())


def test_no_host_read():
    updates = updates_of()
    with HostReads() as reads:
        kc.KLClip(1e-3).scale(updates)
    assert reads.count == 0


def test_it_runs_on_the_meta_device():
    updates = [LayerUpdate(torch.empty(3, 4, device="meta"), torch.empty(3, 4, device="meta"), 0.5)]
    assert kc.KLClip(1e-3).scale(updates).shape == ()


@pytest.mark.parametrize("max_kl", [0.0, -1.0, float("nan"), "a", None, True])
def test_a_bound_that_is_not_positive_is_refused(max_kl):
    with pytest.raises(kc.ArgumentError, match=r"KLClip\(max_kl="):
        kc.KLClip(max_kl)


# -- in a step ------------------------------------------------------------------------------------------------------


def gaussian_step(max_kl: float, *, damping: float, rate: float = 0.3) -> float:
    """The measured KL per loss term of one step of a linear Gaussian model, for which K-FAC is the exact Fisher."""
    model, inputs = nn.Linear(3, 2), torch.randn(20, 3)
    before = copy.deepcopy(model)
    clip = kc.KLClip(max_kl)
    kfac = kc.KFAC(model, kc.Gaussian(1.0), damping=damping, trust_region=clip)
    outputs = model(inputs)
    # One draw along each output: their scores average to the identity.
    columns = math.sqrt(2) * torch.eye(2)
    kfac.update(outputs, draws=[outputs.detach() + column for column in columns])
    (0.5 * (outputs - 100 * torch.randn(20, 2)).square().sum(1)).mean().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    kfac.precondition(lr=rate)
    optimizer.step()
    return (kc.Gaussian(1.0).kl(before(inputs), model(inputs)) / 20).item()


@pytest.mark.parametrize("max_kl", [1e-4, 1e-2, 1.0])
def test_a_clipped_step_makes_the_kl_that_was_allowed(max_kl):
    """The Fisher is exact and the KL quadratic: the ratio is 1, not 2 and not 1/2."""
    assert gaussian_step(max_kl, damping=0.0) / max_kl == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_a_damped_step_stays_below(damping):
    assert gaussian_step(1e-2, damping=damping) < 1e-2


@pytest.mark.parametrize("max_kl", [1e-6, 1e-4])
def test_a_small_step_of_a_network_makes_about_that_kl(max_kl):
    """One example and many draws: a layer's block is near the exact one, and layers add up to more than their sum."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    model[2].requires_grad_(False)
    inputs = torch.randn(1, 3)
    kfac = kc.KFAC(model, kc.Gaussian(1.0), damping=1e-8, trust_region=kc.KLClip(max_kl))
    outputs = model(inputs)
    columns = math.sqrt(3) * torch.eye(3)
    kfac.update(outputs, draws=[outputs.detach() + column for column in columns])
    before = outputs.detach()
    (100 * outputs.sum()).backward()
    kfac.precondition(lr=1.0)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    ratio = kc.Gaussian(1.0).kl(before, model(inputs)).item() / max_kl
    assert 0.9 < ratio < 1.1, f"ratio {ratio}"


def test_the_factor_is_a_0d_tensor_among_the_metrics():
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    kfac = kc.KFAC(model, criterion, trust_region=kc.KLClip(1e-4))
    kfac.attach(optimizer)
    train(model, criterion, optimizer, batches(1))
    scale = kfac.metrics()["kfac/trust_region_scale"]
    assert scale.shape == ()
    assert 0 < scale < 1


def test_one_factor_multiplies_all_layers():
    model, (inputs, labels) = network(), batches(1)[0]
    other = copy.deepcopy(model)
    found = []
    for one, clip in ((model, None), (other, kc.KLClip(1e-5))):
        kfac = kc.KFAC(one, "categorical", trust_region=clip, data=kc.Data(seed=1))
        outputs = one(inputs)
        kfac.update(outputs)
        nn.functional.cross_entropy(outputs, labels).backward()
        kfac.precondition(lr=0.1)
        found.append(torch.cat([p.grad.flatten() for p in one.parameters()]))
    assert_same(found[1], found[0] * kfac.metrics()["kfac/trust_region_scale"])


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (1e-3, r"trust_region is 0\.001: pass kc\.KLClip\(0\.001\)"),
        (1, r"pass kc\.KLClip\(1\)"),
        ("kl", r"trust_region is 'kl': expected kc\.KLClip"),
        (True, r"trust_region is True: expected kc\.KLClip"),
        (kc.KLClip, "the class KLClip"),
    ],
)
def test_what_is_no_trust_region_is_refused(value, match):
    with pytest.raises(kc.ArgumentError, match=match):
        kc.KFAC(network(), "categorical", trust_region=value)


def test_any_object_with_scale_is_a_trust_region():
    class Half:
        def scale(self, updates: object) -> Tensor:
            return torch.tensor(0.5)

    half = Half()
    assert kc.KFAC(network(), "categorical", trust_region=half).trust_region is half


class Halving(kc.KLClip):
    def scale(self, updates):
        return 0.5 * super().scale(updates)


class Doubling(kc.KLClip):
    def factors(self, numbers):
        return 2 * super().factors(numbers)


class OfItsOwn:
    def scale(self, updates):
        return torch.ones(())


@pytest.mark.parametrize(
    ("trust_region", "expected"),
    [
        (None, True),
        (kc.KLClip(1e-3), True),
        (kc.Graft("sgd"), True),
        (kc.Graft("adam"), False),
        (Halving(1e-3), False),
        (Doubling(1e-3), True),
        (OfItsOwn(), False),
    ],
)
def test_a_number_of_each_layer_is_enough_where_scale_is_made_of_them(trust_region, expected):
    assert measures_layers(trust_region) is expected


# -- the length of a step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [1e-3, 0.1])
def test_a_constrained_update_has_the_length_that_is_allowed(max_norm):
    updates = updates_of()
    nu = kc.NormConstraint(max_norm).scale(updates)
    squares = sum(((nu * one.rate * one.update) ** 2).sum() for one in updates)
    assert_same(torch.as_tensor(squares).sqrt(), torch.tensor(max_norm))


def test_a_length_that_is_allowed_shortens_nothing():
    assert kc.NormConstraint(1e6).scale(updates_of()) == 1
    assert kc.NormConstraint(1.0).scale([LayerUpdate(torch.zeros(2, 2), torch.zeros(2, 2), 0.5)]) == 1


def test_a_step_of_sgd_has_the_length_that_is_allowed():
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    kc.KFAC(model, criterion, trust_region=kc.NormConstraint(1e-3)).attach(optimizer)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    train(model, criterion, optimizer, batches(1))
    after = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert float((after - before).norm()) == pytest.approx(1e-3)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan"), "a", True])
def test_a_length_that_is_not_positive_is_refused(max_norm):
    with pytest.raises(kc.ArgumentError, match=r"NormConstraint\(max_norm="):
        kc.NormConstraint(max_norm)


@pytest.mark.parametrize("region", [kc.KLClip(0.02), kc.NormConstraint(0.2)])
def test_a_whole_step_is_bounded_from_its_two_numbers(region):
    assert_same(region.bound(torch.tensor(0.16), torch.tensor(0.16)), torch.tensor(0.5))
    assert region.bound(torch.tensor(0.0), torch.tensor(0.0)) == 1
