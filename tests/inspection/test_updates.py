"""Lengths, ratios and angles of an update, against the dense block and known answers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kfac_cond as kc
from kfac_cond.inspection import updates
from kfac_cond.inspection.gradients import mean_gradient

from ..helpers import classifier
from ..reference import entries_of
from .test_signal import labelled


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
def test_all_numbers_are_those_of_the_dense_block(structure):
    model, data = classifier(), labelled([6, 9])
    fisher = kc.estimate(model, data, nn.CrossEntropyLoss(), structure=structure)
    found = updates.measure(model, data, nn.CrossEntropyLoss(), fisher, damping=0.02)
    loss = nn.CrossEntropyLoss()(model(torch.cat([x for x, _ in data])), torch.cat([y for _, y in data]))
    flat = torch.nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(model.parameters())))
    weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    for name, block in fisher.items():
        order = entries_of(model, block.layout)
        g, w, of = flat[order], weights[order], found[name]
        u = torch.linalg.solve(block.to_dense() + 0.02 * torch.eye(len(g)), g)
        assert of.gradient_norm == pytest.approx(float(g.norm()))
        assert of.update_norm == pytest.approx(float(u.norm()))
        assert of.weight_norm == pytest.approx(float(w.norm()))
        assert of.amplification == pytest.approx(float(u.norm() / g.norm()))
        assert of.update_to_weight == pytest.approx(float(u.norm() / w.norm()))
        assert of.gradient_to_weight == pytest.approx(float(g.norm() / w.norm()))
        assert of.cosine == pytest.approx(float(u @ g / u.norm() / g.norm()))
        assert of.slope == pytest.approx(float(u @ g))


def test_a_damping_that_hides_the_fisher_makes_the_update_the_gradient():
    model, data = classifier(), labelled([10])
    fisher = kc.estimate(model, data, "categorical")
    for of in updates.measure(model, data, "categorical", fisher, damping=1e6).values():
        assert of.cosine == pytest.approx(1.0)
        assert of.amplification == pytest.approx(1e-6, rel=1e-4)


def test_zeros_have_no_ratio():
    model, data = classifier(), labelled([10])
    fisher = kc.estimate(model, data, "categorical")
    gradient = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    of = updates.measure(model, None, "categorical", fisher, gradient=gradient)["0"]
    assert (of.cosine, of.amplification, of.update_to_weight) == (None, None, None)


def test_the_default_damping_follows_the_block():
    model, data = classifier(), labelled([10])
    fisher = kc.estimate(model, data, "categorical")
    gradient = mean_gradient(model, data, "categorical")
    found = updates.measure(model, None, "categorical", fisher, gradient=gradient)
    block = fisher["0"]
    assert found["0"].damping == pytest.approx(1e-3 * float(block.trace()) / block.layout.numel)


def test_neither_data_nor_a_gradient_is_refused():
    model, data = classifier(), labelled([10])
    with pytest.raises(kc.ArgumentError, match="pass gradient="):
        updates.measure(model, None, "categorical", kc.estimate(model, data, "categorical"))
