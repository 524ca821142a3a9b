"""Inner products of weight gradients V_n = sum_s g_ns a_ns^T, from pairs (a, g) in the form of ``linalg.pairs``.

In the cheaper of two orders: through the products of positions, g g'^T times a a'^T entry by entry, or through the V_n
themselves, a few examples at a time. Nothing here has the side of vec V_n squared.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

import torch
from einops import einsum, rearrange
from torch import Tensor

from . import sparse
from .pairs import MAX_ELEMENTS, example_gradients
from .sparse import SparseRows


def _inner_of_rows(a: SparseRows, g: Tensor, b: SparseRows, h: Tensor) -> Tensor:
    """The sum over n of <V_n, W_n>, 0-d; b has the entries of a, with other values."""
    total: Tensor = (sparse.gradient_columns(a, g) * sparse.gradient_columns(b, h)).sum()
    return total


@sparse.form(_inner_of_rows)
def inner_products(a: Tensor, g: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """The sum over n of <V_n, W_n>, 0-d, with V_n of the pair (a, g) and W_n of (b, h)."""
    positions, d_out, d_in = a.shape[-2], g.shape[-1], a.shape[-1]
    through_positions = positions * (d_out + d_in) <= 2 * d_out * d_in
    each = g.shape[:-3].numel() * (positions**2 if through_positions else d_out * d_in)
    size, total = max(1, MAX_ELEMENTS // max(each, 1)), g.new_zeros(())
    for parts in zip(*(torch.split(x, size, dim=-3) for x in (a, g, b, h)), strict=True):
        some_a, some_g, some_b, some_h = parts
        if through_positions:
            total += ((some_g @ some_h.mT) * (some_a @ some_b.mT)).sum()
        else:
            total += (example_gradients(some_a, some_g) * example_gradients(some_b, some_h)).sum()
    return total


def squared_inner_products(a: Tensor | SparseRows, g: Tensor, b: Tensor | SparseRows, h: Tensor) -> Tensor:
    """The sum over n and m of <V_kn, W_lm>^2, [k, l], with V_kn of (a, g_k) and W_lm of (b, h_l).

    Args:
        a: [..., n, s, i], or its entries.
        g: [k, ..., n, s, o], several to one a.
        b: [..., m, t, i].
        h: [l, ..., m, t, o].
    """
    k, groups, s, d_out = len(g), g.shape[1:-3].numel(), g.shape[-2], g.shape[-1]
    side, t, d_in = len(h), h.shape[-2], a.shape[-1]
    through_positions = s * t * (k * side * (d_out + 1) + d_in) <= k * side * d_out * d_in
    if through_positions or not isinstance(a, Tensor):
        size = max(1, isqrt(MAX_ELEMENTS // max((k * side + 1) * groups * s * t, 1)))
        products = _through_positions
    else:
        size = max(1, MAX_ELEMENTS // max(max(k, side) * groups * d_out * d_in, 1))
        products = _through_gradients
    total = g.new_zeros(k, side)
    for some_a, some_g in _pieces(a, g, size):
        for some_b, some_h in _pieces(b, h, size):
            total += products(*_dense(some_a, some_b), some_g, some_h).square().sum((-2, -1))
    return total


def _through_positions(a: Tensor, b: Tensor, g: Tensor, h: Tensor) -> Tensor:
    """[k, l, n, m]; everything with a dimension for groups."""
    of_a = einsum(a, b, "c n s i, c m t i -> c n s m t")
    of_g = einsum(g, h, "k c n s o, l c m t o -> k l c n s m t")
    return einsum(of_g, of_a, "k l c n s m t, c n s m t -> k l n m")


def _through_gradients(a: Tensor, b: Tensor, g: Tensor, h: Tensor) -> Tensor:
    """[k, l, n, m]; everything with a dimension for groups."""
    V, W = einsum(g, a, "k c n s o, c n s i -> k n c o i"), einsum(h, b, "l c m t o, c m t i -> l m c o i")
    return einsum(V.flatten(2), W.flatten(2), "k n p, l m p -> k l n m")


def _pieces(a: Tensor | SparseRows, g: Tensor, size: int) -> Iterator[tuple[Tensor | SparseRows, Tensor]]:
    """Some examples at a time, g with a dimension for groups."""
    g = g if g.dim() == 5 else rearrange(g, "k n s o -> k 1 n s o")
    for start in range(0, g.shape[-3], size):
        yield _examples(a, start, min(start + size, g.shape[-3])), g[..., start : start + size, :, :]


def _examples(a: Tensor | SparseRows, start: int, stop: int) -> Tensor | SparseRows:
    """Those of some examples, of a tensor with a dimension for groups."""
    if isinstance(a, Tensor):
        return (a if a.dim() == 4 else a.unsqueeze(0))[..., start:stop, :, :]
    _, s, d = a.shape
    mine = (a.rows >= start * s) & (a.rows < stop * s)
    return SparseRows(a.rows[mine] - start * s, a.columns[mine], a.values[mine], (stop - start, s, d))


def _dense(a: Tensor | SparseRows, b: Tensor | SparseRows) -> tuple[Tensor, Tensor]:
    """Both as tensors with a dimension for groups, in the columns that some entry of theirs is in."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        assert isinstance(a, Tensor) and isinstance(b, Tensor)
        return a, b
    columns = torch.unique(torch.cat([a.columns, b.columns]))
    of_a, of_b = (
        SparseRows(x.rows, torch.searchsorted(columns, x.columns), x.values, (*x.shape[:-1], len(columns))).to_dense()
        for x in (a, b)
    )
    return of_a.unsqueeze(0), of_b.unsqueeze(0)
