"""A diagonal matrix answers as the same matrix whole, in products, scalars, inverses and eigenbases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_cond.linalg.damping import factored_damping, relative_damping
from kfac_cond.linalg.eigen import eigenbases, from_eigenbasis
from kfac_cond.linalg.inverse import damped_inverses
from kfac_cond.linalg.kronecker import kronecker_matmul
from kfac_cond.linalg.ladder import Rung
from kfac_cond.linalg.moments import second_moment, second_moment_diagonal, trace
from kfac_cond.linalg.pairs import input_moment, input_moment_diagonal, rotated
from kfac_cond.linalg.sides import (
    Diagonal,
    Side,
    as_side,
    as_tensor,
    columns,
    frobenius_norm,
    identity,
    identity_like,
    inner,
    whole,
)

close = {"rtol": 0.0, "atol": 1e-10}


@pytest.fixture(params=[(), (2,)], ids=["one", "groups"])
def sides(request: pytest.FixtureRequest) -> tuple[Diagonal, Diagonal]:
    """An input side of 4 and an output side of 3."""
    generator = torch.Generator().manual_seed(0)
    A, G = (Diagonal(torch.rand(*request.param, d, generator=generator, dtype=torch.float64) + 0.1) for d in (4, 3))
    return A, G


SCALARS: dict[str, Callable[[Side], Tensor]] = {
    "trace": trace,
    "frobenius_norm": frobenius_norm,
    "diagonal": lambda side: side.diagonal(dim1=-2, dim2=-1),
    "square": lambda side: whole(side.square()),
    "transposed": lambda side: whole(side.mT),
    "identity": lambda side: whole(identity_like(side)),
}


@pytest.mark.parametrize("name", SCALARS)
def test_scalars_are_those_of_the_whole_matrix(sides, name: str) -> None:
    torch.testing.assert_close(SCALARS[name](sides[0]), SCALARS[name](whole(sides[0])), **close)


@pytest.mark.parametrize("batch", [(), (5,)], ids=["one vector", "many"])
@pytest.mark.parametrize("diagonal", ["A", "G", "AG"])
def test_products_are_those_of_the_whole_matrices(sides, diagonal: str, batch: tuple[int, ...]) -> None:
    A, G = sides
    v = torch.randn(*batch, *A.shape[:-2], 3, 4, dtype=torch.float64)
    some = (G if "G" in diagonal else whole(G)), v, (A if "A" in diagonal else whole(A))
    torch.testing.assert_close(kronecker_matmul(*some), whole(G) @ v @ whole(A), **close)


@pytest.mark.parametrize("mine", [whole, lambda side: side], ids=["whole", "diagonal"])
def test_inner_products_are_those_of_the_whole_matrices(sides, mine: Callable[[Side], Side]) -> None:
    other = torch.randn(sides[0].shape, dtype=torch.float64)
    expected = (whole(sides[0]) * other).sum((-2, -1))
    torch.testing.assert_close(inner(mine(sides[0]), other), expected, **close)
    torch.testing.assert_close(inner(other, mine(sides[0])), expected, **close)


def test_columns_are_those_of_the_whole_matrix(sides) -> None:
    groups = sides[0].shape[:-2].numel()
    group, index = torch.arange(3) % groups, torch.tensor([2, 0, 2])
    assert torch.equal(columns(sides[0], group, index), columns(whole(sides[0]), group, index))


def test_a_side_is_stored_as_what_it_holds(sides) -> None:
    leading = len(sides[0].shape) - 2
    for side in (sides[0], whole(sides[0])):
        assert type(as_side(as_tensor(side), leading=leading)) is type(side)


def test_the_identity_of_a_shape_holds_one_number() -> None:
    one = identity(torch.Size((2, 50, 50)), torch.ones((), dtype=torch.float32))
    assert (one.shape, one.values.untyped_storage().nbytes()) == (torch.Size((2, 50, 50)), 4)


@pytest.mark.parametrize("rule", [factored_damping, lambda A, G, damping: (relative_damping(A, G, damping, 1e-9),)])
def test_dampings_are_those_of_the_whole_matrices(sides, rule: Any) -> None:
    for found, expected in zip(rule(*sides, 0.3), rule(*map(whole, sides), 0.3), strict=True):
        torch.testing.assert_close(found, expected, **close)


BROKEN = {
    "good": lambda x: x,
    "zero": lambda x: 0 * x,
    "with a zero": lambda x: x * (torch.arange(x.shape[-1]) > 0),
    "negative": lambda x: -x,
    "nan": lambda x: x * torch.nan,
}


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BROKEN)
def test_the_ladder_is_climbed_as_by_the_whole_matrix(sides, name: str, dtype: torch.dtype, damping: float) -> None:
    side = Diagonal(BROKEN[name](sides[0].values).to(dtype))
    added = torch.full(side.shape[:-2], damping, dtype=dtype)
    (found, expected), rungs = damped_inverses([side, whole(side)], [added, added], [None, None])
    assert rungs[0] == rungs[1]
    torch.testing.assert_close(whole(found), expected, rtol=1e-4, atol=1e-10)


def test_an_infinite_entry_has_no_inverse(sides) -> None:
    bad = Diagonal(sides[0].values / (torch.arange(4) != 2))
    assert damped_inverses([bad], [torch.ones(bad.shape[:-2])], [None])[1] == [Rung.IDENTITY]
    assert eigenbases([bad])[1] == [Rung.IDENTITY]


@pytest.mark.parametrize("name", BROKEN)
def test_eigenbases_are_those_of_the_whole_matrix(sides, name: str) -> None:
    side = Diagonal(BROKEN[name](sides[0].values))
    (found, expected), rungs = eigenbases([side, whole(side)])
    assert found[1] is None
    assert rungs[0] == rungs[1]
    torch.testing.assert_close(whole(from_eigenbasis(*found)), from_eigenbasis(*expected), **close)


def test_a_previous_result_stands_in(sides) -> None:
    bad = Diagonal(sides[0].values * torch.nan)
    (inverse,), rungs = damped_inverses([bad], [torch.zeros(bad.shape[:-2])], [sides[0]])
    assert inverse is sides[0]
    assert rungs == [Rung.PREVIOUS]
    before = (sides[0].values, None)
    assert eigenbases([bad], [before])[0][0][0] is before[0]


def test_one_read_for_all(sides, reads) -> None:
    added = [torch.zeros(side.shape[:-2]) for side in sides]
    with reads:
        damped_inverses([*sides, *map(whole, sides)], added * 2, [None] * 4)
    assert reads.names.count("tolist") == 1


@pytest.mark.parametrize("count", [None, torch.tensor(2)])
@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("leading", [(), (2,), (4, 2)])
def test_second_moment_diagonal_is_that_diagonal(leading: tuple[int, ...], ones: bool, count: Tensor | None) -> None:
    x = torch.randn(*leading, 5, 3, dtype=torch.float64)
    expected = second_moment(x, ones=ones, count=count).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(second_moment_diagonal(x, ones=ones, count=count), expected, **close)


def test_count_takes_the_place_of_the_number_of_rows() -> None:
    x = torch.randn(5, 3)
    assert second_moment(x, ones=True, count=torch.tensor(2))[-1, -1] == 2
    assert second_moment(x, ones=True)[-1, -1] == 5


@pytest.mark.parametrize("groups", [(), (2,)])
@pytest.mark.parametrize("positions", [1, 3, 50])
@pytest.mark.parametrize("examples", [1, 6])
def test_input_moment_diagonal_is_that_diagonal(examples: int, positions: int, groups: tuple[int, ...]) -> None:
    a, g = (torch.randn(*groups, examples, positions, d, dtype=torch.float64) for d in (4, 3))
    for mine, theirs in ((a, g), (g, a)):
        expected = input_moment(mine, theirs).diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(input_moment_diagonal(mine, theirs), expected, **close)


def test_rotated_pairs_have_the_rotated_gradient(spd) -> None:
    x, basis = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.linalg.eigh(spd(2, 4, 4))[1]
    torch.testing.assert_close(rotated(x, basis), torch.einsum("gnsd,gde->gnse", x, basis), **close)
    assert rotated(x, None) is x
