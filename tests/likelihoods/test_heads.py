"""ORACLES 1-4 on every likelihood against torch.distributions, for both shapes and with a mask."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, kl_divergence

import kfac_cond as kc

from ..likelihood_cases import CLOSED, HEADS, Head
from ..reference import assert_same

SHAPES = [(5,), (3, 2)]
every = pytest.mark.parametrize("name", HEADS)
closed = pytest.mark.parametrize("name", CLOSED)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
masked_too = pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])


def outputs_of(head: Head, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return 0.8 * torch.randn(*shape, head.width, generator=torch.Generator().manual_seed(seed))


def mask_of(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % 3 != 1


def bound(head: Head, shape: tuple[int, ...], masked: bool) -> tuple[kc.Likelihood, Tensor]:
    """The likelihood, and which terms count."""
    keep = mask_of(shape) if masked else torch.ones(shape, dtype=torch.bool)
    return head.likelihood.bind(mask=keep) if masked else head.likelihood, keep


def per_term(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return values if values.shape == shape else values.sum(-1)


@every
@shapes
@masked_too
def test_log_prob_and_its_gradient_are_those_of_torch(name, shape, masked):
    head = HEADS[name]
    likelihood, keep = bound(head, shape, masked)
    f = outputs_of(head, shape).requires_grad_()
    y = head.labels(f)
    expected = torch.where(keep, per_term(head.distribution(f).log_prob(y), shape), 0.0)
    # Torch's von Mises has a polynomial for its Bessel function.
    assert_same(likelihood.log_prob(f, y), expected, tolerance=1e-6 if name == "von mises" else 1e-10)
    (gradient,) = torch.autograd.grad(-expected.sum(), f)
    assert_same(likelihood.score(f.detach(), y), gradient)


@closed
@shapes
@masked_too
def test_the_fisher_and_its_root_are_those_of_torch_s_distribution(name, shape, masked):
    head = HEADS[name]
    likelihood, keep = bound(head, shape, masked)
    f = outputs_of(head, shape)
    expected = torch.stack([head.information(row) for row in f.reshape(-1, head.width)])
    expected = expected.reshape(*shape, head.width, head.width) * keep[..., None, None]
    root = likelihood.fisher_sqrt(f)
    assert_same(likelihood.fisher(f), expected)
    assert_same(root @ root.mT, expected)


@closed
@shapes
@masked_too
def test_kl_is_half_the_quadratic_form_to_third_order(name, shape, masked):
    """ORACLES 3: the ratio to it tends to 1."""
    head = HEADS[name]
    likelihood, _ = bound(head, shape, masked)
    f, e = outputs_of(head, shape), outputs_of(head, shape, seed=7)
    half = 0.5 * torch.einsum("...i,...ij,...j->", e, likelihood.fisher(f), e)
    errors = [abs(float(likelihood.kl(f, f + t * e) / (t * t * half)) - 1) for t in (1e-2, 1e-3)]
    assert errors[0] < 0.05 and errors[1] < 0.15 * errors[0] + 1e-8


@pytest.mark.parametrize(
    "name", [n for n in CLOSED if n not in ("negative binomial", "ordinal", "von mises", "multinomial")]
)
@masked_too
def test_kl_is_that_of_torch(name, masked):
    head, shape = HEADS[name], (3, 2)
    likelihood, keep = bound(head, shape, masked)
    ours, theirs = (head.distribution(outputs_of(head, shape, seed)) for seed in (0, 7))
    if isinstance(ours, Independent):
        ours, theirs = ours.base_dist, theirs.base_dist
    expected = torch.where(keep, per_term(kl_divergence(ours, theirs), shape), 0.0)
    found = likelihood.kl_terms(outputs_of(head, shape), outputs_of(head, shape, seed=7))
    assert_same(found, expected)


def labels_of(name: str) -> list[Tensor]:
    """All labels of one term."""
    head = HEADS[name]
    if name in ("categorical", "tempered"):
        return list(torch.arange(head.width))
    last = {"bernoulli": 1, "binomial": 4, "ordinal": 3, "multinomial": 5}[name]
    every_one = (torch.tensor(y) for y in itertools.product(range(last + 1), repeat=head.width))
    return [y.double() for y in every_one if name != "multinomial" or y.sum() == 5]


@pytest.mark.parametrize("name", ["categorical", "tempered", "bernoulli", "binomial", "ordinal", "multinomial"])
def test_the_score_has_mean_zero_and_the_fisher_is_its_second_moment(name):
    """ORACLES 1 and 2, over all labels."""
    head = HEADS[name]
    f = outputs_of(head, (1,))
    scores = [(head.likelihood.score(f, y[None])[0], head.log_prob(f, y[None]).exp()) for y in labels_of(name)]
    assert abs(sum(p for _, p in scores) - 1) < 1e-12
    assert sum(p * s for s, p in scores).abs().max() < 1e-12
    assert_same(sum(p * s.outer(s) for s, p in scores), head.likelihood.fisher(f)[0])
