"""Embeddings of what all examples share: no dimension of such a call counts examples."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from ..helpers import Apply
from ..reference import assert_same, categorical_log_prob, fisher_of_draws
from .embedding_cases import FEATURES, TOKENS, embedding, parameters_in_order

POSITIONS = {
    "once": lambda n, t: torch.arange(t),
    "as one example": lambda n, t: torch.arange(t)[None],
    "by each": lambda n, t: torch.arange(t).expand(n, t),
    "some twice": lambda n, t: (torch.arange(t) // 2)[None],
}


class Positional(nn.Module):
    """Tokens with a table of positions that all examples look up."""

    def __init__(self, look_up: Any, *, tokens: bool = False, **arguments: Any) -> None:
        super().__init__()
        self.look_up = look_up
        self.table = embedding(arguments)
        self.tokens = self.table if tokens else embedding({}).requires_grad_(False)
        self.head = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(4 * FEATURES, 4))

    def forward(self, indices: Tensor) -> Tensor:
        return self.head(self.tokens(indices) + self.table(self.look_up(len(indices), 4)))


def of_the_table(model: Positional, indices: Tensor, labels: list[Tensor]) -> Tensor:
    order = parameters_in_order(model.table)
    settings = {"parameters": [model.table.weight], "divisor": len(indices)}
    return fisher_of_draws(model, indices, labels, categorical_log_prob, **settings)[order][:, order]


@pytest.mark.parametrize("arguments", [{}, {"padding_idx": 1}], ids=["plain", "padding"])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("look_up", POSITIONS.values(), ids=POSITIONS)
def test_what_all_look_up_is_squared_example_by_example(look_up, tokens, arguments):
    """With labels that are not drawn, products between examples do not vanish: they must not be there."""
    model, indices, labels = (
        Positional(look_up, tokens=tokens, **arguments),
        torch.randint(3, (6, 4)),
        torch.arange(6) % 4,
    )
    words = ["block", "diagonal", "tkfac", "ekfac", "kfac"]
    data = [(indices, labels)]
    found = kc.estimate(model, data, "categorical", structure=words, kind="empirical")
    block, diagonal, tkfac, ekfac, kfac = (fisher["table"] for fisher in found)
    expected = of_the_table(model, indices, [labels])
    assert_same(block.to_dense(), expected)
    assert_same(diagonal.diagonal().flatten(), expected.diagonal())
    assert_same(tkfac.G, torch.einsum("otpt -> op", expected.reshape(FEATURES, TOKENS, FEATURES, TOKENS)))
    assert_same(ekfac.trace(), expected.trace())
    each = copy.deepcopy(model)
    each.look_up = lambda n, t: look_up(n, t).expand(n, t)
    assert_same(kfac.G, kc.estimate(each, data, "categorical", kind="empirical")["table"].G)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("structure", ["kfac", "tkfac", "block", "diagonal", "unit_wise"])
@pytest.mark.parametrize("look_up", ["once", "as one example"])
def test_drawn_labels_take_one_backward_and_have_the_same_mean(look_up, structure, tokens):
    """ORACLES 14: over all combinations of labels, each as likely, where the gradient of all examples is squared."""
    model, indices = Positional(POSITIONS[look_up], tokens=tokens), torch.randint(3, (3, 4))
    model.head.append(Apply(lambda f: f - f.detach()))
    labels = [torch.tensor(combination) for combination in product(range(4), repeat=3)]
    found, expected = (
        kc.estimate(model, [indices], "categorical", structure=structure, **settings)["table"]
        for settings in ({"options": kc.Options(draws=[labels])}, {"kind": "exact"})
    )
    assert_same(found.to_dense(), expected.to_dense())


def test_reduce_takes_positions_of_one_example_and_refuses_a_column():
    """Means over positions need to know which of them are one example's."""
    indices, rules = torch.randint(3, (6, 4)), {"table": {"sharing": "reduce"}}
    model = Positional(POSITIONS["as one example"])
    one = kc.estimate(model, [indices], "categorical", rules=rules, kind="exact")["table"]
    model.look_up = POSITIONS["by each"]
    each = kc.estimate(model, [indices], "categorical", rules=rules, kind="exact")["table"]
    assert_same(one.to_dense(), each.to_dense())
    with pytest.raises(kc.CaptureError, match=r"layer 'table' with sharing='reduce' has 4 entries"):
        kc.estimate(Positional(POSITIONS["once"]), [indices], "categorical", rules=rules)
