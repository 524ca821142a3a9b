"""Any torch distribution, mixtures, and a likelihood at a temperature."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch import distributions as td

from kfac_cond.errors import LikelihoodError
from kfac_cond.likelihoods import (
    Categorical,
    FromDistribution,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    MixtureDensity,
    Tempered,
    exact_scores,
)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def two_outputs(f: Tensor) -> td.Distribution:
    return td.Normal(f[..., 0], (f[..., 1] / 2).exp())


@pytest.mark.parametrize("masked", [False, True])
def test_a_normal_is_the_gaussian(masked: bool) -> None:
    outputs, other = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    mask = torch.tensor([True, False, True, True]) if masked else None
    ours = FromDistribution(lambda f: td.Normal(f, 0.5**0.5)).bind(mask=mask)
    theirs = Gaussian(0.5).bind(mask=mask)
    labels = ours.sample(outputs, generator())
    close(ours.score(outputs, labels), theirs.score(outputs, labels))
    close(ours.log_prob(outputs, labels), theirs.log_prob(outputs, labels))
    close(ours.kl(outputs, other), theirs.kl(outputs, other))


def test_two_outputs_of_one_label_are_the_heteroscedastic_gaussian() -> None:
    outputs = torch.randn(5, 2).double()
    ours = FromDistribution(two_outputs)
    labels = ours.sample(outputs, generator())
    assert labels.shape == (5,) and ours.terms(outputs) == 5
    close(ours.score(outputs, labels), HeteroscedasticGaussian().score(outputs, labels.unsqueeze(1)))


def test_events_that_are_not_last_are_summed_over() -> None:
    outputs = torch.randn(2, 3, 4).double()
    ours = FromDistribution(lambda f: td.Normal(f, 1.0), event_dims=(1,))
    close(ours.log_prob(outputs, outputs), Gaussian(event_dims=(1,)).log_prob(outputs, outputs))


def test_the_same_generator_draws_the_same_and_leaves_the_global_one_alone() -> None:
    outputs, likelihood = torch.randn(5, 2), FromDistribution(two_outputs)
    before = torch.get_rng_state()
    first, second = likelihood.sample(outputs, generator()), likelihood.sample(outputs, generator())
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), before)


class Unsampled(td.Distribution):
    arg_constraints: ClassVar[dict[str, Any]] = {}

    def log_prob(self, value: Tensor) -> Tensor:
        return value


class Unscored(td.Distribution):
    arg_constraints: ClassVar[dict[str, Any]] = {}

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.zeros(3, 2)


OUTPUTS = torch.randn(3, 2)
REFUSED = [
    (lambda: FromDistribution(lambda f: Unsampled()).sample(OUTPUTS), "Unsampled cannot be sampled"),
    (lambda: FromDistribution(lambda f: Unscored()).score(OUTPUTS, OUTPUTS), "Unscored has no log_prob"),
    (lambda: FromDistribution(lambda f: f).sample(OUTPUTS), "returned Tensor, expected a torch Distribution"),
    (lambda: FromDistribution(td.Normal(0.0, 1.0)), "expected a function from the outputs"),
    (lambda: FromDistribution(lambda f: td.Normal(f.detach(), 1.0)).score(OUTPUTS, OUTPUTS), "does not depend"),
    (lambda: FromDistribution(lambda f: td.Normal(f.sum(), 1.0)).log_prob(OUTPUTS, torch.zeros(())), "event_dims"),
    (lambda: FromDistribution(lambda f: td.Normal(f, 1.0)).fisher(OUTPUTS), "has no fisher_sqrt"),
    (lambda: MixtureDensity(2).fisher(torch.randn(3, 6)), "has no fisher_sqrt"),
    (lambda: MixtureDensity(2).check(torch.randn(3, 8)), r"expected K \(1 \+ 2 D\)"),
    (lambda: MixtureDensity(0), "components=0"),
    (lambda: Tempered(Categorical(), 0.0), "temperature=0.0"),
    (lambda: Tempered("categorical", 1.0), "expected a likelihood"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("attempt", "message"), REFUSED)
def test_what_cannot_be_done_is_refused_with_the_reason(attempt: Any, message: str) -> None:
    with pytest.raises(LikelihoodError, match=message):
        attempt()


def test_a_mixture_s_log_prob_and_score_are_those_of_torch() -> None:
    outputs = torch.randn(5, 2 * 5).double().requires_grad_()
    likelihood = MixtureDensity(2)
    labels = likelihood.sample(outputs, generator())
    assert labels.shape == (5, 2)
    means, scales = outputs[:, 2:6].reshape(5, 2, 2), (outputs[:, 6:].reshape(5, 2, 2) / 2).exp()
    parts = td.Independent(td.Normal(means, scales), 1)
    expected = td.MixtureSameFamily(td.Categorical(logits=outputs[:, :2]), parts).log_prob(labels)
    close(likelihood.log_prob(outputs, labels), expected)
    (gradient,) = torch.autograd.grad(-expected.sum(), outputs)
    close(likelihood.score(outputs, labels), gradient)


def test_the_score_of_a_mixture_s_draws_has_mean_zero() -> None:
    outputs = torch.tensor([0.5, -0.5, -1.0, 2.0, 0.1, -0.7]).double().expand(50_000, 6)
    likelihood = MixtureDensity(2)
    scores = likelihood.score(outputs, likelihood.sample(outputs, generator()))
    assert (scores.mean(0).abs() <= 5 * scores.std(0) / 50_000**0.5).all()


def test_a_mixture_of_one_is_the_heteroscedastic_gaussian() -> None:
    outputs, labels = torch.randn(4, 5).double(), torch.randn(4, 2).double()
    close(MixtureDensity(1).log_prob(outputs, labels), HeteroscedasticGaussian().log_prob(outputs[:, 1:], labels))


def test_two_then_five_examples_of_a_mixture_are_drawn_as_seven() -> None:
    outputs, whole, parts = torch.randn(7, 10), generator(), generator()
    split = torch.cat([MixtureDensity(2).sample(part, parts) for part in (outputs[:2], outputs[2:])])
    torch.testing.assert_close(split, MixtureDensity(2).sample(outputs, whole), rtol=1e-5, atol=1e-5)


INNER: list[Likelihood] = [Categorical(), Gaussian(0.7), Categorical(weight=torch.tensor([1.0, 2.0, 0.5]))]


@pytest.mark.parametrize("inner", INNER, ids=repr)
def test_a_temperature_is_a_layer_before_the_likelihood(inner: Likelihood) -> None:
    outputs = torch.randn(4, 3).double().requires_grad_()
    targets = inner.sample(outputs)
    tempered, plain = Tempered(inner, 2.5).bind(targets), inner.bind(targets)
    labels = tempered.sample(outputs, generator())
    (gradient,) = torch.autograd.grad(-tempered.log_prob(outputs, labels).sum(), outputs)
    close(tempered.score(outputs, labels), gradient)
    close(tempered.fisher(outputs), plain.fisher(outputs / 2.5) / 6.25)
    columns = (
        torch.stack([column for column, _ in exact_scores(Tempered(inner, 2.5), outputs)])
        if inner is not INNER[2]
        else torch.stack(list(tempered.fisher_columns(outputs)))
    )
    close(torch.einsum("kni,knj->nij", columns, columns), tempered.fisher(outputs))
    assert tempered.terms(outputs) == plain.terms(outputs)
    close(tempered.kl(outputs, outputs + 1), plain.kl(outputs / 2.5, (outputs + 1) / 2.5))
