"""Sums over examples made of pairs, against the per-example weight gradients they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kfac_cond.linalg import pairs

from ..reference import assert_same

GROUPS = [(), (3,)]
#: Few and many positions, and sides of which either is the larger: both orders of a moment are taken.
SHAPES = [(1, 4, 3), (2, 9, 8), (5, 2, 6), (7, 6, 2), (40, 3, 2)]


@pytest.fixture(params=GROUPS, ids=["", "groups"])
def groups(request) -> tuple[int, ...]:
    return request.param


@pytest.fixture(params=SHAPES, ids=str)
def pair(request, groups) -> tuple[Tensor, Tensor]:
    positions, d_out, d_in = request.param
    return torch.randn(*groups, 6, positions, d_in), torch.randn(*groups, 6, positions, d_out)


def gradients(a: Tensor, g: Tensor) -> Tensor:
    """V_n by the definition: a sum of outer products over positions."""
    return (g[..., :, None] * a[..., None, :]).sum(-3)


def test_example_gradients(pair):
    assert_same(pairs.example_gradients(*pair), gradients(*pair))


@pytest.mark.parametrize("most", [1, 30, 2**24])
def test_squared_gradients(pair, most, monkeypatch):
    monkeypatch.setattr(pairs, "MAX_ELEMENTS", most)
    assert_same(pairs.squared_gradients(*pair), gradients(*pair).square().sum(-3))


@pytest.mark.parametrize("turned", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("most", [1, 30, 2**24])
def test_squared_gradients_in_bases(pair, most, turned, monkeypatch):
    monkeypatch.setattr(pairs, "MAX_ELEMENTS", most)
    V = gradients(*pair)
    whole = [torch.linalg.qr(torch.randn(*x.shape[:-3], x.shape[-1], x.shape[-1]))[0] for x in pair]
    of_A, of_G = (basis if one else None for basis, one in zip(whole, turned, strict=True))
    expected = V if of_A is None else V @ of_A.unsqueeze(-3)
    expected = expected if of_G is None else of_G.mT.unsqueeze(-3) @ expected
    assert_same(pairs.squared_gradients_in_bases(*pair, of_A, of_G), expected.square().sum(-3))


@pytest.mark.parametrize("positions", [1, 2, 100])
def test_of_many_positions_the_gradients_are_brought_to_the_bases(positions):
    a, g = torch.randn(4, positions, 8), torch.randn(4, positions, 6)
    with FlopCounterMode(display=False) as counted:
        pairs.squared_gradients_in_bases(a, g, torch.eye(8), torch.eye(6))
    formed = 4 * positions * 8 * 6
    of_pairs, of_gradients = 4 * positions * (8 * 8 + 6 * 6), 4 * 8 * 6 * (8 + 6)
    assert counted.get_total_flops() == 2 * (formed + min(of_pairs, of_gradients))


@pytest.mark.parametrize("most", [1, 30, 2**24])
def test_row_moments(pair, most, monkeypatch):
    monkeypatch.setattr(pairs, "MAX_ELEMENTS", most)
    V = gradients(*pair)
    assert_same(pairs.row_moments(*pair), torch.einsum("...noi, ...noj -> ...oij", V, V))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("most", [1, 30, 2**24])
def test_input_moment(pair, most, weighted, monkeypatch):
    monkeypatch.setattr(pairs, "MAX_ELEMENTS", most)
    a, g = pair
    V = gradients(a, g)
    weight = torch.randn(*g.shape[:-3], g.shape[-1], g.shape[-1]) if weighted else None
    weight = None if weight is None else weight @ weight.mT
    middle = torch.eye(g.shape[-1]) if weight is None else weight
    expected = (V.mT @ (middle.unsqueeze(-3) @ V)).sum(-3)
    assert_same(pairs.input_moment(a, g, weight), expected)


def test_example_rows_are_in_the_order_of_the_matrix(pair):
    a, g = pair
    V = gradients(a, g)
    expected = torch.stack([V.select(-3, n).flatten() for n in range(6)])
    assert_same(pairs.example_rows(a, g), expected)


@pytest.mark.parametrize(("positions", "formed"), [(1, False), (2, False), (30, True)])
def test_a_moment_forms_weight_gradients_only_where_that_is_cheaper(positions, formed, monkeypatch):
    calls = []
    plain = pairs.example_gradients
    monkeypatch.setattr(pairs, "example_gradients", lambda *pair: calls.append(1) or plain(*pair))
    pairs.input_moment(torch.randn(4, positions, 8), torch.randn(4, positions, 8))
    assert bool(calls) == formed


@pytest.mark.parametrize(("d_out", "d_in", "positions", "formed"), [(9, 8, 1, False), (8, 8, 1, True), (9, 8, 2, True)])
def test_row_moments_form_weight_gradients_only_where_that_is_cheaper(d_out, d_in, positions, formed, monkeypatch):
    calls = []
    plain = pairs.example_gradients
    monkeypatch.setattr(pairs, "example_gradients", lambda *pair: calls.append(1) or plain(*pair))
    pairs.row_moments(torch.randn(4, positions, d_in), torch.randn(4, positions, d_out))
    assert bool(calls) == formed


def test_one_position_forms_no_weight_gradient(monkeypatch):
    monkeypatch.setattr(pairs, "example_gradients", lambda *_: pytest.fail("a weight gradient was formed"))
    pairs.squared_gradients(torch.randn(4, 1, 8), torch.randn(4, 1, 8))
