"""Age, drift and effective numbers of what preconditions in training, by brute force and known answers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kfac_cond as kc
from kfac_cond.inspection import staleness
from kfac_cond.inspection.gradients import mean_gradient
from kfac_cond.inspection.staleness import effective_captures

from ..helpers import classifier
from ..training import batches, train

RULES = {"factored": kc.Damping(0.1), "exact": kc.Damping(0.1, rule="exact")}


def trained(steps: int, *, damping: kc.Damping, factors: int = 1, inverses: int = 4, **settings) -> kc.KFAC:
    model = classifier()
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.3)
    schedule = kc.Schedule(factors=factors, inverses=inverses, decay=0.8)
    kfac = kc.KFAC(model, criterion, damping=damping, schedule=schedule, **settings)
    kfac.attach(optimizer)
    train(model, criterion, optimizer, batches(steps, classes=3))
    kfac.test_model = model
    return kfac


def dense_inverse(block: kc.Block, damping: kc.Damping) -> torch.Tensor:
    if damping.rule == "factored":
        return block.inverse(damping=damping.value, rule="factored").to_dense()
    return block.inverse(damping=damping.value).to_dense()


@pytest.mark.parametrize("rule", RULES)
def test_a_stale_inverse_against_the_dense_matrices(rule):
    """Refreshed at steps 0 and 4, captured at every one; seven steps were taken."""
    kfac = trained(7, damping=RULES[rule])
    gradient = mean_gradient(kfac.test_model, batches(1, classes=3, seed=5), "categorical")
    found, now = staleness.measure(kfac, gradient=gradient), kfac.fisher()
    for name, block in now.items():
        old, of = kfac._shared.factors.inverses[name].to_dense(), found[name]
        fresh = dense_inverse(block, RULES[rule])
        g = block.layout.to_matrix({key: gradient[key] for key in block.layout.names}).flatten()
        mine, theirs = old @ g, fresh @ g
        assert of.cosine == pytest.approx(float(mine @ theirs / mine.norm() / theirs.norm()), abs=1e-9)
        again = old @ torch.linalg.solve(fresh, g)
        assert of.residual == pytest.approx(float((again - g).norm() / g.norm()), rel=1e-6)
        assert of.residual > 1e-3
        assert 0 < of.off_diagonal_A < 1
        assert of.age == 3


@pytest.mark.parametrize("rule", RULES)
def test_an_inverse_of_this_step_is_not_stale(rule):
    kfac = trained(5, damping=RULES[rule])
    gradient = mean_gradient(kfac.test_model, batches(1, classes=3), "categorical")
    for of in staleness.measure(kfac, gradient=gradient).values():
        assert of.cosine == pytest.approx(1.0)
        assert of.residual < 1e-6
        assert max(of.off_diagonal_A, of.off_diagonal_G) < 1e-6
        assert of.age == 1


def test_a_rotation_of_the_factors_is_the_off_diagonal_share():
    """A = R diag(3, 1) R^T in the basis of the identity: off it is the sine of twice the angle."""
    layout = kc.estimate(nn.Linear(2, 2, bias=False), [torch.randn(3, 2)], "categorical")[""].layout
    c, s = torch.tensor(0.3).cos(), torch.tensor(0.3).sin()
    R = torch.stack([torch.stack([c, -s]), torch.stack([s, c])])
    values = torch.diag(torch.tensor([3.0, 1.0]))
    old = kc.KroneckerBlock(layout, values, values).inverse(damping=0.1)
    now = kc.KroneckerBlock(layout, R @ values @ R.T, values)
    of_A, of_G = staleness.off_diagonal(now, old)
    assert float(of_A) == pytest.approx(float((2 * (2 * c * s) ** 2 / 10) ** 0.5))
    assert float(of_G) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("captures", [1, 2, 5, 40])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
def test_effective_captures_are_those_of_the_weights(decay, captures):
    weights = torch.tensor([decay**age for age in range(captures)])
    expected = weights.sum() ** 2 / weights.square().sum()
    assert float(effective_captures(weights.sum(), decay)) == pytest.approx(float(expected))


def test_effective_examples_are_counted_from_the_average():
    kfac = trained(6, damping=kc.Damping(0.1), factors=2)
    weights = torch.tensor([1.0, 0.8, 0.64])
    captures = float(weights.sum() ** 2 / weights.square().sum())
    for of in staleness.measure(kfac).values():
        assert of.effective_captures == pytest.approx(captures)
        assert of.effective_examples == pytest.approx(8 * captures)
        assert of.effective_positions == pytest.approx(8 * captures)
        assert (of.cosine, of.residual) == (None, None)
    assert staleness.measure(kfac)["2"].dimension_A == 5
    assert staleness.measure(kfac)["2"].dimension_G == 3


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
def test_the_kept_dimension_is_the_trace_of_the_product(structure, rule):
    kfac = trained(3, damping=RULES[rule], structure=structure)
    factors = kfac._shared.factors
    for name, block in factors.blocks(factors.average.ready).items():
        inverse = factors.inverses[name]
        expected = float((block.to_dense() @ inverse.to_dense()).trace())
        assert float(staleness.kept_dimension(block, inverse)) == pytest.approx(expected)


def test_the_age_outlives_a_checkpoint():
    kfac = trained(7, damping=kc.Damping(0.1))
    other = kc.KFAC(classifier(), nn.CrossEntropyLoss(), damping=0.1)
    other.load_state_dict(kfac.state_dict())
    assert {of.age for of in staleness.measure(other).values()} == {3}


def test_a_state_of_before_ages_were_noted_is_read():
    kfac = trained(7, damping=kc.Damping(0.1))
    state = kfac.state_dict()
    without = ((name, {key: one for key, one in entry.items() if key != "made"}) for name, entry in state["layers"])
    other = kc.KFAC(classifier(), nn.CrossEntropyLoss(), damping=0.1)
    other.load_state_dict({**state, "layers": tuple(without)})
    assert {of.age for of in staleness.measure(other).values()} == {None}


def test_before_the_first_inverse_it_says_what_to_do():
    with pytest.raises(kc.NotReadyError, match="run a training step"):
        staleness.measure(kc.KFAC(classifier(), nn.CrossEntropyLoss()))
