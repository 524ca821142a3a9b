"""Sums over examples of functions of V_n = sum_s g_ns a_ns^T, from the pairs (a, g) themselves.

Everywhere a is [..., n, s, i] and g is [..., n, s, o]: n examples, s positions, groups in front where there are any. A
position that does not count has g = 0. Activations that are known by their entries have forms of their own of what is
asked of them, in ``linalg.sparse``, where nothing of the size of all their numbers is formed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import einsum, rearrange
from torch import Tensor

from . import sparse
from .products import symmetrise

MAX_ELEMENTS = 2**24
"""Elements of the per-example weight gradients that are held at a time, where they have to be formed."""


@sparse.form(sparse.example_gradients)
def example_gradients(a: Tensor, g: Tensor) -> Tensor:
    """V_n of every example, [..., n, o, i]."""
    return einsum(g, a, "... n s o, ... n s i -> ... n o i")


@sparse.form(sparse.squared_gradients)
def squared_gradients(a: Tensor, g: Tensor) -> Tensor:
    """The sum over n of V_n squared entry by entry, [..., o, i]; with one position no V_n is formed."""
    if a.shape[-2] == 1:
        return g.squeeze(-2).square().mT @ a.squeeze(-2).square()
    sums = g.new_zeros((*g.shape[:-3], g.shape[-1], a.shape[-1]))
    for some_a, some_g in _chunks(a, g):
        sums += example_gradients(some_a, some_g).square().sum(dim=-3)
    return sums


def squared_gradients_in_bases(a: Tensor, g: Tensor, of_A: Tensor | None, of_G: Tensor | None) -> Tensor:
    """The sum over n of U_G^T V_n U_A squared entry by entry, [..., o, i], in the cheaper of two orders.

    Through a and g in the bases, or, where an example has many positions, through V_n brought to them.

    Args:
        of_A: U_A, [..., i, i], orthonormal columns; None for the identity.
        of_G: U_G, [..., o, o], likewise.
    """
    positions, d_out, d_in = a.shape[-2], g.shape[-1], a.shape[-1]
    of_pairs = (of_A is not None) * positions * d_in**2 + (of_G is not None) * positions * d_out**2
    of_gradients = (of_A is not None) * d_out * d_in**2 + (of_G is not None) * d_out**2 * d_in
    # Of one position no V_n is formed in the first order.
    if positions == 1 or of_pairs <= of_gradients or not isinstance(a, Tensor):
        return squared_gradients(rotated(a, of_A), rotated(g, of_G))
    sums = g.new_zeros((*g.shape[:-3], d_out, d_in))
    for some_a, some_g in _chunks(a, g):
        v = rotated(example_gradients(some_a, some_g), of_A)
        sums += rotated(v.mT, of_G).mT.square().sum(dim=-3)
    return sums


@sparse.form(sparse.row_moments)
def row_moments(a: Tensor, g: Tensor) -> Tensor:
    """For each row o of V the sum over n of V_n[o] V_n[o]^T, [..., o, i, i], in the cheaper of two orders.

    Through V_n, or where an example has one position through a a^T, weighted with g squared: as many multiplications in
    one product of matrices for all rows, after i i numbers an example where V_n has o i.
    """
    d_in = a.shape[-1]
    moments = g.new_zeros((*g.shape[:-3], g.shape[-1], d_in, d_in))
    if a.shape[-2] == 1 and d_in < g.shape[-1]:
        for some_a, some_g in _chunks(a, g, each=d_in**2):
            outer = einsum(some_a, some_a, "... n s i, ... n s j -> ... n i j")
            summed = some_g.squeeze(-2).square().mT @ rearrange(outer, "... n i j -> ... n (i j)")
            moments += rearrange(summed, "... o (i j) -> ... o i j", i=d_in)
        return symmetrise(moments)
    for some_a, some_g in _chunks(a, g):
        rows = rearrange(example_gradients(some_a, some_g), "... n o i -> ... o n i")
        moments += rows.mT @ rows
    return symmetrise(moments)


def input_moment(a: Tensor, g: Tensor, weight: Tensor | None = None) -> Tensor:
    """The sum over n of V_n^T G V_n, [..., i, i], in the cheaper of two orders.

    Through the kernel g G g^T between positions, [n, s, s], or through V_n.

    Args:
        weight: G, [..., o, o]; None for the identity.
    """
    positions, d_out, d_in = a.shape[-2], g.shape[-1], a.shape[-1]
    if positions * (positions * (d_out + d_in) + d_in**2) <= positions * d_out * d_in + d_out * d_in**2:
        weighted = g if weight is None else einsum(g, weight, "... n s o, ... o p -> ... n s p")
        kernel = weighted @ g.mT
        moment = _rows(a).mT @ _rows(kernel @ a)
    else:
        moment = a.new_zeros((*a.shape[:-3], d_in, d_in))
        for some_a, some_g in _chunks(a, g):
            v = example_gradients(some_a, some_g)
            weighted = v if weight is None else einsum(weight, v, "... o p, ... n p i -> ... n o i")
            moment += _rows(v).mT @ _rows(weighted)
    return symmetrise(moment)


@sparse.form(sparse.output_moment)
def output_moment(a: Tensor, g: Tensor, weight: Tensor | None = None) -> Tensor:
    """The sum over n of V_n A V_n^T, [..., o, o], as ``input_moment`` of the other side.

    Args:
        weight: A, [..., i, i]; None for the identity.
    """
    return input_moment(g, a, weight)


@sparse.form(sparse.output_moment_diagonal)
def output_moment_diagonal(a: Tensor, g: Tensor) -> Tensor:
    """The diagonal of ``output_moment``, [..., o], without a matrix of that side."""
    return input_moment_diagonal(g, a)


@sparse.form(sparse.input_moment_diagonal)
def input_moment_diagonal(a: Tensor, g: Tensor) -> Tensor:
    """The diagonal of ``input_moment``, [..., i], without a matrix of that side; in the cheaper of the two orders."""
    positions, d_out, d_in = a.shape[-2], g.shape[-1], a.shape[-1]
    if positions * (d_out + d_in) <= d_out * d_in:
        return (a * ((g @ g.mT) @ a)).sum(dim=(-3, -2))
    return squared_gradients(a, g).sum(dim=-2)


def rotated(x: Tensor, basis: Tensor | None) -> Tensor:
    """One half of the pairs in another basis, [..., n, s, d]; V_n of both halves rotated is U_G^T V_n U_A.

    Args:
        x: a or g, [..., n, s, d].
        basis: [..., d, d], orthonormal columns; None for the identity.
    """
    return x if basis is None else einsum(x, basis, "... n s d, ... d e -> ... n s e")


def example_rows(a: Tensor, g: Tensor) -> Tensor:
    """vec(V_n) of every example in the row-major order of the layer's matrix, groups first: [n, P]."""
    v = example_gradients(a, g)
    return rearrange(v, "n o i -> n (o i)" if v.dim() == 3 else "groups n o i -> n (groups o i)")


def _rows(x: Tensor) -> Tensor:
    return rearrange(x, "... n s d -> ... (n s) d")


def _chunks(a: Tensor, g: Tensor, *, each: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs in pieces of which what is formed takes ``MAX_ELEMENTS`` at most (one example at least).

    Args:
        each: the elements formed for one example of one group; None for those of its weight gradient.
    """
    each = g.shape[-1] * a.shape[-1] if each is None else each
    size = max(1, MAX_ELEMENTS // max(g.shape[:-3].numel() * each, 1))
    return zip(torch.split(a, size, dim=-3), torch.split(g, size, dim=-3), strict=True)
