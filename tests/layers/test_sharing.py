"""How positions enter the factors, as formulas written out with loops over einsum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfac_cond.layers.sharing import (
    expanded_gradient_moment,
    expanded_input_moment,
    kept,
    masked,
    pooled_inputs,
    reduced_input_moment,
)

from ..reference import assert_same

MASK = torch.tensor([[True, True, False], [True, False, False], [False, False, False], [True, True, True]])


def with_ones(a: Tensor) -> Tensor:
    return torch.cat([a, torch.ones(*a.shape[:-1], 1)], -1)


@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", [None, MASK])
def test_expand_sums_over_valid_positions(mask, bias, lead):
    a = torch.randn(*lead, 4, 3, 5)
    moment, count = expanded_input_moment(a, None if mask is None else mask[..., None], bias=bias)
    rows = with_ones(a) if bias else a
    weight = torch.ones(4, 3) if mask is None else mask.double()
    assert_same(moment, torch.einsum("...nsi, ...nsj, ns -> ...ij", rows, rows, weight))
    assert count == weight.sum()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", [None, MASK])
def test_reduce_averages_within_an_example_first(mask, bias):
    """An example without a valid position is not counted."""
    a = torch.randn(4, 3, 5)
    weight = torch.ones(4, 3) if mask is None else mask.double()
    moment, count = reduced_input_moment(*pooled_inputs(a, None if mask is None else mask[..., None]), bias=bias)
    rows = with_ones(a) if bias else a
    mean = torch.einsum("nsi, ns -> ni", rows, weight) / weight.sum(1, keepdim=True).clamp(min=1)
    assert_same(moment, mean.T @ mean)
    assert count == (weight.sum(1) > 0).sum()


def test_gradients_sum_over_examples_and_positions():
    g = torch.randn(2, 4, 3, 5)
    assert_same(expanded_gradient_moment(g), torch.einsum("kni, knj -> kij", g.flatten(1, 2), g.flatten(1, 2)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_masked_positions_are_zero_whatever_they_were(bad):
    x = torch.full((4, 3, 2), bad)
    found = masked(x, MASK[..., None])
    assert torch.equal(found[~MASK], torch.zeros(6, 2))
    assert not torch.isfinite(found[MASK]).any()


@pytest.mark.parametrize(
    ("batch", "count", "expected"),
    [
        (4, 3, MASK[..., None]),
        (3, 4, MASK.T[..., None]),
        (12, 1, MASK.reshape(12, 1, 1)),
        (4, 1, None),
        (4, 9, None),
        (12, 3, None),
    ],
)
def test_a_mask_fits_the_forms_of_its_positions(batch, count, expected):
    found = kept(MASK, batch, count)
    assert found is expected or torch.equal(found, expected)


def test_no_mask_keeps_all():
    assert kept(None, 4, 3) is None
