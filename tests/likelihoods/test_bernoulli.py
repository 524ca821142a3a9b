"""Bernoulli: weights of elements and of positive labels, labels out of range."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kfac_cond.errors import LikelihoodError
from kfac_cond.likelihoods import Bernoulli

from .cases import named


def test_pos_weight_needs_data_labels() -> None:
    likelihood = Bernoulli(event_dims=(), pos_weight=torch.ones(3))
    assert likelihood.needs_targets and not likelihood.bind(torch.zeros(2, 3)).needs_targets
    with pytest.raises(LikelihoodError, match=r"kfac\.update\(outputs, targets=labels\)"):
        likelihood.term_weight(torch.randn(2, 3))


def test_weights_of_elements_need_no_data_labels() -> None:
    likelihood = Bernoulli(event_dims=(), weight=torch.tensor([1.0, 2.0]))
    kappa = likelihood.term_weight(torch.randn(2, 2))
    assert not likelihood.needs_targets and kappa is not None and kappa.tolist() == [[1.0, 2.0], [1.0, 2.0]]


def test_weights_multiply() -> None:
    likelihood = Bernoulli(event_dims=(), weight=torch.tensor([2.0, 3.0]), pos_weight=torch.tensor(5.0))
    bound = likelihood.bind(torch.tensor([[0.0, 1.0], [0.5, 0.0]]), weight=torch.tensor([[1.0, 7.0], [1.0, 1.0]]))
    kappa = bound.term_weight(torch.randn(2, 2))
    assert kappa is not None and kappa.tolist() == [[2.0, 105.0], [6.0, 3.0]]


def test_weights_do_not_enter_m() -> None:
    likelihood = Bernoulli(event_dims=(), weight=torch.full((3,), 2.0), pos_weight=torch.full((3,), 2.0))
    assert likelihood.bind(torch.ones(2, 3)).terms(torch.randn(2, 3)).item() == 6


@pytest.mark.parametrize("label", [0.5, -1.0, 2.0, float("nan")])
def test_a_drawn_label_other_than_0_and_1_raises_the_flag(label: float) -> None:
    labels = torch.tensor([[0.0, label], [1.0, 1.0]])
    assert Bernoulli().invalid_labels(torch.randn(2, 2), labels)
    assert not Bernoulli().bind(mask=torch.tensor([False, True])).invalid_labels(torch.randn(2, 2), labels)


@pytest.mark.parametrize(("label", "invalid"), [(0.5, False), (1.0, False), (1.01, True), (-0.01, True)])
def test_data_labels_may_be_soft(label: float, invalid: bool) -> None:
    bound = Bernoulli().bind(torch.tensor([[0.0, label]]))
    assert bool(bound.invalid_targets(torch.randn(1, 2))) == invalid


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float16], ids=named)
def test_labels_of_any_dtype(dtype: torch.dtype) -> None:
    outputs, labels = torch.randn(2, 2), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    likelihood = Bernoulli().bind(labels.to(dtype))
    assert torch.equal(likelihood.score(outputs, labels.to(dtype)), outputs.sigmoid() - labels)
    assert not likelihood.invalid_targets(outputs) and not likelihood.invalid_labels(outputs, labels.to(dtype))


@pytest.mark.parametrize("logit", [-800.0, -40.0, 40.0, 800.0])
def test_far_logits_have_finite_log_prob_and_kl(logit: float) -> None:
    outputs = torch.full((2, 2), logit)
    values = Bernoulli().log_prob(outputs, torch.eye(2)), Bernoulli().kl(outputs, -outputs), Bernoulli().fisher(outputs)
    assert all(value.isfinite().all() for value in values)


@pytest.mark.parametrize("arguments", [{"pos_weight": 2.0}, {"weight": torch.ones(2, dtype=torch.long)}], ids=named)
def test_weights_of_the_wrong_kind_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(LikelihoodError, match="expected a floating tensor"):
        Bernoulli(**arguments)
