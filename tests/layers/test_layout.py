"""A layer's parameters as one matrix, there and back."""

from __future__ import annotations

import pytest
import torch

import kfac_cond as kc
from kfac_cond.layers import WeightLayout
from kfac_cond.layers.layout import JointLayout

from ..reference import assert_same

LAYOUTS = {
    "linear": (WeightLayout("w", "b", (4, 3)), (4, 4)),
    "without bias": (WeightLayout("w", None, (4, 3)), (4, 3)),
    "bias alone": (WeightLayout(None, "b", (4, 3)), (4, 1)),
    "convolution": (WeightLayout("w", "b", (4, 2, 3, 2)), (4, 13)),
    "groups": (WeightLayout("w", "b", (6, 2, 3), groups=2), (2, 3, 7)),
    "groups, bias alone": (WeightLayout(None, "b", (6, 2, 3), groups=2), (2, 3, 1)),
    "transposed": (WeightLayout("w", "b", (3, 4), transposed=True), (4, 4)),
    "transposed convolution": (WeightLayout("w", "b", (4, 2, 3, 2), transposed=True), (2, 25)),
    "transposed groups": (WeightLayout("w", "b", (6, 2, 3), groups=2, transposed=True), (2, 2, 10)),
    "transposed groups, bias alone": (WeightLayout(None, "b", (6, 2, 3), groups=2, transposed=True), (2, 2, 1)),
    "a unit an entry": (WeightLayout("w", "b", (2, 3), groups=6, output_dims=2), (6, 1, 2)),
    "a unit an entry, bias alone": (WeightLayout(None, "b", (2, 3), groups=6, output_dims=2), (6, 1, 1)),
    "one unit": (WeightLayout("w", "b", (1, 1), output_dims=2), (1, 2)),
    "joint": (
        JointLayout(
            parts=(WeightLayout("w", "b", (6, 2, 3), groups=2), WeightLayout("v", None, (3, 4), transposed=True))
        ),
        (54,),
    ),
    "any parameters": (
        JointLayout.of({"w": (2, 3), "scale": (), "experts": (2, 2, 2), "none": (0, 3), "b": (4,)}),
        (19,),
    ),
}


@pytest.fixture(params=LAYOUTS)
def case(request):
    return LAYOUTS[request.param]


def values(layout: WeightLayout) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in layout.shapes.items()}


def test_the_shape_of_the_matrix(case):
    layout, shape = case
    assert layout.matrix_shape == shape
    assert layout.to_matrix(values(layout)).shape == shape
    assert layout.numel == sum(x.numel() for x in values(layout).values())


def test_there_and_back(case):
    layout, _ = case
    tensors = values(layout)
    back = layout.from_matrix(layout.to_matrix(tensors))
    assert list(back) == list(layout.names)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_the_matrix_acts_on_inputs_as_the_layer_does():
    layout, _ = LAYOUTS["transposed"]
    tensors, x = values(layout), torch.randn(3)
    assert_same(layout.to_matrix(tensors) @ torch.cat([x, torch.ones(1)]), x @ tensors["w"] + tensors["b"])


def test_a_missing_tensor_is_named(case):
    layout, _ = case
    with pytest.raises(kc.ArgumentError, match=f"'{layout.names[-1]}' is missing"):
        layout.to_matrix({name: torch.zeros(layout.shapes[name]) for name in layout.names[:-1]})


def test_a_tensor_of_another_shape_is_named(case):
    layout, _ = case
    with pytest.raises(kc.ArgumentError, match=rf"'{layout.names[0]}' has shape \(9,\), expected"):
        layout.to_matrix({**values(layout), layout.names[0]: torch.zeros(9)})


def test_a_matrix_of_another_shape_is_refused(case):
    layout, shape = case
    with pytest.raises(kc.ArgumentError, match="expected"):
        layout.from_matrix(torch.zeros(*shape, 2))


def test_any_parameters_are_flattened_one_after_another():
    layout, _ = LAYOUTS["any parameters"]
    tensors = values(layout)
    assert torch.equal(layout.to_matrix(tensors), torch.cat([x.flatten() for x in tensors.values()]))


def test_a_layout_of_nothing_is_refused():
    with pytest.raises(kc.ArgumentError, match="no parameters"):
        JointLayout.of({})
