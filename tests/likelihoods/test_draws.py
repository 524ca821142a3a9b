"""Draws of labels: their distribution, and a stream that does not depend on how examples are batched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kfac_cond.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood

from .cases import CASES, NAMES, Case, named


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def split_draws(likelihood: Likelihood, outputs: Tensor, at: int) -> Tensor:
    stream = generator()
    return torch.cat([likelihood.sample(part, stream) for part in (outputs[:at], outputs[at:])])


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_two_then_five_examples_are_drawn_as_seven(case: Case) -> None:
    outputs = torch.randn(7, *case.shape[1:])
    whole = case.likelihood.sample(outputs, generator())
    torch.testing.assert_close(split_draws(case.likelihood, outputs, 2), whole, rtol=1e-14, atol=1e-14)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(2, 40),
    trailing=st.lists(st.integers(1, 9), max_size=2),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@pytest.mark.parametrize("likelihood", [Bernoulli(event_dims=()), Gaussian(event_dims=())], ids=repr)
def test_any_split_draws_the_same(
    likelihood: Likelihood, count: int, trailing: list[int], data: st.DataObject, dtype: torch.dtype
) -> None:
    outputs = torch.linspace(-2, 2, count).reshape(-1, *(1,) * len(trailing)).expand(count, *trailing).to(dtype)
    at = data.draw(st.integers(1, count - 1))
    whole = likelihood.sample(outputs, generator())
    torch.testing.assert_close(split_draws(likelihood, outputs, at), whole, rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(2, 40), classes=st.integers(2, 40), trailing=st.integers(1, 5), data=st.data())
@pytest.mark.parametrize("dim", [1, -1])
def test_any_split_draws_the_same_classes(
    dim: int, count: int, classes: int, trailing: int, data: st.DataObject
) -> None:
    shape = (count, classes, trailing) if dim == 1 else (count, trailing, classes)
    outputs = torch.randn(shape, generator=generator(1))
    at = data.draw(st.integers(1, count - 1))
    likelihood = Categorical(dim=dim)
    assert torch.equal(split_draws(likelihood, outputs, at), likelihood.sample(outputs, generator()))


def test_the_draw_of_a_position_does_not_depend_on_where_the_classes_lie() -> None:
    outputs = torch.randn(4, 3, 5)
    first = Categorical(dim=1).sample(outputs, generator())
    assert torch.equal(first, Categorical(dim=-1).sample(outputs.movedim(1, -1), generator()))


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_mask_does_not_move_the_stream(case: Case) -> None:
    outputs = case.outputs()
    assert torch.equal(case.bound(True).sample(outputs, generator()), case.likelihood.sample(outputs, generator()))


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_given_generator_leaves_the_global_one_alone(case: Case) -> None:
    before = torch.get_rng_state()
    case.likelihood.sample(case.outputs(), generator())
    assert torch.equal(torch.get_rng_state(), before)


def assert_frequencies(drawn: Tensor, p: Tensor, n: int) -> None:
    """Within 5 standard deviations of the binomial."""
    assert ((drawn - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-12).all()


@pytest.mark.parametrize("classes", [2, 7, 1000])
def test_classes_are_drawn_with_their_probabilities(classes: int) -> None:
    n = 20_000
    logits = 0.5 * torch.randn(classes)
    drawn = Categorical().sample(logits.float().expand(n, classes), generator())
    assert_frequencies(torch.bincount(drawn, minlength=classes) / n, logits.softmax(0), n)


@pytest.mark.parametrize("where", [[0], [4], [0, 4], [1, 2, 3], [0, 1, 2, 3]], ids=named)
def test_a_class_of_probability_zero_is_never_drawn(where: list[int]) -> None:
    logits = torch.zeros(5)
    logits[where] = -torch.inf
    drawn = Categorical().sample(logits.expand(50_000, 5), generator())
    assert (torch.bincount(drawn, minlength=5)[where] == 0).all()


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("p", [[0.0, 1.0, 0.0], [0.0, 0.3, 0.7], [0.1] * 10, [1.0, 0.0]], ids=named)
def test_the_ends_of_the_uniform_draw_a_possible_class(
    monkeypatch: pytest.MonkeyPatch, extreme: float, p: list[float]
) -> None:
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, extreme, dtype=torch.float32))
    probabilities = torch.tensor(p)
    drawn = Categorical().sample(probabilities.log().unsqueeze(0))
    possible = probabilities.nonzero()
    assert drawn.item() == (possible[0] if extreme == 0 else possible[-1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_draw_no_index_out_of_bounds(bad: float) -> None:
    drawn = Categorical().sample(torch.full((50, 3), bad), generator())
    assert ((drawn >= 0) & (drawn < 3)).all()


def test_bernoulli_labels_are_drawn_with_their_probabilities() -> None:
    n = 100_000
    logits = torch.tensor([-8.0, -1.0, 0.0, 2.0, 8.0])
    drawn = Bernoulli().sample(logits.expand(n, 5), generator())
    assert_frequencies(drawn.mean(0), logits.sigmoid(), n)


@pytest.mark.parametrize(("logit", "label"), [(-torch.inf, 0.0), (torch.inf, 1.0)])
def test_certain_bernoulli_labels(logit: float, label: float) -> None:
    assert (Bernoulli().sample(torch.full((10_000,), logit), generator()) == label).all()


def test_gaussian_labels_have_the_stated_moments() -> None:
    n = 400_000
    z = (Gaussian(4.0).sample(torch.full((n,), 3.0), generator()) - 3) / 2
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean().item() - moment) < 5 * (variance / n) ** 0.5


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=named)
def test_gaussian_labels_are_finite_at_the_ends_of_the_uniform(
    monkeypatch: pytest.MonkeyPatch, extreme: float, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, extreme, dtype=torch.float32))
    drawn = Gaussian().sample(torch.zeros(3, dtype=dtype))
    # The quantile of 2^-25.
    torch.testing.assert_close(drawn.double().abs(), torch.full((3,), 5.4200), rtol=0, atol=2e-3)


def test_gaussian_labels_of_half_precision_means_are_not_rounded_to_half_precision() -> None:
    outputs = torch.full((20_000,), 256.0, dtype=torch.bfloat16)
    labels = Gaussian().sample(outputs, generator())
    assert labels.dtype == torch.float32
    assert abs(Gaussian().score(outputs, labels).float().var().item() - 1) < 0.05
