"""ORACLES 1-5 on every likelihood, shape and mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .cases import CASES, NAMES, Case

pytestmark = pytest.mark.parametrize("case", CASES, ids=NAMES)
masked_too = pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def zeroed(case: Case, values: Tensor, masked: bool) -> Tensor:
    """Values [number of terms, ...] with zeros at masked terms."""
    keep = case.mask().reshape(-1) if masked else torch.ones(len(values), dtype=torch.bool)
    return torch.where(keep.reshape(-1, *(1,) * (values.ndim - 1)), values, 0.0)


def drawn(case: Case, outputs: Tensor) -> Tensor:
    return case.likelihood.sample(outputs, torch.Generator().manual_seed(1))


@masked_too
def test_the_score_has_mean_zero_over_labels(case: Case, masked: bool) -> None:
    outputs, likelihood = case.outputs(), case.bound(masked)
    mean = torch.zeros_like(case.rows(outputs))
    for labels, w in case.expectation(outputs):
        mean += w.unsqueeze(1) * case.rows(likelihood.score(outputs, labels))
    close(mean, torch.zeros_like(mean))


@masked_too
def test_the_fisher_is_the_second_moment_of_the_score_over_labels(case: Case, masked: bool) -> None:
    outputs, likelihood = case.outputs(), case.bound(masked)
    moment = torch.zeros(len(case.rows(outputs)), case.event, case.event)
    for labels, w in case.expectation(outputs):
        s = case.rows(likelihood.score(outputs, labels))
        moment += w[:, None, None] * s.unsqueeze(2) * s.unsqueeze(1)
    close(likelihood.fisher(outputs).reshape(moment.shape), moment)


@masked_too
def test_the_fisher_is_the_hessian_of_minus_log_prob_at_any_label(case: Case, masked: bool) -> None:
    outputs, likelihood = case.outputs(), case.bound(masked)
    labels = drawn(case, outputs)
    rows = case.rows(outputs)
    hessian = torch.func.hessian(lambda r: -likelihood.log_prob(case.unrows(r), labels).sum())(rows)
    fisher = likelihood.fisher(outputs).reshape(-1, case.event, case.event)
    eye = torch.eye(len(rows))
    close(hessian, torch.einsum("rs,rij->risj", eye, fisher))


@masked_too
def test_the_square_root_times_its_transpose_is_the_fisher(case: Case, masked: bool) -> None:
    outputs, likelihood = case.outputs(), case.bound(masked)
    root = likelihood.fisher_sqrt(outputs)
    assert root.shape[:-1] == (*case.terms, case.event)
    close(root @ root.mT, likelihood.fisher(outputs))


@masked_too
def test_the_columns_are_those_of_one_term_within_the_example(case: Case, masked: bool) -> None:
    outputs, likelihood = case.outputs(), case.bound(masked)
    positions = len(case.rows(outputs)) // case.shape[0]
    moment = torch.zeros(len(case.rows(outputs)), case.event, case.event)
    for count, column in enumerate(likelihood.fisher_columns(outputs)):
        assert column.shape == outputs.shape
        rows = case.rows(column)
        elsewhere = rows.reshape(case.shape[0], positions, case.event).clone()
        elsewhere[:, count // case.event] = 0
        assert not elsewhere.any()
        moment += rows.unsqueeze(2) * rows.unsqueeze(1)
    assert count + 1 == positions * case.event
    close(moment, likelihood.fisher(outputs).reshape(moment.shape))


@masked_too
def test_kl_is_half_the_quadratic_form_to_third_order(case: Case, masked: bool) -> None:
    outputs, likelihood = case.outputs(), case.bound(masked)
    direction = case.outputs(seed=7)
    e = case.rows(direction)
    fisher = likelihood.fisher(outputs).reshape(-1, case.event, case.event)
    half = 0.5 * torch.einsum("ri,rij,rj->", e, fisher, e)
    errors = [abs(likelihood.kl(outputs, outputs + t * direction) / (t * t * half) - 1).item() for t in (1e-2, 1e-3)]
    assert errors[0] < 0.05, f"ratio of KL to half the quadratic form is 1 +- {errors[0]}"
    assert errors[1] < 0.15 * errors[0] + 1e-8


@masked_too
def test_kl_equals_that_of_torch(case: Case, masked: bool) -> None:
    outputs, other = case.outputs(), case.outputs(seed=7)
    expected = torch.distributions.kl_divergence(case.distribution(outputs), case.distribution(other))
    found = case.bound(masked).kl_terms(outputs, other)
    assert found.shape == case.terms
    close(found.reshape(-1), zeroed(case, expected, masked))


def test_kl_is_the_sum_over_terms(case: Case) -> None:
    outputs, other = case.outputs(), case.outputs(seed=7)
    close(case.likelihood.kl(outputs, other), case.likelihood.kl_terms(outputs, other).sum())


@masked_too
def test_log_prob_equals_that_of_torch(case: Case, masked: bool) -> None:
    outputs = case.outputs()
    labels = drawn(case, outputs)
    expected = case.distribution(outputs).log_prob(case.label_rows(labels))
    found = case.bound(masked).log_prob(outputs, labels)
    assert found.shape == case.terms
    close(found.reshape(-1), zeroed(case, expected, masked))


@masked_too
def test_the_score_is_the_gradient_of_minus_log_prob(case: Case, masked: bool) -> None:
    outputs, likelihood = case.outputs().requires_grad_(), case.bound(masked)
    labels = drawn(case, outputs)
    (gradient,) = torch.autograd.grad(-likelihood.log_prob(outputs, labels).sum(), outputs)
    close(likelihood.score(outputs, labels), gradient)


def test_nan_at_masked_terms_stays_there(case: Case) -> None:
    clean, likelihood = case.outputs(), case.bound(True)
    labels = drawn(case, clean)
    keep = likelihood.spread(case.mask(), clean)
    outputs = torch.where(keep, clean, torch.nan).requires_grad_()
    value = likelihood.log_prob(outputs, labels).sum() + likelihood.kl(outputs, case.outputs(seed=7))
    (gradient,) = torch.autograd.grad(value, outputs)
    assert gradient.isfinite().all() and likelihood.score(outputs, labels).isfinite().all()
    assert likelihood.fisher(outputs).isfinite().all()


def test_bound_data_labels_change_neither_score_nor_weights(case: Case) -> None:
    outputs = case.outputs()
    labels = drawn(case, outputs)
    bound = case.likelihood.bind(case.likelihood.sample(outputs))
    assert bound.term_weight(outputs) is None
    close(bound.weighted_score(outputs, labels), case.likelihood.weighted_score(outputs, labels))


def test_shapes_of_terms_and_events(case: Case) -> None:
    outputs = case.outputs()
    assert case.likelihood.term_shape(outputs) == case.terms
    assert case.likelihood.event_shape(outputs) == tuple(case.shape[axis] for axis in case.axes)
    assert case.likelihood.examples(outputs) == case.shape[0]


@masked_too
def test_m_is_the_number_of_valid_terms(case: Case, masked: bool) -> None:
    terms = case.bound(masked).terms(case.outputs())
    assert terms.shape == () and terms.dtype == torch.float64
    assert terms.item() == (case.mask().sum() if masked else torch.ones(case.terms).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scores_and_columns_keep_the_dtype_of_the_outputs(case: Case, dtype: torch.dtype) -> None:
    outputs = case.outputs().to(dtype)
    labels = drawn(case, outputs)
    score = case.likelihood.score(outputs, labels)
    assert score.dtype == dtype and next(case.likelihood.fisher_columns(outputs)).dtype == dtype
    exact = case.likelihood.score(outputs.double(), labels.double() if labels.is_floating_point() else labels)
    close(score.double(), exact, tolerance=4 * torch.finfo(dtype).eps)
