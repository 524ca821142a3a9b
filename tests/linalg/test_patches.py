"""Windows of images that are not unfolded, against the unfolded ones."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kfac_cond.layers.sharing import (
    expanded_input_moment,
    masked,
    pooled_inputs,
    reduced_input_moment,
    sampled_input_moment,
)
from kfac_cond.linalg import patches as module
from kfac_cond.linalg.correlations import Axis, _plan, product_count
from kfac_cond.linalg.moments import second_moment, second_moment_diagonal
from kfac_cond.linalg.patches import Patches, unfolded
from kfac_cond.linalg.products import gram_flops

from ..passes import Passes


def axis(size: int, kernel: int, stride: int = 1, dilation: int = 1, low: int = 0, up: int = 0) -> Axis:
    """As a convolution reads ``size`` pixels with margins."""
    positions = (size + low + up - dilation * (kernel - 1) - 1) // stride + 1
    return Axis(size, tuple(dilation * tap - low for tap in range(kernel)), stride, 0, positions)


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@st.composite
def axes(draw: st.DrawFn) -> Axis:
    """Any: images smaller than the kernel reaches, margins cut off, taps from either end, pixels spread out."""
    if draw(st.booleans()) and draw(st.booleans()):
        spread, (low, kernel, dilation, positions) = draw(st.integers(2, 3)), (draw(st.integers(1, 4)) for _ in "lkdp")
        offsets = tuple(low - 2 - dilation * tap for tap in range(kernel))
        return Axis(draw(st.integers(1, 4)), offsets, 1, 0, 2 * positions - 1, spread)
    numbers = [st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), *[st.integers(-1, 5)] * 2]
    found = axis(*map(draw, numbers))
    assume(found.positions > 0)
    back = Axis(found.size, found.offsets[::-1], found.stride, found.start, found.stop)
    return draw(st.sampled_from([found, back]))


@st.composite
def any_patches(draw: st.DrawFn) -> Patches:
    lies = tuple(draw(axes()) for _ in range(draw(st.sampled_from([1, 2, 2, 3]))))
    groups, channels, n = draw(st.sampled_from([1, 2])), draw(st.integers(1, 3)), draw(st.sampled_from([0, 1, 2]))
    return Patches(image(n, groups * channels, *(one.size for one in lies)), lies, groups)


def plain(patches: Patches) -> Tensor:
    """The second moment by its definition."""
    rows = patches.to_dense().flatten(-3, -2)
    return rows.mT @ rows


def same(found: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().clamp(min=1.0) if expected.numel() else 1.0
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-12)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(any_patches())
def test_the_second_moment_of_any_windows_both_ways(patches: Patches) -> None:
    expected = plain(patches)
    for moment in (patches.correlated_moment(), patches.unfolded_moment()):
        same(moment, expected)
        assert torch.equal(moment, moment.mT)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(any_patches())
def test_products_are_counted_without_the_plan_of_them(patches: Patches) -> None:
    for parts in product(*(one.parts for one in patches.axes)):
        lies = tuple(part for _, part in parts)
        assert product_count(lies) == len(_plan(lies).products)


def test_which_way_to_take_is_known_of_many_taps():
    patches = Patches(torch.empty(2, 4, 64, 64, device="meta"), (axis(64, 51, low=25, up=25),) * 2, groups=4)
    _plan.cache_clear()
    assert not patches.correlates
    assert _plan.cache_info().currsize == 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(any_patches())
def test_sums_and_squares_of_any_windows(patches: Patches) -> None:
    dense = patches.to_dense()
    rows, flat = patches.flatten(-3, -2), dense.flatten(-3, -2)
    assert (patches.shape, rows.shape) == (tuple(dense.shape), tuple(flat.shape))
    same(patches.sum(dim=-2), dense.sum(dim=-2))
    same(patches.sum(), dense.sum())
    same(rows.sum(dim=-2), flat.sum(dim=-2))
    same(second_moment_diagonal(rows, ones=True), second_moment_diagonal(flat, ones=True))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(any_patches(), st.data())
def test_any_rows_picked(patches: Patches, data: st.DataObject) -> None:
    rows = patches.flatten(-3, -2)
    assume(rows.shape[-2])
    picked = torch.tensor(data.draw(st.lists(st.integers(0, rows.shape[-2] - 1), min_size=1, max_size=5)))
    assert torch.equal(rows.index_select(-2, picked), patches.to_dense().flatten(-3, -2).index_select(-2, picked))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(any_patches(), st.booleans(), st.data())
def test_windows_are_unfolded_some_at_a_time(patches: Patches, some_absent: bool, data: st.DataObject) -> None:
    if some_absent:
        *_, n, positions, _ = patches.shape
        absent = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n * positions, max_size=n * positions)))
        patches = masked(patches, ~absent.reshape(n, positions, 1).bool())
    limit = module.MIN_ELEMENTS
    module.MIN_ELEMENTS = 1
    try:
        same(patches.unfolded_moment(), plain(patches))
        same(patches.sum(dim=-2), patches.to_dense().sum(dim=-2))
    finally:
        module.MIN_ELEMENTS = limit


@pytest.mark.parametrize("channels", [2, 16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("present", [None, 0.7])
@pytest.mark.parametrize("form", [second_moment, second_moment_diagonal])
def test_positions_enter_the_factors_as_those_of_unfolded_windows(form, present, groups, bias, channels):
    patches = Patches(image(40, groups * channels, 9, 10), (axis(9, 3, low=1, up=1), axis(10, 3)), groups)
    assert patches.correlates == (channels == 16)
    keep = None if present is None else torch.rand(40, 72, 1) < present
    rows = torch.arange(0, 2880, 7)
    ways: list[Callable[..., Any]] = [
        lambda a: expanded_input_moment(a, keep, bias=bias, moment=form),
        lambda a: sampled_input_moment(a, keep, rows, bias=bias, moment=form),
        lambda a: pooled_inputs(a, keep),
        lambda a: reduced_input_moment(*pooled_inputs(a, keep), bias=bias, moment=form),
    ]
    for way in ways:
        for found, expected in zip(way(patches), way(patches.to_dense()), strict=True):
            same(found.double(), expected.double())


def test_a_function_of_torch_is_given_the_tensor():
    patches = Patches(image(2, 3, 5), (axis(5, 2),))
    same(torch.cat([patches, patches.new_ones(2, 4, 1)], dim=-1)[..., :-1], patches.to_dense())
    assert unfolded(patches.image) is patches.image


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_dtype_and_the_device_are_those_of_the_image(dtype, device):
    patches = Patches(torch.zeros(2, 40, 6, 6, dtype=dtype, device=device), (axis(6, 3), axis(6, 3, low=1, up=1)))
    for moment in (patches.correlated_moment(), patches.unfolded_moment(), patches.sum(dim=-2)):
        assert (moment.dtype, moment.device.type) == (dtype, device)
    assert patches.flatten(-3, -2).index_select(-2, torch.zeros(3, dtype=torch.int64, device=device)).shape == (3, 360)


def test_reads_nothing(reads):
    patches = Patches(image(2, 16, 6, 6), (axis(6, 3), axis(6, 3, stride=2, low=1, up=1)))
    with reads:
        second_moment(patches.flatten(-3, -2), ones=True)
        patches.unfolded_moment()
        patches.picked(torch.zeros(3, dtype=torch.int64))
    assert reads.names == []


# -- how much work it is ----------------------------------------------------------------------------------------------


def three_by_three(n: int = 16, channels: int = 32, size: int = 16, padding: int = 1) -> Patches:
    return Patches(image(n, channels, size, size), (axis(size, 3, low=padding, up=padding),) * 2)


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_three_by_three_windows_are_thirteen_products_of_the_image(padding):
    patches = three_by_three(padding=padding)
    with Passes() as passes:
        second_moment(patches.flatten(-3, -2), ones=True)
    whole = [shape for shape in passes.products if shape[-2] > 16 * 16 * 15]
    assert [shape[-3] for shape in whole] == [32] * 13
    # Zeros between rows and between images, and what lies along the borders.
    assert passes.largest <= 18**2 / 16**2 * patches.image.numel()


def test_windows_that_are_unfolded_take_no_more_than_the_image(monkeypatch):
    monkeypatch.setattr(module, "MIN_ELEMENTS", 1)
    patches = three_by_three(n=8, channels=4, size=64)
    with Passes() as passes:
        patches.unfolded_moment()
    assert passes.largest <= patches.image.numel()


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_operations_counted_are_those_done(stride, padding):
    patches = Patches(image(8, 64, 16, 16), (axis(16, 3, stride=stride, low=padding, up=padding),) * 2)
    with FlopCounterMode(display=False) as counter:
        moment = second_moment(patches.flatten(-3, -2))
    rows, d = patches.flatten(-3, -2).shape
    counted = patches.moment_flops or gram_flops(rows, d, moment.device)
    # Of two images that are shifted a few rows have no counterpart.
    assert 0.9 * counted < counter.get_total_flops() <= counted


@pytest.mark.parametrize(
    ("patches", "expected"),
    [
        pytest.param(three_by_three(), True, id="3x3"),
        pytest.param(Patches(image(8, 16, 16, 16), (axis(16, 1),) * 2), False, id="one tap"),
        pytest.param(Patches(image(8, 3, 8, 8), (axis(8, 3),) * 2), False, id="few numbers"),
        pytest.param(Patches(image(8, 16, 16, 16), (axis(16, 3),) * 2, groups=16), False, id="a group a channel"),
        pytest.param(Patches(image(8, 16, 2, 2), (axis(2, 5, low=2, up=2),) * 2), False, id="reaches beyond the image"),
        pytest.param(Patches(image(16, 64, 32, 32), (axis(32, 3, stride=2),) * 2), True, id="stride"),
    ],
)
def test_the_way_with_less_work_is_taken(patches, expected):
    assert patches.correlates == expected
