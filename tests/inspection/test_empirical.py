"""The conditional against the empirical Fisher: dense matrices by hand, and models whose labels are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kfac_cond as kc
from kfac_cond.inspection import empirical
from kfac_cond.inspection.gradients import mean_gradient
from kfac_cond.inspection.overlap import side_overlaps, top_overlap

from ..helpers import classifier
from ..reference import categorical_log_prob, entries_of, fisher_of_draws
from .test_signal import labelled

DAMPING = 0.05


def dense_gradient(model: nn.Module, data, block) -> torch.Tensor:
    loss = nn.functional.cross_entropy(model(data[0][0]), data[0][1])
    return torch.nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(model.parameters())))[
        entries_of(model, block.layout)
    ]


def test_all_numbers_are_those_of_the_dense_matrices():
    """In 'block', which is the Fisher by its definition: E straight from the data labels."""
    model, data = classifier(), labelled([12])
    fisher = kc.estimate(model, data, "categorical", structure="block", kind="exact")
    found = empirical.measure(model, data, "categorical", fisher, damping=DAMPING)
    parameters = list(model.parameters())
    E = fisher_of_draws(model, data[0][0], [data[0][1]], categorical_log_prob, parameters=parameters, divisor=12)
    for name, block in fisher.items():
        F, order = block.to_dense(), entries_of(model, block.layout)
        of_layer = E[order][:, order]
        g, identity = dense_gradient(model, data, block), torch.eye(len(F))
        mine, theirs = (torch.linalg.solve(one + DAMPING * identity, g) for one in (F, of_layer))
        k = found[name].dimension
        tops = [torch.linalg.eigh(one)[1][:, -k:] for one in (F, of_layer)]
        of = found[name]
        assert of.trace_ratio == pytest.approx(float(of_layer.trace() / F.trace()), rel=1e-9)
        assert of.cosine == pytest.approx(float(mine @ theirs / mine.norm() / theirs.norm()), rel=1e-8)
        assert of.length_ratio == pytest.approx(float(theirs.norm() / mine.norm()), rel=1e-8)
        assert of.overlap == pytest.approx(float((tops[0].T @ tops[1]).square().sum() / k), rel=1e-6)
        assert of.chance == k / len(F)
        assert of.overlap_A is None


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "tkfac", "diagonal"])
def test_labels_that_are_the_drawn_ones_give_the_same_matrix(structure):
    model, data = classifier(), labelled([20])
    options = kc.Options(draws=[[data[0][1]]])
    fisher = kc.estimate(model, data, "categorical", structure=structure, options=options)
    for of in empirical.measure(model, data, "categorical", fisher, damping=DAMPING, options=options).values():
        assert of.trace_ratio == pytest.approx(1.0)
        assert of.length_ratio == pytest.approx(1.0)
        assert of.cosine == pytest.approx(1.0)
        assert of.overlap == pytest.approx(1.0)
        assert of.overlap_G == (None if structure == "diagonal" else pytest.approx(1.0))


def test_labels_noisier_than_the_model_says_show_as_the_trace_ratio():
    """A fitted mean, noise of deviation 3 where the model says 1: E is nine times F."""
    model = nn.Linear(2, 3)
    x = torch.randn(4000, 2)
    data = [(x, model(x).detach() + 3 * torch.randn(4000, 3))]
    fisher = kc.estimate(model, data, "gaussian", kind="exact")
    of = empirical.measure(model, data, "gaussian", fisher, damping=DAMPING)[""]
    assert of.trace_ratio == pytest.approx(9.0, rel=0.05)
    assert of.overlap_A == pytest.approx(1.0)


def test_labels_that_are_fitted_leave_nothing_of_the_empirical_fisher():
    model = nn.Linear(2, 3)
    x = torch.randn(50, 2)
    data = [(x, model(x).detach())]
    fisher = kc.estimate(model, data, "gaussian", kind="exact")
    of = empirical.measure(model, data, "gaussian", fisher, damping=DAMPING)[""]
    assert (of.trace_ratio, of.overlap, of.cosine) == (0.0, None, None)


def test_a_gradient_handed_in_is_used():
    model, data = classifier(), labelled([9])
    fisher = kc.estimate(model, data, "categorical")
    gradient = mean_gradient(model, data, "categorical")
    assert empirical.measure(model, data, "categorical", fisher) == empirical.measure(
        model, data, "categorical", fisher, gradient=gradient
    )


def rotated(angle: float) -> torch.Tensor:
    c, s = torch.tensor(angle).cos(), torch.tensor(angle).sin()
    return torch.stack([torch.stack([c, -s]), torch.stack([s, c])])


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.0])
def test_the_overlap_of_one_direction_is_the_squared_cosine(angle):
    layout = kc.estimate(nn.Linear(2, 2, bias=False), [torch.randn(3, 2)], "categorical")[""].layout
    turned = rotated(angle)
    values = torch.diag(torch.tensor([4.0, 1.0]))
    one = kc.KroneckerBlock(layout, torch.eye(2) + values, values)
    other = kc.KroneckerBlock(layout, torch.eye(2) + values, turned @ values @ turned.T)
    expected = pytest.approx(float(torch.tensor(angle).cos() ** 2))
    assert side_overlaps(one, other, k=1) == (pytest.approx(1.0), expected)
    assert top_overlap(one, other, k=1) == (expected, 1)


def test_diagonal_sides_are_compared_without_their_squares():
    layout = kc.estimate(nn.Linear(3, 2, bias=False), [torch.randn(3, 3)], "categorical")[""].layout
    G = torch.diag(torch.tensor([2.0, 1.0]))
    one = kc.KroneckerBlock(layout, torch.tensor([3.0, 2.0, 1.0]), G)
    other = kc.KroneckerBlock(layout, torch.tensor([1.0, 2.0, 3.0]), G)
    assert side_overlaps(one, other, k=2)[0] == 0.5


def test_a_block_of_rank_one_is_compared_in_one_dimension():
    layout = kc.estimate(nn.Linear(2, 2, bias=False), [torch.randn(3, 2)], "categorical")[""].layout
    ones = torch.ones(2, 2)
    one = kc.KroneckerBlock(layout, ones, ones)
    assert top_overlap(one, kc.KroneckerBlock(layout, torch.eye(2) + ones, ones)) == (pytest.approx(1.0), 1)
