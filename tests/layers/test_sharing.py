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
from kfac_cond.linalg.moments import second_moment, second_moment_diagonal

from ..reference import assert_same

MASK = torch.tensor([[True, True, False], [True, False, False], [False, False, False], [True, True, True]])


def with_ones(a: Tensor) -> Tensor:
    return torch.cat([a, torch.ones(*a.shape[:-1], 1)], -1)


FORMS = {
    "whole": (second_moment, lambda matrix: matrix),
    "diagonal": (second_moment_diagonal, lambda matrix: matrix.diagonal(dim1=-2, dim2=-1)),
}


@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("form", FORMS)
def test_expand_sums_over_valid_positions(form, mask, bias, lead):
    moment, of_whole = FORMS[form]
    a = torch.randn(*lead, 4, 3, 5)
    found, count = expanded_input_moment(a, None if mask is None else mask[..., None], bias=bias, moment=moment)
    rows = with_ones(a) if bias else a
    weight = torch.ones(4, 3) if mask is None else mask.double()
    assert_same(found, of_whole(torch.einsum("...nsi, ...nsj, ns -> ...ij", rows, rows, weight)))
    assert count == weight.sum()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("form", FORMS)
def test_reduce_averages_within_an_example_first(form, mask, bias):
    """An example without a valid position is not counted."""
    moment, of_whole = FORMS[form]
    a = torch.randn(4, 3, 5)
    weight = torch.ones(4, 3) if mask is None else mask.double()
    pooled = pooled_inputs(a, None if mask is None else mask[..., None])
    found, count = reduced_input_moment(*pooled, bias=bias, moment=moment)
    rows = with_ones(a) if bias else a
    mean = torch.einsum("nsi, ns -> ni", rows, weight) / weight.sum(1, keepdim=True).clamp(min=1)
    assert_same(found, of_whole(mean.T @ mean))
    assert count == (weight.sum(1) > 0).sum()


@pytest.mark.parametrize("form", FORMS)
def test_gradients_sum_over_examples_and_positions(form):
    moment, of_whole = FORMS[form]
    g = torch.randn(2, 4, 3, 5)
    rows = g.flatten(1, 2)
    assert_same(expanded_gradient_moment(g, moment), of_whole(torch.einsum("kni, knj -> kij", rows, rows)))


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
