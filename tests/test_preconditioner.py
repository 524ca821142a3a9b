"""One step against its formula, the moving average and the schedule, changed models, and what it says of itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .reference import assert_same
from .training import (
    EVERY_STEP,
    HostReads,
    backward_of,
    batches,
    convolutional,
    expected_updates,
    factors_of_draws,
    found_updates,
    gradients_of,
    network,
    parameters_of,
    train,
    wrapped,
)


def mean_eigenvalue(A: Tensor, G: Tensor) -> float:
    return (A.trace() / A.shape[0] * G.trace() / G.shape[0]).item()


DAMPINGS = {
    "number": (0.03, {}, lambda name, A, G: 0.03),
    "callable": (lambda step: 0.05 / (step + 1), {}, lambda name, A, G: 0.05),
    "relative": (kc.Damping(0.2, relative=True), {}, lambda name, A, G: 0.2 * mean_eigenvalue(A, G)),
    "floor": (kc.Damping(0.2, relative=True, floor=3.0), {}, lambda name, A, G: 3.0),
    "layer": (0.03, {"0": {"damping": 0.4}}, lambda name, A, G: 0.4 if name == "0" else 0.03),
}


def with_rule(damping, rule: str) -> kc.Damping:
    if isinstance(damping, kc.Damping):
        return kc.Damping(damping.value, rule=rule, relative=damping.relative, floor=damping.floor)
    return kc.Damping(damping, rule=rule)


@pytest.mark.parametrize("rule", ["factored", "exact"])
@pytest.mark.parametrize("case", DAMPINGS)
@pytest.mark.parametrize("layer", ["0", "2", "4"])
def test_a_step_is_the_formula(rule, case, layer):
    damping, rules, number = DAMPINGS[case]
    model, inputs, labels = convolutional(), torch.randn(5, 2, 5, 5), torch.randint(3, (5,))
    draws = [torch.randint(3, (5,)) for _ in range(2)]
    kfac = kc.KFAC(model, "categorical", damping=with_rule(damping, rule), rules=rules, schedule=EVERY_STEP)
    plain = backward_of(kfac, model, inputs, labels, draws)
    kfac.precondition()
    factors = factors_of_draws(model, inputs, draws, divisor=5)
    expected = expected_updates(model, factors, plain, damping=number, rule=rule)
    assert_same(found_updates(model, [layer])[layer], expected[layer])


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_step_with_a_part_frozen_is_the_formula_without_it(frozen):
    model, (inputs, labels) = network(), batches(1)[0]
    getattr(model[0], frozen).requires_grad_(False)
    draws = [torch.randint(2, (8,))]
    kfac = kc.KFAC(model, "categorical", damping=0.1, schedule=EVERY_STEP)
    plain = backward_of(kfac, model, inputs, labels, draws)
    kfac.precondition()
    factors = factors_of_draws(model, inputs, draws, divisor=8)
    expected = expected_updates(model, factors, plain, damping=lambda *_: 0.1, rule="factored")
    assert_same(found_updates(model, ["0"])["0"], expected["0"])


@pytest.mark.parametrize("decay", [0.0, 0.7, lambda step: 0.1 * (step + 1)], ids=["none", "number", "callable"])
@pytest.mark.parametrize("layer", ["0", "2"])
def test_the_average_over_captures_is_bias_corrected(decay, layer):
    model, rho = network(), decay if callable(decay) else (lambda step: decay)
    kfac = kc.KFAC(model, "categorical", schedule=kc.Schedule(factors=1, inverses=1, decay=decay))
    sums, weight = [0.0, 0.0], 0.0
    for step, (inputs, labels) in enumerate(batches(3)):
        draws = [torch.randint(2, (8,))]
        backward_of(kfac, model, inputs, labels, draws)
        kfac.precondition()
        factors = factors_of_draws(model, inputs, draws, divisor=8)[layer]
        sums = [rho(step) * before + new[0] for before, new in zip(sums, factors, strict=True)]
        weight = rho(step) * weight + 1
    assert_same(kfac.fisher()[layer].A, sums[0] / weight)
    assert_same(kfac.fisher()[layer].G, sums[1] / weight)


def test_between_refreshes_the_inverses_stay():
    model, data = network(), batches(4)
    kfac = kc.KFAC(model, "categorical", damping=0.1, schedule=kc.Schedule(factors=1, inverses=3))
    drawn = torch.randint(2, (8,))
    first = factors_of_draws(model, data[0][0], [drawn], divisor=8)
    for inputs, labels in data[:3]:
        plain = backward_of(kfac, model, inputs, labels, [drawn])
        kfac.precondition()
    expected = expected_updates(model, first, plain, damping=lambda *_: 0.1, rule="factored")
    assert_same(found_updates(model, ["2"])["2"], expected["2"])


def test_at_a_refresh_the_inverses_follow():
    model, data = network(), batches(4)
    kfac = kc.KFAC(model, "categorical", damping=0.1, schedule=kc.Schedule(factors=1, inverses=3, decay=0.0))
    for inputs, labels in data:
        drawn = torch.randint(2, (8,))
        plain = backward_of(kfac, model, inputs, labels, [drawn])
        kfac.precondition()
    last = factors_of_draws(model, data[3][0], [drawn], divisor=8)
    expected = expected_updates(model, last, plain, damping=lambda *_: 0.1, rule="factored")
    assert_same(found_updates(model, ["2"])["2"], expected["2"])


def captured_steps(schedule: kc.Schedule, steps: int) -> list[int]:
    """The steps at which the average takes something in."""
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion, schedule=schedule)
    kfac.attach(optimizer)
    captured = []
    for step, batch in enumerate(batches(steps)):
        before = dict(kfac.state_dict()["layers"])["0"]["average"].get("A")
        train(model, criterion, optimizer, [batch])
        after = dict(kfac.state_dict()["layers"])["0"]["average"].get("A")
        if after is not before and (before is None or not torch.equal(before, after)):
            captured.append(step)
    return captured


@pytest.mark.parametrize(
    ("factors", "expected"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (None, []), (lambda step: step in (1, 2), [1, 2])]
)
def test_factors_are_captured_when_they_are_due(factors, expected):
    assert captured_steps(kc.Schedule(factors=factors, inverses=1), 5) == expected


# -- nothing half-changed -------------------------------------------------------------------------------------------


def test_an_invalid_gradient_of_the_last_layer_leaves_the_first_untouched():
    model, (inputs, labels) = network(), batches(1)[0]
    kfac = kc.KFAC(model, "categorical")
    plain = backward_of(kfac, model, inputs, labels)
    model[2].weight.grad = model[2].weight.grad.to_sparse()
    with pytest.raises(kc.ArgumentError, match=r"2\.weight.*sparse"):
        kfac.precondition()
    assert torch.equal(model[0].weight.grad, plain["0.weight"])


def test_an_update_that_fails_midway_leaves_the_first_layer_untouched():
    model, data = network(), batches(2)
    kfac = kc.KFAC(model, "categorical")
    backward_of(kfac, model, *data[0])
    kfac.precondition()
    plain = backward_of(kfac, model, *data[1])
    inverses = kfac._shared.factors.inverses
    inverses["2"] = inverses["0"]
    with pytest.raises(kc.ArgumentError):
        kfac.precondition()
    assert torch.equal(model[0].weight.grad, plain["0.weight"])


@pytest.mark.parametrize("change", ["unfrozen", "frozen", "resized"])
def test_a_changed_layer_is_named_with_refresh_and_nothing_is_written(change):
    model, data = network(), batches(2)
    if change == "unfrozen":
        model[2].bias.requires_grad_(False)
    kfac = kc.KFAC(model, "categorical")
    backward_of(kfac, model, *data[0])
    kfac.precondition()
    model.zero_grad()
    nn.functional.cross_entropy(model(data[1][0]), data[1][1]).backward()
    if change == "resized":
        model[2].weight = nn.Parameter(torch.randn(5, 4))
        model[2].weight.grad = torch.randn(5, 4)
    else:
        model[2].bias.requires_grad_(change == "unfrozen")
    plain = gradients_of(model)
    with pytest.raises(kc.ModelChangedError, match=r"layer '2'.*kfac\.refresh\(\)"):
        kfac.precondition()
    assert torch.equal(model[0].weight.grad, plain["0.weight"])
    assert kfac.step == 1


@pytest.mark.parametrize("kept", ["0", "2"])
def test_refresh_keeps_what_still_fits(kept):
    model, data = network(), batches(1)
    kfac = kc.KFAC(model, "categorical")
    backward_of(kfac, model, *data[0])
    kfac.precondition()
    before = kfac.fisher()[kept].A
    changed = "2" if kept == "0" else "0"
    model.get_submodule(changed).bias.requires_grad_(False)
    kfac.refresh()
    assert list(kfac.fisher()) == [kept]
    assert torch.equal(kfac.fisher()[kept].A, before)


def test_a_new_head_is_preconditioned_from_its_first_capture_on():
    model, data = network(), batches(3)
    kfac = kc.KFAC(model, "categorical", damping=0.1, schedule=kc.Schedule(factors=2, inverses=100, decay=0.0))
    backward_of(kfac, model, *data[0])
    kfac.precondition()
    model[2] = nn.Linear(4, 5)
    kfac.refresh()
    backward_of(kfac, model, *data[1])
    kfac.precondition()
    drawn = torch.randint(5, (8,))
    plain = backward_of(kfac, model, *data[2], draws=drawn)
    kfac.precondition()
    factors = factors_of_draws(model, data[2][0], [drawn], divisor=8)
    expected = expected_updates(model, factors, plain, damping=lambda *_: 0.1, rule="factored")
    assert_same(found_updates(model, ["2"])["2"], expected["2"])


# -- dtypes, gradients that are not there ---------------------------------------------------------------------------


def test_a_bfloat16_model_has_float32_factors_and_its_own_gradients():
    model = network().to(torch.bfloat16)
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion)
    kfac.attach(optimizer)
    train(model, criterion, optimizer, [(inputs.bfloat16(), labels) for inputs, labels in batches(2)])
    assert kfac.fisher()["0"].dtype == torch.float32
    assert model[0].weight.grad.dtype == torch.bfloat16
    assert torch.isfinite(parameters_of(model)).all()


@pytest.mark.parametrize("rule", ["factored", "exact"])
def test_a_step_within_autocast_is_in_full_precision(rule):
    found = []
    for autocast in (False, True):
        torch.manual_seed(0)
        model, (inputs, labels) = network().float(), batches(1)[0]
        kfac = kc.KFAC(model, "categorical", damping=kc.Damping(0.1, rule=rule), trust_region=kc.KLClip(1e-3))
        backward_of(kfac, model, inputs.float(), labels, torch.zeros(8, dtype=torch.long))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            kfac.precondition(lr=0.1)
        found.append(model[0].weight.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_the_state_follows_a_change_of_dtype(before, after):
    model = network().to(before)
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion, schedule=kc.Schedule(factors=2, inverses=2))
    kfac.attach(optimizer)
    train(model, criterion, optimizer, [(inputs.to(before), labels) for inputs, labels in batches(1)])
    model.to(after)
    train(model, criterion, optimizer, [(inputs.to(after), labels) for inputs, labels in batches(2)])
    assert kfac.fisher()["0"].dtype == after
    assert model[0].weight.grad.dtype == after


def test_between_refreshes_the_inverses_follow_a_change_of_dtype():
    model = network().float()
    kfac, criterion = wrapped(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.1), schedule=kc.Schedule())
    train(model, criterion, optimizer, [(inputs.float(), labels) for inputs, labels in batches(1)])
    model.double()
    train(model, criterion, optimizer, batches(1))
    assert dict(kfac.state_dict()["layers"])["0"]["inverse"]["A"].dtype == torch.float64


def test_a_missing_bias_gradient_counts_as_zero():
    model, (inputs, labels) = network(), batches(1)[0]
    kfac = kc.KFAC(model, "categorical", damping=0.1)
    drawn = torch.randint(2, (8,))
    plain = backward_of(kfac, model, inputs, labels, drawn)
    model[0].bias.grad = None
    kfac.precondition()
    factors = factors_of_draws(model, inputs, [drawn], divisor=8)
    plain["0.bias"] = torch.zeros(4)
    expected = expected_updates(model, factors, plain, damping=lambda *_: 0.1, rule="factored")
    assert_same(model[0].weight.grad, expected["0"][0, :, :-1])
    assert model[0].bias.grad is None


def test_a_layer_without_gradients_is_left_out():
    model, (inputs, labels) = network(), batches(1)[0]
    kfac = kc.KFAC(model, "categorical")
    backward_of(kfac, model, inputs, labels)
    model[0].weight.grad = model[0].bias.grad = None
    kfac.precondition()
    assert model[0].weight.grad is None


def test_zero_gradients_stay_zero():
    model, (inputs, labels) = network(), batches(1)[0]
    kfac = kc.KFAC(model, "categorical", trust_region=kc.KLClip(1e-3))
    backward_of(kfac, model, inputs, labels)
    model.zero_grad(set_to_none=False)
    kfac.precondition(lr=0.1)
    assert torch.equal(model[0].weight.grad, torch.zeros(4, 3))


def test_excluded_parameters_keep_their_gradient():
    model, (inputs, labels) = nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 2)), batches(1)[0]
    kfac = kc.KFAC(model, "categorical", rules={"1": {"exclude": True}})
    plain = backward_of(kfac, model, inputs, labels)
    kfac.precondition()
    assert torch.equal(model[1].weight.grad, plain["1.weight"])


# -- what it says ---------------------------------------------------------------------------------------------------


def test_metrics_are_flat_and_named():
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion, trust_region=kc.KLClip(1e-3))
    kfac.attach(optimizer)
    train(model, criterion, optimizer, batches(2))
    assert set(kfac.metrics()) == {
        "kfac/step",
        "kfac/damping",
        "kfac/skipped_captures",
        "kfac/failed_layers",
        "kfac/unsettled_layers",
        "kfac/plain_layers",
        "kfac/trust_region_scale",
    }
    assert kfac.metrics()["kfac/step"] == 2


def test_metrics_do_not_wait_for_the_device():
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion, trust_region=kc.KLClip(1e-3))
    kfac.attach(optimizer)
    train(model, criterion, optimizer, batches(2))
    with HostReads() as reads:
        kfac.metrics()
    assert reads.count == 0


STAGES = {
    "fresh": (0, "step 0, not attached to an optimizer\n  factors of 0, inverses of 0 of 2 layers"),
    "attached": (1, "step 0, attached to 1 optimizer\n"),
    "training": (2, "step 3, attached to 1 optimizer\n  factors of 2, inverses of 2 of 2 layers; 0 captures left out"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_print_shows_the_state(stage):
    reached, expected = STAGES[stage]
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion)
    if reached >= 1:
        kfac.attach(optimizer)
    train(model, criterion, optimizer, batches(3) if reached == 2 else [])
    assert expected in str(kfac)
    assert "heard at the calls of CrossEntropyLoss" in str(kfac)


@pytest.mark.parametrize("when", ["before any step", "after a batch without a valid term"])
def test_the_fisher_before_any_factors_is_refused(when):
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion)
    kfac.attach(optimizer)
    if when != "before any step":
        ignored = torch.full((4,), -100)
        optimizer.zero_grad()
        criterion(model(torch.randn(4, 3)), ignored).nan_to_num().backward()
        optimizer.step()
    with pytest.raises(kc.NotReadyError, match="no factors yet"):
        kfac.fisher()
