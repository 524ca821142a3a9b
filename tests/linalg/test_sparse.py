"""Rows by their entries, against the tensors they stand for."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from kfac_cond.layers.sharing import (
    expanded_input_moment,
    joined,
    masked,
    one_example,
    pooled_inputs,
    reduced_input_moment,
)
from kfac_cond.linalg import pairs
from kfac_cond.linalg.moments import second_moment, second_moment_diagonal
from kfac_cond.linalg.sparse import SparseRows

from ..reference import assert_same

#: Examples, positions, columns, entries: few columns, so that entries meet in one place; many; none of something.
SIZES = [(4, 3, 5, 12), (4, 3, 2, 30), (1, 6, 4, 6), (3, 1, 40, 5), (2, 3, 4, 0), (0, 3, 4, 0), (3, 0, 4, 0)]


def made(n: int, s: int, d: int, entries: int) -> SparseRows:
    rows = torch.randint(n * s, (entries,)) if entries else torch.zeros(0, dtype=torch.long)
    return SparseRows(rows, torch.randint(d, (entries,)), torch.randn(entries), (n, s, d))


def dense(x: SparseRows) -> Tensor:
    """By the definition, entry by entry."""
    whole = torch.zeros(torch.Size(x.shape[:-1]).numel(), x.shape[-1])
    for row, column, value in zip(x.rows, x.columns, x.values, strict=True):
        whole[row, column] += value
    return whole.reshape(x.shape)


@pytest.fixture(params=SIZES, ids=str)
def rows(request) -> SparseRows:
    return made(*request.param)


@pytest.fixture
def g(rows) -> Tensor:
    return torch.randn(*rows.shape[:-1], 3)


def same(found: Tensor, expected: Tensor) -> None:
    if expected.numel():
        assert_same(found, expected)
    else:
        assert found.shape == expected.shape


def test_to_dense(rows):
    same(rows.to_dense(), dense(rows))


def test_what_a_tensor_answers(rows):
    whole, keep = dense(rows), torch.rand(*rows.shape[:-1], 1) > 0.5
    assert (tuple(whole.shape), whole.dtype, whole.device) == (rows.shape, rows.dtype, rows.device)
    same(dense(masked(rows, keep)), masked(whole, keep))
    same(dense(one_example(rows)), one_example(whole))
    same(dense(one_example(rows).expand(3, -1, -1)), one_example(whole).expand(3, -1, -1))
    same(rows.sum(), whole.sum())
    same(dense(rows.sum(dim=-2)), whole.sum(dim=-2))
    pooled, counts = rows.sum(dim=-2), torch.rand(rows.shape[0], 1) + 1
    same(dense(pooled / counts), whole.sum(dim=-2) / counts)
    same(dense(pooled + pooled), 2 * whole.sum(dim=-2))
    assert torch.equal(rows.new_zeros(()), torch.zeros(()))
    assert torch.equal(rows.present, (whole != 0).any(-1, keepdim=True))


def test_a_clone_does_not_follow(rows):
    before, other = dense(rows), rows.clone()
    rows.values.add_(1.0)
    rows.columns.zero_()
    same(dense(other), before)


def test_uses_are_joined_along_positions(rows):
    other = made(rows.shape[0], 2, rows.shape[-1], 2 * rows.shape[0])
    same(dense(joined(rows, other, rows)), torch.cat([dense(rows), dense(other), dense(rows)], -2))


def test_pickled_without_what_was_worked_out(rows):
    _ = rows.by_example.merged_columns
    again = pickle.loads(pickle.dumps(rows))
    assert vars(again).keys() == {"rows", "columns", "values", "shape"}
    same(dense(again), dense(rows))


def test_its_second_moment_is_the_diagonal(rows):
    flat = rows.flatten(-3, -2)
    same(second_moment_diagonal(flat), second_moment(dense(flat)).diagonal())


@pytest.fixture(params=[False, True], ids=["whole", "masked"])
def keep(request, rows) -> Tensor | None:
    return torch.rand(*rows.shape[:-1], 1) > 0.5 if request.param else None


def test_the_moment_of_each_position(rows, keep):
    found, count = expanded_input_moment(rows, keep, bias=False, moment=second_moment_diagonal)
    expected, number = expanded_input_moment(dense(rows), keep, bias=False, moment=second_moment_diagonal)
    same(found, expected)
    assert torch.equal(count, number)


def test_the_moment_of_means(rows, keep):
    sums, counts = pooled_inputs(rows, keep)
    whole, numbers = pooled_inputs(dense(rows), keep)
    assert torch.equal(counts, numbers)
    found, _ = reduced_input_moment(sums, counts, bias=False, moment=second_moment_diagonal)
    expected, _ = reduced_input_moment(whole, counts, bias=False, moment=second_moment_diagonal)
    same(found, expected)


@pytest.mark.parametrize(
    "function",
    [
        pairs.example_gradients,
        pairs.example_rows,
        pairs.squared_gradients,
        pairs.row_moments,
        pairs.input_moment_diagonal,
        pairs.output_moment,
        pairs.output_moment_diagonal,
    ],
    ids=lambda function: function.__name__,
)
def test_functions_of_pairs_are_those_of_the_tensor(rows, g, function):
    """Entries of one example at one column are added up before anything is squared."""
    same(function(rows, g), function(dense(rows), g))


def test_no_basis_leaves_them_alone(rows):
    assert pairs.rotated(rows, None) is rows


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_nothing_waits_for_the_device(reads, device):
    a = SparseRows(*(x.to(device) for x in (torch.arange(6), torch.arange(6) % 4, torch.randn(6))), (2, 3, 4))
    g, keep = torch.randn(2, 3, 5, device=device), torch.ones(2, 3, 1, dtype=torch.bool, device=device)
    with reads:
        a = joined(masked(a, keep), a.clone())
        g = joined(g, g)
        _ = a.present
        expanded_input_moment(a, None, bias=False, moment=second_moment_diagonal)
        reduced_input_moment(*pooled_inputs(a, None), bias=False, moment=second_moment_diagonal)
        for function in (pairs.squared_gradients, pairs.input_moment_diagonal, pairs.output_moment):
            function(one_example(a), one_example(g))
    assert not reads.names
