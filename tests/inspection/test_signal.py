"""Gradient noise against its definition, known answers, and errors that cover."""

from __future__ import annotations

from math import inf

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.inspection import signal
from kfac_cond.inspection.gradients import mean_gradient, pieces

from ..helpers import classifier

DAMPING = 0.3


def labelled(sizes: list[int], classes: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 3), torch.randint(classes, (n,))) for n in sizes]


def gradient_matrix(model: nn.Module, batch: tuple[Tensor, Tensor], layer: str, reduction: str = "mean") -> Tensor:
    """[W, b] of one layer's gradient, by autograd alone."""
    module = model.get_submodule(layer)
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction=reduction)
    weight, bias = torch.autograd.grad(loss, [module.weight, module.bias])
    return torch.cat([weight, bias[:, None]], 1)


def by_definition(gradients: Tensor, sizes: list[int], metric: Tensor) -> tuple[float, float]:
    """(s, t) of rows of gradients [B, P] of batches of so many examples, with P x P for the metric."""
    n = torch.tensor(sizes, dtype=torch.float64)
    mean = (n[:, None] * gradients).sum(0) / n.sum()
    deviations = gradients - mean
    noise = (n * torch.einsum("bp,pq,bq->b", deviations, metric, deviations)).sum() / (len(sizes) - 1)
    return float(mean @ metric @ mean - noise / n.sum()), float(noise)


@pytest.mark.parametrize("sizes", [[5] * 10, [2, 5, 3, 4, 6, 2, 3, 5, 7, 4, 1]], ids=["even", "ragged"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_signal_and_noise_are_those_of_the_definition(reduction, sizes):
    model, data = classifier(), labelled(sizes)
    likelihood = kc.Categorical(reduction=reduction)
    fisher = kc.estimate(model, data, likelihood, kind="exact")
    whole, layers = signal.measure(model, data, likelihood, fisher, damping=DAMPING)
    totals = torch.zeros(2, 2)
    for name, block in fisher.items():
        rows = torch.stack([gradient_matrix(model, batch, name).flatten() for batch in data])
        dense = block.to_dense()
        metrics = torch.eye(len(dense)), torch.linalg.inv(dense + DAMPING * torch.eye(len(dense)))
        for index, (of, metric) in enumerate(zip((layers[name].plain, layers[name].metric), metrics, strict=True)):
            expected = by_definition(rows, sizes, metric)
            assert (of.signal, of.noise) == pytest.approx(expected, rel=1e-9)
            assert of.scale == pytest.approx(expected[1] / expected[0] if expected[0] > 0 else inf, rel=1e-8)
            totals[index] += torch.tensor(expected)
    assert (whole.plain.signal, whole.plain.noise) == pytest.approx(tuple(totals[0].tolist()), rel=1e-9)
    assert (whole.metric.signal, whole.metric.noise) == pytest.approx(tuple(totals[1].tolist()), rel=1e-9)
    assert (whole.examples, whole.pieces, whole.batch) == (sum(sizes), len(sizes), sum(sizes) / len(sizes))


def test_a_few_batches_are_cut_into_parts():
    """Single examples, from which the noise is the covariance of examples itself."""
    model, (batch,) = classifier(), labelled([8])
    fisher = kc.estimate(model, [batch], "categorical")
    _, layers = signal.measure(model, [batch], "categorical", fisher, damping=DAMPING)
    examples = [(batch[0][i : i + 1], batch[1][i : i + 1]) for i in range(8)]
    rows = torch.stack([gradient_matrix(model, one, "2").flatten() for one in examples])
    assert layers["2"].plain.noise == pytest.approx(float(rows.T.cov().trace()), rel=1e-9)
    assert layers["2"].pieces == 8


class Shift(nn.Module):
    """Outputs that are the inputs, moved by a parameter: its gradient under a Gaussian is the mean residual."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(1, size)
        nn.init.zeros_(self.linear.weight)
        self.linear.weight.requires_grad_(False)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def residuals(mean: Tensor, spread: float, batches: int, size: int, generator: torch.Generator):
    """Labels around minus the mean, so that a bias of zero has the gradient ``mean`` plus noise of known covariance."""
    shape = (batches, size, len(mean))
    labels = -mean + spread * torch.randn(shape, generator=generator)
    return [(torch.zeros(size, 1), y) for y in labels]


def test_errors_cover_and_estimates_are_unbiased():
    """The noise of an example is spread^2 d, the signal |mean|^2: means within their error, intervals at their rate."""
    mean, spread, model = torch.tensor([0.3, -0.2, 0.1, 0.25]), 0.7, Shift(4)
    generator, expected = torch.Generator().manual_seed(3), (float(mean @ mean), 0.7**2 * 4)
    found, covered, repeats = [], torch.zeros(3), 100
    fisher = kc.estimate(model, residuals(mean, spread, 1, 2, generator), "gaussian", kind="exact")
    for _ in range(repeats):
        data = residuals(mean, spread, 16, 3, generator)
        of = signal.measure(model, data, "gaussian", fisher, damping=DAMPING)[1]["linear"].plain
        found.append([of.signal, of.noise])
        pairs = zip((of.signal, of.noise), (of.signal_error, of.noise_error), expected, strict=True)
        covered += torch.tensor([abs(x - truth) <= 2.36 * error for x, error, truth in pairs] + [True])
        scale = expected[1] / expected[0]
        covered[2] += float(of.scale_least <= scale) - 1
    mean_found, deviation = torch.tensor(found).mean(0), torch.tensor(found).std(0)
    z = (mean_found - torch.tensor(expected)) / (deviation / repeats**0.5)
    assert z.abs().max() < 3
    # Student's t with 7 degrees of freedom at 95 %; binomial with 100 repeats.
    assert covered.min() >= 85, covered


def test_the_suggested_batch_is_the_noise_scale_of_the_metric():
    """Gaussian outputs: F is the identity on the bias, so the metric changes no ratio."""
    generator = torch.Generator().manual_seed(0)
    data = residuals(torch.tensor([1.0, 1.0]), 3.0, 64, 80, generator)
    fisher = kc.estimate(Shift(2), data, "gaussian", kind="exact")
    whole, layers = signal.measure(Shift(2), data, "gaussian", fisher, damping=DAMPING)
    assert layers["linear"].metric.scale == pytest.approx(layers["linear"].plain.scale, rel=1e-9)
    assert whole.suggested_batch == pytest.approx(9.0, rel=0.15)
    assert whole.ratio == pytest.approx(80 / 9, rel=0.15)


def test_pure_noise_suggests_nothing_but_a_bound():
    data = residuals(torch.zeros(3), 1.0, 40, 4, torch.Generator().manual_seed(1))
    fisher = kc.estimate(Shift(3), data, "gaussian", kind="exact")
    whole, _ = signal.measure(Shift(3), data, "gaussian", fisher)
    assert whole.suggested_batch is None
    assert whole.plain.scale_error == inf
    assert 20 < whole.plain.scale_least < inf


def test_no_noise_needs_one_example():
    data = [(torch.zeros(2, 1), torch.ones(2, 3))] * 9
    fisher = kc.estimate(Shift(3), data, "gaussian", kind="exact")
    whole, _ = signal.measure(Shift(3), data, "gaussian", fisher, damping=1.0)
    assert whole.suggested_batch == 1
    assert whole.ratio == inf
    assert whole.plain.signal == pytest.approx(3.0)


def test_the_mean_gradient_is_that_of_all_data_at_once():
    model, data = classifier(), labelled([2, 5, 3])
    together = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    for reduction in ("mean", "sum"):
        found = mean_gradient(model, data, nn.CrossEntropyLoss(reduction=reduction))
        expected = gradient_matrix(model, together, "0", reduction)
        assert torch.allclose(torch.cat([found["0.weight"], found["0.bias"][:, None]], 1), expected)


def test_nothing_of_the_model_changes():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    before = {name: one.clone() for name, one in model.state_dict().items()}
    data = labelled([4, 4])
    state = torch.get_rng_state()
    list(pieces(model, data, "categorical", least=4))
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_data_without_labels_are_named():
    model = classifier()
    fisher = kc.estimate(model, [torch.randn(8, 3)], "categorical")
    with pytest.raises(kc.LikelihoodError, match="needs data labels"):
        signal.measure(model, [torch.randn(8, 3)], "categorical", fisher)


def test_one_example_has_no_noise_to_measure():
    model, data = classifier(), labelled([1])
    fisher = kc.estimate(model, data, "categorical")
    with pytest.raises(kc.ArgumentError, match="one example"):
        signal.measure(model, data, "categorical", fisher)
