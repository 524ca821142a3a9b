"""Training with embeddings, their states, dtypes, and estimates that are interrupted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .helpers import EVERY_STEP
from .layers.embedding_cases import FEATURES, TOKENS, bag, embedding, head
from .reference import assert_same


def wrapped(model: nn.Module, **settings: Any) -> tuple[kc.KFAC, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    kfac = kc.KFAC(model, "categorical", **{"schedule": EVERY_STEP, "damping": 0.1, **settings})
    kfac.attach(optimizer)
    return kfac, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor) -> float:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(inputs), labels)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("rule", ["exact", "factored"])
def test_a_step_solves_for_each_token_by_itself(rule):
    model = nn.Sequential(embedding({}), head(4))
    kfac = kc.KFAC(model, "categorical", damping=kc.Damping(0.1, rule=rule), schedule=EVERY_STEP)
    indices, labels = torch.randint(TOKENS, (5, 4)), torch.randint(4, (5,))
    outputs = model(indices)
    kfac.update(outputs)
    nn.functional.cross_entropy(outputs, labels).backward()
    plain = model[0].weight.grad.clone()
    kfac.precondition()
    A, G = kfac.fisher()["0"].A, kfac.fisher()["0"].G
    eye, root, pi = torch.eye(FEATURES), 0.1**0.5, (A.mean() / G.trace() * FEATURES).sqrt()
    for token in range(TOKENS):
        damped = A[token] * G + 0.1 * eye if rule == "exact" else (A[token] + pi * root) * (G + root / pi * eye)
        assert_same(model[0].weight.grad[token], torch.linalg.solve(damped, plain[token]))


MODELS = {
    "embedding": lambda: nn.Sequential(embedding({}), head(4)),
    "padding": lambda: nn.Sequential(embedding({"padding_idx": 0}), head(4)),
    "max norm": lambda: nn.Sequential(embedding({"max_norm": 1.0}), head(4)),
    "scaled gradient": lambda: nn.Sequential(embedding({"scale_grad_by_freq": True}), head(4)),
    "bag": lambda: nn.Sequential(bag("mean", {}), head(1)),
    "weighted bag": lambda: nn.Sequential(bag("sum", {"padding_idx": 3, "max_norm": 2.0}), head(1)),
}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_training_lowers_the_loss(model, sharing):
    """A class is which tokens there are."""
    model = model()
    indices = torch.randint(TOKENS, (64, 4))
    labels = (indices >= 4).sum(-1).clamp(max=3)
    kfac, optimizer = wrapped(model, rules={"0": {"sharing": sharing}})
    losses = [step(model, optimizer, indices, labels) for _ in range(25)]
    assert losses[-1] < 0.6 * losses[0]
    kfac.remove()


@pytest.mark.parametrize("name", ["max norm", "weighted bag", "scaled gradient"])
def test_a_captured_step_has_the_plain_gradient(name):
    """The weight is renormalised in place in each of two forwards; the graph that scores go through is sound."""
    model, plain = MODELS[name](), MODELS[name]()
    plain.load_state_dict(model.state_dict())
    kfac = kc.KFAC(model, "categorical", schedule=EVERY_STEP)
    for _ in range(2):
        indices, labels = torch.randint(TOKENS, (8, 4)), torch.randint(4, (8,))
        outputs = model(indices)
        kfac.update(outputs)
        nn.functional.cross_entropy(outputs, labels).backward()
        nn.functional.cross_entropy(plain(indices), labels).backward()
    assert torch.equal(model[0].weight, plain[0].weight)
    assert torch.equal(model[0].weight.grad, plain[0].weight.grad)
    kfac.precondition()
    assert not torch.equal(model[0].weight.grad, plain[0].weight.grad)


def test_a_gradient_scaled_by_frequency_leaves_the_fisher_as_it_is():
    model, other = MODELS["embedding"](), MODELS["scaled gradient"]()
    other.load_state_dict(model.state_dict())
    data, options = [torch.randint(TOKENS, (8, 4))], kc.Options(draws=[[torch.randint(4, (8,))]])
    mine, theirs = (kc.estimate(one, data, "categorical", structure="ekfac", options=options) for one in (model, other))
    assert_same(theirs.to_dense(), mine.to_dense())


@pytest.mark.parametrize("name", ["embedding", "weighted bag"])
def test_a_state_goes_on_bitwise(name):
    indices, labels = torch.randint(TOKENS, (16, 4)), torch.randint(4, (16,))
    schedule = kc.Schedule(factors=1, inverses=2)
    model = MODELS[name]()
    kfac, optimizer = wrapped(model, schedule=schedule)
    for _ in range(3):
        step(model, optimizer, indices, labels)
    saved, parameters = kfac.state_dict(), {key: value.clone() for key, value in model.state_dict().items()}
    again = MODELS[name]()
    again.load_state_dict(parameters)
    other, theirs = wrapped(again, schedule=schedule)
    other.load_state_dict(saved)
    for _ in range(3):
        step(model, optimizer, indices, labels)
        step(again, theirs, indices, labels)
    assert torch.equal(model[0].weight, again[0].weight)


@pytest.mark.parametrize("make", [lambda: embedding({}), lambda: bag("sum", {})])
def test_a_model_in_half_precision_has_float32_factors(make):
    model = nn.Sequential(make(), head(1)).to(torch.bfloat16)
    block = kc.estimate(model, [torch.randint(TOKENS, (300, 1))], "categorical")["0"]
    assert (block.A.dtype, block.G.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(block.A.sum(), torch.ones((), dtype=torch.float32))


def test_under_autocast_frequencies_are_exact():
    model = nn.Sequential(embedding({}), head(4)).float()
    indices = torch.randint(TOKENS, (301, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block = kc.estimate(model, [indices], "categorical")["0"]
    expected = torch.bincount(indices.flatten(), minlength=TOKENS) / 1204
    torch.testing.assert_close(block.A.double(), expected.double(), rtol=1e-6, atol=0)


def test_a_batch_without_examples_changes_nothing():
    model = nn.Sequential(embedding({"padding_idx": 0}), head(4))
    indices, labels = torch.randint(TOKENS, (6, 4)), torch.randint(4, (6,))
    found, expected = (
        kc.estimate(model, data, "categorical", options=kc.Options(draws=draws))
        for data, draws in (
            ([indices[:0], indices], [[labels[:0]], [labels]]),
            ([indices], [[labels]]),
        )
    )
    assert_same(found.to_dense(), expected.to_dense())


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
def test_an_interrupted_estimate_goes_on_bitwise(structure, tmp_path):
    """Pairs that are kept are written with it."""
    model = nn.Sequential(embedding({"padding_idx": 0}), head(4))
    data = [torch.randint(TOKENS, (3, 4)) for _ in range(4)]

    def estimated(batches: Any, partial: Any) -> kc.Fisher:
        options = kc.Options(seed=3, partial=partial)
        return kc.estimate(model, batches, "categorical", structure=structure, samples=2, options=options)

    def broken() -> Any:
        yield from data[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        estimated(broken, tmp_path / "partial")
    assert (tmp_path / "partial").exists()
    found, expected = estimated(data, tmp_path / "partial"), estimated(data, None)
    assert torch.equal(found["0"].to_dense(), expected["0"].to_dense())
