"""Damped inverses against torch.linalg.inv, and every rung of the ladder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfac_cond.linalg import ladder
from kfac_cond.linalg.inverse import (
    CROWDED,
    Rung,
    attempted_factors,
    attempted_inverses,
    damped_inverses,
    inverted,
    solves,
)
from kfac_cond.linalg.sides import Diagonal

from ..passes import Passes

SHAPES = [(3, 3), (5, 5), (2, 3, 3), (3, 3), (4, 5, 5), (1, 1)]
NAN = torch.full((3, 3), torch.nan, dtype=torch.float64)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def reference(matrix: Tensor, damping: Tensor | float) -> Tensor:
    added = torch.as_tensor(damping, dtype=matrix.dtype)[..., None, None]
    return torch.linalg.inv(matrix + added * torch.eye(matrix.shape[-1], dtype=matrix.dtype))


def nearly_singular() -> Tensor:
    """Positive definite in exact arithmetic; in float32 its Schur complement is negative, and its trace over its size
    is so small that a hundred times its round-off does not change the two large entries."""
    matrix = torch.eye(1000, dtype=torch.float32) * 1e-3
    matrix[:2, :2] = torch.tensor([[1.0018336772918701, 1.1534463167190552], [1.1534463167190552, 1.3280032873153687]])
    return matrix


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_is_the_inverse(spd, index: int) -> None:
    matrices = [spd(*shape) for shape in SHAPES]
    dampings = [number(0.1 * (i + 1)) for i in range(len(SHAPES))]
    inverses, rungs = damped_inverses(matrices, dampings, [None] * len(SHAPES))
    torch.testing.assert_close(inverses[index], reference(matrices[index], dampings[index]), rtol=0, atol=1e-10)
    assert rungs[index] == Rung.FIRST


def test_each_group_has_its_own_damping(spd) -> None:
    matrix, damping = spd(2, 3, 3), torch.tensor([0.1, 2.0], dtype=torch.float64)
    (inverse,), _ = damped_inverses([matrix], [damping], [None])
    torch.testing.assert_close(inverse, reference(matrix, damping), rtol=0, atol=1e-10)


def test_sizes_dtypes_and_order_are_kept(spd) -> None:
    matrices = [spd(3), spd(3, dtype=torch.float32), spd(2, 4, 4)]
    inverses, _ = damped_inverses(matrices, [number(0.1)] * 3, [None] * 3)
    assert [(i.shape, i.dtype) for i in inverses] == [(m.shape, m.dtype) for m in matrices]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_symmetric_to_the_last_bit(spd, dtype: torch.dtype) -> None:
    (inverse,), _ = damped_inverses([spd(2, 37, 37, dtype=dtype)], [number(1e-3)], [None])
    assert torch.equal(inverse, inverse.mT)


def test_the_matrices_are_left_as_they_are(spd) -> None:
    matrix = spd(4)
    before = matrix.clone()
    damped_inverses([matrix], [number(0.5)], [None])
    assert torch.equal(matrix, before)


def test_inverses_of_one_batch_share_no_memory(spd) -> None:
    inverses, _ = damped_inverses([spd(3), spd(3)], [number(0.1)] * 2, [None] * 2)
    assert all(inverse.untyped_storage().nbytes() == 9 * 8 for inverse in inverses)


def test_one_size_is_one_factorisation(spd, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[torch.Size] = []
    original = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda m, **kept: sizes.append(m.shape) or original(m, **kept))
    damped_inverses([spd(*shape) for shape in SHAPES], [number(0.1)] * len(SHAPES), [None] * len(SHAPES))
    assert sizes == [(4, 3, 3), (5, 5, 5), (1, 1, 1)]


@pytest.mark.parametrize("leading", [(), (2,)])
def test_a_crowded_size_is_factorised_with_one_more_row(
    spd, leading: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    original = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda m, **kept: sizes.append(m.shape[-1]) or original(m, **kept))
    matrices = [spd(*leading, d, d) for d in (CROWDED["cpu"], CROWDED["cpu"] + 2)]
    inverses, rungs = damped_inverses(matrices, [number(0.3)] * 2, [None] * 2)
    for inverse, matrix in zip(inverses, matrices, strict=True):
        torch.testing.assert_close(inverse, reference(matrix, 0.3), rtol=0, atol=1e-10)
    assert sizes == [CROWDED["cpu"] + 1, CROWDED["cpu"] + 2]
    assert rungs == [Rung.FIRST] * 2


def test_no_work_buffer_holds_more_than_one_large_matrix() -> None:
    d = 520
    matrices = [torch.eye(d, dtype=torch.float64) * (i + 1) for i in range(3)]
    with Passes() as passes:
        inverses, _ = damped_inverses(matrices, [number(1.0)] * 3, [None] * 3)
    torch.testing.assert_close(inverses[2], torch.eye(d, dtype=torch.float64) / 4)
    assert passes.largest == d * d


def test_factor_and_inverse_take_the_place_of_one_copy() -> None:
    d = 300
    matrix = torch.eye(d, dtype=torch.float64)
    with Passes(least=d * d) as passes:
        damped_inverses([matrix], [number(1.0)], [None])
    # The copy alone: the factorisation and the inversion are not counted.
    assert passes.written == d * d


@pytest.mark.parametrize(
    ("bad", "at"), [("nan", (0, 0)), ("nan", (2, 1)), ("nan", (4, 3)), ("inf", (2, 1)), ("inf", (4, 3))]
)
def test_what_is_not_finite_anywhere_fails(spd, bad: str, at: tuple[int, int]) -> None:
    matrix = spd(5)
    matrix[at] = matrix[at[::-1]] = float(bad)
    _, rungs = damped_inverses([matrix], [number(0.1)], [None])
    assert rungs == [Rung.IDENTITY]


@pytest.mark.parametrize(("damping", "added"), [(0.2, 2.0), (0.02, 2.0)])
def test_an_indefinite_matrix_gets_ten_then_a_hundred_times_the_damping(damping: float, added: float) -> None:
    matrix = torch.diag(torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64))
    (inverse,), rungs = damped_inverses([matrix], [number(damping)], [None])
    torch.testing.assert_close(inverse, reference(matrix, added), rtol=0, atol=1e-10)
    assert rungs == [Rung.MORE_DAMPING]


def test_a_singular_matrix_without_damping_gets_its_round_off() -> None:
    matrix = torch.ones(4, 4, dtype=torch.float64)
    (inverse,), rungs = damped_inverses([matrix], [number(0.0)], [None])
    assert rungs == [Rung.MORE_DAMPING]
    assert torch.isfinite(inverse).all()


def test_float64_succeeds_where_float32_does_not() -> None:
    matrix = nearly_singular()
    (inverse,), rungs = damped_inverses([matrix], [number(1e-12)], [None])
    assert rungs == [Rung.DOUBLE]
    assert inverse.dtype == torch.float32
    torch.testing.assert_close(inverse, reference(matrix.double(), 1e-12).float(), rtol=1e-5, atol=0)


def test_a_device_without_float64_skips_that_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kfac_cond.linalg.inverse.has_float64", lambda device: False)
    _, rungs = damped_inverses([nearly_singular()], [number(1e-12)], [None])
    assert rungs == [Rung.IDENTITY]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_matrix_that_is_not_finite_keeps_its_previous_inverse(bad: float, dtype: torch.dtype) -> None:
    matrix = torch.eye(3, dtype=dtype)
    matrix[1, 2] = matrix[2, 1] = bad
    previous = torch.full((3, 3), 7.0, dtype=dtype)
    (inverse,), rungs = damped_inverses([matrix], [number(0.1)], [previous])
    assert torch.equal(inverse, previous)
    assert rungs == [Rung.PREVIOUS]


def test_the_identity_stands_in_where_nothing_went_before() -> None:
    (inverse,), rungs = damped_inverses([NAN.expand(2, 3, 3)], [number(0.1)], [None])
    assert torch.equal(inverse, torch.eye(3, dtype=torch.float64).expand(2, 3, 3))
    assert rungs == [Rung.IDENTITY]


def test_a_damping_that_is_not_finite_is_a_failure(spd) -> None:
    _, rungs = damped_inverses([spd(3)], [number(torch.nan)], [None])
    assert rungs == [Rung.IDENTITY]


def test_one_failure_leaves_the_others_of_its_batch_bitwise_as_they_are(spd) -> None:
    good = spd(3)
    (alone,), _ = damped_inverses([good], [number(0.1)], [None])
    (_, beside), rungs = damped_inverses([NAN, good], [number(0.1)] * 2, [None] * 2)
    assert torch.equal(beside, alone)
    assert rungs == [Rung.IDENTITY, Rung.FIRST]


def test_an_inverse_that_overflows_is_a_failure() -> None:
    _, rungs = damped_inverses([torch.eye(2, dtype=torch.float32) * 1e-30], [number(0.0)], [None])
    assert rungs == [Rung.FIRST]
    _, rungs = damped_inverses([torch.eye(2, dtype=torch.float32) * 1e-39], [number(0.0)], [None])
    assert rungs == [Rung.IDENTITY]


def test_the_host_reads_once(spd, reads) -> None:
    matrices = [spd(*shape) for shape in SHAPES]
    with reads:
        damped_inverses(matrices, [number(0.1)] * len(SHAPES), [None] * len(SHAPES))
    assert reads.names == ["tolist"]


def test_the_host_reads_once_more_for_each_rung_climbed(spd, reads) -> None:
    indefinite = torch.diag(torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64))
    with reads:
        damped_inverses([spd(3), spd(5), indefinite], [number(0.2)] * 3, [None] * 3)
    assert reads.names == ["tolist"] * 2


def test_runs_on_the_meta_device() -> None:
    matrices = [torch.ones(shape, device="meta") for shape in SHAPES]
    dampings = [torch.ones((), device="meta")] * len(SHAPES)
    inverses, rungs = damped_inverses(matrices, dampings, [None] * len(SHAPES))
    assert [inverse.shape for inverse in inverses] == [matrix.shape for matrix in matrices]
    assert set(rungs) == {Rung.FIRST}


def test_of_nothing_is_nothing(reads) -> None:
    with reads:
        assert damped_inverses([], [], []) == ([], [])
    assert reads.names == []


def test_lengths_must_agree(spd) -> None:
    with pytest.raises(ValueError, match="1 matrices, 2 dampings and 1 previous"):
        damped_inverses([spd(3)], [number(0.1)] * 2, [None])


def test_read_status_keeps_the_order() -> None:
    flags = [torch.tensor([True, False]), torch.tensor([True])]
    assert ladder.read_status(flags) == [True, False, True]


# -- factors alone -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_a_factor_times_itself_is_the_damped_matrix(spd, index: int) -> None:
    matrices = [spd(*shape) for shape in SHAPES]
    dampings = [number(0.1 * (i + 1)) for i in range(len(SHAPES))]
    factors, flags = attempted_factors(matrices, dampings)
    R, d = factors[index], SHAPES[index][-1]
    expected = matrices[index] + dampings[index] * torch.eye(d, dtype=torch.float64)
    torch.testing.assert_close(R.mT @ R, expected, rtol=0, atol=1e-12)
    assert torch.equal(R, R.triu())
    assert all(flags)


def test_the_factor_of_a_crowded_size_is_a_tensor_of_its_own(spd) -> None:
    d = CROWDED["cpu"]
    matrix = spd(d)
    (R,), _ = attempted_factors([matrix], [number(0.3)])
    torch.testing.assert_close(R.mT @ R, matrix + 0.3 * torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-10)
    assert R.is_contiguous()
    assert R.untyped_storage().nbytes() == d * d * 8


def test_an_inverted_factor_is_the_inverse(spd) -> None:
    matrix, values = spd(2, 4, 4), torch.tensor([1.0, 3.0], dtype=torch.float64)
    (R, diagonal), _ = attempted_factors([matrix, Diagonal(values)], [number(0.2)] * 2)
    torch.testing.assert_close(inverted(R), reference(matrix, 0.2), rtol=0, atol=1e-10)
    torch.testing.assert_close(inverted(diagonal).values, 1 / (values + 0.2), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("bad", "at"), [("nan", (0, 0)), ("nan", (2, 1)), ("nan", (4, 3)), ("inf", (2, 1))])
def test_a_factor_that_is_not_to_be_used_is_flagged(spd, bad: str, at: tuple[int, int]) -> None:
    matrix = spd(5)
    matrix[at] = matrix[at[::-1]] = float(bad)
    indefinite = torch.diag(torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64))
    _, flags = attempted_factors([matrix, indefinite, spd(5)], [number(0.1)] * 3)
    assert [bool(flag) for flag in flags] == [False, False, True]


@pytest.mark.parametrize("scale", [1e-30, 1e-39])
def test_a_factor_is_flagged_where_the_inverse_overflows(scale: float) -> None:
    matrices, dampings = [torch.eye(2, dtype=torch.float32) * scale], [number(0.0)]
    _, expected = attempted_inverses(matrices, dampings)
    _, flags = attempted_factors(matrices, dampings)
    assert flags == expected


def test_factors_read_nothing_and_take_the_place_of_one_copy(spd, reads) -> None:
    d = 300
    matrix = spd(d)
    with reads, Passes(least=d * d) as passes:
        attempted_factors([matrix], [number(1.0)])
    assert reads.names == []
    assert passes.written == d * d


@pytest.mark.parametrize(("uses", "expected"), [(1, True), (2, True), (3, False), (None, False)])
def test_solves_are_for_few_products(uses: int | None, expected: bool) -> None:
    assert solves(torch.device("cpu"), uses) == expected
    assert not solves(torch.device("cuda"), uses)
