"""'implicit' and 'low_rank' as words of kc.estimate: the labels of the other structures, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .fisher_cases import LIKELIHOODS, Tokens, case, perceptron
from .helpers import Apply
from .reference import assert_same
from .test_implicit import Recurrent, Square

KINDS = ["sampled", "exact", "empirical"]
WORDS = ["implicit", "low_rank"]


class Normed(nn.Module):
    """A norm, and a number by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh()) * self.scale


def batches() -> list[tuple[Tensor, Tensor]]:
    x, y = torch.randn(7, 3), torch.randint(3, (7,))
    return [(x[:3], y[:3]), (x[3:], y[3:])]


# -- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("model", [perceptron, Tokens])
def test_labels_are_those_that_a_stored_structure_draws(model, samples, name):
    """Over batches, in every product, in one call and in two."""
    made, x = model(), torch.randn(5, 3) if model is perceptron else torch.randn(5, 3, 2)
    settings = {"samples": samples, "options": kc.Options(seed=5)}
    data, likelihood = x.split(2), LIKELIHOODS[name][0]
    implicit, dense = kc.estimate(made, data, likelihood, structure=["implicit", "dense"], **settings)
    assert_same(implicit.to_dense(), dense.to_dense())
    again = kc.estimate(made, [x], likelihood, structure="implicit", **settings)
    assert_same(again.to_dense(), dense.to_dense())
    assert_same(again.to_dense(), dense.to_dense())


@pytest.mark.parametrize("options", [kc.Options(), kc.Options(data=kc.Data(seed=3)), kc.Options(seed=4)])
def test_the_seed_is_that_of_the_call(options):
    model, data = perceptron(), batches()
    torch.manual_seed(11)
    implicit, dense = kc.estimate(model, data, "categorical", structure=["implicit", "dense"], options=options)
    torch.manual_seed(12)
    assert_same(implicit.to_dense(), dense.to_dense())


def test_another_seed_gives_other_labels():
    model, data = perceptron(), batches()
    found = [
        kc.estimate(model, data, "categorical", structure="implicit", options=kc.Options(seed=seed)).to_dense()
        for seed in (1, 2)
    ]
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_drawn_labels_lead_to_the_exact_fisher():
    """ORACLES 23."""
    model, data = perceptron(), batches()
    exact = kc.estimate(model, data, "categorical", structure="implicit", kind="exact")
    found = kc.estimate(model, data, "categorical", structure="implicit", samples=4000)
    assert_same(found.to_dense(), exact.to_dense(), tolerance=0.05)
    assert_same(exact.to_dense(), kc.implicit(model, data, "categorical").to_dense())


@pytest.mark.parametrize("kind", ["sampled", "empirical"])
def test_masked_and_ignored_terms_and_weights_are_as_in_a_stored_structure(kind):
    model, x, y = Tokens(), torch.randn(4, 3, 2), torch.randint(3, (4, 3))
    y[1, 2] = y[3] = -100
    keep = torch.ones(4, 3, dtype=torch.bool)
    keep[0, 1] = False
    likelihood = kc.Categorical(dim=-1, weight=torch.tensor([0.5, 1.0, 3.0]), ignore_index=-100)
    options = kc.Options(seed=1, data=kc.Data(mask=lambda *_: keep))
    settings = {"structure": ["implicit", "dense"], "kind": kind, "options": options}
    implicit, dense = kc.estimate(model, [(x, y)], likelihood, **settings)
    assert_same(implicit.to_dense(), dense.to_dense())
    assert float(implicit.meta["counts"]["terms"]) == float(dense.meta["counts"]["terms"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [Recurrent, lambda: nn.Sequential(nn.Linear(2, 2), Apply(Square.apply), nn.Flatten())])
def test_without_a_forward_mode(make, kind):
    model, x = make(), torch.randn(3, 4, 2)
    data = [(x[:1], torch.tensor([1])), (x[1:], torch.tensor([0, 1]))]
    options = kc.Options(draws=[[labels] for _, labels in data] if kind == "sampled" else None)
    found = kc.estimate(model, data, "categorical", structure="implicit", kind=kind, options=options)
    expected = torch.zeros(())
    for inputs, labels in data:
        outputs = model(inputs)
        p = outputs.detach().softmax(-1)
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(f, list(model.parameters()), retain_graph=True)])
            for f in outputs.flatten()
        ]
        J = torch.stack(rows).reshape(*outputs.shape, -1)
        if kind == "exact":
            H = torch.diag_embed(p) - p[..., None] * p[..., None, :]
        else:
            score = p - nn.functional.one_hot(labels, outputs.shape[-1])
            H = score[..., None] * score[..., None, :]
        expected = expected + torch.einsum("nop,noq,nqr->pr", J, H, J) / 3
    assert_same(found.to_dense(), expected)


@pytest.mark.parametrize("kind", ["sampled", "empirical"])
def test_samples_have_the_covariance(kind):
    model, data, n = perceptron(), batches(), 4000
    samples = 2 if kind == "sampled" else 1
    fisher = kc.estimate(model, data, "categorical", structure="implicit", kind=kind, samples=samples)
    dense = fisher.to_dense()
    draws = fisher["model"].sample(n, torch.Generator().manual_seed(1))
    spread = ((dense.square() + torch.outer(dense.diagonal(), dense.diagonal())) / n).sqrt()
    assert ((draws.T @ draws / n - dense).abs() <= 5 * spread + 1e-12).all()


def test_dropout_is_one_linear_map_of_its_own():
    """Its masks are those of the seed, whatever a stored structure met: the matrix is a Fisher all the same."""
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    fisher = kc.estimate(model, batches(), "categorical", structure="implicit", samples=2)
    dense = fisher["model"]._dense()
    assert_same(dense, dense.T)
    assert torch.linalg.eigvalsh(dense).min() > -1e-12


def test_a_half_precision_model():
    model, data = perceptron().to(torch.bfloat16), [torch.randn(6, 3).to(torch.bfloat16)]
    implicit, dense = kc.estimate(model, data, "categorical", structure=["implicit", "dense"], samples=3)
    assert implicit.dtype == torch.float32
    assert_same(implicit.to_dense(), dense.to_dense(), tolerance=0.05)


def test_a_loader_that_shuffles_gives_one_matrix():
    """Its order is drawn from the global stream, which every product finds in the same state."""
    x = torch.randn(9, 3)
    loader = torch.utils.data.DataLoader(x, batch_size=2, shuffle=True)
    fisher = kc.estimate(perceptron(), loader, "categorical", structure="implicit", samples=2)
    torch.rand(5)
    assert torch.equal(fisher.to_dense(), fisher.to_dense())


def test_a_batch_without_examples_adds_nothing():
    model, x = perceptron(), torch.randn(4, 3)
    settings = {"structure": "implicit", "options": kc.Options(seed=1)}
    found = kc.estimate(model, [x[:0], x], "categorical", **settings)
    assert_same(found.to_dense(), kc.estimate(model, [x], "categorical", **settings).to_dense())


# -- which parameters -------------------------------------------------------------------------------------------------


def test_all_parameters_are_in_it_in_a_layer_or_not():
    model, data = Normed(), [torch.randn(5, 3)]
    found = kc.estimate(model, data, "categorical", structure="implicit", kind="exact")
    assert found.parameter_names == tuple(name for name, _ in model.named_parameters())
    assert_same(found.to_dense(), kc.implicit(model, data, "categorical").to_dense())


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"layers": "last"}, ["last.weight", "last.bias"]),
        ({"layers": ["last", "first"]}, ["first.weight", "first.bias", "last.weight", "last.bias"]),
        ({"rules": {"first": {"exclude": True}}}, ["scale", "norm.weight", "norm.bias", "last.weight", "last.bias"]),
        ({"rules": {"norm": {"exclude": True}}}, ["scale", "first.weight", "first.bias", "last.weight", "last.bias"]),
        (
            {"rules": {"first": {"exclude": True}}, "layers": "*"},
            ["scale", "norm.weight", "norm.bias", "last.weight", "last.bias"],
        ),
    ],
)
@pytest.mark.parametrize("word", WORDS)
def test_chosen_parameters(word, options, names):
    model, data = Normed(), [torch.randn(5, 3)]
    structure = kc.Structure(word, rank=3 if word == "low_rank" else None)
    chosen = kc.Options(layers=options.get("layers"))
    settings = {"structure": structure, "kind": "exact", "rules": options.get("rules"), "options": chosen}
    found = kc.estimate(model, data, "categorical", **settings)
    assert sorted(found.parameter_names) == sorted(names)
    assert [name for name, _ in model.named_parameters() if name in names] == list(found.parameter_names)
    whole = kc.implicit(model, data, "categorical")
    v = {name: torch.randn_like(p) if name in names else torch.zeros_like(p) for name, p in model.named_parameters()}
    part = {name: v[name] for name in names}
    if word == "implicit":
        for name, product in (found @ part).items():
            assert_same(product, (whole @ v)[name])


def test_parameters_without_a_form_of_their_own_are_enough():
    words = ["implicit", "dense"]
    implicit, dense = kc.estimate(nn.PReLU(3), [torch.randn(4, 3)], "categorical", structure=words, kind="exact")
    assert_same(implicit.to_dense(), dense.to_dense())


def test_nothing_left_is_refused():
    rules = {"*": {"exclude": True}}
    with pytest.raises(kc.CoverageError, match="no trainable parameter that is not excluded"):
        kc.estimate(perceptron(), batches(), "categorical", structure="implicit", rules=rules)
    with pytest.raises(kc.CoverageError, match="'nowhere' matches none"):
        kc.estimate(perceptron(), batches(), "categorical", structure="implicit", options=kc.Options(layers="nowhere"))


# -- rank and iteration -----------------------------------------------------------------------------------------------


def test_the_rank_is_ten_or_all_there_is():
    fisher = kc.estimate(perceptron(), batches(), "categorical", structure="low_rank")
    assert fisher["model"].rank == 10
    fisher = kc.estimate(nn.Linear(1, 2), [torch.randn(4, 1)], "categorical", structure="low_rank")
    assert fisher["model"].rank == 4


@pytest.mark.parametrize("rank", [0, -1, 2.5, "3", True])
def test_a_rank_that_is_none_is_refused(rank):
    with pytest.raises(kc.ArgumentError, match=r"rank=.*whole number"):
        kc.Structure("low_rank", rank=rank)


def test_a_rank_beyond_the_parameters_is_refused():
    with pytest.raises(kc.ArgumentError, match="asked for 40 eigenpairs, expected 1 to 31"):
        kc.estimate(perceptron(), batches(), "categorical", structure=kc.Structure("low_rank", rank=40))


@pytest.mark.parametrize(("settings", "match"), [({"rank": 3}, "has a rank"), ({"second_pass": True}, "second pass")])
@pytest.mark.parametrize("word", ["kfac", "implicit"])
def test_what_a_structure_has_no_use_for_is_refused(word, settings, match):
    with pytest.raises(kc.ArgumentError, match=match):
        kc.Structure(word, **settings)


def test_how_far_iterations_go_can_be_said_of_any_fisher():
    model, data = perceptron(), batches()
    kfac, implicit = kc.estimate(model, data, "categorical", structure=["kfac", "implicit"])
    exact = kc.Iteration(probes=implicit.shape[0])
    assert_same(implicit.with_iteration(exact).trace(), implicit.to_dense().trace())
    assert (implicit.with_iteration(kc.Iteration(probes=1)).trace() - implicit.to_dense().trace()).abs() > 1e-6
    inverse = (kfac + kfac).inverse(damping=0.1).with_iteration(kc.Iteration(limit=1))
    with pytest.raises(kc.NumericalError, match="1 steps"):
        inverse @ torch.randn(kfac.shape[0])
    assert kfac.with_iteration(exact)["0"] is kfac["0"]


# -- what a result knows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", WORDS)
def test_meta(word, kind):
    found, dense = kc.estimate(perceptron(), batches(), "categorical", structure=[word, "dense"], kind=kind)
    assert {**dense.meta, "structure": word, **({"rank": 10} if word == "low_rank" else {})} == found.meta
    assert ("not the conditional Fisher" in repr(found)) == (kind == "empirical")


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_estimates_over_different_data_merge(word, reduction, tmp_path):
    model, data = perceptron(), batches()
    settings = {"structure": word, "kind": "empirical"}
    if word == "low_rank":
        settings["structure"] = kc.Structure("low_rank", rank=31)
    parts = [kc.estimate(model, [batch], kc.Categorical(reduction=reduction), **settings) for batch in data]
    whole = kc.estimate(model, data, kc.Categorical(reduction=reduction), **settings)
    merged = parts[0].merge(parts[1])
    assert_same(merged.to_dense(), whole.to_dense(), tolerance=1e-9)
    assert merged.meta["counts"]["examples"] == 7
    if word == "implicit":
        with pytest.raises(kc.ArgumentError, match=r"ImplicitBlock holds nothing.*low_rank"):
            merged.save(tmp_path / "f")
    else:
        merged.save(tmp_path / "f")
        assert torch.equal(kc.Fisher.load(tmp_path / "f", model).to_dense(), merged.to_dense())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", WORDS)
def test_solvers_of_scipy(word, kind):
    model, data = perceptron(), batches()
    settings = {"structure": word, "kind": kind}
    fisher = kc.estimate(model, data, "categorical", options=kc.Options(seed=1), **settings)
    dense, operator, damping = fisher.to_dense().numpy(), fisher.to_scipy(), 0.05
    largest = scipy.sparse.linalg.eigsh(operator, k=2, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(largest), np.linalg.eigvalsh(dense)[-2:], atol=1e-10)
    v = np.random.default_rng(0).normal(size=len(dense))
    expected = np.linalg.solve(dense + damping * np.eye(len(dense)), v)
    shifted = operator + damping * scipy.sparse.linalg.aslinearoperator(np.eye(len(dense)))
    np.testing.assert_allclose(scipy.sparse.linalg.cg(shifted, v, rtol=1e-13)[0], expected, atol=1e-9)
    found = scipy.sparse.linalg.lsmr(shifted, v, atol=1e-14, btol=1e-14)[0]
    np.testing.assert_allclose(found, expected, atol=1e-8)
    np.testing.assert_allclose(fisher.solve(torch.tensor(v), damping=damping).numpy(), expected, atol=1e-9)
    # The same by name: entries of a flat vector are where ``parameter_names`` says.
    named = dict(zip(fisher.parameter_names, torch.split(torch.tensor(v), [12, 4, 12, 3]), strict=True))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    solved = fisher.solve({name: part.reshape(shapes[name]) for name, part in named.items()}, damping=damping)
    np.testing.assert_allclose(torch.cat([part.flatten() for part in solved.values()]).numpy(), expected, atol=1e-9)


def test_beside_others_nothing_is_disturbed():
    model, data = perceptron(), batches()
    asked = {
        "kfac": "kfac",
        "implicit": "implicit",
        "ekfac": kc.Structure("ekfac", second_pass=True),
        "low_rank": kc.Structure("low_rank", rank=31),
        "dense": "dense",
    }
    options = kc.Options(seed=1)
    together = kc.estimate(model, data, "categorical", structure=[*asked.values()], options=options)
    found = dict(zip(asked, together, strict=True))
    for word in ("kfac", "ekfac", "dense"):
        alone = kc.estimate(model, data, "categorical", structure=asked[word], options=options)
        assert torch.equal(found[word].to_dense(), alone.to_dense())
    for word in WORDS:
        assert_same(found[word].to_dense(), found["dense"].to_dense(), tolerance=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_alone(kind):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = batches()
    state = torch.get_rng_state()
    kc.estimate(model, data, "categorical", structure=["implicit", "low_rank"], kind=kind)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", WORDS)
def test_an_iterator_is_refused_before_it_is_used_up(word):
    data = iter(batches())
    with pytest.raises(kc.ArgumentError, match=r"list_iterator, which can be gone through once.*pass a list"):
        kc.estimate(perceptron(), data, "categorical", structure=["kfac", word])
    assert len(list(data)) == 2


@pytest.mark.parametrize("word", WORDS)
def test_labels_that_can_be_gone_through_once_are_refused(word):
    options = kc.Options(draws=iter([[torch.zeros(3, dtype=int)], [torch.zeros(4, dtype=int)]]))
    with pytest.raises(kc.ArgumentError, match=r"Options\(draws=...\) is list_iterator.*pass a list"):
        kc.estimate(perceptron(), batches(), "categorical", structure=word, options=options)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize(("count", "message"), [(1, "fewer entries"), (3, "more entries")])
def test_another_number_of_labels_than_batches_is_refused(word, count, message):
    options = kc.Options(draws=[[torch.zeros(len(x), dtype=int)] for x, _ in [*batches(), *batches()][:count]])
    with pytest.raises(kc.ArgumentError, match=message):
        kc.estimate(perceptron(), batches(), "categorical", structure=word, options=options)


@pytest.mark.parametrize("word", WORDS)
def test_forward_only_is_refused(word):
    with pytest.raises(kc.ArgumentError, match=r"kind='forward_only' sends nothing back"):
        kc.estimate(perceptron(), batches(), "categorical", structure=["kfac", word], kind="forward_only")


@pytest.mark.parametrize("word", WORDS)
def test_empirical_needs_labels(word):
    with pytest.raises(kc.LikelihoodError, match="kind='empirical' needs data labels"):
        kc.estimate(perceptron(), [torch.randn(2, 3)], "categorical", structure=word, kind="empirical")


@pytest.mark.parametrize("kind", KINDS)
def test_labels_out_of_range_are_refused_with_their_batch(kind):
    data = [*batches(), (torch.randn(2, 3), torch.tensor([0, 7]))]
    likelihood = kc.Categorical(weight=torch.ones(3))
    with pytest.raises(kc.LikelihoodError, match="batch 2: labels out of the range of Categorical"):
        kc.estimate(perceptron(), data, likelihood, structure="implicit", kind=kind)


@pytest.mark.parametrize("kind", ["sampled", "empirical"])
def test_rows_that_pose_as_examples_are_refused(kind):
    """Their scores would be squared apart, where an example's terms belong together."""
    of = case("tokens", "categorical")
    model = nn.Sequential(of.model, nn.Flatten(0, 1))
    data = [(of.inputs, of.labels.flatten())]
    with pytest.raises(kc.LikelihoodError, match=rf"kind='{kind}'.* the batch has 4, the outputs have 12"):
        kc.estimate(model, data, "categorical", structure="implicit", kind=kind)
    exact = kc.estimate(model, data, "categorical", structure="implicit", kind="exact")
    assert_same(exact.to_dense(), of.dense("exact"))


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_not_finite_are_refused(kind):
    data = [(torch.full((2, 3), float("nan")), torch.tensor([0, 1]))]
    with pytest.raises(kc.NumericalError, match="not finite"):
        kc.estimate(perceptron(), data, "categorical", structure="implicit", kind=kind)


@pytest.mark.parametrize("make", [lambda f: kc.estimate(*f, structure="implicit"), lambda f: kc.gram(*f)])
def test_data_without_a_valid_term_are_refused(make):
    data = [(torch.randn(2, 3), torch.tensor([-100, -100]))]
    with pytest.raises(kc.ArgumentError, match=r"no valid loss term \(M = 0\)"):
        make((perceptron(), data, "categorical"))
