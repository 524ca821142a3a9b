"""Embeddings and bags of them: linear layers on one-hot and multi-hot rows, which are never formed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.layers import kind_of
from kfac_cond.layers.survey import survey
from kfac_cond.linalg.pairs import example_gradients

from ..reference import assert_same, categorical_log_prob, fisher_of_draws
from .embedding_cases import EMBEDDINGS, FEATURES, TOKENS, bag, embedding, head, parameters_in_order


def assert_pairs_make_example_gradients(module: nn.Module, args: tuple, kwargs: dict[str, Any], examples: int) -> None:
    """V_n = sum_s g a^T is the gradient of example n alone, of a random linear functional of the output."""
    kind = kind_of(module)
    outputs = module(*args, **kwargs)
    g = torch.randn_like(outputs)
    each = (outputs * g).reshape(examples, outputs.numel() // max(examples, 1)).sum(-1)
    expected = [torch.autograd.grad(one, module.weight, retain_graph=True)[0].T for one in each]
    a = kind.of_call(module, args, kwargs, torch.float64)
    keep, g = kind.present(module, a), kind.output_gradients(module, g)
    assert a.shape[:-1] == g.shape[:-1]
    found = example_gradients(a, g)
    if not examples:
        assert found.shape == (0, FEATURES, TOKENS)
        return
    assert_same(found, torch.stack(expected))
    # What the mask leaves out has no part in any gradient.
    assert_same(example_gradients(a, g if keep is None else g * keep), found)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(), (5,), (5, 4), (5, 2, 3), (1, 4), (5, 1), (0, 4)], ids=str)
@pytest.mark.parametrize("arguments", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_pairs_of_an_embedding_make_its_gradients(arguments, shape, dtype):
    indices = torch.randint(TOKENS, shape, dtype=dtype)
    assert_pairs_make_example_gradients(embedding(arguments), (indices,), {}, shape[0] if shape else 1)


def test_an_embedding_takes_its_indices_by_name():
    assert_pairs_make_example_gradients(embedding({}), (), {"input": torch.randint(TOKENS, (5, 4))}, 5)


SIZE = 12
CALLS: dict[str, tuple[dict[str, Any], Any]] = {
    "rows": ({}, lambda x: ((x.reshape(4, 3),), {})),
    "no rows": ({}, lambda x: ((x.reshape(4, 3)[:0],), {})),
    "offsets": ({}, lambda x: ((x, torch.tensor([0, 5, 6, 9], dtype=x.dtype)), {})),
    "empty bags": ({}, lambda x: ((x, torch.tensor([0, 0, 5, 5, 12], dtype=x.dtype)), {})),
    "offsets by name": ({}, lambda x: ((), {"offsets": torch.tensor([0, 5], dtype=x.dtype), "input": x})),
    "last offset": ({"include_last_offset": True}, lambda x: ((x, torch.tensor([0, 5, 9, 9, 12], dtype=x.dtype)), {})),
}
BAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding_idx": 2},
    "padding from the end": {"padding_idx": -2},
    "max norm": {"max_norm": 0.5},
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("mode", ["sum", "mean", "weighted"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("arguments", BAGS.values(), ids=BAGS)
def test_pairs_of_a_bag_make_its_gradients(arguments, call, mode, dtype):
    more, call = call
    module = bag("sum" if mode == "weighted" else mode, {**arguments, **more})
    args, kwargs = call(torch.randint(TOKENS, (SIZE,), dtype=dtype))
    if mode == "weighted":
        indices = args[0] if args else kwargs["input"]
        kwargs["per_sample_weights"] = torch.randn(indices.shape, requires_grad=True)
    assert_pairs_make_example_gradients(module, args, kwargs, len(module(*args, **kwargs)))


def test_the_largest_of_a_bag_is_no_linear_form():
    (row,) = survey(bag("max", {})).rows
    assert (row.form, row.covered) == ("universal", True)


class Scaled(nn.Embedding):
    def forward(self, indices: Tensor) -> Tensor:
        return 2.0 * super().forward(indices)


def test_an_embedding_with_another_forward_is_of_no_kind():
    assert kind_of(Scaled(TOKENS, FEATURES)) is None
    assert "Embedding with its forward replaced by Scaled" in survey(Scaled(TOKENS, FEATURES)).rows[0].reason


@pytest.mark.parametrize("module", [nn.Embedding(5, 2, sparse=True), nn.EmbeddingBag(5, 2, sparse=True)])
def test_sparse_gradients_are_refused_by_name(module):
    (row,) = survey(module).rows
    assert (row.covered, row.reason, row.remedy) == (False, "its gradient is sparse", "sparse=False")


@pytest.mark.parametrize(
    ("module", "rules", "reasons"),
    [
        (nn.Embedding(5, 2), {}, ()),
        (nn.Embedding(5, 2, padding_idx=0, max_norm=1.0), {}, ()),
        (nn.Embedding(5, 2), {"": {"max_factor_dim": 3}}, ()),
        (nn.Embedding(5, 4), {"": {"max_factor_dim": 3}}, ("side G of 4 as diagonal",)),
        (nn.Embedding(5, 2), {"": {"sharing": "reduce"}}, ("A as its diagonal: an approximation",)),
        (nn.Embedding(5, 2, scale_grad_by_freq=True), {}, ("the factors are those of the loss",)),
        (nn.EmbeddingBag(5, 2), {}, ("A as its diagonal: an approximation, since a bag holds several tokens",)),
        (nn.EmbeddingBag(5, 2, scale_grad_by_freq=True), {}, ("approximation", "the factors are those of the loss")),
    ],
    ids=str,
)
def test_the_row_says_what_is_approximate(module, rules, reasons):
    (row,) = survey(module, rules).rows
    assert (row.form, row.covered) == ("kronecker", True)
    assert all(reason in row.reason for reason in reasons)
    assert bool(row.reason) == bool(reasons)


# -- blocks -----------------------------------------------------------------------------------------------------------


class OneHot(nn.Module):
    """A linear layer on one-hot rows: what an embedding is, with the matrix transposed."""

    def __init__(self, weight: Tensor, padding: int | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(*weight.shape, bias=False)
        self.linear.weight = nn.Parameter(weight.detach().T.clone())
        self.padding = padding

    def forward(self, indices: Tensor) -> Tensor:
        return self.linear(nn.functional.one_hot(indices, TOKENS).to(self.linear.weight))


def both_forms(embed: nn.Module, rest: nn.Module) -> list[nn.Module]:
    return [nn.Sequential(embed, rest), nn.Sequential(OneHot(embed.weight), rest)]


#: The side of the tokens as its diagonal, that of the features whole.
LIMIT = TOKENS - 1


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "tkfac", "diagonal", "unit_wise", "block", "dense"])
@pytest.mark.parametrize("kind", ["sampled", "exact", "forward_only"])
def test_every_structure_is_that_of_a_linear_layer_on_one_hot_rows(kind, structure, sharing):
    """ORACLES 13."""
    indices, labels = torch.randint(TOKENS, (6, 4)), [torch.randint(4, (6,)) for _ in range(2)]
    drawn = {"options": kc.Options(draws=[labels])} if kind == "sampled" else {}
    settings = {"likelihood": "categorical", "structure": structure, "kind": kind, **drawn}
    mine, theirs = both_forms(embedding({}), head(4))
    own, other = {"0": {"sharing": sharing}}, {"0.linear": {"sharing": sharing, "max_factor_dim": LIMIT}}
    if structure == "dense":
        own, other = {**own, "1.2": {"exclude": True}}, {**other, "1.2": {"exclude": True}}
    found = kc.estimate(mine, [indices], rules=own, **settings)
    expected = kc.estimate(theirs, [indices], rules=other, **settings)
    pair = ("*", "*") if structure == "dense" else ("0", "0.linear")
    assert_same(found[pair[0]].to_dense(), expected[pair[1]].to_dense())


def tokens_mask() -> Tensor:
    """The entries of a block that a diagonal side of tokens keeps."""
    return torch.kron(torch.ones(FEATURES, FEATURES), torch.eye(TOKENS))


def brute_force(model: nn.Module, inputs: Any, labels: list[Tensor], divisor: int) -> Tensor:
    order = parameters_in_order(model[0])
    fisher = fisher_of_draws(model, inputs, labels, categorical_log_prob, parameters=[model[0].weight], divisor=divisor)
    return fisher[order][:, order]


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("arguments", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_one_example_of_one_token_is_exact(arguments, draws):
    """ORACLES 6: A has one entry, so the diagonal of it is all of it."""
    model = nn.Sequential(embedding(arguments), head(1))
    indices, labels = torch.tensor([[3]]), [torch.randint(4, (1,)) for _ in range(draws)]
    options = kc.Options(draws=[labels])
    for structure in ("kfac", "ekfac", "tkfac", "block"):
        block = kc.estimate(model, [indices], "categorical", structure=structure, options=options)["0"]
        assert_same(block.to_dense(), brute_force(model, indices, labels, 1))


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_one_bag_is_exact_on_the_entries_kept(mode):
    """ORACLES 6 and 13: a bag of several tokens is one position."""
    model = nn.Sequential(bag(mode, {"padding_idx": 2}), nn.Tanh(), nn.Linear(FEATURES, 4))
    indices, labels = torch.tensor([[3, 2, 3, 5, 0]]), [torch.randint(4, (1,)) for _ in range(2)]
    block = kc.estimate(model, [indices], "categorical", options=kc.Options(draws=[labels]))["0"]
    expected = brute_force(model, indices, labels, 1)
    assert_same(block.to_dense(), expected * tokens_mask())
    assert (expected * (1 - tokens_mask())).abs().max() > 0.01 * expected.abs().max()


@pytest.mark.parametrize("structure", ["diagonal", "block", "unit_wise", "ekfac", "tkfac"])
@pytest.mark.parametrize("arguments", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_what_is_made_of_example_gradients_is_exact(structure, arguments):
    """Several positions of an example may hold one token, whose gradients are added before they are squared."""
    model = nn.Sequential(embedding(arguments), head(4))
    indices, labels = torch.randint(4, (6, 4)), [torch.randint(4, (6,)) for _ in range(2)]
    settings = {"structure": structure, "options": kc.Options(draws=[labels])}
    block = kc.estimate(model, [indices], "categorical", **settings)["0"]
    expected = brute_force(model, indices, labels, 6)
    assert_same(block.trace(), expected.trace())
    if structure == "diagonal":
        assert_same(block.diagonal().flatten(), expected.diagonal())
    elif structure == "block":
        assert_same(block.to_dense(), expected)
    elif structure == "unit_wise":
        assert_same(block.to_dense(), expected * torch.kron(torch.eye(FEATURES), torch.ones(TOKENS, TOKENS)))
    elif structure == "tkfac":
        parts = expected.reshape(FEATURES, TOKENS, FEATURES, TOKENS)
        assert_same(block.G, torch.einsum("otpt -> op", parts))
        assert_same(block.A, torch.einsum("otot -> t", parts) / expected.trace())
    else:
        U = torch.kron(block.basis_G, torch.eye(TOKENS))
        assert_same(block.values.flatten(), (U.T @ expected @ U).diagonal())


def test_A_is_the_frequencies_of_the_tokens():
    """ORACLES 13, over ragged batches."""
    model = nn.Sequential(embedding({}), head(4))
    batches = [torch.randint(TOKENS, (size, 4)) for size in (5, 2)]
    block = kc.estimate(model, batches, "categorical")["0"]
    assert_same(block.A, torch.bincount(torch.cat(batches).flatten(), minlength=TOKENS) / 28)
    assert block.diagonal_sides == ("A",)


def test_padding_leaves_A_G_and_counts():
    """ORACLES 13: as if the positions were not there."""
    model = nn.Sequential(embedding({"padding_idx": 2}), head(4))
    indices, labels = torch.randint(TOKENS, (5, 4)), torch.randint(4, (5,))
    indices[:, 0] = 2
    found = kc.estimate(model, [indices], "categorical", options=kc.Options(draws=[[labels]]))
    y = model[0](indices)
    loss = nn.functional.cross_entropy(model[1](y), labels, reduction="sum")
    (g,) = torch.autograd.grad(loss, [y])
    real = indices != 2
    assert_same(found["0"].A, torch.bincount(indices[real], minlength=TOKENS) / real.sum())
    assert_same(found["0"].G, g[real].T @ g[real] / 5)
    assert found.meta["counts"]["positions"]["0"] == real.sum()


def test_an_empty_bag_is_no_position():
    model = nn.Sequential(bag("sum", {"padding_idx": 2}), head(1))
    indices, labels = torch.tensor([[0, 1], [2, 2], [3, 2]]), torch.randint(4, (3,))
    found = kc.estimate(model, [indices], "categorical", options=kc.Options(draws=[[labels]]))
    y = model[0](indices)
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(model[1](y), labels, reduction="sum"), [y])
    assert_same(found["0"].A, torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]) / 2)
    assert_same(found["0"].G, g[[0, 2]].T @ g[[0, 2]] / 3)


def test_a_mask_of_positions_and_the_padding_hold_together():
    model = nn.Sequential(embedding({"padding_idx": 2}), nn.Linear(FEATURES, 4))
    indices, labels = torch.randint(TOKENS, (5, 4)), torch.randint(4, (5, 4))
    keep = torch.rand(5, 4) > 0.3
    masks = kc.Data(mask=lambda *_: keep, positions=lambda *_: keep)
    options = kc.Options(draws=[[labels]], data=masks)
    found = kc.estimate(model, [indices], kc.Categorical(dim=-1), options=options)["0"]
    real = keep & (indices != 2)
    assert_same(found.A, torch.bincount(indices[real], minlength=TOKENS) / real.sum())


def test_uses_are_positions_of_one_layer():
    """ORACLES 12."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = embedding({}), nn.Linear(FEATURES, 4)

        def forward(self, indices: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embedding(indices[:, :2]).sum(1) * self.embedding(indices[:, 2])))

    model, labels = Twice(), torch.randint(4, (6,))
    indices = torch.randint(3, (6, 3))
    options = kc.Options(draws=[[labels]])
    kfac, block, diagonal = (
        kc.estimate(model, [indices], "categorical", structure=structure, options=options)["embedding"]
        for structure in ("kfac", "block", "diagonal")
    )
    assert_same(kfac.A, torch.bincount(indices.flatten(), minlength=TOKENS) / 18)
    weight = [model.embedding.weight]
    expected = fisher_of_draws(model, indices, [labels], categorical_log_prob, parameters=weight, divisor=6)
    order = parameters_in_order(model.embedding)
    assert_same(block.to_dense(), expected[order][:, order])
    assert_same(diagonal.diagonal().flatten(), expected.diagonal()[order])


def test_one_weight_of_two_embeddings_is_one_layer():
    model = nn.Module()
    model.first, model.second = embedding({}), embedding({})
    model.second.weight = model.first.weight
    assert list(survey(model).layers) == ["first"]


def test_one_weight_of_an_embedding_and_a_head_is_in_the_universal_form():
    model = nn.Sequential(nn.Embedding(TOKENS, FEATURES), nn.Linear(FEATURES, TOKENS, bias=False))
    model[1].weight = model[0].weight
    (row,) = survey(model).rows
    assert row.form == "universal"
    assert "one weight in two roles" in row.reason


@pytest.mark.parametrize("make", [lambda: embedding({}), lambda: bag("sum", {})])
def test_the_nearest_product_is_refused_by_name(make):
    model = nn.Sequential(make(), head(1))
    with pytest.raises(kc.ArgumentError, match=r"layer '0'.*kpsvd.*input side.*diagonal.*'ekfac'"):
        kc.estimate(model, [torch.zeros(2, 1, dtype=torch.long)], "categorical", structure="kpsvd")


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
def test_a_fisher_is_saved_and_loaded(structure, tmp_path):
    pytest.importorskip("safetensors")
    model = nn.Sequential(embedding({}), head(4))
    fisher = kc.estimate(model, [torch.randint(TOKENS, (5, 4))], "categorical", structure=structure)
    fisher.save(tmp_path / "fisher")
    assert_same(kc.Fisher.load(tmp_path / "fisher", model).to_dense(), fisher.to_dense())
