"""Damping that follows the reduction ratio, and the preconditioner's own; beside kc.KFAC too."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import kfac_cond as kc
from kfac_cond.adaptive import UP, calibrated

from .training import EVERY_STEP, batches, network, parameters_of

OMEGA = 0.95**5


@pytest.mark.parametrize(
    ("ratio", "factor"),
    [
        (0.76, OMEGA),
        (5.0, OMEGA),
        (0.75, 1.0),
        (0.25, 1.0),
        (0.24, 1 / OMEGA),
        (-3.0, 1 / OMEGA),
        (math.nan, 1 / OMEGA),
    ],
)
def test_lambda_follows_the_ratio(ratio, factor):
    rule = kc.LevenbergMarquardt(2.0)
    rule.update(ratio)
    assert rule.value == pytest.approx(2.0 * factor)


@pytest.mark.parametrize(("added", "free"), [(2.0, False), (0.0, False), (-0.24, False), (-0.26, True), (-2.0, True)])
def test_lambda_falls_to_a_thousandth_where_the_next_batch_gains_little(added, free):
    rule = kc.LevenbergMarquardt(2.0)
    for _ in range(60):
        rule.saw(added / 2, -0.5)
        rule.saw(added / 2, -0.5)
        rule.saw(math.nan, -1.0)
        rule.update(1.0)
    assert rule.value == pytest.approx(2.0 * OMEGA**60 if free else 2e-3)
    rule.update(1.0)
    assert rule.value == pytest.approx(2.0 * OMEGA**61 if free else 2e-3 * OMEGA)


@pytest.mark.parametrize(("later", "free"), [(0.74, False), (0.76, True)])
def test_what_the_next_batch_gains_later_sets_it_free(later, free):
    rule = kc.LevenbergMarquardt(2.0)
    for fresh in (0.24, *[later] * 60):
        rule.saw(-fresh, -1.0)
        rule.update(1.0)
    assert rule.value == pytest.approx(2.0 * OMEGA**61 if free else 2e-3)


def test_a_lambda_that_grew_again_falls_to_where_it_was():
    """A thousandth of what it was when the next batch last gained, not of what it is."""
    rule = kc.LevenbergMarquardt(1.0)
    for ratio in (*[1.0] * 10, *[0.0] * 20, *[1.0] * 100):
        rule.saw(0.0, -1.0)
        rule.update(ratio)
    assert rule.value == pytest.approx(1e-3)


def test_the_next_batch_may_be_left_out():
    rule = kc.LevenbergMarquardt(2.0, fresh=-math.inf)
    rule.saw(1.0, -1.0)
    rule.update(1.0)
    assert rule.value == pytest.approx(2.0 * OMEGA)


def test_it_stays_within_its_bounds():
    rule = kc.LevenbergMarquardt(1.0, least=0.9, most=1.2, growth=2.0)
    rule.update(1.0)
    assert rule.value == 0.9
    rule.reject()
    assert rule.value == 1.2


@pytest.mark.parametrize(("every", "due"), [(3, [2, 5, 8]), (1, list(range(9))), (None, [])])
def test_when_it_is_due(every, due):
    rule = kc.LevenbergMarquardt(1.0, every=every)
    assert [step for step in range(9) if rule.due(step)] == due


def test_it_is_a_damping_of_kfac():
    model, criterion = network(), nn.CrossEntropyLoss()
    rule = kc.LevenbergMarquardt(0.5)
    kfac = kc.KFAC(model, criterion, damping=rule, schedule=EVERY_STEP)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac.attach(optimizer)
    x, y = batches(1)[0]
    for ratio in (1.0, 0.1, 0.1):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        assert kfac.metrics()["kfac/damping"] == rule.value or ratio == 1.0
        rule.update(ratio)
    assert rule.value == pytest.approx(0.5 / OMEGA)
    assert parameters_of(model).isfinite().all()


def test_one_without_a_number_is_refused_there():
    model, criterion = network(), nn.CrossEntropyLoss()
    kfac = kc.KFAC(model, criterion, damping=kc.LevenbergMarquardt())
    kfac.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(kc.ArgumentError, match=r"no lambda yet.*give LevenbergMarquardt\(initial="):
        kfac.metrics()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"initial": -1.0}, r"initial=-1\.0"),
        ({"initial": 1e9}, r"initial=1000000000\.0"),
        ({"every": 0}, "every=0"),
        ({"check": 0}, "check=0"),
        ({"every": 5, "check": 2}, "a divisor of every=5"),
        ({"decay": 0.0}, r"decay=0\.0"),
        ({"growth": 1.0}, r"growth=1\.0"),
        ({"fresh": None}, "fresh=None"),
        ({"least": 2.0, "most": 1.0}, r"least=2\.0, most=1\.0"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, match):
    with pytest.raises(kc.ArgumentError, match=match):
        kc.LevenbergMarquardt(**arguments)


@pytest.mark.parametrize("rule", [kc.LevenbergMarquardt(3.0), kc.FactorDamping()])
def test_a_state_that_is_none_is_refused(rule):
    with pytest.raises(kc.StateError, match="the file is damaged"):
        rule.load_state_dict({"value": "a"})
    before = rule.state_dict()
    rule.load_state_dict(before)
    assert rule.state_dict() == before


# -- gamma ----------------------------------------------------------------------------------------------------------


def test_three_gammas_are_tried_from_the_tied_one_on():
    own = kc.FactorDamping(20)
    omega = 0.95**10
    assert own.candidates(2.0, 0.0) == pytest.approx((2.0, 2 * omega, 2 / omega))
    assert own.choose((2.0, 1.0, 4.0), (-1.0, -3.0, -2.0)) == 1.0
    assert own.at(9.0) == 1.0
    assert own.candidates(9.0, 0.9) == pytest.approx((1.0, 0.9, 1 / omega))


def test_changes_that_are_not_finite_are_out():
    own = kc.FactorDamping()
    assert own.choose((2.0, 1.0), (-1.0, math.nan)) == 2.0
    assert own.choose((2.0, 1.0), (math.nan, -math.inf)) == 2.0


def test_a_search_takes_the_gamma_of_the_lowest_model():
    x, y = batches(1, size=40)[0]
    found = {}
    for way in ("search", 0.95**10, 1.0, 0.95**-10):
        torch.manual_seed(1)
        model = network()
        own = kc.FactorDamping(20)
        if way != "search":
            own.load_state_dict({"value": 0.1 * way})
            own.every = 1000
        optimizer = kc.NaturalGradient(
            model, "categorical", direction=kc.Direction(factor_damping=own), damping=kc.LevenbergMarquardt(0.01)
        )
        # A step that searches, or, for one gamma alone, none that does.
        optimizer._steps.steps = 0 if way == "search" else 1
        optimizer.step(x, y)
        metrics = optimizer.metrics()
        found[way] = metrics["gamma"], metrics["rate"], parameters_of(model)
    chosen = [way for way in found if way != "search" and torch.allclose(found[way][2], found["search"][2], atol=1e-9)]
    assert len(chosen) == 1
    assert found["search"][0] == pytest.approx(0.1 * chosen[0])


# -- where it starts ------------------------------------------------------------------------------------------------


def valley(best: float, worst_below: float = 0.0):
    """Steps gain the most at ``best``; below ``worst_below`` they do not."""

    def trial(value: float) -> tuple[float, float]:
        tried.append(value)
        gain = -math.exp(-abs(math.log(value / best)))
        return (1.0, gain) if value >= worst_below else (-1.0, 1.0)

    tried: list[float] = []
    return trial, tried


@pytest.mark.parametrize("best", [1e2, 1.0, 1e-2])
def test_trials_go_down_to_what_gains_the_most(best):
    """Of those that gain half as much the largest, a tenth away they gain a tenth here; halfway from there up."""
    trial, tried = valley(best)
    assert calibrated(trial, 1e3) == pytest.approx(1e3**UP * best ** (1 - UP))
    assert tried[-1] == pytest.approx(1e-4)


def test_it_goes_on_halfway_to_the_largest_that_gains_half_of_the_most():
    gains = {100.0: -1.0, 10.0: -4.9, 1.0: -5.1, 0.1: -9.0, 0.01: -10.0, 0.001: -9.0, 0.0001: -9.5}
    assert calibrated(lambda value: (0.6, gains.get(round(value, 6), 0.0)), 100.0) == pytest.approx(100**UP)


def test_a_model_that_is_not_fair_is_no_lambda():
    trials = {100.0: (0.9, -1.0), 10.0: (0.3, -2.0), 1.0: (0.2, -50.0), 0.1: (0.1, -60.0)}
    assert calibrated(lambda value: trials.get(round(value, 6), (0.1, -70.0)), 100.0) == pytest.approx(100.0)


def test_those_that_gain_nothing_are_stepped_over():
    trials = {100.0: (0.9, -1.0), 10.0: (0.2, -0.5), 1.0: (0.6, -50.0), 0.1: (0.7, -40.0), 0.01: (0.7, -30.0)}
    assert calibrated(lambda value: trials.get(round(value, 6), (0.7, 0.0)), 100.0) == pytest.approx(100**UP)


def test_a_start_that_is_too_bold_goes_up():
    trial, tried = valley(1e-3, worst_below=50.0)
    assert calibrated(trial, 1.0) == pytest.approx(100.0)
    assert tried == pytest.approx([1.0, 10.0, 100.0])


def test_there_is_an_end_to_trials():
    trial, tried = valley(1e-30)
    calibrated(trial, 1.0)
    assert len(tried) == 8


@pytest.mark.parametrize("lost", ["added", "predicted", "turn"])
def test_a_state_without_its_sums_is_refused_and_changes_nothing(lost):
    rule = kc.LevenbergMarquardt(3.0)
    before = rule.state_dict()
    damaged = {key: one for key, one in kc.LevenbergMarquardt(5.0).state_dict().items() if key != lost}
    with pytest.raises(kc.StateError, match="the file is damaged"):
        rule.load_state_dict(damaged)
    assert rule.state_dict() == before
