"""Bilinear layers: as linear layers on the products of their inputs' entries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kfac_cond as kc
from kfac_cond.layers import BilinearKind

from ..helpers import Apply
from ..reference import assert_same, categorical_log_prob, exact_fisher, fisher_of_draws, matrix_order
from .test_kinds import assert_gradient_is_made_of_pairs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (5,), (5, 2), (5, 2, 3), (0,), (5, 0)])
def test_pairs_make_the_gradient(shape, bias):
    module = nn.Bilinear(3, 2, 4, bias=bias)
    assert_gradient_is_made_of_pairs(module, torch.randn(*shape, 3), torch.randn(*shape, 2))


def test_inputs_by_name_and_not_contiguous():
    x1, x2 = torch.randn(3, 5).T, torch.randn(2, 5).T
    assert_gradient_is_made_of_pairs(nn.Bilinear(3, 2, 4), input2=x2, input1=x1)
    assert_gradient_is_made_of_pairs(nn.Bilinear(3, 2, 4), x1, input2=x2)


class Pairing(nn.Module):
    """A bilinear layer of two parts of the input, between others."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.first, self.pair, self.head = nn.Linear(4, 5), nn.Bilinear(3, 2, 4, bias=bias), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.pair(h[..., :3], h[..., 3:])))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("draws", [1, 3])
def test_one_example_is_exact(draws, bias):
    """ORACLES 6."""
    model, inputs = Pairing(bias=bias), torch.randn(1, 4)
    drawn = [torch.randint(3, (1,)) for _ in range(draws)]
    found = kc.estimate(model, [inputs], "categorical", options=kc.Options(draws=[drawn]))["pair"]
    expected = fisher_of_draws(
        model, inputs, drawn, categorical_log_prob, parameters=[*model.pair.parameters()], divisor=1
    )
    order = matrix_order(model.pair)
    assert_same(found.to_dense(), expected[order][:, order])


@pytest.mark.parametrize(("sharing", "pooled"), [("expand", False), ("reduce", True)])
def test_positions_of_a_gaussian_are_exact(sharing, pooled):
    """ORACLES 9."""
    pair, head = nn.Bilinear(3, 2, 4), Apply(lambda h: h.mean(1) if pooled else h)
    model = Apply(lambda x: head(pair(x[..., :3], x[..., 3:])))
    model.pair = pair
    inputs = torch.randn(4, 3, 5)
    likelihood = kc.Gaussian(1.0, event_dims=(-1,))
    found = kc.estimate(model, [inputs], likelihood, kind="exact", rules={"pair": {"sharing": sharing}})["pair"]
    divisor = 4 if pooled else 12
    expected = exact_fisher(
        model, inputs, lambda f: torch.eye(f.numel()), parameters=[*pair.parameters()], divisor=divisor
    )
    order = matrix_order(pair)
    assert_same(found.to_dense(), expected[order][:, order])


def test_it_has_the_block_of_a_linear_layer_on_the_products():
    pair, linear = nn.Bilinear(3, 2, 4), nn.Linear(6, 4)
    linear.weight.data, linear.bias.data = pair.weight.data.flatten(1), pair.bias.data
    x1, x2 = torch.randn(5, 3), torch.randn(5, 2)
    written = Apply(lambda x: linear((x[:, :3, None] * x[:, None, 3:]).flatten(1)))
    plain = Apply(lambda x: pair(x[:, :3], x[:, 3:]))
    written.layer, plain.layer = linear, pair
    options = kc.Options(seed=1)
    found, expected = (
        kc.estimate(one, [torch.cat([x1, x2], 1)], "categorical", options=options)["layer"] for one in (plain, written)
    )
    assert_same(found.to_dense(), expected.to_dense())


@pytest.mark.parametrize("args", [(torch.zeros(2, 3),), (torch.zeros(2, 3), [1.0, 2.0])])
def test_another_call_is_none_of_its_own(args):
    assert BilinearKind().of_call(nn.Bilinear(3, 2, 4), args, {}, torch.float64) is None
