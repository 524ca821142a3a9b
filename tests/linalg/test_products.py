"""Symmetric products against the plain ones."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kfac_cond.linalg import products
from kfac_cond.linalg.moments import second_moment
from kfac_cond.linalg.products import add_gram, gram, gram_flops, mirrored

from ..passes import Passes
from ..reference import assert_same

SHAPES = [(7, 3), (0, 3), (5, 256), (9, 257), (9, 511), (9, 512), (2, 5, 300), (2, 3, 0, 300), (3, 2050)]


@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_plain_product(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = gram(x)
    torch.testing.assert_close(found, x.mT @ x, rtol=0, atol=1e-12)
    assert torch.equal(found, found.mT)


def test_sums_over_pieces_and_is_then_made_whole():
    x = torch.randn(9, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    upper = x.new_zeros(300, 300)
    for piece in x.split(4):
        add_gram(upper, piece)
    found = mirrored(upper)
    torch.testing.assert_close(found, x.mT @ x, rtol=0, atol=1e-12)
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize("leading", [(), (1,), (1, 1), (2,)], ids=str)
@pytest.mark.parametrize("rows", [15, 16, 17, 50])
def test_many_rows_are_shared_out_among_threads(rows, leading, monkeypatch):
    monkeypatch.setattr(products, "PIECE", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    a, b = torch.randn(*leading, rows, 3), torch.randn(*leading, rows, 5)
    with Passes() as passes:
        found = products.tall_product(a, b)
    assert_same(found, a.mT @ b)
    pieces = rows // 4 if rows >= 16 and leading != (2,) else 0
    assert (pieces, 3, 4, 5) in passes.products or not pieces
    assert len(passes.products) == 1 + bool(pieces)
    assert_same(gram(a), a.mT @ a)
    assert torch.equal(gram(a), gram(a).mT)
    upper = torch.zeros(*leading, 3, 3)
    for _ in range(2):
        add_gram(upper, a)
    assert_same(mirrored(upper), 2 * a.mT @ a)


def test_one_thread_takes_all_rows_at_once(monkeypatch):
    monkeypatch.setattr(products, "PIECE", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with Passes() as passes:
        products.tall_product(torch.randn(100, 3), torch.randn(100, 5))
    assert passes.products == [(3, 100, 5)]


@pytest.mark.parametrize(("d", "share"), [(256, 1), (512, 3 / 4), (1024, 5 / 8), (2048, 9 / 16), (4096, 9 / 16)])
def test_about_half_of_a_large_product_is_done(d, share):
    x = torch.zeros(3, d)
    with FlopCounterMode(display=False) as counter:
        gram(x)
    assert counter.get_total_flops() == gram_flops(3, d, x.device) == share * 2 * 3 * d * d


def test_of_features_that_are_not_contiguous():
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(gram(x.mT), x @ x.mT, rtol=0, atol=1e-12)


def test_a_panel_is_wider_where_more_is_multiplied_at_once():
    assert gram_flops(1, 1024, torch.device("meta")) == 2 * 1024**2
    assert gram_flops(1, 2048, torch.device("meta")) == 3 / 4 * 2 * 2048**2
    assert gram(torch.zeros(3, 2048, device="meta")).shape == (2048, 2048)


def test_reads_nothing(reads):
    with reads:
        gram(torch.ones(4, 300))
    assert reads.names == []


@pytest.mark.parametrize("shape", [(7, 3), (9, 300), (2, 9, 300)])
def test_is_put_where_it_is_to_be(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    d = shape[-1]
    room = torch.full((*shape[:-2], d + 1, d + 1), torch.nan, dtype=torch.float64)
    gram(x, out=room[..., :d, :d])
    torch.testing.assert_close(room[..., :d, :d], x.mT @ x, rtol=0, atol=1e-12)
    assert room[..., d, :].isnan().all() and room[..., d].isnan().all()


@pytest.mark.parametrize("once", [gram, second_moment, partial(second_moment, ones=True)])
def test_no_other_pass_goes_over_the_whole_matrix(once):
    """Products are written where they stay: beside them half of it is written, and the diagonal blocks."""
    d = 8 * products.NARROWEST["cpu"]
    with Passes() as passes:
        once(torch.ones(2, d))
    assert passes.written < 1.2 * d * d


def test_sums_of_pieces_are_added_where_they_stay():
    d = 8 * products.NARROWEST["cpu"]
    upper, x = torch.zeros(d, d), torch.ones(2, d)
    with Passes() as passes:
        add_gram(upper, x)
    assert passes.written == 0
