"""Layers whose first dimension does not count examples: what all examples share, and rows in another order."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.structures import Fisher

from .reference import assert_same, example_gradients, gaussian_log_prob

NORM, OUTER = "table.1", "table.3"


class Positions(nn.Module):
    """A bias for each feature from a small network on a table of coordinates, as windows of attention have it."""

    def __init__(self, leading: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("coordinates", torch.randn(*leading, 2))
        self.table = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 1, bias=False))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x * self.table(self.coordinates).flatten()[:4]))


class LengthFirst(nn.Module):
    """Time steps before examples, in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 1))
        self.head = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.table(x.reshape(len(x), 2, 2).transpose(0, 1).flatten(0, 1))
        return self.head(rows.reshape(2, len(x)).T)


MODELS = {
    "one table": lambda: Positions((1, 4)),
    "rows": lambda: Positions((4,)),
    "more rows": lambda: Positions((5,)),
    "as many times": lambda: Positions((6,)),
    "length first": LengthFirst,
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture
def inputs():
    return torch.randn(3, 4)


def estimated(model: nn.Module, inputs: Tensor, labels: Tensor, structure: str, kind: str) -> Fisher:
    options = kc.Options(dtype=torch.float64)
    return kc.estimate(model, [(inputs, labels)], kc.Gaussian(1.0), structure=structure, kind=kind, options=options)


def scores(model: nn.Module, inputs: Tensor, labels: Tensor, kind: str) -> Tensor:
    return torch.ones(3, 1) if kind == "exact" else (model(inputs) - labels).detach()


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_the_block_of_each_layer_is_made_example_by_example(model, inputs, kind):
    labels = torch.randn(3, 1)
    sent, parameters = scores(model, inputs, labels, kind), dict(model.named_parameters())
    found = estimated(model, inputs, labels, "block", kind)
    rows = [
        torch.autograd.grad(model(x[None]), list(parameters.values()), score[None])
        for x, score in zip(inputs, sent, strict=True)
    ]
    for block in found.values():
        V = torch.stack([block.layout.to_matrix(dict(zip(parameters, one, strict=True))).flatten() for one in rows])
        assert_same(block.to_dense(), V.T @ V / 3)


def test_dense_is_made_example_by_example(model, inputs):
    labels = torch.randn(3, 1)
    options = kc.Options(dtype=torch.float64, draws=[[labels]])
    found = kc.estimate(model, [inputs], kc.Gaussian(1.0), structure="dense", options=options)
    rows = example_gradients(model, inputs, labels, gaussian_log_prob, list(model.parameters()))
    assert_same(found.to_dense(), rows.T @ rows / 3)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_G_has_no_product_of_two_examples(model, inputs, kind):
    labels, heard = torch.randn(3, 1), []
    G = estimated(model, inputs, labels, "kfac", kind)[OUTER].G
    handle = model.get_submodule(OUTER).register_forward_hook(lambda module, args, output: heard.append(output))
    sent = scores(model, inputs, labels, kind)
    heard.clear()
    outputs = model(inputs)
    handle.remove()
    each = [torch.autograd.grad(outputs[n], heard[0], sent[n], retain_graph=True)[0].flatten() for n in range(3)]
    assert_same(G, sum(g @ g for g in each).reshape(1, 1) / 3)


@pytest.mark.parametrize("name", ["one table", "rows", "more rows"])
def test_the_norm_of_what_is_shared_has_the_exact_block_on_average_over_labels(inputs, name):
    """Labels one standard deviation off on either side: their mean over all signs is the expectation."""
    model = MODELS[name]()
    outputs = model(inputs).detach()
    draws = [outputs + torch.tensor(signs)[:, None] for signs in product([-1.0, 1.0], repeat=3)]
    options = kc.Options(dtype=torch.float64, draws=[draws])
    found = kc.estimate(model, [inputs], kc.Gaussian(1.0), samples=len(draws), options=options)
    expected = estimated(model, inputs, outputs, "unit_wise", "exact")
    assert_same(found[NORM].A * found[NORM].G, expected[NORM].matrices[:, 0])


def test_a_layer_can_be_asked_for_by_the_name_of_its_parameter(inputs):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.code, self.head = nn.Linear(4, 3, bias=False), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.code(x)) @ self.code.weight)

    model = Tied()
    whole = kc.estimate(model, [inputs], kc.Gaussian(1.0))
    assert list(whole) == ["code.weight", "head"]
    for name in whole:
        alone = kc.estimate(model, [inputs], kc.Gaussian(1.0), options=kc.Options(layers=name))
        assert list(alone) == [name]
        assert torch.equal(alone[name].G, whole[name].G)
