"""Every structure of every kind against brute force: the Fisher from its definition, then stored as the word says."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .helpers import Apply
from .reference import (
    assert_same,
    bernoulli_log_prob,
    categorical_log_prob,
    exact_fisher,
    fisher_of_draws,
    gaussian_log_prob,
)

KINDS = ["sampled", "exact", "empirical", "forward_only"]
PER_LAYER = ["kfac", "ekfac", "tkfac", "kpsvd", "diagonal", "block"]


class Tokens(nn.Module):
    """Attention written out over (N, S, d), one layer used twice and one without bias: positions mix."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.head = nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.query(x) @ torch.tanh(self.query(x.flip(1))).mT).softmax(-1)
        return self.head(x + weights @ self.value(x))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def pixels() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 2, (2, 1), groups=2), nn.Tanh(), nn.Conv2d(2, 3, 2, padding=1), Apply(lambda x: x.mean((2, 3)))
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (perceptron, (5, 3)),
    "tokens": (Tokens, (4, 3, 2)),
    "pixels": (pixels, (4, 4, 3, 2)),
}


def information(name: str, f: Tensor) -> Tensor:
    """The output Fisher of one example, its terms along all but the last dimension."""
    if name == "categorical":
        p = f.softmax(-1)
        blocks = torch.diag_embed(p) - p[..., None] * p[..., None, :]
    else:
        of_one = f.sigmoid() * (1 - f.sigmoid()) if name == "bernoulli" else torch.full_like(f, 1 / 0.7)
        blocks = torch.diag_embed(of_one)
    return torch.block_diag(*blocks.reshape(-1, f.shape[-1], f.shape[-1]))


LIKELIHOODS = {
    "categorical": (kc.Categorical(dim=-1), categorical_log_prob),
    "bernoulli": (kc.Bernoulli(event_dims=(-1,)), bernoulli_log_prob),
    "gaussian": (kc.Gaussian(0.7, event_dims=(-1,)), lambda f, y: gaussian_log_prob(f, y, 0.7)),
}


class Case:
    """A model with data and labels, and the matrices that brute force gives for it."""

    def __init__(self, model: str, likelihood: str) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            make, shape = MODELS[model]
            self.model, self.inputs = make().double(), torch.randn(shape, dtype=torch.float64)
            self.name, (self.likelihood, self.log_prob) = likelihood, LIKELIHOODS[likelihood]
            outputs = self.model(self.inputs).detach()
            self.labels, *self.draws = (self.drawn(outputs) for _ in range(3))
        self.divisor = outputs[..., 0].numel()
        self.layers = {name: m for name, m in self.model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}

    def drawn(self, outputs: Tensor) -> Tensor:
        if self.name == "categorical":
            return torch.randint(outputs.shape[-1], outputs.shape[:-1])
        return torch.randint(2, outputs.shape).double() if self.name == "bernoulli" else torch.randn_like(outputs)

    def estimate(self, structure: str | list[str], kind: str, **options: object) -> kc.Fisher | list[kc.Fisher]:
        # Two batches, of unequal size.
        data = [(self.inputs[:3], self.labels[:3]), (self.inputs[3:], self.labels[3:])]
        if kind == "sampled":
            options["draws"] = [[draw[:3] for draw in self.draws], [draw[3:] for draw in self.draws]]
        return kc.estimate(
            self.model, data, self.likelihood, structure=structure, kind=kind, options=kc.Options(**options)
        )

    @lru_cache  # noqa: B019
    def dense(self, kind: str) -> Tensor:
        """F over all parameters, in the order of a flat vector."""
        parameters = [p for module in self.layers.values() for p in module.parameters()]
        settings = {"parameters": parameters, "divisor": self.divisor}
        if kind == "exact":
            return exact_fisher(self.model, self.inputs, lambda f: information(self.name, f), **settings).detach()
        labels = self.draws if kind == "sampled" else [self.labels]
        return fisher_of_draws(self.model, self.inputs, labels, self.log_prob, **settings)

    def block(self, kind: str, block: kc.Block) -> Tensor:
        """F of one layer in the order of its matrix; for 'forward_only' I (x) A."""
        if kind == "forward_only":
            eye, A = torch.eye(block.layout.d_out), self.estimate("kfac", "sampled")[block.name].A
            return torch.block_diag(*[torch.kron(eye, one) for one in A.reshape(-1, *A.shape[-2:])])
        order = self.order(block)
        return self.dense(kind)[order][:, order]

    def order(self, block: kc.Block) -> Tensor:
        """Where the entries of the layer's matrix are in a flat vector of all parameters."""
        start, places = 0, {}
        for name, parameter in self.model.named_parameters():
            places[name] = torch.arange(start, start + parameter.numel()).reshape(parameter.shape)
            start += parameter.numel()
        return block.layout.to_matrix({name: places[name] for name in block.layout.names}).flatten()


@lru_cache
def case(model: str, likelihood: str) -> Case:
    return Case(model, likelihood)


def by_group(F: Tensor, block: kc.Block) -> list[Tensor]:
    """The blocks along the diagonal as [o, i, o, i], one a group."""
    layout = block.layout
    side = layout.d_out * layout.d_in
    pieces = [F[at : at + side, at : at + side] for at in range(0, len(F), side)]
    return [piece.reshape(layout.d_out, layout.d_in, layout.d_out, layout.d_in) for piece in pieces]


def trace_restricted(F: Tensor) -> Tensor:
    R, C = torch.einsum("aibi->ab", F), torch.einsum("aiaj->ij", F)
    return torch.kron(R, C) / R.trace()


def nearest(F: Tensor) -> Tensor:
    d_out, d_in = F.shape[:2]
    U, S, Vh = torch.linalg.svd(F.permute(0, 2, 1, 3).reshape(d_out**2, d_in**2))
    return torch.kron(U[:, 0].reshape(d_out, d_out), Vh[0].reshape(d_in, d_in)) * S[0]


def eigen_corrected(F: Tensor, block: kc.EigenBlock) -> Tensor:
    pairs = zip(
        *(x.reshape(-1, *x.shape[-2:]) for x in (block.basis_G, block.basis_A)),
        strict=True,
    )
    U = torch.block_diag(*[torch.kron(g, a) for g, a in pairs])
    return U @ torch.diag((U.T @ F @ U).diagonal()) @ U.T


def stored(structure: str, F: Tensor, block: kc.Block, kfac: kc.Block) -> Tensor:
    """What a structure makes of the exact block F."""
    if structure == "kfac":
        return kfac.to_dense()
    if structure == "diagonal":
        return torch.diag(F.diagonal())
    if structure == "block":
        return F
    if structure == "ekfac":
        return eigen_corrected(F, block)
    make = {"tkfac": trace_restricted, "kpsvd": nearest}[structure]
    return torch.block_diag(*[make(one) for one in by_group(F, block)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", [one for one in PER_LAYER if one != "kfac"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("model", MODELS)
def test_blocks_are_those_of_brute_force(model, likelihood, structure, kind):
    of = case(model, likelihood)
    found, kfac = of.estimate([structure, "kfac"], kind)
    assert list(found) == list(of.layers)
    for name, block in found.items():
        tolerance = 1e-7 if structure == "kpsvd" else 1e-10
        assert_same(block.to_dense(), stored(structure, of.block(kind, block), block, kfac[name]), tolerance=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("model", MODELS)
def test_dense_is_brute_force_with_what_couples_the_layers(model, likelihood, kind):
    of = case(model, likelihood)
    found, blocks = of.estimate(["dense", "block"], kind)
    expected = blocks.to_dense() if kind == "forward_only" else of.dense(kind)
    assert_same(found.to_dense(), expected)
    if kind != "forward_only":
        assert (found.to_dense() - blocks.to_dense()).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["sampled", "exact", "empirical"])
@pytest.mark.parametrize("structure", ["ekfac", "tkfac", "diagonal", "block", "dense"])
@pytest.mark.parametrize("model", MODELS)
def test_the_trace_is_that_of_the_exact_matrix(model, structure, kind):
    """ORACLES 20, of a sum of diagonal blocks that keeps all squared entries."""
    of = case(model, "categorical")
    assert_same(of.estimate(structure, kind).trace(), of.dense(kind).trace())


@pytest.mark.parametrize("kind", ["sampled", "exact", "empirical"])
@pytest.mark.parametrize("model", MODELS)
def test_eigenvalues_estimated_anew_are_nearer_than_those_of_the_factors(model, kind):
    """ORACLES 20: the distance in the Frobenius norm, which is smaller wherever F is no Kronecker product."""
    of = case(model, "categorical")
    ekfac, kfac = of.estimate(["ekfac", "kfac"], kind)
    for name, block in ekfac.items():
        F = of.block(kind, block)
        assert torch.linalg.norm(F - block.to_dense()) < torch.linalg.norm(F - kfac[name].to_dense())


@pytest.mark.parametrize("other", ["kfac", "tkfac"])
@pytest.mark.parametrize("model", MODELS)
def test_the_nearest_kronecker_product_is_nearer_than_the_others(model, other):
    of = case(model, "categorical")
    nearest_one, some = of.estimate(["kpsvd", other], "exact")
    for name, block in nearest_one.items():
        F = of.block("exact", block)
        assert torch.linalg.norm(F - block.to_dense()) <= torch.linalg.norm(F - some[name].to_dense()) * (1 + 1e-12)


@pytest.mark.parametrize("structure", ["ekfac", "tkfac", "kpsvd", "block"])
def test_one_example_at_one_position_is_the_kronecker_block(structure):
    """ORACLES 6 and 7, of each structure that can hold it."""
    model = perceptron()
    found, kfac = kc.estimate(
        model, [torch.randn(1, 3).expand(4, 3)], "categorical", structure=[structure, "kfac"], kind="exact"
    )
    for name, block in kfac.items():
        assert_same(found[name].to_dense(), block.to_dense())


@pytest.mark.parametrize("structure", [*PER_LAYER, "dense"])
def test_a_list_gives_what_each_gives_alone(structure):
    of = case("tokens", "categorical")
    words = [*PER_LAYER, "dense"]
    together = of.estimate(words, "sampled")[words.index(structure)]
    assert torch.equal(together.to_dense(), of.estimate(structure, "sampled").to_dense())
    assert together.meta["structure"] == structure


def test_a_list_takes_one_forward_and_one_backward_a_draw():
    model, calls = perceptron(), []
    model[1].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].weight.register_hook(lambda _: calls.append("weight gradient"))
    model[1].register_full_backward_hook(lambda *_: calls.append("backward"))
    kc.estimate(model, [torch.randn(4, 3)], "categorical", structure=[*PER_LAYER, "dense"], samples=2)
    assert calls == ["forward", "backward", "backward"]


@pytest.mark.parametrize("structure", [*PER_LAYER, "dense"])
def test_an_iterator_is_enough(structure):
    """Nothing is read twice, so that an iterator that shuffles gives the same data to what comes second."""
    of = case("perceptron", "categorical")
    settings = {"structure": structure, "options": kc.Options(seed=1)}
    found = kc.estimate(of.model, iter(of.inputs.split(2)), of.likelihood, **settings)
    assert_same(found.to_dense(), kc.estimate(of.model, [of.inputs], of.likelihood, **settings).to_dense())


def test_mixed_takes_each_layer_from_its_rule():
    of = case("tokens", "categorical")
    rules = {"*": {"structure": "diagonal"}, "head": {"structure": "ekfac"}, "value": {"structure": "block"}}
    mixed, diagonal, ekfac, block = of.estimate(["mixed", "diagonal", "ekfac", "block"], "sampled", rules=rules)
    for name, expected in (("query", diagonal), ("head", ekfac), ("value", block)):
        assert type(mixed[name]) is type(expected[name])
        assert torch.equal(mixed[name].to_dense(), expected[name].to_dense())


def test_mixed_without_a_rule_is_kfac():
    of = case("tokens", "categorical")
    mixed = of.estimate("mixed", "sampled", rules={"head": {"structure": "diagonal"}})
    assert {name: type(block) for name, block in mixed.items()} == {
        "query": kc.KroneckerBlock,
        "value": kc.KroneckerBlock,
        "head": kc.DiagonalBlock,
    }


def test_a_rule_that_would_not_hold_is_refused():
    with pytest.raises(kc.ArgumentError, match="structure='mixed'"):
        case("tokens", "categorical").estimate("kfac", "sampled", rules={"head": {"structure": "diagonal"}})


@pytest.mark.parametrize("word", ["dense", "mixed", "nothing"])
def test_a_rule_with_a_structure_that_no_layer_has_is_refused(word):
    with pytest.raises(kc.ArgumentError, match=f"'head' has structure='{word}'"):
        case("tokens", "categorical").estimate("mixed", "sampled", rules={"head": {"structure": word}})


@pytest.mark.parametrize("structure", ["ekfac", "tkfac", "kpsvd", "diagonal", "block", "dense"])
def test_padded_positions_add_nothing(structure):
    model = Tokens()
    x = torch.randn(3, 4, 2)
    keep = torch.ones(3, 4, dtype=torch.bool)
    keep[:, 3] = False
    head = nn.Sequential(model.head, Apply(lambda h: h * 1.0))

    def estimated(x: Tensor, data: kc.Data, labels: Tensor) -> kc.Fisher:
        options = kc.Options(draws=[[labels]], data=data)
        return kc.estimate(head, [x], kc.Categorical(dim=-1), structure=structure, options=options)

    labels = torch.randint(2, (3, 4))
    padded = x.masked_fill(~keep[..., None], float("nan"))
    masks = kc.Data(mask=lambda *_: keep, positions=lambda *_: keep)
    assert_same(estimated(padded, masks, labels).to_dense(), estimated(x[:, :3], kc.Data(), labels[:, :3]).to_dense())


@pytest.mark.parametrize("structure", ["ekfac", "tkfac", "kpsvd", "diagonal", "block", "dense"])
def test_positions_that_pose_as_examples_are_refused(structure):
    """A weight gradient of one example cannot be made of rows that do not say whose they are."""
    model = nn.Sequential(Apply(lambda x: x.reshape(-1, 3)), nn.Linear(3, 2), Apply(lambda h: h.reshape(-1, 2, 2)))
    with pytest.raises(kc.CaptureError, match=r"layer '1' has 10 entries along its first dimension, .* 5 examples"):
        kc.estimate(model, [torch.randn(5, 2, 3)], kc.Categorical(dim=-1), structure=structure)


@pytest.mark.parametrize("structure", ["diagonal", "block", "tkfac"])
def test_rows_of_one_example_are_its_positions(structure):
    model = nn.Sequential(Apply(lambda x: x.reshape(-1, 3)), nn.Linear(3, 2), Apply(lambda h: h.reshape(-1, 2, 2)))
    inputs, options = torch.randn(1, 2, 3), kc.Options(seed=0)
    found = kc.estimate(model, [inputs], kc.Categorical(dim=-1), structure=structure, options=options)
    plain = kc.estimate(model[1], [inputs], kc.Categorical(dim=-1), structure=structure, options=options)
    assert_same(found.to_dense(), plain.to_dense())


def test_a_layer_that_is_not_used_has_zeros_in_the_dense_matrix():
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)) if len(x) > 1 else self.first(x)

    model, options = Sometimes(), kc.Options(draws=[[torch.zeros(3, dtype=int)], [torch.zeros(1, dtype=int)]])
    data = [torch.randn(3, 2), torch.randn(1, 2)]
    found = kc.estimate(model, data, "categorical", structure="dense", options=options)
    losses = [nn.functional.cross_entropy(model(x), torch.zeros(len(x), dtype=int), reduction="none") for x in data]
    parameters = list(model.parameters())
    rows = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, parameters, materialize_grads=True, retain_graph=True)]
        )
        for loss in torch.cat(losses)
    ]
    assert_same(found.to_dense(), sum(torch.outer(row, row) for row in rows) / 4)


def test_no_side_of_the_input_is_squared_for_a_diagonal(monkeypatch):
    """A diagonal of a layer with a vocabulary of inputs has no second moment of them to hold."""
    model = nn.Linear(300, 2)
    largest = []
    plain = torch.Tensor.new_zeros

    def watched(self, *shape, **settings):
        result = plain(self, *shape, **settings)
        largest.append(result.numel())
        return result

    monkeypatch.setattr("kfac_cond.forwards.expanded_input_moment", lambda *_, **__: pytest.fail("a moment was formed"))
    monkeypatch.setattr(torch.Tensor, "new_zeros", watched)
    fisher = kc.estimate(model, [torch.randn(4, 300)], "categorical", structure="diagonal")
    assert fisher[""].values.shape == (2, 301)
    assert max(largest, default=0) <= 2 * 301


@pytest.mark.parametrize("structure", PER_LAYER)
def test_values_that_are_not_finite_are_refused(structure):
    with pytest.raises(kc.NumericalError, match="not finite"):
        kc.estimate(perceptron(), [torch.full((2, 3), float("nan"))], "categorical", structure=structure)


@pytest.mark.parametrize("kind", ["empirical", "forward_only"])
def test_what_is_not_the_conditional_fisher_says_so(kind):
    fisher = case("perceptron", "categorical").estimate("kfac", kind)
    assert "not the conditional Fisher" in repr(fisher)
    assert "not the conditional Fisher" in kc.estimate.__doc__.replace("\n            ", " ")


@pytest.mark.parametrize("kind", ["sampled", "exact"])
def test_what_is_the_conditional_fisher_does_not(kind):
    assert "not the" not in repr(case("perceptron", "categorical").estimate("kfac", kind))


def test_the_empirical_one_differs_from_the_conditional_one():
    of = case("perceptron", "categorical")
    empirical, exact = (of.estimate("block", kind).to_dense() for kind in ("empirical", "exact"))
    assert (empirical - exact).norm() > 0.1 * exact.norm()


def test_the_empirical_one_needs_data_labels():
    with pytest.raises(kc.LikelihoodError, match="needs data labels"):
        kc.estimate(perceptron(), [torch.randn(2, 3)], "categorical", kind="empirical")


def test_the_empirical_one_refuses_labels_out_of_range():
    with pytest.raises(kc.LikelihoodError, match="labels out of the range"):
        kc.estimate(perceptron(), [(torch.randn(2, 3), torch.tensor([0, 7]))], "categorical", kind="empirical")


def test_the_empirical_one_leaves_ignored_labels_out():
    model, x, y = perceptron(), torch.randn(4, 3), torch.tensor([0, -100, 1, -100])
    found = kc.estimate(model, [(x, y)], "categorical", structure="block", kind="empirical")
    expected = kc.estimate(model, [(x[y >= 0], y[y >= 0])], "categorical", structure="block", kind="empirical")
    assert_same(found.to_dense(), expected.to_dense())


def test_forward_only_sends_nothing_back():
    model, backwards = perceptron(), []
    model[1].register_full_backward_hook(lambda *_: backwards.append(1))
    fisher = kc.estimate(model, [torch.randn(4, 3)], "categorical", kind="forward_only")
    assert torch.equal(fisher["0"].G, torch.eye(4))
    assert backwards == []


def test_forward_only_does_not_depend_on_the_outputs():
    model, x = perceptron(), torch.randn(4, 3)
    found, other = (
        kc.estimate(model, [x], one, kind="forward_only") for one in ("categorical", kc.Gaussian(0.1, reduction="sum"))
    )
    assert torch.equal(found.to_dense(), other.to_dense())
