"""ORACLES 1-5 on the closed forms beyond classes, bits and the plain Gaussian, by enumeration or quadrature."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import distributions as td

from kfac_cond.errors import LikelihoodError
from kfac_cond.likelihoods import (
    Beta,
    Binomial,
    Gamma,
    Gaussian,
    HeteroscedasticGaussian,
    Laplace,
    Likelihood,
    Multinomial,
    MultivariateGaussian,
    NegativeBinomial,
    Ordinal,
    Poisson,
    VonMises,
    exact_scores,
)

from .cases import named

COVARIANCE = torch.tensor([[2.0, 0.3, -0.2], [0.3, 0.5, 0.1], [-0.2, 0.1, 0.7]], dtype=torch.float64)
VARIANCES = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)


def points(*grids: Tensor) -> list[Tensor]:
    return [torch.stack(point) for point in itertools.product(*grids)]


def hermite(n: int = 8) -> tuple[Tensor, Tensor]:
    x, w = np.polynomial.hermite_e.hermegauss(n)
    return torch.as_tensor(x), torch.as_tensor(w) / math.sqrt(2 * math.pi)


def legendre(low: float, high: float, n: int = 400) -> tuple[Tensor, Tensor]:
    x, w = np.polynomial.legendre.leggauss(n)
    return torch.as_tensor((high - low) / 2 * x + (high + low) / 2), torch.as_tensor((high - low) / 2 * w)


def counts(last: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda f: (torch.arange(last + 1.0), torch.ones(last + 1))


def around(reach: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def rule(f: Tensor) -> tuple[Tensor, Tensor]:
        (y, w), (z, v) = legendre(f.item() - reach, f.item()), legendre(f.item(), f.item() + reach)
        return torch.cat([y, z]), torch.cat([w, v])

    return rule


def positive(f: Tensor) -> tuple[Tensor, Tensor]:
    t, w = legendre(-60.0, 8.0, 1500)
    return t.exp(), w * t.exp()


def fractions(f: Tensor) -> tuple[Tensor, Tensor]:
    t, w = legendre(-36.0, 36.0, 1500)
    return t.sigmoid(), w * t.sigmoid() * (-t).sigmoid()


@dataclass(frozen=True)
class Scalar:
    """A likelihood of one number an element; ``rule`` gives labels and the measure of each, for one output."""

    make: Callable[..., Likelihood]
    settings: tuple[object, ...]
    torch: Callable[[Tensor], td.Distribution] | None
    rule: Callable[[Tensor], tuple[Tensor, Tensor]]
    natural: bool = False

    def __str__(self) -> str:
        return f"{self.make.__name__}{self.settings}"  # type: ignore[attr-defined]


CUTS = (-1.0, 0.2, 1.5)
SCALARS = [
    Scalar(Laplace, (0.7,), lambda f: td.Laplace(f, 0.7), around(30.0)),
    Scalar(Poisson, (), lambda f: td.Poisson(f.exp()), counts(80), natural=True),
    Scalar(NegativeBinomial, (2.5,), lambda f: td.NegativeBinomial(2.5, logits=f - math.log(2.5)), counts(400)),
    Scalar(Binomial, (4,), lambda f: td.Binomial(4, logits=f), counts(4), natural=True),
    Scalar(Gamma, (0.4,), lambda f: td.Gamma(1 / 0.4, (-f).exp() / 0.4), positive),
    Scalar(Beta, (0.2,), lambda f: td.Beta(4 * f.sigmoid(), 4 * (-f).sigmoid()), fractions),
    Scalar(VonMises, (1.7,), lambda f: td.VonMises(f, 1.7), around(math.pi)),
    Scalar(Ordinal, (CUTS,), None, counts(3)),
]
scalars = pytest.mark.parametrize("case", SCALARS, ids=str)
OUTPUTS = torch.tensor([-1.1, -0.3, 0.0, 0.6, 1.2], dtype=torch.float64)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=tolerance, atol=tolerance)


def expected_over_labels(case: Scalar, power: int) -> Tensor:
    """E[score^power] at each output; power 0 is the mass."""
    likelihood, totals = case.make(*case.settings), []
    for f in OUTPUTS:
        y, w = case.rule(f)
        at = f.expand(len(y))
        weight = w * likelihood.log_prob(at, y).exp()
        totals.append((weight * likelihood.score(at, y) ** power).sum())
    return torch.stack(totals)


@scalars
def test_probabilities_sum_to_one(case: Scalar) -> None:
    close(expected_over_labels(case, 0), torch.ones(5))


@scalars
def test_the_score_has_mean_zero(case: Scalar) -> None:
    close(expected_over_labels(case, 1), torch.zeros(5))


@scalars
def test_the_fisher_is_the_second_moment_of_the_score(case: Scalar) -> None:
    close(case.make(*case.settings).fisher(OUTPUTS).flatten(), expected_over_labels(case, 2), 1e-9)


@pytest.mark.parametrize("case", [case for case in SCALARS if case.natural], ids=str)
def test_the_fisher_of_natural_parameters_is_the_hessian_at_any_label(case: Scalar) -> None:
    likelihood = case.make(*case.settings)
    labels = torch.tensor([0.0, 1, 2, 3, 4])
    hessian = torch.func.hessian(lambda f: -likelihood.log_prob(f, labels).sum())(OUTPUTS)
    close(likelihood.fisher(OUTPUTS).flatten().diag(), hessian)


@scalars
def test_the_score_is_the_gradient_of_minus_log_prob(case: Scalar) -> None:
    likelihood, outputs = case.make(*case.settings), OUTPUTS.clone().requires_grad_()
    labels = likelihood.sample(outputs, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(-likelihood.log_prob(outputs, labels).sum(), outputs)
    close(likelihood.score(outputs, labels), gradient)


@pytest.mark.parametrize("case", [case for case in SCALARS if case.torch], ids=str)
def test_log_prob_equals_that_of_torch(case: Scalar) -> None:
    likelihood = case.make(*case.settings)
    labels = likelihood.sample(OUTPUTS, torch.Generator().manual_seed(0))
    assert case.torch is not None
    # Torch's von Mises has a polynomial for its Bessel function.
    close(
        likelihood.log_prob(OUTPUTS, labels),
        case.torch(OUTPUTS).log_prob(labels),
        1e-6 if case.make is VonMises else 1e-10,
    )


@scalars
def test_kl_is_the_mean_of_the_log_ratio(case: Scalar) -> None:
    likelihood, other = case.make(*case.settings), OUTPUTS.flip(0) + 0.1
    for f, g, found in zip(OUTPUTS, other, likelihood.kl_terms(OUTPUTS, other), strict=True):
        y, w = case.rule(f)
        if case.make is Laplace:  # its ratio has a kink at the other's median
            (a, u), (b, v) = legendre(min(f, g).item(), max(f, g).item()), around(30.0)(torch.maximum(f, g))
            c, t = around(30.0)(torch.minimum(f, g))
            keep, low = b > torch.maximum(f, g), c < torch.minimum(f, g)
            y, w = torch.cat([a, b[keep], c[low]]), torch.cat([u, v[keep], t[low]])
        ours = likelihood.log_prob(f.expand(len(y)), y)
        close(found, (w * ours.exp() * (ours - likelihood.log_prob(g.expand(len(y)), y))).sum(), 1e-8)


@scalars
def test_kl_is_half_the_quadratic_form_in_the_limit(case: Scalar) -> None:
    likelihood = case.make(*case.settings)
    half = 0.5 * likelihood.fisher(OUTPUTS).flatten()
    errors = [(likelihood.kl_terms(OUTPUTS, OUTPUTS + t) / (t * t * half) - 1).abs().max() for t in (1e-2, 1e-3)]
    assert errors[0] < 0.05 and errors[1] < 0.15 * errors[0] + 1e-7


@scalars
def test_draws_have_the_second_moment_of_the_score(case: Scalar) -> None:
    n, likelihood = 20_000, case.make(*case.settings)
    outputs = OUTPUTS.expand(n, 5)
    scores = likelihood.score(outputs, likelihood.sample(outputs, torch.Generator().manual_seed(1)))
    deviation = (scores.square().var(0) / n).sqrt()
    assert (scores.mean(0).abs() <= 5 * scores.std(0) / n**0.5).all()
    assert ((scores.square().mean(0) - likelihood.fisher(OUTPUTS).flatten()).abs() <= 5 * deviation + 1e-9).all()


LABEL_ROWS: list[tuple[Likelihood, int]] = [
    (MultivariateGaussian(COVARIANCE), 3),
    (MultivariateGaussian(VARIANCES), 3),
    (HeteroscedasticGaussian(), 4),
    (Multinomial(3), 3),
]
vectors = pytest.mark.parametrize(("likelihood", "size"), LABEL_ROWS, ids=named)


def row(size: int) -> Tensor:
    return torch.linspace(-0.8, 0.9, size, dtype=torch.float64).unsqueeze(0)


def labels_and_weights(likelihood: Likelihood, outputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    if isinstance(likelihood, Multinomial):
        every = [y for y in points(*[torch.arange(4.0).double()] * 3) if y.sum() == 3]
        return [(y, likelihood.log_prob(outputs, y[None]).exp()[0]) for y in every]
    x, w = hermite()
    if isinstance(likelihood, HeteroscedasticGaussian):
        mean, scale = outputs[0, :2], (outputs[0, 2:] / 2).exp()
        nodes = [(mean + scale * z) for z in points(x, x)]
        return list(zip(nodes, [v.prod() for v in points(w, w)], strict=True))
    factor = torch.linalg.cholesky(COVARIANCE if likelihood is LABEL_ROWS[0][0] else VARIANCES.diag())
    nodes = [outputs[0] + factor @ z for z in points(x, x, x)]
    return list(zip(nodes, [v.prod() for v in points(w, w, w)], strict=True))


@vectors
def test_the_moments_of_a_vector_s_score(likelihood: Likelihood, size: int) -> None:
    outputs = row(size)
    first, second = torch.zeros(size), torch.zeros(size, size)
    for y, w in labels_and_weights(likelihood, outputs):
        s = likelihood.score(outputs, y[None])[0]
        first, second = first + w * s, second + w * s.outer(s)
    close(first, torch.zeros(size))
    close(likelihood.fisher(outputs)[0], second)


@vectors
def test_the_score_of_a_vector_is_the_gradient_of_minus_log_prob(likelihood: Likelihood, size: int) -> None:
    outputs = torch.randn(5, size, dtype=torch.float64, requires_grad=True)
    labels = likelihood.sample(outputs, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(-likelihood.log_prob(outputs, labels).sum(), outputs)
    close(likelihood.score(outputs, labels), gradient)


@vectors
def test_kl_of_vectors_is_the_mean_of_the_log_ratio(likelihood: Likelihood, size: int) -> None:
    outputs, other = row(size), row(size).flip(1) * 0.7
    ratio = [
        w * (likelihood.log_prob(outputs, y[None]) - likelihood.log_prob(other, y[None]))[0]
        for y, w in labels_and_weights(likelihood, outputs)
    ]
    close(likelihood.kl(outputs, other), torch.stack(ratio).sum())


@vectors
def test_the_columns_of_a_masked_vector_rebuild_its_fisher(likelihood: Likelihood, size: int) -> None:
    outputs = torch.randn(4, size, dtype=torch.float64)
    bound = likelihood.bind(mask=torch.tensor([True, False, True, True]))
    columns = torch.stack([column for column, _ in exact_scores(bound, outputs)])
    close(torch.einsum("kni,knj->nij", columns, columns), bound.fisher(outputs))
    assert not bound.fisher(outputs)[1].any()


@vectors
def test_along_another_dimension_the_terms_are_the_same(likelihood: Likelihood, size: int) -> None:
    moved = type(likelihood).__new__(type(likelihood))
    moved.__dict__.update(likelihood.__dict__, dim=1, event_dims=(1,))
    outputs = torch.randn(2, 3, size, dtype=torch.float64)
    close(moved.fisher(outputs.movedim(-1, 1)), likelihood.fisher(outputs))
    labels = likelihood.sample(outputs, torch.Generator().manual_seed(0))
    close(moved.score(outputs.movedim(-1, 1), labels.movedim(-1, 1)).movedim(1, -1), likelihood.score(outputs, labels))


def test_a_variance_an_output_is_the_gaussian_where_all_are_equal() -> None:
    outputs = torch.randn(4, 3, dtype=torch.float64)
    close(MultivariateGaussian(torch.full((3,), 0.6)).fisher(outputs), Gaussian(0.6).fisher(outputs), 1e-6)


EVERY = [case.make(*case.settings) for case in SCALARS] + [likelihood for likelihood, _ in LABEL_ROWS]
SIZES = [3] * len(SCALARS) + [size for _, size in LABEL_ROWS]


@pytest.mark.parametrize(("likelihood", "size"), list(zip(EVERY, SIZES, strict=True)), ids=named)
def test_two_then_five_examples_are_drawn_as_seven(likelihood: Likelihood, size: int) -> None:
    outputs, whole, parts = torch.randn(7, size), torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    split = torch.cat([likelihood.sample(outputs[:2], parts), likelihood.sample(outputs[2:], parts)])
    torch.testing.assert_close(split, likelihood.sample(outputs, whole), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("likelihood", "size"), list(zip(EVERY, SIZES, strict=True)), ids=named)
def test_nothing_waits_for_the_device(likelihood: Likelihood, size: int) -> None:
    outputs = torch.empty(4, size, device="meta")
    labels = likelihood.sample(outputs)
    found = [likelihood.score(outputs, labels), likelihood.kl(outputs, outputs), likelihood.fisher(outputs)]
    found += [likelihood.invalid_labels(outputs, labels), likelihood.log_prob(outputs, labels)]
    assert {value.device.type for value in found} == {"meta"}


@pytest.mark.parametrize(("likelihood", "size"), list(zip(EVERY, SIZES, strict=True)), ids=named)
def test_drawn_labels_are_in_the_support(likelihood: Likelihood, size: int) -> None:
    outputs = 2 * torch.randn(500, size)
    assert not likelihood.invalid_labels(outputs, likelihood.sample(outputs))
    assert likelihood.invalid_labels(outputs, torch.full_like(likelihood.sample(outputs), torch.nan))


REFUSED = [
    (lambda: Laplace(0.0), "scale=0.0.*positive"),
    (lambda: NegativeBinomial(-1.0), "size=-1.0"),
    (lambda: Binomial(0), "total_count=0.*Bernoulli"),
    (lambda: Beta(1.5), "between 0 and 1"),
    (lambda: Ordinal([1.0, 0.0]), "ascend"),
    (lambda: MultivariateGaussian(-torch.eye(2)), "positive definite"),
    (lambda: MultivariateGaussian(torch.tensor(1.0)), r"kc\.Gaussian"),
    (lambda: MultivariateGaussian(VARIANCES).check(torch.randn(4, 2)), "have 2 entries.*expected 3"),
    (lambda: HeteroscedasticGaussian().check(torch.randn(4, 3)), "expected an even number"),
    (lambda: HeteroscedasticGaussian(dim=0), "dim=0"),
    (lambda: HeteroscedasticGaussian().score(torch.randn(4, 2), torch.randn(4, 2)), r"expected \(4, 1\)"),
]


@pytest.mark.parametrize(("attempt", "message"), REFUSED)
def test_what_does_not_fit_is_refused(attempt: Callable[[], object], message: str) -> None:
    with pytest.raises(LikelihoodError, match=message):
        attempt()
