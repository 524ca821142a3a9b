"""Regressions whose Fisher at the maximum inverts to a covariance that every textbook has, through every way to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .reference import assert_same

ROWS, R, PHI, VARIANCE, TRIALS = 60, 2.5, 0.4, 0.7, 5


@dataclass(frozen=True)
class Family:
    """A regression as textbooks write it, in terms of the linear predictor f.

    ``weight`` is the diagonal of W, with X^T W X the information; ``residual`` times X^T is the gradient of log p.
    """

    likelihood: kc.Likelihood
    draw: Callable[[Tensor, torch.Generator], Tensor]
    weight: Callable[[Tensor], Tensor]
    residual: Callable[[Tensor, Tensor], Tensor]

    @property
    def constant(self) -> bool:
        """Whether every row has the same weight, wherever it is."""
        return len(set(self.weight(torch.tensor([-1.0, 0.0, 1.0])).tolist())) == 1


def normal(f: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(f.shape, generator=generator)


def coins(f: Tensor, generator: torch.Generator, trials: int) -> Tensor:
    return (torch.rand(*f.shape, trials, generator=generator) < f.sigmoid()[:, None]).sum(-1).double()


def gammas(f: Tensor, generator: torch.Generator) -> Tensor:
    return f.exp() * PHI * torch._standard_gamma(torch.full_like(f, 1 / PHI), generator=generator)


FAMILIES = {
    "poisson": Family(
        kc.Poisson(reduction="sum"),
        lambda f, g: torch.poisson(f.exp(), generator=g),
        lambda f: f.exp(),
        lambda f, y: y - f.exp(),
    ),
    "negative binomial": Family(
        kc.NegativeBinomial(R, reduction="sum"),
        lambda f, g: torch.poisson(f.exp(), generator=g),
        lambda f: R * f.exp() / (R + f.exp()),
        lambda f, y: R * (y - f.exp()) / (R + f.exp()),
    ),
    "logistic": Family(
        kc.Bernoulli(reduction="sum"),
        lambda f, g: coins(f, g, 1),
        lambda f: f.sigmoid() * (1 - f.sigmoid()),
        lambda f, y: y - f.sigmoid(),
    ),
    "binomial": Family(
        kc.Binomial(TRIALS, reduction="sum"),
        lambda f, g: coins(f, g, TRIALS),
        lambda f: TRIALS * f.sigmoid() * (1 - f.sigmoid()),
        lambda f, y: y - TRIALS * f.sigmoid(),
    ),
    "gaussian": Family(
        kc.Gaussian(VARIANCE, reduction="sum"),
        lambda f, g: f + VARIANCE**0.5 * normal(f, g),
        lambda f: torch.full_like(f, 1 / VARIANCE),
        lambda f, y: (y - f) / VARIANCE,
    ),
    "gamma": Family(
        kc.Gamma(PHI, reduction="sum"),
        gammas,
        lambda f: torch.full_like(f, 1 / PHI),
        lambda f, y: (y / f.exp() - 1) / PHI,
    ),
}


@lru_cache
def fitted(name: str) -> tuple[nn.Module, list[Tensor], Tensor]:
    """(model at the maximum, the data in two batches, the textbook's covariance); the intercept is the bias, last."""
    family, generator = FAMILIES[name], torch.Generator().manual_seed(4)
    x = torch.randn(ROWS, 3, generator=generator)
    X = torch.cat([x, torch.ones(ROWS, 1)], 1)
    y = family.draw(X @ torch.tensor([0.3, -0.2, 0.4, 0.5]), generator)
    beta = torch.zeros(4)
    for _ in range(50):
        # Fisher scoring.
        f = X @ beta
        beta = beta + torch.linalg.solve(X.T @ (family.weight(f)[:, None] * X), X.T @ family.residual(f, y))
    assert (X.T @ family.residual(X @ beta, y)).abs().max() < 1e-9
    model = nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.copy_(beta[:3])
        model.bias.copy_(beta[3])
    return model, [x[:25], x[25:]], torch.linalg.inv(X.T @ (family.weight(X @ beta)[:, None] * X))


def covariance(fisher: kc.Fisher) -> Tensor:
    return torch.stack([fisher.solve(unit) for unit in torch.eye(4)])


@pytest.mark.parametrize("structure", ["block", "dense", "tkfac", "kpsvd"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_estimate_inverts_to_the_covariance(name, structure):
    """With one output, R (x) C / tr F and the nearest Kronecker product are F itself."""
    model, data, textbook = fitted(name)
    fisher = kc.estimate(model, data, FAMILIES[name].likelihood, structure=structure, kind="exact")
    assert_same(covariance(fisher), textbook, tolerance=1e-8)
    errors = fisher.inverse().to_dense().diagonal().sqrt()
    assert_same(errors, textbook.diagonal().sqrt(), tolerance=1e-8)


@pytest.mark.parametrize("make", [kc.implicit, kc.gram])
@pytest.mark.parametrize("name", FAMILIES)
def test_products_and_the_kernel_invert_to_the_covariance(name, make):
    model, data, textbook = fitted(name)
    assert_same(covariance(make(model, data, FAMILIES[name].likelihood)), textbook, tolerance=1e-8)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", FAMILIES)
def test_kronecker_factors_do_where_all_rows_weigh_the_same(name, structure):
    """mean(w) mean(a a^T) is mean(w a a^T) for a constant w; elsewhere it is another matrix, also in the basis of A."""
    model, data, textbook = fitted(name)
    fisher = kc.estimate(model, data, FAMILIES[name].likelihood, structure=structure, kind="exact")
    if FAMILIES[name].constant:
        assert_same(covariance(fisher), textbook, tolerance=1e-8)
    else:
        assert (covariance(fisher) - textbook).norm() > 0.01 * textbook.norm()


def test_a_mean_loss_has_n_times_the_covariance():
    """F is that of the loss as it is stated: divided by N, its inverse is N times as large."""
    model, data, textbook = fitted("poisson")
    fisher = kc.estimate(model, data, kc.Poisson(), structure="block", kind="exact")
    assert_same(covariance(fisher), ROWS * textbook, tolerance=1e-8)


def test_numbers_of_trials_that_differ_are_weights():
    """W = n p (1 - p), with n bound as the terms' weights of one trial."""
    model, (x, _), _ = fitted("logistic")
    n = torch.arange(1.0, len(x) + 1)[:, None]
    X, p = torch.cat([x, torch.ones(len(x), 1)], 1), model(x).sigmoid().detach()
    likelihood = kc.Bernoulli(event_dims=(), reduction="sum").bind(weight=n)
    (columns,) = likelihood.fisher_columns(model(x).detach())
    rows = likelihood.weighted(columns, model(x).detach()) * X
    assert_same(rows.T @ rows, X.T @ (n * p * (1 - p) * X))


def test_the_standard_errors_of_a_printed_table():
    """Dobson 1990, An Introduction to Generalized Linear Models, page 93: a randomised controlled trial, in counts."""
    counts = torch.tensor([18.0, 17, 15, 20, 10, 20, 25, 13, 12])
    one_hot = torch.eye(3)[:, 1:]
    x = torch.cat([one_hot.repeat(3, 1), one_hot.repeat_interleave(3, 0)], 1)
    X, beta = torch.cat([x, torch.ones(9, 1)], 1), torch.zeros(5)
    for _ in range(30):
        rate = (X @ beta).exp()
        beta = beta + torch.linalg.solve(X.T @ (rate[:, None] * X), X.T @ (counts - rate))
    model = nn.Linear(4, 1)
    nn.utils.vector_to_parameters(beta, model.parameters())
    fisher = kc.estimate(model, [x], kc.Poisson(reduction="sum"), structure="block", kind="exact")
    printed = torch.tensor([[-0.4543, 0.2022], [-0.2930, 0.1927], [0.0, 0.2000], [0.0, 0.2000], [3.045, 0.1709]])
    found = torch.stack([beta, fisher.inverse().to_dense().diagonal().sqrt()], 1)
    torch.testing.assert_close(found, printed, rtol=0, atol=6e-4)
