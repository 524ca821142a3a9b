from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfac_cond.linalg import inner
from kfac_cond.linalg.pairs import example_gradients
from kfac_cond.linalg.sparse import SparseRows

from ..reference import assert_same

#: (groups, examples, positions, d_in, d_out): positions few beside a gradient's entries, and many.
SHAPES = [((), 5, 1, 4, 3), ((), 4, 2, 6, 5), ((), 3, 9, 2, 2), ((2,), 3, 1, 3, 2), ((3,), 4, 7, 2, 2)]


def flat(a: Tensor, g: Tensor) -> Tensor:
    """vec V_n of every example, groups with it."""
    V = example_gradients(a, g)
    return V.flatten(1) if V.dim() == 3 else V.movedim(0, 1).flatten(1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("limit", [2**24, 8])
def test_squared_inner_products(shape: tuple, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inner, "MAX_ELEMENTS", limit)
    groups, n, s, d_in, d_out = shape
    a, b = torch.randn(*groups, n, s, d_in), torch.randn(*groups, n + 2, s, d_in)
    g, h = torch.randn(2, *groups, n, s, d_out), torch.randn(3, *groups, n + 2, s, d_out)
    found = inner.squared_inner_products(a, g, b, h)
    expected = torch.stack([torch.stack([(flat(a, x) @ flat(b, y).T).square().sum() for y in h]) for x in g])
    assert_same(found, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("limit", [2**24, 8])
def test_inner_products(shape: tuple, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inner, "MAX_ELEMENTS", limit)
    groups, n, s, d_in, d_out = shape
    a, b = torch.randn(2, *groups, n, s, d_in)
    g, h = torch.randn(2, *groups, n, s, d_out)
    assert_same(inner.inner_products(a, g, b, h), (flat(a, g) * flat(b, h)).sum())


def rows(n: int, s: int, d: int, *, entries: int) -> SparseRows:
    """Several entries a row, some in one place."""
    at = torch.randint(n * s, (entries,))
    return SparseRows(at, torch.randint(d, (entries,)), torch.randn(entries), (n, s, d))


@pytest.mark.parametrize("limit", [2**24, 8])
def test_activations_known_by_their_entries(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inner, "MAX_ELEMENTS", limit)
    a, b = rows(4, 3, 7, entries=20), rows(5, 3, 7, entries=18)
    g, h = torch.randn(2, 4, 3, 6), torch.randn(1, 5, 3, 6)
    found = inner.squared_inner_products(a, g, b, h)
    assert_same(found, inner.squared_inner_products(a.to_dense(), g, b.to_dense(), h))
    scaled = SparseRows(a.rows, a.columns, a.values * torch.arange(7.0)[a.columns], a.shape)
    expected = inner.inner_products(a.to_dense(), g[0], scaled.to_dense(), g[1])
    assert_same(inner.inner_products(a, g[0], scaled, g[1]), expected)
