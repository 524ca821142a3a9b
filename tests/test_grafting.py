"""Grafting: each layer's step as long as another method's, in its own direction."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.gradients import trust_region_scale
from kfac_cond.trust_region import LayerUpdate, as_trust_region

from .reference import assert_same
from .training import HostReads, batches, network, parameters_of, train, wrapped

MAGNITUDES = ["sgd", "adam", "adagrad"]


def plain_and_preconditioned(model: nn.Module, data: list, graft: kc.Graft | None) -> list[list[tuple[Tensor, Tensor]]]:
    """By step and layer, the plain and the preconditioned gradient as the layer's matrix; parameters stay."""
    kfac = kc.KFAC(model, "categorical", damping=0.1, trust_region=graft, data=kc.Data(seed=2))
    found = []
    for inputs, labels in data:
        model.zero_grad()
        outputs = model(inputs)
        kfac.update(outputs)
        nn.functional.cross_entropy(outputs, labels).backward()
        before = {name: p.grad.clone() for name, p in model.named_parameters()}
        kfac.precondition()
        after = {name: p.grad for name, p in model.named_parameters()}
        layouts = [layer.layout for layer in kfac.layers.values()]
        found.append([(one.to_matrix(before), one.to_matrix(after).clone()) for one in layouts])
    kfac.remove()
    return found


def norm_by_formula(magnitude: str, gradients: list[Tensor]) -> Tensor:
    """|m| at the last of some gradients."""
    g = gradients[-1]
    if magnitude == "sgd":
        return g.norm()
    if magnitude == "adagrad":
        return (g / (sum(one.square() for one in gradients).sqrt() + 1e-8)).norm()
    v, steps = torch.zeros_like(g), len(gradients)
    for one in gradients:
        v = 0.9 * v + 0.1 * one.square()
    return (g / ((v / (1 - 0.9**steps)).sqrt() + 1e-8)).norm()


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_the_norm_is_that_of_the_other_method_and_the_direction_its_own(magnitude):
    model, data = network(), batches(4)
    plain = plain_and_preconditioned(model, data, None)
    grafted = plain_and_preconditioned(model, data, kc.Graft(magnitude, beta=0.9))
    for layer in range(2):
        gradients = [step[layer][0] for step in plain]
        for step in range(4):
            direction, found = plain[step][layer][1], grafted[step][layer][1]
            wanted = norm_by_formula(magnitude, gradients[: step + 1])
            assert_same(found, direction * wanted / direction.norm())


def test_adam_s_norm_is_that_of_torch_without_momentum():
    """At a rate of one, torch's own step is m."""
    (step,) = plain_and_preconditioned(network(), batches(1), kc.Graft("adam"))
    weight = nn.Parameter(torch.zeros_like(step[0][0]))
    weight.grad = step[0][0].clone()
    torch.optim.Adam([weight], lr=1.0, betas=(0.0, 0.999)).step()
    assert_same(step[0][1].norm(), weight.detach().norm())


def test_an_update_that_is_zero_stays_so():
    zero = LayerUpdate(torch.zeros(2, 2), torch.zeros(2, 2), 0.1, "a")
    assert kc.Graft("sgd").scale([zero]) == [1.0]


def test_a_gradient_that_overflowed_does_not_stay():
    graft, fine = kc.Graft("adam"), torch.ones(2)
    graft.scale([LayerUpdate(fine, fine, 0.1, "a")])
    before = copy.deepcopy(graft.state_dict()["layers"]["a"])
    graft.scale([LayerUpdate(fine * torch.inf, fine, 0.1, "a")])
    after = graft.state_dict()["layers"]["a"]
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_gradient_scaler_changes_nothing():
    """A fused optimizer is handed scaled gradients: the norms are of those without."""
    scaled = {"a": LayerUpdate(torch.full((2,), 8.0), torch.full((2,), 8.0), 0.1, "a")}
    (factor,) = trust_region_scale(kc.Graft("adam", eps=1.0), scaled, torch.tensor(8.0))
    (expected,) = kc.Graft("adam", eps=1.0).scale([LayerUpdate(torch.ones(2), torch.ones(2), 0.1, "a")])
    assert_same(factor, expected)


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_it_reads_nothing(magnitude):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = kc.Schedule(factors=4, inverses=4)
    kfac, criterion = wrapped(model, optimizer, trust_region=kc.Graft(magnitude), schedule=schedule)
    train(model, criterion, optimizer, batches(1))
    with HostReads() as reads:
        train(model, criterion, optimizer, batches(2))
    assert reads.count == 0
    assert kfac.metrics()["kfac/trust_region_scale"].ndim == 0


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_a_resumed_run_is_the_same_to_the_last_bit(magnitude):
    data = batches(8)

    def made():
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        return model, optimizer, *wrapped(model, optimizer, trust_region=kc.Graft(magnitude))

    model, optimizer, kfac, criterion = made()
    train(model, criterion, optimizer, data[:3])
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(kfac.state_dict())
    train(model, criterion, optimizer, data[3:])
    again, optimizer, other, criterion = made()
    again.load_state_dict(weights)
    other.load_state_dict(state)
    train(again, criterion, optimizer, data[3:])
    assert torch.equal(parameters_of(again), parameters_of(model))


def test_a_state_of_another_magnitude_is_refused():
    one = kc.KFAC(network(), "categorical", trust_region=kc.Graft("adam"))
    other = kc.KFAC(network(), "categorical", trust_region=kc.Graft("sgd"))
    with pytest.raises(kc.StateError, match="a Graft of 'adam', this one is of 'sgd'"):
        other.load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("given", "message"),
    [({"magnitude": "lion"}, "expected one of sgd"), ({"beta": 1.0}, r"beta=1\.0"), ({"eps": 0.0}, r"eps=0\.0")],
)
def test_what_makes_no_graft_is_refused(given, message):
    with pytest.raises(kc.ArgumentError, match=message):
        kc.Graft(**given)


@pytest.mark.parametrize("saved", [True, False])
def test_a_state_with_and_without_one_do_not_mix(saved):
    with_one, without = (
        kc.KFAC(nn.Linear(3, 2), "categorical", trust_region=region) for region in (kc.Graft("adam"), None)
    )
    source, target = (with_one, without) if saved else (without, with_one)
    with pytest.raises(kc.StateError, match=r"trust region that keeps something .* give KFAC the trust_region"):
        target.load_state_dict(source.state_dict())


# -- and then bounded --------------------------------------------------------------------------------------------------


def updates(number: int = 2) -> tuple[list[LayerUpdate], list[Tensor]]:
    """Updates (F + damping)^-1 g, and the matrices F + damping."""
    found, matrices = [], []
    for index in range(number):
        root = torch.randn(6, 6)
        matrices.append(root @ root.mT + torch.eye(6))
        gradient = torch.randn(2, 3)
        update = torch.linalg.solve(matrices[-1], gradient.flatten()).reshape(2, 3)
        found.append(LayerUpdate(gradient, update, 0.1, str(index)))
    return found, matrices


@pytest.mark.parametrize("max_kl", [1e-4, 1e4])
def test_a_grafted_step_is_bounded_by_its_own_divergence(max_kl):
    """Whose grafting factors enter squared."""
    seen, matrices = updates()
    grafted = kc.Graft("sgd").scale(seen)
    steps = [0.1 * c * one.update.flatten() for c, one in zip(grafted, seen, strict=True)]
    divergence = sum(0.5 * step @ F @ step for F, step in zip(matrices, steps, strict=True))
    nu = (max_kl / divergence).sqrt().clamp(max=1.0)
    assert (nu < 1) == (max_kl < 1)
    for found, c in zip(as_trust_region([kc.Graft("sgd"), kc.KLClip(max_kl)]).scale(seen), grafted, strict=True):
        assert_same(found, nu * c)


def test_one_of_a_sequence_is_as_it_is_alone():
    seen, _ = updates()
    for one in (kc.KLClip(1e-4), kc.Graft("sgd")):
        alone = one.scale(seen)
        expected = [alone] * 2 if isinstance(alone, Tensor) else alone
        for found, factor in zip(as_trust_region((one,)).scale(seen), expected, strict=True):
            assert_same(found, factor)


def test_a_sequence_asks_for_rates_where_one_of_it_does():
    assert as_trust_region((kc.Graft(), kc.KLClip())).needs_rate
    assert not as_trust_region((kc.Graft(), kc.Graft())).needs_rate


@pytest.mark.parametrize("wrong", [(), (None,), (kc.Graft("sgd"), 1e-3), (kc.KLClip,)])
def test_a_sequence_is_of_trust_regions(wrong):
    with pytest.raises(kc.ArgumentError, match="trust_region is"):
        kc.KFAC(network(), "categorical", trust_region=wrong)


def both() -> tuple[kc.Graft, kc.KLClip]:
    return kc.Graft("adam"), kc.KLClip(1e-3)


def test_a_sequence_is_saved_with_the_run():
    model, data = network(), batches(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac, criterion = wrapped(model, optimizer, trust_region=both())
    for batch in data[:3]:
        train(model, criterion, optimizer, [batch])
    again = copy.deepcopy(model)
    state = kfac.state_dict()
    other = torch.optim.SGD(again.parameters(), lr=0.1)
    resumed, listened = wrapped(again, other, trust_region=both())
    resumed.load_state_dict(state)
    for batch in data[3:]:
        train(model, criterion, optimizer, [batch])
        train(again, listened, other, [batch])
    assert torch.equal(parameters_of(model), parameters_of(again))
    turned, _ = wrapped(network(), trust_region=both()[::-1])
    with pytest.raises(kc.StateError, match="another sequence of trust regions"):
        turned.load_state_dict(state)
