"""The damped inverses of many blocks at once against the inverse of each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_cond.layers.layout import WeightLayout
from kfac_cond.linalg.ladder import Rung
from kfac_cond.structures import CholeskyBlock, KroneckerBlock, damped_inverses_of, unread_inverses_of

from ..linalg.conftest import ReadCounter

RULES = ["factored", "exact"]
#: Layouts with the sides that are diagonals.
DIAGONAL = [("linear", "A"), ("linear", "G"), ("linear", "AG"), ("groups", "A"), ("groups", "G")]
LINEAR = ["linear", "linear A", "linear G", "linear AG"]
close = {"rtol": 0.0, "atol": 1e-10}


@pytest.fixture
def blocks(kronecker, layouts: dict[str, WeightLayout]) -> dict[str, KroneckerBlock]:
    whole = {name: kronecker(layout, name) for name, layout in layouts.items()}
    diagonal = {f"{name} {sides}": kronecker(layouts[name], name, sides) for name, sides in DIAGONAL}
    return whole | diagonal


@pytest.fixture
def dampings(blocks: dict[str, KroneckerBlock]) -> dict[str, Tensor]:
    """A number for each layer, the same for all its groups."""
    return {
        name: torch.full(block.sides[0].shape[:-2], 0.1 * (index + 1), dtype=torch.float64)
        for index, (name, block) in enumerate(blocks.items())
    }


def broken(block: KroneckerBlock) -> KroneckerBlock:
    return KroneckerBlock(block.layout, A=block.A * torch.nan, G=block.G, name=block.name)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "name",
    ["linear", "no-bias", "weight-frozen", "convolution", "groups", "groups-no-bias", *map(" ".join, DIAGONAL)],
)
def test_each_is_the_block_s_own_inverse(blocks: Any, dampings: Any, rule: Any, name: str) -> None:
    inverses, rungs = damped_inverses_of(blocks, dampings, rule=rule, previous={})
    expected = blocks[name].inverse(damping=dampings[name].max().item(), rule=rule).to_dense()
    torch.testing.assert_close(inverses[name].to_dense(), expected, **close)
    assert rungs[name] == Rung.FIRST


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("rule", RULES)
def test_a_layer_that_fails_keeps_its_previous_inverse(blocks: Any, dampings: Any, rule: Any, name: str) -> None:
    previous, _ = damped_inverses_of(blocks, dampings, rule=rule, previous={})
    blocks[name] = KroneckerBlock(blocks[name].layout, A=blocks[name].A * torch.nan, G=blocks[name].G * torch.nan)
    inverses, rungs = damped_inverses_of(blocks, dampings, rule=rule, previous=previous)
    assert torch.equal(inverses[name].to_dense(), previous[name].to_dense())
    assert [name for name, rung in rungs.items() if rung == Rung.PREVIOUS] == [name]


@pytest.mark.parametrize("factor", [1.0, torch.nan], ids=["A", "both"])
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("rule", RULES)
def test_the_identity_stands_in_where_nothing_went_before(
    blocks: Any, dampings: Any, rule: Any, name: str, factor: float
) -> None:
    block = blocks[name]
    blocks[name] = KroneckerBlock(block.layout, A=block.A * torch.nan, G=block.G * factor)
    inverses, rungs = damped_inverses_of(blocks, dampings, rule=rule, previous={})
    torch.testing.assert_close(inverses[name].to_dense(), torch.eye(15, dtype=torch.float64), **close)
    assert rungs[name] == Rung.IDENTITY


@pytest.mark.parametrize("rule", RULES)
def test_a_failure_leaves_the_other_layers_as_they_are(blocks: Any, dampings: Any, rule: Any) -> None:
    before, _ = damped_inverses_of(blocks, dampings, rule=rule, previous={})
    blocks["linear"] = broken(blocks["linear"])
    after, _ = damped_inverses_of(blocks, dampings, rule=rule, previous={})
    torch.testing.assert_close(after["no-bias"].to_dense(), before["no-bias"].to_dense(), **close)


def test_the_exact_rule_without_damping_gives_no_infinite_inverse(kronecker, layouts: Any) -> None:
    block = kronecker(layouts["linear"])
    singular = KroneckerBlock(block.layout, A=torch.diag(torch.arange(5.0, dtype=torch.float64)), G=block.G)
    inverses, _ = damped_inverses_of(
        {"fc": singular}, {"fc": torch.tensor(0.0, dtype=torch.float64)}, rule="exact", previous={}
    )
    assert torch.isfinite(inverses["fc"].to_dense()).all()


@pytest.mark.parametrize("rule", RULES)
def test_singular_factors_without_damping_climb(kronecker, layouts: Any, rule: Any) -> None:
    block = kronecker(layouts["linear"])
    singular = KroneckerBlock(block.layout, A=torch.ones(5, 5), G=block.G)
    _, rungs = damped_inverses_of({"fc": singular}, {"fc": torch.tensor(0.0)}, rule=rule, previous={})
    assert rungs["fc"] > Rung.FIRST


@pytest.mark.parametrize("diagonal", ["", "A", "AG"])
@pytest.mark.parametrize("rule", RULES)
def test_a_block_that_is_zero_leaves_the_gradient_without_damping(
    kronecker, layouts: Any, rule: Any, diagonal: str
) -> None:
    block = kronecker(layouts["linear"], diagonal=diagonal)
    zero = KroneckerBlock(block.layout, A=0 * block.A, G=0 * block.G)
    inverses, rungs = damped_inverses_of({"fc": zero}, {"fc": torch.tensor(0.0)}, rule=rule, previous={})
    assert torch.equal(inverses["fc"].to_dense(), torch.eye(15))
    assert rungs["fc"] > Rung.FIRST


@pytest.mark.parametrize("diagonal", ["", "A", "AG"])
@pytest.mark.parametrize("rule", RULES)
def test_damping_alone_inverts_a_block_that_is_zero(kronecker, layouts: Any, rule: Any, diagonal: str) -> None:
    block = kronecker(layouts["linear"], diagonal=diagonal)
    zero = KroneckerBlock(block.layout, A=0 * block.A, G=0 * block.G)
    inverses, rungs = damped_inverses_of({"fc": zero}, {"fc": torch.tensor(0.25)}, rule=rule, previous={})
    torch.testing.assert_close(inverses["fc"].to_dense(), 4 * torch.eye(15), **close)
    assert rungs["fc"] == Rung.FIRST


@pytest.mark.parametrize("rule", RULES)
def test_an_inverse_of_the_other_rule_stands_in_as_well(blocks: Any, dampings: Any, rule: Any) -> None:
    other = next(one for one in RULES if one != rule)
    previous, _ = damped_inverses_of(blocks, dampings, rule=other, previous={})
    blocks["linear"] = KroneckerBlock(
        blocks["linear"].layout, A=blocks["linear"].A * torch.nan, G=blocks["linear"].G * torch.nan
    )
    inverses, rungs = damped_inverses_of(blocks, dampings, rule=rule, previous=previous)
    assert inverses["linear"] is previous["linear"]
    assert rungs["linear"] == Rung.PREVIOUS


def test_a_long_diagonal_does_not_raise_what_its_damping_covers() -> None:
    """The round-off of a decomposition grows with its side; a diagonal is not decomposed."""
    d = 100_000
    layout = WeightLayout("fc.weight", None, (1, d))
    A, damping = torch.zeros(d, dtype=torch.float32), torch.tensor(1e-3, dtype=torch.float32)
    A[0] = 1.0
    block = KroneckerBlock(layout, A=A, G=torch.ones(1, 1, dtype=torch.float32))
    inverses, rungs = damped_inverses_of({"fc": block}, {"fc": damping}, rule="exact", previous={})
    torch.testing.assert_close(inverses["fc"].values[0, 1:], torch.full((d - 1,), 1e3), check_dtype=False)
    assert rungs["fc"] == Rung.FIRST


# -- by their Cholesky factors -----------------------------------------------------------------------------------------


def test_what_serves_once_is_solved_with_and_is_the_inverse(blocks: Any, dampings: Any) -> None:
    inverses, rungs = damped_inverses_of(blocks, dampings, rule="factored", previous={})
    solving, of_solving = damped_inverses_of(blocks, dampings, rule="factored", previous={}, uses=1)
    assert {type(one) for one in solving.values()} == {CholeskyBlock}
    assert of_solving == rungs
    for name, one in solving.items():
        v = torch.randn(blocks[name].layout.matrix_shape, dtype=torch.float64)
        torch.testing.assert_close(one.matvec(v), inverses[name].matvec(v), **close)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("uses", [None, 100])
def test_what_serves_often_is_inverted(blocks: Any, dampings: Any, rule: Any, uses: int | None) -> None:
    inverses, _ = damped_inverses_of(blocks, dampings, rule=rule, previous={}, uses=uses)
    assert CholeskyBlock not in {type(one) for one in inverses.values()}


def test_every_verb_of_a_solving_block_is_that_of_the_inverse(blocks: Any, dampings: Any) -> None:
    inverses, _ = damped_inverses_of(blocks, dampings, rule="factored", previous={})
    solving, _ = damped_inverses_of(blocks, dampings, rule="factored", previous={}, uses=1)
    for name, one in solving.items():
        expected = inverses[name]
        for verb in ("to_dense", "trace", "logdet", "frobenius_norm", "diagonal", "eigenvalues"):
            torch.testing.assert_close(getattr(one, verb)(), getattr(expected, verb)(), **close)
        for verb in ("sqrt", "inverse", "inverse_sqrt"):
            torch.testing.assert_close(getattr(one, verb)().to_dense(), getattr(expected, verb)().to_dense(), **close)
        torch.testing.assert_close((3 * one).to_dense(), 3 * expected.to_dense(), **close)
        assert one.diagonal_sides == expected.diagonal_sides


def test_a_solving_block_in_another_dtype_solves(blocks: Any, dampings: Any) -> None:
    solving, _ = damped_inverses_of(blocks, dampings, rule="factored", previous={}, uses=1)
    block = solving["linear"]
    v = torch.randn(block.layout.matrix_shape)
    torch.testing.assert_close(block.to(torch.float32).matvec(v), block.matvec(v.double()).float())
    assert isinstance(block.to(torch.float32), CholeskyBlock)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("damping", [0.1, 1e3])
@pytest.mark.parametrize("side", ["A", "G"])
def test_what_cannot_be_factorised_climbs_as_an_inverse_does(
    blocks: Any, dampings: Any, name: str, side: str, damping: float
) -> None:
    """Indefinite; with the damping it succeeds, with more of it, or never."""
    blocks[name] = replace(blocks[name], **{side: -getattr(blocks[name], side)})
    dampings[name] = torch.tensor(damping, dtype=torch.float64)
    inverses, rungs = damped_inverses_of(blocks, dampings, rule="factored", previous={})
    found, of_found = damped_inverses_of(blocks, dampings, rule="factored", previous={}, uses=1)
    assert of_found == rungs
    assert (type(found[name]) is KroneckerBlock) == (rungs[name] != Rung.FIRST)
    torch.testing.assert_close(found[name].to_dense(), inverses[name].to_dense(), **close)
    others = {type(one) for key, one in found.items() if key != name}
    assert others == {CholeskyBlock}


def test_a_layer_that_fails_keeps_the_factors_it_had(blocks: Any, dampings: Any) -> None:
    previous, _ = damped_inverses_of(blocks, dampings, rule="factored", previous={}, uses=1)
    blocks["linear"] = broken(blocks["linear"])
    found, rungs = damped_inverses_of(blocks, dampings, rule="factored", previous=previous, uses=1)
    assert found["linear"] is previous["linear"]
    assert rungs["linear"] == Rung.PREVIOUS


def test_factors_serve_on_where_nothing_is_looked_at(blocks: Any, dampings: Any) -> None:
    """As after a resume with another schedule: until the next refresh of all."""
    previous, _ = damped_inverses_of(blocks, dampings, rule="factored", previous={}, uses=1)
    found, failed = unread_inverses_of(blocks, dampings, rule="factored", previous=previous)
    assert found == previous
    assert all(failed.values())


def test_the_status_of_all_factors_is_read_once(blocks: Any, dampings: Any) -> None:
    counter = ReadCounter()
    with counter:
        damped_inverses_of(blocks, dampings, rule="factored", previous={}, uses=1)
    assert counter.names == ["tolist"]
