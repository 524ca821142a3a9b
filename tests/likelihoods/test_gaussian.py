"""Gaussian: its variance."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kfac_cond.errors import LikelihoodError
from kfac_cond.likelihoods import Gaussian

from .cases import named


@pytest.mark.parametrize("variance", [0.25, 1, 9.0])
def test_the_fisher_is_the_identity_over_the_variance(variance: float) -> None:
    found = Gaussian(variance).fisher(torch.randn(2, 3))
    torch.testing.assert_close(found, torch.eye(3).expand(2, 3, 3) / variance, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variance", [0, -1.0, float("inf"), float("nan"), "1", None, True, torch.ones(3)], ids=named)
def test_a_variance_that_is_not_a_positive_number_is_refused(variance: Any) -> None:
    with pytest.raises(LikelihoodError, match=r"variance=.*positive number"):
        Gaussian(variance)


@pytest.mark.parametrize("label", [float("nan"), float("inf")])
def test_labels_that_are_not_finite_raise_the_flag(label: float) -> None:
    labels = torch.tensor([[0.0, label], [1.0, 1.0]])
    assert Gaussian().invalid_labels(torch.randn(2, 2), labels)
    assert Gaussian().bind(labels).invalid_targets(torch.randn(2, 2))
    assert not Gaussian().bind(labels, mask=torch.tensor([False, True])).invalid_targets(torch.randn(2, 2))
