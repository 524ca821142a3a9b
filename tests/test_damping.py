"""lambda: a number, a callable of the step, or a share of a block's mean eigenvalue."""

from __future__ import annotations

import pytest
import torch

import kfac_cond as kc
from kfac_cond.damping import as_damping

from .reference import assert_same


@pytest.fixture(params=[(), (3,)], ids=["plain", "groups"])
def factors(request) -> tuple[torch.Tensor, torch.Tensor]:
    a, g = torch.randn(*request.param, 9, 4), torch.randn(*request.param, 9, 2)
    return a.mT @ a, g.mT @ g


@pytest.mark.parametrize(("value", "expected"), [(0.1, 0.1), (0, 0.0), (lambda step: 1 / (step + 1), 0.25)])
def test_the_number_at_a_step(value, expected):
    assert kc.Damping(value).at(3) == expected


@pytest.mark.parametrize("value", [0.1, lambda step: 0.1])
def test_a_number_is_the_same_for_every_group(factors, value):
    A, G = factors
    assert_same(kc.Damping(value).of(A, G, step=0), torch.full(A.shape[:-2], 0.1))


def test_relative_is_a_share_of_the_mean_eigenvalue(factors):
    A, G = factors
    traces = A.diagonal(dim1=-2, dim2=-1).sum(-1) * G.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert_same(kc.Damping(0.3, relative=True).of(A, G, step=0), 0.3 * traces / 8)


@pytest.mark.parametrize("factor", [1e-6, 1e3])
def test_relative_damping_follows_the_scale_of_the_loss(factors, factor):
    A, G = factors
    damping = kc.Damping(0.3, relative=True)
    assert_same(damping.of(A, factor * G, step=0), factor * damping.of(A, G, step=0))


def test_relative_damping_of_an_empty_block_is_the_floor(factors):
    A, G = factors
    found = kc.Damping(0.3, relative=True, floor=1e-4).of(A, 0 * G, step=0)
    assert_same(found, torch.full(A.shape[:-2], 1e-4))


@pytest.mark.parametrize("relative", [False, True])
def test_a_layer_s_own_number_takes_its_place(factors, relative):
    A, G = factors
    own = kc.Damping(0.3, relative=relative).of(A, G, step=0, override=0.7)
    assert_same(own, kc.Damping(0.7, relative=relative).of(A, G, step=0))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "0.1", True, None])
def test_what_is_no_damping_is_refused(value):
    with pytest.raises(kc.ArgumentError, match="expected a finite number >= 0"):
        as_damping(value)


@pytest.mark.parametrize("value", [-1.0, float("nan"), None, "0.1"])
def test_a_callable_that_gives_none_is_refused_with_its_step(value):
    with pytest.raises(kc.ArgumentError, match="damping at step 5"):
        kc.Damping(lambda step: value).at(5)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"rule": "exactly"}, "rule='exactly'"),
        ({"floor": 0.0}, "floor=0.0"),
        ({"floor": "a"}, "floor='a'"),
        ({"floor": float("nan")}, "floor=nan"),
        ({"floor": True}, "floor=True"),
        ({"relative": "yes"}, "relative='yes'"),
    ],
)
def test_other_settings_out_of_range_are_refused_by_name(options, name):
    with pytest.raises(kc.ArgumentError, match=name):
        kc.Damping(0.1, **options)


@pytest.mark.parametrize("given", [0.1, 1, kc.Damping(0.2, rule="exact")])
def test_as_damping_takes_a_number_or_a_damping(given):
    found = as_damping(given)
    assert found is given or found.value == given
