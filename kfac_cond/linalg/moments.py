"""Second moments: the sums of outer products that Kronecker factors are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from . import patches, sparse
from .products import gram
from .sides import Side, as_side
from .triangles import triangle


@sparse.form(patches.outer_products, of=patches.PatchRows)
def outer_products(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The sum over n of x_n x_n^T, [..., d, d], exactly symmetric, in ``out`` where given; ``x`` as there."""
    return gram(x, out=out)


def second_moment(x: Tensor, *, ones: bool = False, count: Tensor | None = None) -> Tensor:
    """The sum over n of x_n x_n^T, or of [x_n, 1] [x_n, 1]^T: a sum, not a mean.

    Run it with autocast disabled: autocast would do the product in half precision whatever the dtype of ``x``.

    Args:
        x: [..., n, d], float32 or wider; n may be 0. Windows of images are not unfolded where there is a cheaper way.
        ones: append the constant feature 1, as a layer with a bias does to its input.
        count: how many rows have that feature, 0-d or [...]; the others are zero. None for all of them.

    Returns:
        [..., d, d], or [..., d + 1, d + 1] with ``ones``; exactly symmetric, dtype and device of ``x``.

    Source: Martens & Grosse 2015 (arXiv:1503.05671), section 3 (homogeneous coordinates for the bias).
    """
    if not ones:
        return outer_products(x)
    # Concatenating the column of ones to x would copy all n rows of it; the borders alone are d + 1 numbers.
    n, d = x.shape[-2:]
    column_sums = x.sum(dim=-2)
    bordered = column_sums.new_empty((*x.shape[:-2], d + 1, d + 1))
    outer_products(x, out=bordered[..., :d, :d])
    bordered[..., :d, d].copy_(column_sums)
    bordered[..., d, :d].copy_(column_sums)
    corner = bordered[..., d, d]
    if count is None:
        corner.fill_(float(n))
    else:
        corner.copy_(count)
    return bordered


def second_moment_triangle(x: Tensor, *, ones: bool = False, count: Tensor | None = None) -> Tensor:
    """One triangle of ``second_moment``, [..., d (d + 1) / 2]; arguments as there."""
    return triangle(second_moment(x, ones=ones, count=count))


@sparse.form(sparse.second_moment_diagonal)
def second_moment_diagonal(x: Tensor, *, ones: bool = False, count: Tensor | None = None) -> Tensor:
    """The diagonal of ``second_moment``, [..., d] or [..., d + 1], without the matrix; arguments as there."""
    squares = x.square().sum(dim=-2)
    if not ones:
        return squares
    last = squares.new_full((), x.shape[-2]) if count is None else count.to(squares.dtype)
    return torch.cat([squares, last.expand(squares.shape[:-1]).unsqueeze(-1)], dim=-1)


def trace(matrix: Side) -> Tensor:
    """The trace of each matrix.

    Args:
        matrix: [..., d, d].

    Returns:
        [...], a view's sum: no synchronisation.
    """
    return torch.sum(matrix.diagonal(dim1=-2, dim2=-1), dim=-1)


def of_unit_trace(moment: Tensor, *, leading: int) -> Tensor:
    """Each second moment divided by its trace; one that is zero stays so.

    Args:
        moment: [..., d, d], or the diagonal alone, [..., d].
        leading: the number of dimensions in front of either.
    """
    total = trace(as_side(moment, leading=leading))
    return moment / torch.where(total > 0, total, 1).reshape(*total.shape, *[1] * (moment.dim() - leading))
