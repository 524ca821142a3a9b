"""Rows of which few entries are not zero, known by these entries alone: what a layer on indices multiplies by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, singledispatch
from typing import Any, TypeVar, cast

import torch
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SparseRows:
    """A tensor [*leading, d] of rows, by its entries; those of one place add up.

    It answers as a tensor does to what activations are asked. The number of entries is known on the host and never
    depends on their values, so that nothing here waits for a device; no tensor has the size of all rows.

    Args:
        rows: [entries], int64, in which row an entry is, counted over all leading dimensions.
        columns: [entries], int64, and in which column.
        values: [entries]; an entry may be zero.
        shape: (*leading, d).
    """

    rows: Tensor
    columns: Tensor
    values: Tensor
    shape: tuple[int, ...]

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the entries."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """The device of the entries."""
        return self.values.device

    def to(self, target: torch.device) -> SparseRows:
        """The same rows on another device."""
        return SparseRows(self.rows.to(target), self.columns.to(target), self.values.to(target), self.shape)

    def clone(self) -> SparseRows:
        """The same rows, in tensors of their own."""
        return SparseRows(self.rows.clone(), self.columns.clone(), self.values.clone(), self.shape)

    def new_zeros(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor of zeros, of the same dtype and device."""
        return self.values.new_zeros(shape)

    def masked_fill(self, mask: Tensor, value: float) -> SparseRows:
        """With the entries of some rows replaced; the mask is [*leading, 1], bool."""
        return self._with_values(self.values.masked_fill(mask.flatten()[self.rows], value))

    def flatten(self, start: int, end: int) -> SparseRows:
        """Its two leading dimensions as one; the arguments are -3 and -2, as ``Tensor.flatten`` is told."""
        assert (start, end) == (-3, -2)
        first, second, d = self.shape
        return SparseRows(self.rows, self.columns, self.values, (first * second, d))

    def unsqueeze(self, dim: int) -> SparseRows:
        """With a dimension of size one in front of a single leading one; ``dim`` is -3."""
        assert dim == -3
        return SparseRows(self.rows, self.columns, self.values, (1, *self.shape))

    def expand(self, n: int, *same: int) -> SparseRows:
        """Rows [1, s, d] as those of each of n examples; ``same`` is -1, -1, as ``Tensor.expand`` is told."""
        assert same == (-1, -1) and self.shape[0] == 1
        _, s, d = self.shape
        first = torch.arange(n, device=self.device) * s
        rows = (rearrange(first, "n -> n 1") + self.rows).flatten()
        return SparseRows(rows, self.columns.repeat(n), self.values.repeat(n), (n, s, d))

    def sum(self, dim: int | None = None) -> Any:
        """The sum of all entries, 0-d; with ``dim=-2`` the sums over the second leading dimension, as rows again."""
        if dim is None:
            return self.values.sum()
        assert dim == -2
        first, second, d = self.shape
        return SparseRows(self.rows // max(second, 1), self.columns, self.values, (first, d))

    def __add__(self, other: SparseRows) -> SparseRows:
        return _concatenated([self, other], [self.rows, other.rows], self.shape)

    def __truediv__(self, divisors: Tensor) -> SparseRows:
        """Each row divided by a number of its own, [*leading, 1]."""
        return self._with_values(self.values / divisors.flatten()[self.rows])

    def _with_values(self, values: Tensor) -> SparseRows:
        return SparseRows(self.rows, self.columns, values, self.shape)

    @property
    def present(self) -> Tensor:
        """Which rows have any entry that is not zero, [*leading, 1]."""
        counts = self.values.new_zeros(_product(self.shape[:-1]))
        return (counts.index_add_(0, self.rows, (self.values != 0).to(self.dtype)) > 0).reshape(*self.shape[:-1], 1)

    def to_dense(self) -> Tensor:
        """The tensor itself, [*leading, d], for small sizes and tests."""
        places = self.values.new_zeros(_product(self.shape))
        return places.index_add_(0, self._keys, self.values).reshape(self.shape)

    def by_column(self, merged: Tensor) -> Tensor:
        """Sums by column, [d, ...], of what was merged."""
        return merged.new_zeros(self.shape[-1], *merged.shape[1:]).index_add_(0, self.merged_columns, merged)

    def merged(self, values: Tensor) -> Tensor:
        """Values of entries, [entries, ...], with those of one place added up; zeros fill what is left of the entries.

        ``merged_columns`` says in which column each of them is.
        """
        return torch.zeros_like(values).index_add_(0, self._merged[1], values)

    @property
    def merged_columns(self) -> Tensor:
        """The columns of what ``merged`` gives, [entries]; those that are left over are 0."""
        return self._merged[0]

    @property
    def _keys(self) -> Tensor:
        """Where each entry is, counted over all places."""
        return self.rows * self.shape[-1] + self.columns

    @cached_property
    def _merged(self) -> tuple[Tensor, Tensor]:
        """The columns of the places that differ, and which of these places each entry is at."""
        keys, order = torch.sort(self._keys)
        first = torch.ones_like(keys)
        first[1:] = keys[1:] != keys[:-1]
        in_order = first.cumsum(0) - 1
        places = torch.empty_like(in_order).scatter_(0, order, in_order)
        return torch.zeros_like(keys).scatter_(0, places, self.columns), places

    @cached_property
    def by_example(self) -> SparseRows:
        """Of rows [n, s, d] those of each example together, [n, d]."""
        pooled: SparseRows = self.sum(dim=-2)
        return pooled


Function = TypeVar("Function", bound=Callable[..., Any])


def form(own: Callable[..., Any], of: type = SparseRows) -> Callable[[Function], Function]:
    """Gives a function of activations, its first argument, a form of its own where they are no tensor but ``of``."""

    def decorated(function: Function) -> Function:
        either = singledispatch(function)
        either.register(of, own)
        return cast(Function, either)

    return decorated


def joined(first: SparseRows, *others: SparseRows) -> SparseRows:
    """Rows [n, s_i, d] one after another along their positions: [n, s_1 + s_2 + ..., d]."""
    pieces, (n, _, d) = [first, *others], first.shape
    total, start = sum(piece.shape[1] for piece in pieces), 0
    rows = []
    for piece in pieces:
        positions = max(piece.shape[1], 1)
        example = torch.div(piece.rows, positions, rounding_mode="floor")
        rows.append(example * total + start + piece.rows % positions)
        start += piece.shape[1]
    return _concatenated(pieces, rows, (n, total, d))


def picked(x: SparseRows, rows: Tensor) -> SparseRows:
    """Some rows [n, s, d], counted over both, as those of a single example; entries of others stay, as zeros."""
    places = torch.full((_product(x.shape[:-1]),), -1, dtype=torch.int64, device=x.device)
    places[rows] = torch.arange(len(rows), device=x.device)
    place = places[x.rows]
    values = torch.where(place >= 0, x.values, 0)
    return SparseRows(place.clamp(min=0), x.columns, values, (1, len(rows), x.shape[-1]))


def second_moment_diagonal(x: SparseRows, *, ones: bool = False, count: Tensor | None = None) -> Tensor:
    """The sum over all rows of their squares, [d]; rows by their entries have no constant feature."""
    assert not ones
    return x.by_column(x.merged(x.values).square())


# -- the pairs (a, g) of which a is such, as ``linalg.pairs`` has them: V_n = sum_s g_ns a_ns^T ------------------------


def gradient_columns(a: SparseRows, g: Tensor) -> Tensor:
    """The columns of all V_n that are not zero, one after another, [entries, o]; others are zero.

    ``a.by_example`` knows which column, and merged those of one.
    """
    values = rearrange(a.values, "e -> e 1") * rearrange(g, "n s o -> (n s) o")[a.rows]
    return a.by_example.merged(values)


def example_gradients(a: SparseRows, g: Tensor) -> Tensor:
    """V_n of every example, [n, o, i], for small sizes."""
    columns = rearrange(a.values, "e -> e 1") * rearrange(g, "n s o -> (n s) o")[a.rows]
    n, d = a.by_example.shape
    summed = columns.new_zeros(n * d, g.shape[-1]).index_add_(0, a.by_example._keys, columns)
    return rearrange(summed, "(n i) o -> n o i", n=n, i=d)


def squared_gradients(a: SparseRows, g: Tensor) -> Tensor:
    """The sum over n of V_n squared entry by entry, [o, i]."""
    return a.by_example.by_column(gradient_columns(a, g).square()).mT


def row_moments(a: SparseRows, g: Tensor) -> Tensor:
    """For each row o of V the sum over n of V_n[o] V_n[o]^T, [o, i, i], for small sizes."""
    rows = rearrange(example_gradients(a, g), "n o i -> o n i")
    return rows.mT @ rows


def input_moment_diagonal(a: SparseRows, g: Tensor) -> Tensor:
    """The diagonal of the sum over n of V_n^T V_n, [i]."""
    return a.by_example.by_column(gradient_columns(a, g).square().sum(-1))


def output_moment(a: SparseRows, g: Tensor) -> Tensor:
    """The sum over n of V_n V_n^T, [o, o]."""
    columns = gradient_columns(a, g)
    moment = columns.mT @ columns
    return (moment + moment.mT).mul_(0.5)


def output_moment_diagonal(a: SparseRows, g: Tensor) -> Tensor:
    """The diagonal of ``output_moment``, [o]."""
    return gradient_columns(a, g).square().sum(0)


def _concatenated(pieces: list[SparseRows], rows: list[Tensor], shape: tuple[int, ...]) -> SparseRows:
    columns, values = torch.cat([one.columns for one in pieces]), torch.cat([one.values for one in pieces])
    return SparseRows(torch.cat(rows), columns, values, shape)


def _product(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
