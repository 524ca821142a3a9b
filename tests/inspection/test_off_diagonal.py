from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.inspection import off_diagonal

from ..fisher_cases import MODELS, case
from ..helpers import classifier
from ..reference import entries_of


def share_of(dense: Tensor, fisher: kc.Fisher, model: nn.Module) -> float:
    """By enumeration."""
    within = 0.0
    for block in fisher.values():
        order = entries_of(model, block.layout)
        within += float(dense[order][:, order].square().sum())
    return 1 - within / float(dense.square().sum())


def measured(of: object, **settings: object) -> off_diagonal.BlockDiagonality:
    fisher = of.estimate("kfac", "exact")
    data = [(of.inputs[:3], of.labels[:3]), (of.inputs[3:], of.labels[3:])]
    return off_diagonal.measure(of.model, data, of.likelihood, fisher, **settings)


def blocks(of: object) -> tuple[kc.Block, kc.Fisher]:
    """The Fisher as one matrix, and layer by layer."""
    dense, layers = of.estimate(["dense", "kfac"], "exact", dtype=torch.float64)
    return dense["*"], layers


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_the_share_is_that_of_the_dense_fisher(model: str, likelihood: str) -> None:
    of = case(model, likelihood)
    exact, layers = blocks(of)
    found = off_diagonal.of_matrix(exact, layers, probes=150, seed=0)
    assert abs(found.share - share_of(of.dense("exact"), layers, of.model)) < 4 * found.standard_error
    assert found.standard_error < 0.15
    assert found.norm == pytest.approx(float(torch.linalg.norm(of.dense("exact"))), rel=0.3)


@pytest.mark.parametrize("model", ["perceptron", "tokens"])
def test_probes_go_through_the_exact_products(model: str) -> None:
    of = case(model, "categorical")
    expected = off_diagonal.of_matrix(*blocks(of), probes=3, seed=7)
    found = measured(of, probes=3, options=kc.Options(seed=7))
    assert found.share == pytest.approx(expected.share, rel=1e-9)
    assert found.norm == pytest.approx(expected.norm, rel=1e-9)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-9)


def test_standard_errors_cover() -> None:
    of = case("perceptron", "categorical")
    exact, layers = blocks(of)
    expected = share_of(of.dense("exact"), layers, of.model)
    found = [off_diagonal.of_matrix(exact, layers, probes=12, seed=seed) for seed in range(100)]
    # Student's t of eleven degrees of freedom, at 95 %; a quotient of few probes is not quite normal.
    assert sum(abs(one.share - expected) < 2.2 * one.standard_error for one in found) >= 85


class Apart(nn.Module):
    """Two layers that no output shares."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], -1)


def test_a_block_diagonal_fisher_has_nothing_outside() -> None:
    model, x = Apart(), torch.randn(6, 3)
    fisher = kc.estimate(model, [x], "gaussian")
    found = off_diagonal.measure(model, [x], "gaussian", fisher, probes=2)
    assert found.share == pytest.approx(0.0, abs=1e-12)
    assert found.standard_error == pytest.approx(0.0, abs=1e-12)
    assert (found.layers, found.probes) == (2, 2)


def test_layers_that_are_copies_have_half_outside() -> None:
    """f = (W + W') x: all four blocks are the same."""
    model, x = Apart(), torch.randn(6, 3)
    model.forward = lambda x: model.left(x) + model.right(x)
    fisher = kc.estimate(model, [x], "gaussian")
    found = off_diagonal.measure(model, [x], "gaussian", fisher, probes=40)
    assert abs(found.share - 0.5) < 4 * found.standard_error
    assert found.standard_error < 0.15


def test_one_block_of_everything_has_nothing_outside() -> None:
    model, x = classifier(), torch.randn(6, 3)
    fisher = kc.estimate(model, [x], "categorical", structure="dense")
    assert off_diagonal.measure(model, [x], "categorical", fisher, probes=1).share == pytest.approx(0.0, abs=1e-12)


def test_only_the_layers_of_the_fisher_are_looked_at() -> None:
    model, x = classifier(), torch.randn(6, 3)
    fisher = kc.estimate(model, [x], "categorical", options=kc.Options(layers="2"))
    found = off_diagonal.measure(model, [x], "categorical", fisher, probes=3)
    assert (found.share, found.layers) == (pytest.approx(0.0, abs=1e-12), 1)


def test_one_probe_has_no_standard_error() -> None:
    assert measured(case("perceptron", "categorical"), probes=1).standard_error is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probes": 0}, "expected a whole number >= 1"),
        ({"data": iter([])}, "gone through once"),
        ({"model": nn.Linear(3, 3)}, "does not train"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict, message: str) -> None:
    model, x = classifier(), torch.randn(6, 3)
    fisher = kc.estimate(model, [x], "categorical")
    given = {"model": model, "data": [x], "likelihood": "categorical", "fisher": fisher, **settings}
    with pytest.raises(kc.KFACError, match=message):
        off_diagonal.measure(**given)


def test_nothing_of_the_model_or_the_random_state_changes() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    data = [torch.randn(9, 3)]
    fisher = kc.estimate(model, data, "categorical")
    before = [t.clone() for t in (*model.parameters(), torch.get_rng_state())]
    off_diagonal.measure(model, data, "categorical", fisher, probes=1)
    assert all(map(torch.equal, (*model.parameters(), torch.get_rng_state()), before))
