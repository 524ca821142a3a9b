"""Every structure of every kind against brute force: the Fisher from its definition, then stored as the word says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.structures.keeping import KeepingCollector, NearestCollector

from .fisher_cases import LIKELIHOODS, MODELS, Tokens, case, perceptron, twice
from .helpers import Apply
from .reference import assert_same

KINDS = ["sampled", "exact", "empirical", "forward_only"]
PER_LAYER = ["kfac", "ekfac", "tkfac", "kpsvd", "diagonal", "unit_wise", "block"]


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
    if structure == "unit_wise":
        row = torch.arange(block.layout.numel) // block.layout.d_in
        return F * (row[:, None] == row)
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
    expected = blocks.to_dense() if kind == "forward_only" else of.dense(kind, found.parameter_names)
    assert_same(found.to_dense(), expected)
    if kind != "forward_only":
        assert (found.to_dense() - blocks.to_dense()).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["sampled", "exact", "empirical"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("model", MODELS)
def test_implicit_is_brute_force_and_dense_without_a_matrix(model, likelihood, kind):
    of = case(model, likelihood)
    found, dense = of.estimate(["implicit", "dense"], kind)
    assert_same(found.to_dense(), of.dense(kind))
    # In the order of the layers there, in that of the model's parameters here.
    assert sorted(found.parameter_names) == sorted(dense.parameter_names)
    v = {name: torch.randn(p.shape, dtype=torch.float64) for name, p in of.model.named_parameters()}
    for name, product in (dense @ v).items():
        assert_same((found @ v)[name], product)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [3, None])
@pytest.mark.parametrize("kind", ["sampled", "exact", "empirical"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("model", MODELS)
def test_low_rank_is_the_best_of_its_rank(model, likelihood, kind, rank):
    """Of all eigenpairs, where ``rank`` is None, the matrix itself."""
    of = case(model, likelihood)
    F = of.dense(kind)
    kept = rank or len(F)
    found = of.estimate(kc.Structure("low_rank", rank=kept), kind)
    values, vectors = torch.linalg.eigh(F)
    best = (vectors[:, -kept:] * values[-kept:]) @ vectors[:, -kept:].T
    assert_same(found.to_dense(), best, tolerance=1e-9)
    assert (found["model"].rank, found.meta["rank"]) == (kept, kept)


@pytest.mark.parametrize("kind", ["sampled", "exact", "empirical"])
@pytest.mark.parametrize("structure", ["ekfac", "tkfac", "diagonal", "unit_wise", "block", "dense"])
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
        mine, theirs = (torch.linalg.norm(F - one.to_dense()) for one in (block, kfac[name]))
        # A norm's factors keep all that a matrix for each unit can.
        assert mine < theirs or (of.is_norm(name) and mine <= theirs * (1 + 1e-12))


@pytest.mark.parametrize("other", ["kfac", "tkfac"])
@pytest.mark.parametrize("model", MODELS)
def test_the_nearest_kronecker_product_is_nearer_than_the_others(model, other):
    of = case(model, "categorical")
    nearest_one, some = of.estimate(["kpsvd", other], "exact")
    for name, block in nearest_one.items():
        F = of.block("exact", block)
        distance, of_other = (torch.linalg.norm(F - one.to_dense()) for one in (block, some[name]))
        assert distance <= of_other * (1 + 1e-12) + 1e-14 * torch.linalg.norm(F)


@pytest.mark.parametrize(("iterations", "warned"), [(1, True), (500, False)])
def test_a_nearest_product_that_is_not_found_is_warned_of(iterations, warned, monkeypatch, caplog):
    monkeypatch.setattr(NearestCollector, "iterations", iterations)
    case("tokens", "categorical").estimate("kpsvd", "exact")
    assert ("layer 'query': the nearest Kronecker product still moves" in caplog.text) == warned


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


@pytest.mark.parametrize("kind", ["sampled", "exact", "empirical"])
@pytest.mark.parametrize("model", MODELS)
def test_a_second_pass_gives_what_kept_pairs_give(model, kind):
    of = case(model, "categorical")
    words = ["ekfac", "diagonal", "kfac", "dense"]
    for found, expected in zip(of.estimate(twice(words), kind), of.estimate(words, kind), strict=True):
        assert_same(found.to_dense(), expected.to_dense())


def test_a_second_pass_drops_the_same_units_and_draws_the_same_labels():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 3)).train()
    data = torch.randn(12, 3).split(4)
    ekfac, diagonal = kc.estimate(model, data, "categorical", structure=twice(["ekfac", "diagonal"]))
    # Of the second pass the one, of the first the other.
    assert_same(ekfac.trace(), diagonal.trace())


def test_a_second_pass_keeps_no_pairs(monkeypatch):
    monkeypatch.setattr(KeepingCollector, "add", lambda *_: pytest.fail("a pair was kept"))
    case("tokens", "categorical").estimate(twice(["ekfac", "tkfac"]), "sampled")


@pytest.mark.parametrize(("structure", "passes"), [("ekfac", 2), ("kfac", 1), ("diagonal", 1)])
def test_a_second_pass_is_made_only_where_it_is_needed(structure, passes):
    of, calls = case("perceptron", "categorical"), []
    handle = of.model.register_forward_hook(lambda *_: calls.append(1))
    of.estimate(twice(structure), "exact")
    handle.remove()
    assert len(calls) == 2 * passes


@pytest.mark.parametrize(
    ("again", "message"),
    [([], "yielded no batch"), ([torch.zeros(3, 3, dtype=torch.float64)], "second pass gave 3 examples")],
)
def test_a_second_pass_over_other_data_is_refused(again, message):
    batches = iter([[torch.randn(4, 3)], again])
    with pytest.raises(kc.ArgumentError, match=message):
        kc.estimate(
            perceptron(),
            lambda: next(batches),
            "categorical",
            structure=twice("ekfac"),
        )


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


@pytest.mark.parametrize("structure", ["tkfac", "kpsvd", "diagonal", "unit_wise", "block", "dense"])
def test_how_positions_are_shared_does_not_matter_to_what_is_made_of_examples(structure):
    of = case("tokens", "categorical")
    reduced = of.estimate(structure, "exact", rules={"*": {"sharing": "reduce"}})
    assert_same(reduced.to_dense(), of.estimate(structure, "exact").to_dense())


def test_a_shared_basis_has_the_eigenvalues_of_the_exact_matrix():
    """ORACLES 20 in the basis of 'reduce'."""
    of = case("tokens", "categorical")
    found = of.estimate("ekfac", "exact", rules={"*": {"sharing": "reduce"}})
    for block in found.values():
        assert_same(block.to_dense(), eigen_corrected(of.block("exact", block), block))


@pytest.mark.parametrize("structure", ["ekfac", "tkfac", "kpsvd", "diagonal", "unit_wise", "block", "dense"])
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


@pytest.mark.parametrize("structure", ["ekfac", "tkfac", "kpsvd", "diagonal", "unit_wise", "block"])
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
