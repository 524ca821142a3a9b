"""How positions enter the factors: ``expand`` counts each one, ``reduce`` first averages them within an example.

Source: Eschenhagen et al. 2023 (arXiv:2311.00636), equations 11-13 (expand) and 17-19 (reduce), in the scale of the
user's loss: A is always a plain mean, everything else is in G.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from ..linalg import sparse
from ..linalg.moments import second_moment

COPIED = {"cpu": 2**20}
"""Numbers of output gradients that are put into another order at a time, by type of device."""
COPIED_ELSEWHERE = 2**26
"""The same on every other device, which multiplies many rows at once."""


class Moment(Protocol):
    """How outer products are summed over rows: ``second_moment``, or ``second_moment_diagonal`` for a large side."""

    def __call__(self, x: Tensor, *, ones: bool = False, count: Tensor | None = None) -> Tensor:
        """The sum over rows of x."""


def kept(positions: Tensor | None, batch: int, count: int) -> Tensor | None:
    """A mask of real positions as [batch, positions, 1] for a layer of that form, or None where it does not apply.

    A mask (B, T) applies to a layer on (B, T, features), to one on the flattened (B * T, features), and to one on
    (T, B, features) where B and T differ. A layer on other positions (pooled, pixels) is left alone.
    """
    if positions is None:
        return None
    examples, length = positions.shape
    if (batch, count) == (examples, length):
        return rearrange(positions, "n s -> n s 1")
    if (batch, count) == (length, examples):
        return rearrange(positions, "n s -> s n 1")
    if count == 1 and length > 1 and batch == examples * length:
        return rearrange(positions, "n s -> (n s) 1 1")
    return None


def both(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
    """Positions that are real by two masks, either of which may be absent."""
    if mine is None or theirs is None:
        return theirs if mine is None else mine
    return mine & theirs


def expanded_input_moment(
    a: Tensor, keep: Tensor | None, *, bias: bool, moment: Moment = second_moment
) -> tuple[Tensor, Tensor]:
    """The sum over valid positions of a a^T, with the feature 1 last where there is a bias, and their number.

    Args:
        a: [..., batch, positions, d_in].
        keep: [batch, positions, 1] bool, or of each group [groups, batch, positions, 1], whose numbers are then added;
            None where all positions are real.
        bias: whether there is one.
        moment: how the outer products are summed.
    """
    rows = masked(a, keep).flatten(-3, -2)
    if keep is None:
        return moment(rows, ones=bias), _count(a, rows.shape[-2])
    count = keep.sum(dim=(-3, -2, -1))
    return moment(rows, ones=bias, count=count), count.sum()


def chosen(shape: Sequence[int], fraction: float, *, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Some positions, each as likely as another, counted over (batch, positions) in their order.

    Args:
        shape: (batch, positions).
        fraction: share of them, in (0, 1]; one at least is chosen.
        generator: where the choice comes from, on the device.
        device: of the result.
    """
    number = prod(shape)
    return torch.randperm(number, generator=generator, device=device)[: max(1, round(fraction * number))]


@sparse.form(sparse.picked)
def picked(x: Tensor, rows: Tensor) -> Tensor:
    """Activations, gradients or a mask [..., batch, positions, d] at some positions, as those of a single example."""
    return x.flatten(-3, -2).index_select(-2, rows).unsqueeze(-3)


def sampled_input_moment(
    a: Tensor, keep: Tensor | None, rows: Tensor, *, bias: bool, moment: Moment = second_moment
) -> tuple[Tensor, Tensor]:
    """``expanded_input_moment`` in expectation, from some positions; their number is that of all, as there.

    Args:
        rows: of ``chosen``.
        a, keep, bias, moment: as there.
    """
    some = None if keep is None else picked(keep, rows)
    summed, _ = expanded_input_moment(picked(a, rows), some, bias=bias, moment=moment)
    number = prod(a.shape[-3:-1])
    return summed * (number / len(rows)), _count(a, number) if keep is None else keep.sum()


def pooled_inputs(a: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum of a over the valid positions of each example, [..., batch, d_in], and their number, [..., batch, 1]."""
    if keep is None:
        return a.sum(dim=-2), torch.full((a.shape[-3], 1), float(a.shape[-2]), dtype=a.dtype, device=a.device)
    return masked(a, keep).sum(dim=-2), keep.sum(dim=-2).to(a.dtype)


def reduced_input_moment(
    sums: Tensor, counts: Tensor, *, bias: bool, moment: Moment = second_moment
) -> tuple[Tensor, Tensor]:
    """The sum over examples of the outer product of the mean activation, and the number of examples that have one.

    Args:
        sums: [..., batch, d_in], activations summed over positions, and over the uses of the layer.
        counts: [batch, 1], the number of terms of each sum, or [groups, batch, 1].
        bias: whether there is one.
        moment: how the outer products are summed.
    """
    # An example without any valid position has no constant feature either.
    present = (counts > 0).sum(dim=(-2, -1))
    return moment(sums / counts.clamp(min=1), ones=bias, count=present), present.sum()


def masked(x: Tensor, keep: Tensor | None) -> Tensor:
    """Activations or output gradients with those at padded positions set to zero, also where they are NaN."""
    return x if keep is None else x.masked_fill(~keep, 0.0)


def expanded_gradient_moment(g: Tensor, moment: Moment = second_moment) -> Tensor:
    """The sum over examples and positions of g g^T; g is [..., batch, positions, d_out]."""
    batch, positions = g.shape[-3:-1]
    if g.stride(-3) == positions * g.stride(-2) or not g.numel():
        return moment(g.flatten(-3, -2))
    # Rows that lie in another order are put into it, of as many examples at a time as their copy may have numbers.
    number = COPIED.get(g.device.type, COPIED_ELSEWHERE) * batch // g.numel()
    total = None
    for part in torch.split(g, max(number, 1), dim=-3):
        one = moment(part.flatten(-3, -2))
        total = one if total is None else total.add_(one)
    assert total is not None
    return total


def one_example(x: Tensor) -> Tensor:
    """[..., batch, positions, d] as the positions of a single example, [..., 1, batch * positions, d]."""
    return x.flatten(-3, -2).unsqueeze(-3)


@sparse.form(sparse.joined)
def joined(first: Tensor, *others: Tensor) -> Tensor:
    """The positions of the uses of a layer one after another."""
    return torch.cat([first, *others], dim=-2)


def _count(like: Tensor, number: int) -> Tensor:
    return torch.full((), number, dtype=torch.int64, device=like.device)
