"""The oracles on the grid of likelihoods x structures x kinds: p from torch.distributions, F from its definition."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .likelihood_cases import CLOSED, CONSTANT, HEADS, STRUCTURES, Case, Mixing, case
from .reference import assert_same, exact_fisher, matrix_order
from .test_structures import stored

KRONECKER = ["kfac", "ekfac", "tkfac", "kpsvd", "block"]
GRID = [
    (head, kind)
    for head, kind in itertools.product(HEADS, ["sampled", "exact", "empirical"])
    if HEADS[head].closed or kind != "exact"
]
grid = pytest.mark.parametrize(("head", "kind"), GRID)
mixing_too = pytest.mark.parametrize("net", ["perceptron", "mixing"])


def tolerance(structure: str) -> float:
    return 1e-7 if structure == "kpsvd" else 1e-10


@grid
@pytest.mark.parametrize("structure", [one for one in STRUCTURES if one not in ("kfac", "dense")])
@mixing_too
def test_blocks_are_those_of_brute_force(net, structure, head, kind):
    of = case(net, head)
    found, kfac = of.stored(kind)[structure], of.stored(kind)["kfac"]
    assert list(found) == list(of.layers)
    for name, block in found.items():
        expected = stored(structure, of.block(kind, block), block, kfac[name])
        assert_same(block.to_dense(), expected, tolerance=tolerance(structure))


@grid
@mixing_too
def test_dense_is_brute_force(net, head, kind):
    of = case(net, head)
    assert_same(of.stored(kind)["dense"].to_dense(), of.dense(kind))


@grid
@mixing_too
def test_eigenvalues_estimated_anew_are_nearer_and_have_the_trace(net, head, kind):
    """ORACLES 20."""
    of = case(net, head)
    ekfac, kfac = of.stored(kind)["ekfac"], of.stored(kind)["kfac"]
    assert_same(ekfac.trace(), of.dense(kind).trace())
    for name, block in ekfac.items():
        F = of.block(kind, block)
        nearer, near = (torch.linalg.norm(F - one.to_dense()) for one in (block, kfac[name]))
        assert nearer <= near + 1e-12 * torch.linalg.norm(F)


@grid
@pytest.mark.parametrize("structure", KRONECKER)
def test_one_example_is_exact(structure, head, kind):
    """ORACLES 6: whatever the likelihood and however many the labels, since they share the one a."""
    of = case("one example", head)
    for block in of.stored(kind)[structure].values():
        assert_same(block.to_dense(), of.block(kind, block), tolerance=tolerance(structure))


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("structure", KRONECKER)
@pytest.mark.parametrize("head", CLOSED)
def test_equal_inputs_are_exact(head, structure, kind):
    """ORACLES 7."""
    of = Case("one example", head)
    of.inputs = of.inputs.expand(4, -1)
    of.divisor = 4
    of.labels = of.head.labels(of.model(of.inputs))
    for block in of.stored(kind)[structure].values():
        assert_same(block.to_dense(), of.block(kind, block), tolerance=tolerance(structure))


EXACT = [
    ("deep linear", "expand"),
    ("deep linear over positions", "expand"),
    ("deep linear pooled", "reduce"),
    ("linear", "expand"),
    ("convolution", "expand"),
    ("convolution pooled", "reduce"),
]


@pytest.mark.parametrize("structure", KRONECKER)
@pytest.mark.parametrize("head", CONSTANT)
@pytest.mark.parametrize(("net", "sharing"), EXACT)
def test_linear_nets_are_exact_where_the_output_fisher_is_constant(net, sharing, head, structure):
    """ORACLES 8 to 11, of every likelihood with the information of a Gaussian."""
    of = case(net, head)
    for block in of.stored("exact", sharing)[structure].values():
        assert_same(block.to_dense(), of.block("exact", block), tolerance=tolerance(structure))


class Pooled(nn.Module):
    """A stack over positions, summed or averaged over those that are real."""

    def __init__(self, stack: nn.Module, how: str) -> None:
        super().__init__()
        self.stack, self.how = stack, how

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        total = (self.stack(x) * real[..., None]).sum(1)
        return total / real.sum(1, keepdim=True) if self.how == "mean" else total


def pooled_exactly(model: Pooled, x: Tensor, real: Tensor, information) -> dict[str, Tensor]:
    """F of each layer in the order of its matrix, from examples one at a time, without what pads them."""
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        total = torch.zeros(())
        for row, keep in zip(x, real, strict=True):
            alone = row[keep][None]
            settings = {"parameters": [layer.weight, layer.bias], "divisor": len(x)}
            total = total + exact_fisher(lambda h: model(h, torch.ones(h.shape[:2])), alone, information, **settings)
        order = matrix_order(layer)
        found[name] = total[order][:, order].detach()
    return found


def pooled_estimate(model: Pooled, x: Tensor, real: Tensor, likelihood: kc.Likelihood, structure: str) -> kc.Fisher:
    data = kc.Data(positions=lambda args, kwargs, outputs: kwargs["real"])
    rules, options = {"*": {"sharing": "reduce"}}, kc.Options(data=data)
    batches = [{"x": x[:2], "real": real[:2]}, {"x": x[2:], "real": real[2:]}]
    return kc.estimate(model, batches, likelihood, structure=structure, kind="exact", rules=rules, options=options)


@pytest.mark.parametrize("structure", KRONECKER)
@pytest.mark.parametrize("head", CONSTANT)
@pytest.mark.parametrize("how", ["mean", "sum"])
def test_of_ragged_positions_the_mean_is_exact_and_the_sum_is_not(how, head, structure):
    """ORACLES 9: with biases beside the weights, a mean over positions has the bias column of one position."""
    model, x = Pooled(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, HEADS[head].width)), how), torch.randn(5, 3, 3)
    real = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 1]]).bool()
    found = pooled_estimate(model, x, real, HEADS[head].likelihood, structure)
    for name, F in pooled_exactly(model, x, real, HEADS[head].fisher).items():
        if how == "mean" or structure not in ("kfac", "ekfac"):
            assert_same(found[name].to_dense(), F, tolerance=tolerance(structure))
        else:
            assert (found[name].to_dense() - F).norm() > 0.01 * F.norm()


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "tkfac", "kpsvd", "block"])
@pytest.mark.parametrize("head", CLOSED)
def test_identical_positions_pooled_are_exact(head, structure):
    """ORACLES 7, of any net."""
    stack = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, HEADS[head].width))
    model, x = Pooled(stack, "sum"), torch.randn(3).expand(4, 2, 3)
    real = torch.ones(4, 2, dtype=torch.bool)
    found = pooled_estimate(model, x, real, HEADS[head].likelihood, structure)
    for name, F in pooled_exactly(model, x, real, HEADS[head].fisher).items():
        assert_same(found[name].to_dense(), F, tolerance=tolerance(structure))


@pytest.mark.parametrize("head", [name for name in CLOSED if name not in CONSTANT])
def test_they_are_not_where_it_is_not(head):
    of = case("deep linear", head)
    blocks = of.stored("exact")["kfac"].values()
    assert all((block.to_dense() - of.block("exact", block)).norm() > 1e-5 * block.frobenius_norm() for block in blocks)


@pytest.mark.parametrize("head", CONSTANT)
def test_data_labels_miss_the_exact_block(head):
    """ORACLES 8: the inequality."""
    of = case("deep linear", head)
    empirical, exact = (of.stored(kind)["kfac"].to_dense() for kind in ("empirical", "exact"))
    assert (empirical - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize(("head", "kind"), [(head, kind) for head, kind in GRID if kind != "empirical"])
def test_data_labels_change_nothing(head, kind):
    """ORACLES 5."""
    one, other = Case("perceptron", head), Case("perceptron", head)
    other.labels = other.labels.roll(1, 0)
    assert not torch.equal(one.labels, other.labels)
    words = ["kfac", "ekfac", "diagonal"]
    for a, b in zip(one.estimate(words, kind), other.estimate(words, kind), strict=True):
        assert torch.equal(a.to_dense(), b.to_dense())


@grid
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_sum_is_M_times_the_mean(structure, head, kind):
    """ORACLES 5: A is a plain mean, so that all of it is in G."""
    of, total = case("mixing", head), Case("mixing", head)
    total.likelihood = of.head.make(reduction="sum")
    expected = of.divisor * of.stored(kind)[structure].to_dense()
    assert_same(total.stored(kind)[structure].to_dense(), expected, tolerance=tolerance(structure))


WAYS = {
    "exact": lambda of: of.estimate("kfac", "exact"),
    "implicit": lambda of: kc.implicit(of.model, [of.inputs], of.likelihood).to_dense(),
    "gram": lambda of: kc.gram(of.model, [of.inputs], of.likelihood),
}


@pytest.mark.parametrize("head", [name for name in HEADS if not HEADS[name].closed])
@pytest.mark.parametrize("way", WAYS)
def test_what_has_no_closed_form_is_refused_where_it_is_needed(way, head):
    with pytest.raises(kc.LikelihoodError, match="fisher_sqrt"):
        WAYS[way](case("perceptron", head))


@pytest.mark.parametrize("head", CLOSED)
@mixing_too
def test_products_and_the_kernel_are_those_of_brute_force(net, head):
    """ORACLES 21."""
    of, dense = case(net, head), case(net, head).dense("exact")
    data = [x for x, _ in of.batches()]
    kernel = kc.gram(of.model, data, of.likelihood)
    assert_same(kc.implicit(of.model, data, of.likelihood).to_dense(), dense)
    assert_same(kernel.fisher().to_dense(), dense)
    values, both = torch.linalg.eigvalsh(dense).flip(0), min(len(dense), len(kernel.matrix))
    assert_same(kernel.eigenvalues()[:both], values[:both])
    # What either has beyond is zero.
    assert torch.cat([kernel.eigenvalues()[both:], values[both:]]).abs().max() < 1e-12 * values[0]


def exported(structure: str) -> tuple[kc.Fisher, Tensor]:
    fisher = case("mixing", "categorical").stored("exact")[structure]
    # The dense matrix in the order of the parameters, which is that of the operator.
    return fisher, torch.stack([fisher @ unit for unit in torch.eye(fisher.shape[0])])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_scipy_s_eigenvalues_are_those_of_the_dense_matrix(structure):
    """ORACLES 22."""
    fisher, dense = exported(structure)
    start = np.random.default_rng(0).normal(size=len(dense))
    values = scipy.sparse.linalg.eigsh(fisher.to_scipy(), k=3, which="LA", return_eigenvectors=False, v0=start)
    np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(dense.numpy())[-3:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_scipy_s_solution_is_that_of_the_dense_matrix(structure):
    """ORACLES 22."""
    fisher, dense = exported(structure)
    shifted = fisher.to_scipy() + 0.1 * scipy.sparse.linalg.aslinearoperator(np.eye(len(dense)))
    v = np.random.default_rng(0).normal(size=len(dense))
    solution, failed = scipy.sparse.linalg.cg(shifted, v, rtol=1e-13)
    assert failed == 0
    np.testing.assert_allclose(solution, np.linalg.solve(dense.numpy() + 0.1 * np.eye(len(dense)), v), atol=1e-9)
    np.testing.assert_allclose(fisher.solve(torch.tensor(v), damping=0.1).numpy(), solution, atol=1e-9)


# -- ORACLES 15: one backward for labels drawn at every term, averaged over all labels --------------------------------


def all_labels(head: str) -> tuple[Case, list[tuple[float, Tensor]]]:
    """One example of three terms on a net that mixes them, and every label with its probability."""
    of = Case("mixing", head)
    of.model, of.inputs = Mixing(HEADS[head].width), torch.randn(1, 3, 2)
    f = of.model(of.inputs).detach()
    sides = (1, 3) if head == "categorical" else (1, 3, 2)
    values = range(3) if head == "categorical" else (0.0, 1.0)
    labels = [torch.tensor(y).reshape(sides) for y in itertools.product(values, repeat=int(np.prod(sides)))]
    return of, [(float(of.head.log_prob(f, y).exp()), y) for y in labels]


def estimated(of: Case, sharing: str, labels: Tensor | None, structure: str) -> kc.Fisher:
    """From one backward for the labels, or the exact kind where there are none."""
    draws, kind = (None, "exact") if labels is None else ([[labels]], "sampled")
    rules, options = {"*": {"sharing": sharing}}, kc.Options(draws=draws)
    settings = {"structure": structure, "kind": kind, "rules": rules, "options": options}
    return kc.estimate(of.model, [of.inputs], of.likelihood, **settings)


def partial_traces(fisher: kc.Fisher) -> Tensor:
    parts = []
    for block in fisher.values():
        F = block.to_dense().reshape(*block.layout.matrix_shape, *block.layout.matrix_shape)
        parts += [torch.einsum("aibi->ab", F), torch.einsum("aiaj->ij", F)]
    return torch.cat([part.flatten() for part in parts])


READ = {
    "dense": lambda make: make("dense").to_dense(),
    "block": lambda make: make("block").to_dense(),
    "diagonal": lambda make: make("diagonal").to_dense(),
    "ekfac, its trace": lambda make: make("ekfac").trace(),
    "tkfac, its partial traces": lambda make: partial_traces(make("tkfac")),
    "kfac, G": lambda make: torch.cat([block.G.flatten() for block in make("kfac").values()]),
}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("what", READ)
@pytest.mark.parametrize("head", ["categorical", "bernoulli"])
def test_one_backward_over_all_labels_is_the_exact_expectation(head, what, sharing):
    of, labels = all_labels(head)
    assert abs(sum(p for p, _ in labels) - 1) < 1e-12
    found = sum(p * READ[what](partial(estimated, of, sharing, y)) for p, y in labels)
    assert_same(found, READ[what](partial(estimated, of, sharing, None)))


# -- ORACLES 23: draws ------------------------------------------------------------------------------------------------

DRAWN = ["categorical", "heteroscedastic", "poisson", "multinomial", "beta", "von mises", "ordinal"]
SEEDS = 60


def quadratic_forms(head: str, structure: str, samples: int) -> Tensor:
    """v^T F v of estimates with different seeds."""
    of = case("perceptron", head)
    v = torch.linspace(-1, 1, len(of.dense("exact")))
    return torch.stack(
        [
            kc.estimate(
                of.model,
                [of.inputs],
                of.likelihood,
                structure=structure,
                samples=samples,
                options=kc.Options(seed=seed),
            ).quadratic(v)
            for seed in range(SEEDS)
        ]
    )


@pytest.mark.parametrize("structure", ["dense", "kfac"])
@pytest.mark.parametrize("head", DRAWN)
def test_the_error_of_draws_falls_with_the_root_of_their_number(head, structure):
    of = case("perceptron", head)
    exact = kc.estimate(of.model, [of.inputs], of.likelihood, structure=structure, kind="exact")
    expected = exact.quadratic(torch.linspace(-1, 1, len(of.dense("exact"))))
    one, many = quadratic_forms(head, structure, 1), quadratic_forms(head, structure, 12)
    for found in (one, many):
        # Five standard errors of the mean over seeds.
        assert abs(found.mean() - expected) < 5 * found.std() / SEEDS**0.5
    # The logarithm of a ratio of two sample variances has a deviation near 2 / sqrt(SEEDS) for normal numbers.
    assert abs((one.var() / many.var()).log() - np.log(12)) < 5 * 2 / SEEDS**0.5


@pytest.mark.parametrize("head", [name for name in HEADS if not HEADS[name].closed])
def test_draws_without_a_closed_form_have_the_moment_of_torch_s(head):
    """A library's draws and torch's own: the same second moment of the score."""
    likelihood, f = HEADS[head].likelihood, torch.linspace(-0.6, 0.8, HEADS[head].width).expand(20_000, -1)
    moments = []
    for labels in (likelihood.sample(f, torch.Generator().manual_seed(0)), HEADS[head].labels(f)):
        squared = likelihood.score(f, labels).square()
        moments.append((squared.mean(0), squared.var(0) / len(f)))
    (ours, a), (theirs, b) = moments
    assert ((ours - theirs).abs() < 5 * (a + b).sqrt()).all()
