"""ORACLES 5 with weights: class weights, weights of positives and ignored labels through every structure and kind."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor

import kfac_cond as kc

from .likelihood_cases import Case
from .reference import assert_same, exact_fisher, fisher_of_draws
from .test_structures import stored

CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
POSITIVES, ELEMENTS = (torch.tensor(pair, dtype=torch.float64) for pair in ([2.0, 0.3], [1.0, 4.0]))


class Weighted(Case):
    """A case whose terms have weights kappa by the labels of the data, and these alone."""

    def __init__(self, net: str, head: str) -> None:
        super().__init__(net, head)
        if head == "bernoulli":
            self.likelihood = kc.Bernoulli(event_dims=(), pos_weight=POSITIVES, weight=ELEMENTS)
            self.kappa = ELEMENTS * (POSITIVES * self.labels + 1 - self.labels)
            self.divisor = self.labels.numel()
            return
        self.likelihood = kc.Categorical(dim=-1, weight=CLASS_WEIGHTS, ignore_index=-100)
        self.kappa = CLASS_WEIGHTS[self.labels]
        self.kappa.view(-1)[::4] = 0.0
        self.divisor = float(self.kappa.sum())
        self.labels = self.labels.masked_fill(self.kappa == 0, -100)

    def dense(self, kind: str) -> Tensor:
        """The sum over examples of what one gives, a score times the root of kappa and the output Fisher times it."""
        return sum(self.of_example(n, kind) for n in range(len(self.inputs))) / self.divisor

    def of_example(self, n: int, kind: str) -> Tensor:
        settings = {"parameters": list(self.model.parameters()), "divisor": 1}
        x, kappa = self.inputs[n : n + 1], self.kappa[n]
        if kind == "exact":
            each = kappa.flatten() if self.head.width == 2 else kappa.flatten().repeat_interleave(self.head.width)
            return exact_fisher(self.model, x, lambda f: each[:, None] * self.head.fisher(f), **settings).detach()
        labels = self.draws if kind == "sampled" else [self.labels.clamp(min=0)]
        return fisher_of_draws(
            self.model,
            x,
            [one[n : n + 1] for one in labels],
            lambda f, y: (kappa.sqrt() * self.head.distribution(f).log_prob(y)).sum(),
            **settings,
        )


@lru_cache
def weighted(net: str, head: str) -> Weighted:
    return Weighted(net, head)


heads = pytest.mark.parametrize("head", ["categorical", "bernoulli"])
kinds = pytest.mark.parametrize("kind", ["sampled", "exact", "empirical"])


@kinds
@pytest.mark.parametrize("structure", ["ekfac", "tkfac", "kpsvd", "diagonal", "block"])
@heads
@pytest.mark.parametrize("net", ["perceptron", "mixing"])
def test_blocks_are_those_of_the_weighted_loss(net, head, structure, kind):
    of = weighted(net, head)
    found, kfac = of.stored(kind)[structure], of.stored(kind)["kfac"]
    tolerance = 1e-7 if structure == "kpsvd" else 1e-10
    for name, block in found.items():
        expected = stored(structure, of.block(kind, block), block, kfac[name])
        assert_same(block.to_dense(), expected, tolerance=tolerance)


@kinds
@heads
@pytest.mark.parametrize("net", ["perceptron", "mixing"])
def test_dense_is_that_of_the_weighted_loss(net, head, kind):
    of = weighted(net, head)
    assert_same(of.stored(kind)["dense"].to_dense(), of.dense(kind))


@kinds
@heads
def test_G_is_the_block_of_the_bias(head, kind):
    """With one position, whatever A is: the weights enter G alone."""
    of = weighted("perceptron", head)
    for block in of.stored(kind)["kfac"].values():
        F = of.block(kind, block).reshape(block.layout.matrix_shape * 2)
        assert_same(block.G, F[:, -1, :, -1])


@heads
def test_the_exact_one_is_the_gauss_newton_matrix_of_the_weighted_criterion(head):
    """From torch's own criterion: the Hessian of the loss in the outputs, between two Jacobians."""
    of = weighted("perceptron", head)
    if head == "bernoulli":
        criterion = torch.nn.BCEWithLogitsLoss(weight=ELEMENTS, pos_weight=POSITIVES)
    else:
        criterion = torch.nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, ignore_index=-100)
    names = dict(of.model.named_parameters())

    def outputs(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(of.model, values, (of.inputs,))

    f = outputs(names).detach()
    jacobians = torch.func.jacrev(outputs)(names)
    J = torch.cat([jacobians[name].reshape(f.numel(), -1) for name in names], 1).detach()
    H = torch.func.hessian(lambda f: criterion(f, of.labels))(f).reshape(f.numel(), f.numel())
    expected = J.T @ H @ J
    assert_same(of.stored("exact")["dense"].to_dense(), expected)
