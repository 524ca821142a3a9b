"""Categorical: ignored labels, class weights, labels out of range."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_cond.errors import LikelihoodError
from kfac_cond.likelihoods import Categorical

from .cases import named

WEIGHT = torch.tensor([0.5, 0.0, 2.0, 3.0], dtype=torch.float64)


def test_ignored_labels_are_not_valid() -> None:
    bound = Categorical(ignore_index=2).bind(torch.tensor([0, 2, 1]))
    valid = bound.valid(torch.randn(3, 4))
    assert valid is not None and valid.tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64], ids=named)
def test_any_integer_dtype_serves_as_labels(dtype: torch.dtype) -> None:
    bound = Categorical().bind(torch.tensor([156, 1, 3]).to(dtype))
    valid = bound.valid(torch.randn(3, 200))
    # 156 as int8 is -100, torch's ignored label; as uint8 it is a class.
    assert valid is not None and valid.tolist() == [dtype != torch.int8, True, True]


def test_torchs_own_ignored_label_is_ignored_without_being_asked_for() -> None:
    likelihood = Categorical()
    assert not likelihood.needs_targets
    bound = likelihood.bind(torch.tensor([0, -100, -100]))
    assert bound.terms(torch.randn(3, 4)).item() == 1 and not bound.invalid_targets(torch.randn(3, 4))


def test_ignored_labels_and_a_mask_both_leave_terms_out() -> None:
    bound = Categorical(ignore_index=2).bind(torch.tensor([0, 2, 1]), mask=torch.tensor([False, True, True]))
    assert bound.terms(torch.randn(3, 4)).item() == 1


def test_ignore_index_does_not_apply_to_probabilities() -> None:
    bound = Categorical(ignore_index=0).bind(torch.full((3, 4), 0.25))
    assert bound.valid(torch.randn(3, 4)) is None and bound.terms(torch.randn(3, 4)).item() == 3


@pytest.mark.parametrize("arguments", [{"weight": WEIGHT}, {"ignore_index": 0}, {"ignore_index": -100}], ids=named)
def test_weights_and_ignored_labels_need_data_labels(arguments: dict[str, Any]) -> None:
    likelihood = Categorical(**arguments)
    assert likelihood.needs_targets and not likelihood.bind(torch.zeros(2, dtype=torch.long)).needs_targets
    with pytest.raises(LikelihoodError, match=r"kfac\.update\(outputs, targets=labels\)"):
        likelihood.terms(torch.randn(2, 4))


def test_label_smoothing_alone_needs_no_data_labels() -> None:
    likelihood = Categorical(label_smoothing=0.1)
    assert not likelihood.needs_targets and likelihood.term_weight(torch.randn(2, 4)) is None


def test_m_of_weighted_classes_is_the_sum_of_weights_at_valid_labels() -> None:
    bound = Categorical(weight=WEIGHT, ignore_index=3).bind(torch.tensor([0, 3, 2, 1]))
    assert bound.terms(torch.randn(4, 4)).item() == 2.5


def test_m_of_probabilities_is_the_number_of_terms_whatever_the_weights() -> None:
    bound = Categorical(weight=WEIGHT).bind(torch.full((3, 4), 0.25))
    assert bound.terms(torch.randn(3, 4)).item() == 3


def test_class_weights_and_term_weights_multiply() -> None:
    bound = Categorical(weight=WEIGHT).bind(torch.tensor([0, 3]), weight=torch.tensor([4.0, 5.0]))
    kappa = bound.term_weight(torch.randn(2, 4))
    assert kappa is not None and kappa.tolist() == [2.0, 15.0]


@pytest.mark.parametrize("label", [4, -1, 10**12, -(10**12)])
def test_labels_out_of_range_raise_the_flag_and_nothing_else(label: int) -> None:
    outputs, labels = torch.randn(3, 4), torch.tensor([0, label, 3])
    likelihood = Categorical(weight=WEIGHT).bind(labels)
    assert likelihood.invalid_labels(outputs, labels) and likelihood.invalid_targets(outputs)
    values = likelihood.score(outputs, labels), likelihood.log_prob(outputs, labels), likelihood.terms(outputs)
    assert all(value.isfinite().all() for value in values)


def test_labels_in_range_do_not_raise_the_flag() -> None:
    outputs, labels = torch.randn(2, 5, 4), torch.tensor([[0, 1, 2, 3], [4, 4, 0, 0]])
    likelihood = Categorical(dim=1).bind(labels)
    assert not likelihood.invalid_labels(outputs, labels) and not likelihood.invalid_targets(outputs)


def test_a_label_out_of_range_at_a_masked_term_does_not_raise_the_flag() -> None:
    labels = torch.tensor([0, 9])
    likelihood = Categorical().bind(labels, mask=torch.tensor([True, False]))
    assert not likelihood.invalid_targets(torch.randn(2, 4)) and not likelihood.invalid_labels(
        torch.randn(2, 4), labels
    )


def test_a_draw_of_torchs_ignored_label_is_out_of_range() -> None:
    assert Categorical().invalid_labels(torch.randn(2, 4), torch.tensor([-100, 0]))


def test_nothing_bound_raises_no_flag() -> None:
    assert not Categorical().invalid_targets(torch.randn(2, 4))


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_probabilities_that_are_none_raise_the_flag(value: float) -> None:
    targets = torch.full((3, 4), 0.25)
    targets[1, 2] = value
    assert Categorical().bind(targets).invalid_targets(torch.randn(3, 4))
    assert not Categorical().bind(targets, mask=torch.tensor([True, False, True])).invalid_targets(torch.randn(3, 4))


def test_logits_of_minus_infinity_have_finite_score_fisher_and_kl() -> None:
    outputs, other = torch.randn(3, 4), torch.randn(3, 4)
    outputs[:, 1] = other[:, 1] = -torch.inf
    likelihood, labels = Categorical(), torch.tensor([0, 2, 3])
    values = (
        likelihood.score(outputs, labels),
        likelihood.fisher(outputs),
        likelihood.kl(outputs, other),
        *likelihood.fisher_columns(outputs),
    )
    assert all(value.isfinite().all() for value in values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dimension 0 counts examples"),
        ({"dim": "last"}, "dim='last'"),
        ({"ignore_index": 1.5}, "ignore_index=1.5"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5"),
        ({"weight": [1.0, 2.0]}, "found list"),
        ({"weight": torch.ones(2, 2)}, r"shape \(2, 2\)"),
        ({"weight": torch.ones(2, dtype=torch.long)}, "torch.int64"),
        ({"weight": torch.tensor([1.0, -1.0])}, "none of them negative"),
        ({"weight": torch.tensor([1.0, float("nan")])}, "finite"),
    ],
    ids=named,
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(LikelihoodError, match=message):
        Categorical(**arguments)


def test_columns_are_computed_one_at_a_time() -> None:
    columns = Categorical().fisher_columns(torch.randn(2, 3, 30_000))
    # All of the square root would be 6 x 30,000 x 30,000 numbers.
    column: Tensor = next(columns)
    assert column.shape == (2, 3, 30_000) and not column[:, 1:].any()
