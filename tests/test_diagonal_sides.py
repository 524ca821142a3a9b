"""Sides beyond max_factor_dim: the diagonals of the same factors, from estimate to training step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .fisher_cases import Case, case, twice
from .helpers import Apply, categorical_loss, classifier, plain_factors
from .reference import assert_same
from .test_state import build, everything, run, same, through_a_file
from .test_structures import by_group
from .training import EVERY_STEP, backward_of, batches, convolutional, expected_updates, factors_of_draws, found_updates

LIMITS = {"perceptron": 3, "tokens": 2, "pixels": 3}
"""Sides below and above it in each model, of both kinds."""


def kept(side: Tensor, limit: int) -> Tensor:
    """A side as the limit leaves it."""
    return side.diagonal(dim1=-2, dim2=-1) if side.shape[-1] > limit else side


def as_matrix(side: Tensor, limit: int) -> Tensor:
    """The same as a matrix."""
    return torch.diag_embed(kept(side, limit)) if side.shape[-1] > limit else side


# -- estimates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sampled", "exact", "empirical", "forward_only"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
@pytest.mark.parametrize("model", LIMITS)
def test_kfac_has_the_diagonals_of_its_factors(model, likelihood, sharing, kind):
    of, limit = case(model, likelihood), LIMITS[model]
    rules = {"*": {"sharing": sharing}}
    found, whole = (of.estimate("kfac", kind, rules=rules, max_factor_dim=at) for at in (limit, 10**6))
    for name, block in whole.items():
        assert_same(found[name].A, kept(block.A, limit))
        assert_same(found[name].G, kept(block.G, limit))
    expected = {"perceptron": [("A", "G"), ("A",)], "tokens": [("A",), (), ("A", "G")], "pixels": [("A",), ("A",)]}
    assert [block.diagonal_sides for block in found.values()] == expected[model]


def test_the_diagonals_are_those_of_the_definition():
    model, inputs, drawn = classifier(hidden=5), torch.randn(6, 3), torch.randint(3, (6,))
    options = kc.Options(draws=[[drawn]], max_factor_dim=4)
    found = kc.estimate(model, [inputs], "categorical", options=options)
    for name, (A, G) in plain_factors(model, inputs, lambda f: categorical_loss(f, drawn), divisor=6).items():
        assert_same(found[name].A, kept(A, 4))
        assert_same(found[name].G, kept(G, 4))
    assert [block.diagonal_sides for block in found.values()] == [("G",), ("A",)]


def trace_restricted(of: Case, kind: str, block: kc.Block, limit: int) -> Tensor:
    products = []
    for F in by_group(of.block(kind, block), block):
        R, C = torch.einsum("aibi->ab", F), torch.einsum("aiaj->ij", F)
        products.append(torch.kron(as_matrix(R, limit), as_matrix(C, limit)) / R.trace())
    return torch.block_diag(*products)


@pytest.mark.parametrize("kind", ["sampled", "exact", "empirical"])
@pytest.mark.parametrize("model", LIMITS)
def test_tkfac_has_the_diagonals_of_the_exact_partial_traces(model, kind):
    of, limit = case(model, "categorical"), LIMITS[model]
    for block in of.estimate("tkfac", kind, max_factor_dim=limit).values():
        assert (block.A.shape[-1] > limit) == ("A" in block.diagonal_sides)
        assert_same(block.to_dense(), trace_restricted(of, kind, block, limit))


def eigen_corrected(F: Tensor, block: kc.EigenBlock) -> Tensor:
    layout = block.layout
    left, right = (
        torch.eye(d).repeat(layout.groups, 1, 1) if basis is None else basis.reshape(-1, d, d)
        for basis, d in ((block.basis_G, layout.d_out), (block.basis_A, layout.d_in))
    )
    U = torch.block_diag(*[torch.kron(g.contiguous(), a.contiguous()) for g, a in zip(left, right, strict=True)])
    return U @ torch.diag((U.T @ F @ U).diagonal()) @ U.T


@pytest.mark.parametrize("second_pass", [False, True])
@pytest.mark.parametrize("kind", ["sampled", "exact", "empirical"])
@pytest.mark.parametrize("model", LIMITS)
def test_ekfac_estimates_its_eigenvalues_in_the_basis_of_what_is_kept(model, kind, second_pass):
    of, limit = case(model, "categorical"), LIMITS[model]
    words = ["ekfac", "kfac"]
    found, kfac = of.estimate(twice(words) if second_pass else words, kind, max_factor_dim=limit)
    for name, block in found.items():
        assert block.diagonal_sides == kfac[name].diagonal_sides
        assert_same(block.to_dense(), eigen_corrected(of.block(kind, block), block))


@pytest.mark.parametrize("structure", ["ekfac", "tkfac"])
@pytest.mark.parametrize("model", LIMITS)
def test_the_trace_stays_exact(model, structure):
    """ORACLES 20, whatever is kept of the sides."""
    of = case(model, "categorical")
    assert_same(of.estimate(structure, "exact", max_factor_dim=1).trace(), of.dense("exact").trace())


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_padded_positions_add_nothing(sharing):
    x, keep = torch.randn(3, 4, 2), torch.ones(3, 4, dtype=torch.bool)
    keep[:, 3] = False
    head = nn.Sequential(nn.Linear(2, 3), Apply(lambda h: h * 1.0))
    labels = torch.randint(3, (3, 4))

    def estimated(x: Tensor, labels: Tensor, data: kc.Data) -> kc.Fisher:
        rules = {"*": {"sharing": sharing}}
        options = kc.Options(draws=[[labels]], data=data, max_factor_dim=1)
        return kc.estimate(head, [x], kc.Categorical(dim=-1), rules=rules, options=options)

    padded = x.masked_fill(~keep[..., None], float("nan"))
    found = estimated(padded, labels, kc.Data(mask=lambda *_: keep, positions=lambda *_: keep))
    expected = estimated(x[:, :3], labels[:, :3], kc.Data())
    assert_same(found["0"].A, expected["0"].A)
    assert_same(found["0"].G, expected["0"].G)


def test_a_rule_wins_over_the_option_and_the_option_over_the_default():
    rules, options = {"0": {"max_factor_dim": 5}}, kc.Options(max_factor_dim=3)
    found = kc.estimate(classifier(), [torch.randn(4, 3)], "categorical", rules=rules, options=options)
    assert [block.diagonal_sides for block in found.values()] == [(), ("A",)]
    plain = kc.estimate(classifier(), [torch.randn(4, 3)], "categorical")
    assert [block.diagonal_sides for block in plain.values()] == [(), ()]


def test_kpsvd_is_refused_beyond_the_limit():
    with pytest.raises(kc.ArgumentError, match=r"layer '0': structure='kpsvd'.*5 rows.*max_factor_dim is 4.*'tkfac'"):
        case("pixels", "categorical").estimate("kpsvd", "sampled", max_factor_dim=4)


@pytest.mark.parametrize("structure", ["block", "diagonal", "dense"])
def test_what_has_no_sides_does_not_depend_on_their_limit(structure):
    of = case("tokens", "categorical")
    found, expected = (of.estimate(structure, "sampled", max_factor_dim=at) for at in (1, None))
    assert torch.equal(found.to_dense(), expected.to_dense())


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "many"])
def test_a_limit_that_is_none_is_refused(value):
    with pytest.raises(kc.ArgumentError, match=r"max_factor_dim=.*expected a whole number >= 1"):
        kc.Options(max_factor_dim=value)
    with pytest.raises(kc.ArgumentError, match=r"rules\['0'\]: max_factor_dim=.*expected a whole number >= 1"):
        kc.coverage(classifier(), rules={"0": {"max_factor_dim": value}})


# -- factors of an eigen-corrected block ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sampled", "exact", "forward_only"])
@pytest.mark.parametrize("limit", [1, 3, None])
@pytest.mark.parametrize("model", LIMITS)
def test_ekfac_has_the_factors_of_kfac(model, limit, kind):
    found, kfac = case(model, "categorical").estimate(["ekfac", "kfac"], kind, max_factor_dim=limit)
    for name, block in kfac.items():
        assert isinstance(found[name], kc.EigenBlock)
        assert_same(found[name].A, block.A)
        assert_same(found[name].G, block.G)


@pytest.mark.parametrize("derived", [lambda f: f.inverse(damping=0.1), lambda f: f.sqrt(), lambda f: 2 * f])
def test_what_is_made_of_it_has_none(derived):
    block = derived(case("tokens", "categorical").estimate("ekfac", "sampled"))["head"]
    with pytest.raises(kc.ArgumentError, match="layer 'head': it has no A"):
        _ = block.A


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "tkfac"])
@pytest.mark.parametrize("limit", [2, None])
def test_through_a_file(structure, limit, tmp_path):
    fisher = case("tokens", "categorical").estimate(structure, "sampled", max_factor_dim=limit)
    fisher.save(tmp_path / "f")
    found = kc.Fisher.load(tmp_path / "f")
    for name, block in fisher.items():
        assert found[name].diagonal_sides == block.diagonal_sides
        assert torch.equal(found[name].to_dense(), block.to_dense())
        assert torch.equal(found[name].A, block.A)
        assert torch.equal(found[name].G, block.G)
    found.sqrt().save(tmp_path / "root")
    assert torch.equal(kc.Fisher.load(tmp_path / "root").to_dense(), found.sqrt().to_dense())


# -- the algebra of a whole Fisher ------------------------------------------------------------------------------------


def test_merging_is_one_estimate_over_all_the_data():
    model, x = classifier(), torch.randn(7, 3)
    settings = {"likelihood": "categorical", "kind": "exact", "options": kc.Options(max_factor_dim=3)}
    parts = [kc.estimate(model, [part], **settings) for part in x.split([3, 4])]
    found, whole = parts[0].merge(parts[1]), kc.estimate(model, [x], **settings)
    for name, block in whole.items():
        assert_same(found[name].A, block.A)
        assert_same(found[name].G, block.G)


def test_merging_a_diagonal_with_a_matrix_is_refused():
    """Of equal sizes the sum of the two would broadcast."""
    model, x = classifier(), torch.randn(4, 3)
    mine, theirs = (
        kc.estimate(model, [x], "categorical", options=kc.Options(max_factor_dim=limit)) for limit in (4, 3)
    )
    with pytest.raises(kc.ArgumentError, match=r"layer '0' keeps neither side as diagonal .*, A and G in the other"):
        mine.merge(theirs)


def test_a_sum_of_a_diagonal_and_a_matrix_is_the_sum_of_the_matrices():
    of = case("perceptron", "categorical")
    mine, theirs = (of.estimate("kfac", "exact", max_factor_dim=limit) for limit in (3, None))
    found = mine + theirs
    assert_same(found.to_dense(), mine.to_dense() + theirs.to_dense())
    for name in found:
        assert_same(found[name].frobenius_norm(), torch.linalg.matrix_norm(found[name].to_dense()))


def test_scipy_sees_the_same_matrix():
    fisher = case("perceptron", "categorical").estimate("kfac", "exact", max_factor_dim=3)
    v = torch.randn(fisher.shape[0])
    assert_same(torch.from_numpy(fisher.to_scipy() @ v.numpy()), fisher.to_dense() @ v)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["factored", "exact"])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("limit", [1, 3, 10])
@pytest.mark.parametrize("layer", ["0", "2", "4"])
def test_a_step_is_the_formula(layer, limit, relative, rule):
    model, inputs, labels = convolutional(), torch.randn(5, 2, 5, 5), torch.randint(3, (5,))
    draws = [torch.randint(3, (5,)) for _ in range(2)]
    damping = kc.Damping(0.03, rule=rule, relative=relative)
    rules = {"*": {"max_factor_dim": limit}}
    kfac = kc.KFAC(model, "categorical", damping=damping, rules=rules, schedule=EVERY_STEP)
    plain = backward_of(kfac, model, inputs, labels, draws)
    kfac.precondition()
    factors = {
        name: (as_matrix(A, limit), as_matrix(G, limit))
        for name, (A, G) in factors_of_draws(model, inputs, draws, divisor=5).items()
    }

    def number(name: str, A: Tensor, G: Tensor) -> float:
        return 0.03 * (A.diagonal().mean() * G.diagonal().mean()).item() if relative else 0.03

    expected = expected_updates(model, factors, plain, damping=number, rule=rule)
    assert_same(found_updates(model, [layer])[layer], expected[layer])
    sizes = {"A": factors[layer][0].shape[-1], "G": factors[layer][1].shape[-1]}
    assert kfac.fisher()[layer].diagonal_sides == tuple(side for side, size in sizes.items() if size > limit)


RULES = {"0": {"max_factor_dim": 3}, "2": {"max_factor_dim": 4}}
"""Of Linear(3, 4) both sides, of Linear(4, 2) its input."""


def small() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize("rule", ["factored", "exact"])
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_resumed_is_uninterrupted_bitwise(stop, rule):
    data, settings = batches(6), {"damping": kc.Damping(0.1, rule=rule), "rules": RULES}
    whole, before, after = ((*build(model, **settings), model) for model in (small(), small(), small()))

    def go(parts: Any, some: Any) -> None:
        kfac, criterion, optimizer, model = parts
        run(kfac, model, optimizer, some, criterion=criterion)

    go(whole, data)
    go(before, data[:stop])
    saved = through_a_file([before[3].state_dict(), before[2].state_dict(), before[0].state_dict()])
    for target, state in zip((after[3], after[2], after[0]), saved, strict=True):
        target.load_state_dict(state)
    go(after, data[stop:])
    assert same(everything(after[0]), everything(whole[0]))
    assert all(
        torch.equal(mine, theirs) for mine, theirs in zip(after[3].parameters(), whole[3].parameters(), strict=True)
    )


@pytest.mark.parametrize("rule", ["factored", "exact"])
@pytest.mark.parametrize(("mine", "theirs"), [(RULES, {}), ({}, RULES)])
def test_a_state_under_another_limit_is_refused(mine, theirs, rule):
    damping = kc.Damping(0.1, rule=rule)
    model = small()
    kfac, criterion, optimizer = build(model, damping=damping, rules=mine)
    run(kfac, model, optimizer, batches(2), criterion=criterion)
    other, *_ = build(small(), damping=damping, rules=theirs)
    before = everything(other)
    with pytest.raises(kc.StateError, match=r"layer '0': A is .*max_factor_dim"):
        other.load_state_dict(kfac.state_dict())
    assert same(everything(other), before)


# -- nothing silent ---------------------------------------------------------------------------------------------------


def test_the_coverage_table_says_which_side_is_a_diagonal():
    rules = {"0": {"max_factor_dim": 3}}
    found = {row.path: row for row in kc.coverage(classifier(), rules=rules).rows}
    row = found["0.weight"]
    assert (row.covered, row.reason) == (True, "side A of 4 and side G of 4 as diagonal: more than max_factor_dim=3")
    assert "max_factor_dim=4 in a rule" in row.remedy
    assert (found["2.weight"].reason, found["2.weight"].remedy) == ("", "")


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "tkfac"])
def test_the_table_of_a_fisher_says_which_side_is_a_diagonal(structure):
    rules = {"0": {"max_factor_dim": 3}}
    fisher = kc.estimate(classifier(), [torch.randn(4, 3)], "categorical", structure=structure, rules=rules)
    lines = str(fisher).splitlines()[-3:]
    assert lines[0].split() == ["layer", "shape", "trace", "diagonal"]
    assert lines[1].endswith("  A and G")
    assert "diagonal" not in lines[2]
