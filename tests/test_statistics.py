"""Sums and counts merge exactly; the moving average is its formula; what is not finite stays out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kfac_cond.averages import MovingAverage, rounded_at_random
from kfac_cond.statistics import (
    LayerSums,
    Slots,
    Statistics,
    all_finite,
    check_finite,
    combined,
    statistic_dtype,
)

from .passes import Passes
from .reference import assert_same


def sums_of(layers: dict[str, LayerSums]) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (sums.A, sums.G) for name, sums in layers.items()}


def piece(value: float, *, M: float = 2.0, count: int = 4, adds: bool = True, names: str = "ab") -> Statistics:
    """Sums of one capture in which every layer has A = value * count and G = 10 value."""
    layers = {
        name: LayerSums(torch.eye(2) * value * count, torch.tensor(count), torch.eye(3)[None] * 10 * value)
        for name in names
    }
    finite, nonfinite = check_finite(sums_of(layers))
    return Statistics(layers, torch.tensor([M]), Slots(adds=(adds,)), 5, finite, nonfinite)


def averaged(*pieces: Statistics, decay: float = 0.9, names: str = "ab") -> MovingAverage:
    average = MovingAverage(names)
    for one in pieces:
        average.update(one, decay=decay)
    return average


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_statistics_have_float32_at_least(dtype, expected):
    assert statistic_dtype(dtype) == expected


# -- merging ----------------------------------------------------------------------------------------------------------


def test_merging_adds_sums_and_counts():
    merged = piece(1.0).merged(piece(3.0, M=5.0, count=1))
    assert_same(merged.layers["a"].A, torch.eye(2) * (4.0 + 3.0))
    assert_same(merged.layers["a"].G, torch.eye(3)[None] * 40.0)
    assert (merged.layers["a"].A_count, merged.divisor, merged.examples) == (5, 7.0, 10)


def test_merging_keeps_M_of_a_sum():
    assert piece(1.0, M=1.0, adds=False).merged(piece(1.0, M=1.0, adds=False)).divisor == 1.0


@pytest.mark.parametrize("flip", [False, True])
def test_merging_keeps_layers_that_one_piece_lacks(flip):
    pieces = [piece(1.0, names="a"), piece(3.0, names="b")]
    merged = pieces[flip].merged(pieces[not flip])
    assert set(merged.layers) == {"a", "b"}
    assert_same(merged.layers["b"].G, torch.eye(3)[None] * 30.0)
    assert merged.divisor == 4.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("flip", [False, True])
def test_a_piece_that_is_not_finite_adds_nothing_to_the_other(flip, value):
    pieces = [piece(1.0), piece(value)]
    merged = pieces[flip].merged(pieces[not flip])
    assert_same(merged.layers["a"].G, piece(1.0).layers["a"].G)
    assert_same(merged.layers["a"].A, piece(1.0).layers["a"].A)
    assert (merged.divisor, merged.layers["a"].A_count) == (2.0, 4)
    assert bool(merged.finite)
    assert bool(merged.nonfinite["a"])


def test_merging_is_three_passes_over_each_factor_in_their_own_memory():
    d = 50
    first, second = (
        Statistics(
            {"a": LayerSums(torch.eye(d), torch.tensor(4), torch.eye(d)[None])},
            torch.tensor([2.0]),
            Slots(),
            5,
            torch.tensor(True),
        )
        for _ in range(2)
    )
    kept = first.layers["a"].A
    with Passes(least=d * d) as passes:
        merged = first.merged(second)
    assert merged.layers["a"].A is kept
    assert passes.written == 2 * 3 * d * d


def test_two_pieces_that_are_not_finite_are_not_finite():
    assert not piece(float("nan")).merged(piece(float("inf"))).finite


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=3, max_size=3))
def test_merging_is_associative(values):
    left = piece(values[0]).merged(piece(values[1])).merged(piece(values[2]))
    right = piece(values[0]).merged(piece(values[1]).merged(piece(values[2])))
    torch.testing.assert_close(left.layers["a"].G, right.layers["a"].G, rtol=1e-12, atol=1e-12)
    assert left.divisor == right.divisor


# -- heads and groups of draws ----------------------------------------------------------------------------------------


def two_heads(M: list[float], values: list[float]) -> Statistics:
    """A capture of two heads with weights 1 and 3, the second of a loss that is a sum; G = value of each head."""
    G = torch.stack([torch.eye(3) * value for value in values])
    layers = {"a": LayerSums(torch.eye(2), torch.tensor(1), G)}
    slots = Slots((1.0, 3.0), (True, False), names=("x", "y"))
    return Statistics(layers, torch.tensor(M), slots, 5, *check_finite(sums_of(layers)))


def test_each_head_is_divided_by_its_own_M():
    merged = two_heads([2.0, 1.0], [4.0, 5.0]).merged(two_heads([6.0, 1.0], [8.0, 7.0]))
    assert merged.divisor.tolist() == [8.0, 1.0]
    assert_same(combined(merged.layers["a"].G, merged.slots.scales(merged.divisor)), torch.eye(3) * (12 / 8 + 3 * 12))


def test_each_head_has_an_average_of_its_own():
    """A capture without a valid term of one head is no zero of it."""
    average = MovingAverage("a", (1.0, 3.0))
    for one in (two_heads([2.0, 1.0], [4.0, 5.0]), two_heads([0.0, 1.0], [0.0, 7.0])):
        average.update(one, decay=0.5)
    assert_same(average.factors("a")[1], torch.eye(3) * (2.0 + 3 * (0.5 * 5 + 7) / 1.5))


@pytest.mark.parametrize(("draws", "groups"), [(2, 2), (5, 3), (8, 8), (11, 4)])
def test_groups_of_draws_are_estimates_whose_mean_is_that_of_all(draws, groups):
    slots, M = Slots((1.0, 2.0), (True, True), draws=draws, groups=groups), torch.tensor([3.0, 7.0])
    numbers = torch.arange(1.0, 2 * draws + 1).reshape(2, draws) ** 2
    sums = torch.zeros(len(slots))
    for head in range(2):
        for draw in range(draws):
            sums[slots.index(head, draw)] += numbers[head, draw] / draws
    whole = combined(sums, slots.scales(M))
    assert_same(whole, numbers[0].mean() / 3 + 2 * numbers[1].mean() / 7)
    parts = [combined(sums, slots.scales(M, group)) for group in range(groups)]
    assert_same(parts[1], numbers[0, 1::groups].mean() / 3 + 2 * numbers[1, 1::groups].mean() / 7)
    assert_same(sum(slots.share(group) * part for group, part in enumerate(parts)), whole)


# -- finiteness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["A", "G"])
def test_a_layer_with_one_bad_entry_is_found(where, bad):
    one = piece(1.0)
    getattr(one.layers["b"], where)[..., 0, 1] = bad
    finite, nonfinite = check_finite(sums_of(one.layers))
    assert not finite
    assert (bool(nonfinite["a"]), bool(nonfinite["b"])) == (False, True)


def test_infinities_of_both_signs_do_not_cancel():
    assert not all_finite([torch.tensor([float("inf"), float("-inf")])])


# -- the moving average -----------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.1, 5), min_size=1, max_size=6), st.floats(0, 0.99))
def test_the_average_is_its_bias_corrected_formula(values, decay):
    """sum_s rho^(t-s) x_s / sum_s rho^(t-s)."""
    A, G = averaged(*map(piece, values), decay=decay).factors("a")
    weights = torch.tensor([decay ** (len(values) - 1 - s) for s in range(len(values))], dtype=torch.float64)
    mean = (weights * torch.tensor(values, dtype=torch.float64)).sum() / weights.sum()
    torch.testing.assert_close(A, torch.eye(2) * mean)
    torch.testing.assert_close(G, torch.eye(3) * 10 * mean / 2.0)


def test_one_capture_is_its_own_average():
    A, G = averaged(piece(3.0)).factors("a")
    assert_same(A, torch.eye(2) * 3.0)
    assert_same(G, torch.eye(3) * 15.0)


def test_a_layer_that_was_not_used_adds_zero_to_G_and_skips_in_A():
    A, G = averaged(piece(1.0), piece(5.0, names="a"), decay=0.5).factors("b")
    assert_same(A, torch.eye(2))
    assert_same(G, torch.eye(3) * (0.5 * 5.0) / 1.5)


def test_a_layer_first_used_later_counts_the_captures_before():
    A, G = averaged(piece(5.0, names="a"), piece(1.0), decay=0.5).factors("b")
    assert_same(A, torch.eye(2))
    assert_same(G, torch.eye(3) * 5.0 / 1.5)


def test_a_layer_that_was_never_used_is_not_ready():
    assert averaged(piece(1.0, names="a")).ready == ["a"]


@pytest.mark.parametrize("unusable", [piece(float("nan")), piece(1.0, M=0.0), piece(float("nan"), M=0.0)])
@pytest.mark.parametrize("when", [0, 1])
def test_a_capture_that_is_not_usable_changes_nothing(when, unusable):
    pieces = [piece(1.0), piece(3.0)]
    pieces.insert(when, unusable)
    found, expected = averaged(*pieces).factors("a"), averaged(piece(1.0), piece(3.0)).factors("a")
    assert_same(found[0], expected[0])
    assert_same(found[1], expected[1])


def test_an_unusable_first_capture_gives_zeros_not_nan():
    A, G = averaged(piece(float("nan"))).factors("a")
    assert not A.any()
    assert not G.any()


def test_a_capture_with_no_position_of_a_layer_skips_in_its_A():
    A, _ = averaged(piece(2.0), piece(0.0, count=0)).factors("a")
    assert_same(A, torch.eye(2) * 2.0)


def test_it_follows_a_change_of_dtype():
    average = averaged(piece(1.0))
    three = piece(3.0)
    three.layers["a"] = LayerSums(
        *(x.float() for x in (three.layers["a"].A, three.layers["a"].A_count, three.layers["a"].G))
    )
    average.update(three, decay=0.0)
    A, G = average.factors("a")
    assert A.dtype == G.dtype == torch.float32
    assert_same(A, torch.eye(2, dtype=torch.float32) * 3.0)


def test_a_layers_state_goes_round():
    average, fresh = averaged(piece(1.0), piece(2.0)), MovingAverage("ab")
    for name in "ab":
        fresh.load_layer(name, average.layer_state(name))
    average.update(piece(7.0), decay=0.9)
    fresh.update(piece(7.0), decay=0.9)
    assert torch.equal(fresh.factors("a")[0], average.factors("a")[0])
    assert torch.equal(fresh.factors("b")[1], average.factors("b")[1])


def test_what_was_handed_on_stays_as_it_was():
    average, fresh = averaged(piece(1.0)), MovingAverage("ab")
    fresh.load_layer("a", average.layer_state("a"))
    before = [factor.clone() for factor in average.factors("a")]
    fresh.update(piece(7.0), decay=0.9)
    assert [torch.equal(*pair) for pair in zip(before, average.factors("a"), strict=True)] == [True, True]


def test_a_capture_is_three_passes_over_each_factor_in_their_own_memory():
    d = 50
    pieces = [LayerSums(torch.eye(d), torch.tensor(4), torch.eye(d)[None]) for _ in range(2)]
    first, second = (Statistics({"a": one}, torch.tensor([2.0]), Slots(), 5, torch.tensor(True)) for one in pieces)
    average = averaged(first, names="a")
    with Passes(least=d * d) as passes:
        average.update(second, decay=0.9)
    assert passes.written <= 2 * 3 * d * d


def test_spent_sums_are_scaled_where_they_are():
    sums, scales = torch.eye(50)[None], {0: torch.tensor(3.0)}
    with Passes(least=50 * 50) as passes:
        found = combined(sums, scales, spent=True)
    assert_same(found, 3.0 * torch.eye(50))
    assert passes.written == 50 * 50
    assert found.data_ptr() == sums.data_ptr()


def test_numbers_are_rounded_at_random_to_themselves_on_average():
    x = torch.full((20000,), 1 + 0.3 * 2**-7)
    found = rounded_at_random(x, torch.Generator().manual_seed(0))
    assert found.dtype == torch.bfloat16
    assert found.double().unique().tolist() == [1.0, 1 + 2**-7]
    torch.testing.assert_close(found.double().mean(), x.mean(), rtol=0, atol=0.02 * 2**-7)
    exact = torch.tensor([0.0, -1.5, 2.0**100])
    assert torch.equal(rounded_at_random(exact, torch.Generator()).double(), exact)


def test_an_average_in_bfloat16_follows_a_change_that_is_smaller_than_its_last_place():
    """To the nearest, a fiftieth of 2 percent would never be added."""
    d = 100
    average = MovingAverage("a", storage={"a": torch.bfloat16})
    for step, value in enumerate([1.0] * 3 + [1.02] * 400):
        layers = {"a": LayerSums(torch.full((d, d), 4 * value), torch.tensor(4), torch.full((1, d, d), 2 * value))}
        average.update(Statistics(layers, torch.tensor([2.0]), Slots(), 5, torch.tensor(True)), decay=0.98, step=step)
    assert average.A["a"].dtype == average.G["a"].dtype == torch.bfloat16
    for factor in average.factors("a"):
        assert abs(factor.double().mean() - 1.02) < 0.002


def test_restricted_keeps_what_stays_and_forgets_the_rest():
    kept = averaged(piece(1.0), names="abc").restricted("abd", without=["b"])
    assert kept.ready == ["a"]
    assert_same(kept.factors("a")[0], torch.eye(2))
    kept.update(piece(3.0, names="b"), decay=0.9)
    assert_same(kept.factors("b")[1], torch.eye(3) * 15.0)


def test_on_the_meta_device_it_runs():
    def meta(x: Tensor) -> Tensor:
        return x.to("meta")

    one = piece(1.0)
    layers = {name: LayerSums(meta(s.A), meta(s.A_count), meta(s.G)) for name, s in one.layers.items()}
    statistics = Statistics(layers, meta(one.divisor), Slots(), 5, *check_finite(sums_of(layers)))
    average = averaged(statistics, statistics.merged(statistics))
    assert average.factors("a")[0].is_meta
