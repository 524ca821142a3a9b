"""From gradients and inverses to updates: what is refused, what a missing gradient counts as, what is written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kfac_cond as kc
from kfac_cond.gradients import gradient_matrix, gradients_of, rate_of, trust_region_scale, write
from kfac_cond.layers.layer import Layer
from kfac_cond.layers.survey import survey
from kfac_cond.trust_region import LayerUpdate

from .reference import assert_same


@pytest.fixture
def layer() -> Layer:
    found = survey(nn.Sequential(nn.Linear(3, 2))).layers["0"]
    for parameter in found.parameters.values():
        parameter.grad = torch.randn_like(parameter)
    return found


@pytest.fixture
def inverse(layer: Layer) -> kc.KroneckerBlock:
    rows = torch.randn(9, 4), torch.randn(9, 2)
    return kc.KroneckerBlock(layer.layout, A=rows[0].mT @ rows[0], G=rows[1].mT @ rows[1])


def update_of(layer: Layer, gradients: dict[str, torch.Tensor], inverse: kc.KroneckerBlock) -> torch.Tensor:
    return inverse.matvec(gradient_matrix(layer, gradients))


def test_gradients_are_named(layer):
    assert {name: gradient.shape for name, gradient in gradients_of(layer).items()} == {
        "0.weight": (2, 3),
        "0.bias": (2,),
    }


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_missing_gradient_is_left_out(layer, name):
    layer.parameters[f"0.{name}"].grad = None
    assert f"0.{name}" not in gradients_of(layer)


def test_no_gradient_at_all_is_empty(layer):
    layer.parameters["0.weight"].grad = layer.parameters["0.bias"].grad = None
    assert gradients_of(layer) == {}


def test_a_sparse_gradient_is_refused_by_name(layer):
    layer.parameters["0.weight"].grad = layer.parameters["0.weight"].grad.to_sparse()
    with pytest.raises(kc.ArgumentError, match=r"gradient of '0\.weight'.*sparse.*exclude=True"):
        gradients_of(layer)


def test_a_changed_layer_is_refused_by_name(layer):
    layer.parameters["0.bias"].requires_grad_(False)
    with pytest.raises(kc.ModelChangedError, match="layer '0'"):
        gradients_of(layer)


def test_an_update_is_the_inverse_times_the_matrix(layer, inverse):
    matrix = torch.cat([layer.parameters["0.weight"].grad, layer.parameters["0.bias"].grad[:, None]], 1)
    assert_same(gradient_matrix(layer, gradients_of(layer)), matrix)
    found = update_of(layer, gradients_of(layer), inverse)
    assert_same(found, inverse.G @ matrix @ inverse.A)


def test_a_missing_gradient_counts_as_zero(layer):
    layer.parameters["0.bias"].grad = None
    assert torch.equal(gradient_matrix(layer, gradients_of(layer))[:, -1], torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_gradient_is_brought_to_the_dtype_of_statistics(layer, dtype):
    found = {name: gradient.to(dtype) for name, gradient in gradients_of(layer).items()}
    assert gradient_matrix(layer, found).dtype == torch.float32


RATES = {
    "none": ({}, 1.0),
    "one": ({"0.weight": 0.1}, 0.1),
    "the larger": ({"0.weight": 0.1, "0.bias": 0.3}, 0.3),
    "a tensor": ({"0.weight": torch.tensor(0.1)}, 0.1),
    "a tensor and a number": ({"0.weight": torch.tensor(0.1), "0.bias": 0.3}, 0.3),
    "two tensors": ({"0.weight": torch.tensor(0.5), "0.bias": torch.tensor([0.3])}, 0.5),
    "zero": ({"0.weight": 0.0}, 0.0),
}


@pytest.mark.parametrize("case", RATES)
def test_the_rate_is_the_largest_of_the_layer_s(layer, case):
    given, expected = RATES[case]
    rates = {id(layer.parameters[name]): rate for name, rate in given.items()}
    assert float(rate_of(layer, rates)) == pytest.approx(expected)


@pytest.mark.parametrize("scale", [None, 0.25], ids=["whole", "shortened"])
def test_what_is_written_is_the_update(layer, inverse, scale):
    gradients = {"0": gradients_of(layer)}
    updates = {"0": update_of(layer, gradients["0"], inverse)}
    write({"0": layer}, gradients, updates, None if scale is None else torch.tensor(scale))
    expected = updates["0"] * (scale or 1.0)
    assert_same(torch.cat([layer.parameters["0.weight"].grad, layer.parameters["0.bias"].grad[:, None]], 1), expected)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch wants gradients of the weight's dtype")
def test_writing_keeps_the_gradient_s_tensor_and_dtype(layer, inverse):
    layer.parameters["0.weight"].grad_dtype = None
    gradient = layer.parameters["0.weight"].grad = layer.parameters["0.weight"].grad.to(torch.bfloat16)
    gradients = {"0": gradients_of(layer)}
    write({"0": layer}, gradients, {"0": update_of(layer, gradients["0"], inverse)}, None)
    assert layer.parameters["0.weight"].grad is gradient
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("factor", [2.0, 1024.0])
def test_the_scaler_s_factor_is_taken_out_of_gradient_and_update(layer, factor):
    g = torch.randn(2, 4)
    plain = trust_region_scale(kc.KLClip(1e-3), {"0": LayerUpdate(g, 3 * g, 0.7)}, None)
    scaled = {"0": LayerUpdate(factor * g, 3 * factor * g, 0.7)}
    assert_same(trust_region_scale(kc.KLClip(1e-3), scaled, torch.tensor(factor)), plain)
