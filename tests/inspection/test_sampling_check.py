from __future__ import annotations

from math import sqrt

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.inspection import sampling_check
from kfac_cond.output_fisher import fisher_diagonal

from ..helpers import Apply
from ..likelihood_cases import CLOSED, HEADS, case
from ..reference import assert_same


def given(outputs: Tensor) -> tuple[nn.Module, list[Tensor]]:
    """A model whose outputs are these, in two batches."""
    model = nn.Linear(outputs.shape[-1], outputs.shape[-1], bias=False)
    nn.init.eye_(model.weight)
    half = len(outputs) // 2
    return model, [outputs[:half], outputs[half:]]


def check(
    likelihood: kc.Likelihood | kc.Product, outputs: Tensor, *, samples: int = 4, **options: object
) -> sampling_check.SamplingCheck:
    model, data = given(outputs)
    return sampling_check.measure(model, data, likelihood, samples=samples, options=kc.Options(**options))


@pytest.mark.parametrize("head", CLOSED)
def test_right_draws_pass(head: str) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        found = check(HEADS[head].likelihood, torch.randn(200, HEADS[head].width), seed=seed)
        assert found.passed
        assert max(map(abs, found.z_outputs)) == abs(found.z_output) < 4.5
        assert abs(found.z_scale) < 4.5 and abs(found.z_fisher) < 6
        assert 0.7 < found.fisher_ratio < 1.4
        assert (found.terms, found.draws, len(found.z_outputs)) == (200, 4, HEADS[head].width)


@pytest.mark.parametrize("head", CLOSED)
def test_the_diagonal_of_the_output_fisher(head: str) -> None:
    likelihood, outputs = HEADS[head].likelihood, torch.randn(4, 3, HEADS[head].width)
    bound = likelihood.bind(mask=torch.rand(4, 3) > 0.3, weight=torch.rand(4, 3))
    kappa = bound.mask * bound.weights if head != "tempered" else bound.likelihood.mask * bound.likelihood.weights
    expected = bound.fisher(outputs).diagonal(dim1=-2, dim2=-1) * kappa[..., None]
    assert_same(fisher_diagonal(bound, outputs), expected)


def wrong(base: type, change: object) -> type:
    """A likelihood that draws from other outputs than it scores."""
    return type("Wrong", (base,), {"sample": lambda self, f, generator=None: base.sample(self, change(f), generator)})


FAULTS = {
    "twice the temperature": (wrong(kc.Categorical, lambda f: f / 2), {}, 5),
    "half the temperature": (wrong(kc.Categorical, lambda f: f * 2), {}, 5),
    "the mean of a Gaussian shifted": (wrong(kc.Gaussian, lambda f: f + 0.3), {}, 3),
    "one output of a Gaussian shifted": (wrong(kc.Gaussian, lambda f: f + torch.tensor([0.0, 0.3, 0.0])), {}, 3),
    "odds of bits shifted": (wrong(kc.Bernoulli, lambda f: f + 0.5), {}, 3),
    "rates shifted": (wrong(kc.Poisson, lambda f: f + 0.2), {}, 3),
    "cumulative logits shifted": (
        wrong(kc.Ordinal, lambda f: f + 0.5),
        {"thresholds": (-1.0, 0.2, 1.5), "event_dims": (-1,)},
        2,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_labels_of_other_outputs_are_caught(fault: str) -> None:
    make, settings, width = FAULTS[fault]
    found = check(make(**settings), torch.randn(400, width))
    assert not found.passed
    assert max(abs(found.z_output), abs(found.z_scale)) > 5


def test_a_wrong_temperature_shows_where_outputs_average_to_nothing() -> None:
    """Every class as likely as every other over the data: only along the outputs themselves are scores off."""
    outputs = torch.randn(100, 5)
    everywhere = torch.cat([outputs.roll(shift, -1) for shift in range(5)])
    found = check(FAULTS["twice the temperature"][0](), everywhere)
    assert abs(found.z_output) < 4
    assert abs(found.z_scale) > 8
    assert not found.passed


class Widened(kc.Gaussian):
    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return outputs + 1.3 * (super().sample(outputs, generator) - outputs)


class Doubled(kc.Categorical):
    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return 2 * super().score(outputs, labels)


class Mixed(kc.MultivariateGaussian):
    """Labels whose entries are independent, as wide as they should be."""

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return outputs + torch.randn(outputs.shape, generator=generator)


@pytest.mark.parametrize(
    ("likelihood", "width"),
    [
        (Widened(), 3),
        (Doubled(), 4),
        (Mixed(torch.tensor([[1.0, 0.7], [0.7, 1.0]])), 2),
    ],
)
def test_a_wrong_second_moment_is_caught(likelihood: kc.Likelihood, width: int) -> None:
    found = check(likelihood, torch.randn(400, width))
    assert not found.passed
    assert abs(found.z_fisher) > 5


def test_a_factor_shows_in_the_ratio() -> None:
    assert check(Doubled(), torch.randn(2000, 4)).fisher_ratio == pytest.approx(4.0, rel=0.1)
    assert check(Widened(), torch.randn(2000, 3)).fisher_ratio == pytest.approx(1.69, rel=0.1)


def test_z_of_an_output_is_its_summed_score_over_its_root_information() -> None:
    outputs, labels = torch.randn(6, 3), [torch.randint(3, (6,)) for _ in range(2)]
    found = check(kc.Categorical(), outputs, samples=2, draws=[[y[:3] for y in labels], [y[3:] for y in labels]])
    p = outputs.softmax(-1)
    observed = sum(nn.functional.one_hot(y, 3) for y in labels).sum(0)
    expected = (2 * p.sum(0) - observed) / (2 * p * (1 - p)).sum(0).sqrt()
    assert_same(torch.tensor(found.z_outputs), expected)
    s = torch.cat([p - nn.functional.one_hot(y, 3) for y in labels])
    f = torch.cat([outputs, outputs])
    H = torch.diag_embed(p) - p[..., None] * p[..., None, :]
    variance = 2 * torch.einsum("ni,nij,nj->", outputs, H, outputs)
    assert found.z_scale == pytest.approx(float((s * f).sum()) / sqrt(float(variance)))


def test_labels_of_the_data_are_no_draws_of_the_model() -> None:
    outputs = 2 * torch.randn(300, 4)
    data_labels = outputs.argmax(-1)
    found = check(kc.Categorical(), outputs, samples=1, draws=[[data_labels[:150]], [data_labels[150:]]])
    assert not found.passed


@pytest.mark.parametrize("confidence", [0.0, 12.0])
def test_rare_classes_are_no_alarm(confidence: float) -> None:
    """Of a thousand classes most are never drawn, and one that is, where a ten-thousandth was due."""
    for seed in range(6):
        torch.manual_seed(seed)
        outputs = 2 * torch.randn(60, 1000)
        outputs[:, 0] += confidence
        assert check(kc.Categorical(), outputs, samples=1, seed=seed).passed


def test_bits_that_are_nearly_certain_are_no_alarm() -> None:
    for seed in range(6):
        torch.manual_seed(seed)
        assert check(kc.Bernoulli(), 8 + torch.randn(50, 6), samples=2, seed=seed).passed


@pytest.mark.parametrize("p", [0.5, 0.01, 0.0005])
def test_the_tail_of_a_sum_is_bounded(p: float) -> None:
    n = 200
    for k in range(n + 1):
        total = k - n * p
        exact = stats.binom.sf(k - 1, n, p) if total > 0 else stats.binom.cdf(k, n, p)
        assert sampling_check.tail(total, n * p * (1 - p), max(p, 1 - p)) >= exact * (1 - 1e-9)


def test_terms_that_do_not_count_are_not_looked_at() -> None:
    outputs = torch.randn(80, 5, 3)
    outputs[:, 3:] = 1e30
    picks = kc.Data(mask=lambda args, kwargs, f: f[..., 0] < 1e20)
    found = check(kc.Categorical(), outputs, data=picks)
    assert found.passed
    assert found.terms == 240


def test_weighted_terms_and_labels_along_another_dimension() -> None:
    x, y = torch.randn(90, 4), torch.randint(3, (90, 4))
    model = nn.Sequential(nn.Linear(4, 12), Apply(lambda h: h.unflatten(-1, (3, 4))))
    likelihood = kc.Categorical(dim=1, weight=torch.tensor([0.1, 1.0, 5.0]))
    assert sampling_check.measure(model, [(x, y)], likelihood).passed
    bad = FAULTS["half the temperature"][0](dim=1, weight=torch.tensor([0.1, 1.0, 5.0]))
    model[0].weight.data *= 4
    assert not sampling_check.measure(model, [(x, y)], bad).passed


def test_the_worst_of_several_heads_is_named() -> None:
    split = nn.Sequential(nn.Linear(3, 4), Apply(lambda h: {"kind": h[:, :3], "size": h[:, 3:]}))
    right = kc.Product({"kind": kc.Categorical(), "size": kc.Gaussian()})
    off = kc.Product({"kind": kc.Categorical(), "size": FAULTS["the mean of a Gaussian shifted"][0]()})
    data = [torch.randn(400, 3)]
    assert sampling_check.measure(split, data, right).passed
    found = sampling_check.measure(split, data, off)
    assert found.head == "size" and not found.passed


def test_it_looks_at_the_very_labels_of_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    of, drawn = case("perceptron", "categorical"), []
    sample = kc.Categorical.sample

    def noted(self: kc.Likelihood, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        drawn.append(sample(self, f, generator))
        return drawn[-1]

    monkeypatch.setattr(kc.Categorical, "sample", noted)
    options = kc.Options(seed=5)
    fisher = kc.estimate(of.model, of.batches(), of.likelihood, samples=3, options=options)
    first = [*drawn]
    drawn.clear()
    found = sampling_check.measure(of.model, of.batches(), of.likelihood, fisher, options=options)
    assert found.draws == 3 and len(first) == len(drawn) == 6
    assert all(map(torch.equal, first, drawn))


def test_false_alarms_are_rare() -> None:
    probabilities = []
    for seed in range(50):
        torch.manual_seed(seed)
        probabilities.append(check(kc.Categorical(), torch.randn(60, 4), samples=2, seed=seed).probability)
    assert sum(p < 0.05 for p in probabilities) <= 5
    assert min(probabilities) > sampling_check.ALARM


def test_without_a_closed_form_there_is_no_check() -> None:
    with pytest.raises(kc.LikelihoodError, match="no fisher_sqrt"):
        check(HEADS["mixture"].likelihood, torch.randn(20, 6))


def test_nothing_of_the_model_or_the_random_state_changes() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    data = [torch.randn(9, 3)]
    before = [t.clone() for t in (*model.parameters(), *model.buffers(), torch.get_rng_state())]
    sampling_check.measure(model, data, "categorical")
    after = [*model.parameters(), *model.buffers(), torch.get_rng_state()]
    assert all(map(torch.equal, after, before))
