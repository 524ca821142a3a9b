"""Sampled and exact scores: what is sent back, and its weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_cond.errors import LikelihoodError
from kfac_cond.likelihoods import Categorical, exact_scores, sampled_scores

from .cases import CASES, NAMES, Case

grid = pytest.mark.parametrize("case", CASES, ids=NAMES)


def kappa(case: Case) -> Tensor:
    return 0.5 + torch.rand(case.terms, generator=torch.Generator().manual_seed(2))


@grid
def test_exact_scores_square_to_the_weighted_fisher(case: Case) -> None:
    outputs = case.outputs().requires_grad_()
    weight = kappa(case)
    likelihood = case.likelihood.bind(mask=case.mask(), weight=weight)
    moment = torch.zeros(len(case.rows(outputs)), case.event, case.event)
    for column, factor in exact_scores(likelihood, outputs):
        assert factor == 1.0 and not column.requires_grad
        rows = case.rows(column)
        moment += rows.unsqueeze(2) * rows.unsqueeze(1)
    expected = weight[..., None, None] * likelihood.fisher(outputs).detach()
    torch.testing.assert_close(moment, expected.reshape(moment.shape), rtol=1e-10, atol=1e-10)


@grid
def test_sampled_scores_average_to_the_weighted_fisher_over_all_labels(case: Case) -> None:
    outputs, weight = case.outputs(), kappa(case)
    likelihood = case.likelihood.bind(mask=case.mask(), weight=weight)
    labels, probabilities = zip(*case.expectation(outputs), strict=True)
    moment = torch.zeros(len(case.rows(outputs)), case.event, case.event)
    for (score, factor), p in zip(sampled_scores(likelihood, outputs, draws=labels), probabilities, strict=True):
        assert factor == 1 / len(labels)
        rows = case.rows(score)
        moment += p[:, None, None] * rows.unsqueeze(2) * rows.unsqueeze(1)
    expected = weight[..., None, None] * likelihood.fisher(outputs)
    torch.testing.assert_close(moment, expected.reshape(moment.shape), rtol=1e-10, atol=1e-10)


@grid
def test_sampled_scores_are_those_of_the_generators_draws(case: Case) -> None:
    outputs = case.outputs().requires_grad_()
    streams = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    found = list(sampled_scores(case.likelihood, outputs, generators=streams))
    for seed, (score, factor) in zip((1, 2), found, strict=True):
        labels = case.likelihood.sample(outputs, torch.Generator().manual_seed(seed))
        assert factor == 0.5 and not score.requires_grad
        assert torch.equal(score, case.likelihood.score(outputs, labels))


def test_one_draw_from_the_global_generator_by_default() -> None:
    ((score, factor),) = sampled_scores(Categorical(), torch.randn(3, 4))
    assert factor == 1.0 and score.shape == (3, 4)


@pytest.mark.parametrize("arguments", [{"generators": ()}, {"draws": []}], ids=str)
def test_no_draw_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(LikelihoodError, match="at least one"):
        sampled_scores(Categorical(), torch.randn(3, 4), **arguments)


def test_a_bare_tensor_of_draws_is_refused() -> None:
    with pytest.raises(LikelihoodError, match=r"draws=\[labels\]"):
        sampled_scores(Categorical(), torch.randn(3, 4), draws=torch.zeros(3, dtype=torch.long))  # type: ignore[arg-type]


def test_outputs_are_checked_before_the_first_score() -> None:
    with pytest.raises(LikelihoodError, match="no dimension of classes"):
        sampled_scores(Categorical(), torch.randn(3))
