"""Kinds that are not the conditional Fisher say so, and are what their names say."""

from __future__ import annotations

import pytest
import torch

import kfac_cond as kc

from .fisher_cases import case, perceptron
from .reference import assert_same


@pytest.mark.parametrize("kind", ["empirical", "forward_only"])
def test_what_is_not_the_conditional_fisher_says_so(kind):
    fisher = case("perceptron", "categorical").estimate("kfac", kind)
    assert "not the conditional Fisher" in repr(fisher)
    assert "not the conditional Fisher" in kc.estimate.__doc__.replace("\n            ", " ")


@pytest.mark.parametrize("kind", ["sampled", "exact"])
def test_what_is_the_conditional_fisher_does_not(kind):
    assert "not the" not in repr(case("perceptron", "categorical").estimate("kfac", kind))


def test_the_empirical_one_differs_from_the_conditional_one():
    of = case("perceptron", "categorical")
    empirical, exact = (of.estimate("block", kind).to_dense() for kind in ("empirical", "exact"))
    assert (empirical - exact).norm() > 0.1 * exact.norm()


def test_the_empirical_one_needs_data_labels():
    with pytest.raises(kc.LikelihoodError, match="needs data labels"):
        kc.estimate(perceptron(), [torch.randn(2, 3)], "categorical", kind="empirical")


def test_the_empirical_one_refuses_labels_out_of_range():
    with pytest.raises(kc.LikelihoodError, match="labels out of the range"):
        kc.estimate(perceptron(), [(torch.randn(2, 3), torch.tensor([0, 7]))], "categorical", kind="empirical")


def test_the_empirical_one_leaves_ignored_labels_out():
    model, x, y = perceptron(), torch.randn(4, 3), torch.tensor([0, -100, 1, -100])
    found = kc.estimate(model, [(x, y)], "categorical", structure="block", kind="empirical")
    expected = kc.estimate(model, [(x[y >= 0], y[y >= 0])], "categorical", structure="block", kind="empirical")
    assert_same(found.to_dense(), expected.to_dense())


def test_forward_only_sends_nothing_back():
    model, backwards = perceptron(), []
    model[1].register_full_backward_hook(lambda *_: backwards.append(1))
    fisher = kc.estimate(model, [torch.randn(4, 3)], "categorical", kind="forward_only")
    assert torch.equal(fisher["0"].G, torch.eye(4))
    assert backwards == []


@pytest.mark.parametrize("model", ["perceptron", "tokens", "pixels"])
def test_forward_only_has_the_same_inputs_as_the_conditional_one(model):
    of = case(model, "categorical")
    found, sampled = (of.estimate("kfac", kind) for kind in ("forward_only", "sampled"))
    assert all(torch.equal(block.A, sampled[name].A) for name, block in found.items())


def test_forward_only_does_not_depend_on_the_outputs():
    model, x = perceptron(), torch.randn(4, 3)
    found, other = (
        kc.estimate(model, [x], one, kind="forward_only") for one in ("categorical", kc.Gaussian(0.1, reduction="sum"))
    )
    assert torch.equal(found.to_dense(), other.to_dense())
