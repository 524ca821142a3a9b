"""Windows of an image as rows, known by the image alone: what a convolution multiplies by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils._pytree import tree_map

from .correlations import Axis, moment_products, window_moment, window_sums
from .products import add_gram, gram_flops, mirrored

MIN_ELEMENTS = 2**18
"""Elements of unfolded windows that are formed at a time whatever the size of the image."""
MOVED = 48
"""Multiplications that take as long as one number that is put elsewhere."""
STARTED = {"cpu": 2**19}
"""Multiplications that take as long as what is done beside them for one product of matrices, by type of device."""
LAUNCHED = 2**27
"""The same on every other device, which multiplies much faster than the host tells it to."""


@dataclass(frozen=True, eq=False)
class Patches:
    """A tensor [*groups, batch, positions, channels * taps] of windows, by the image that they are of.

    It answers as a tensor does to what activations are asked, without windows where there is a way; a function of torch
    is given the tensor itself.

    Args:
        image: [batch, groups * channels, *space].
        axes: how windows lie, one for each axis of space.
        groups: pieces of the channels with windows of their own; there is a dimension for them unless there is one.
        absent: [batch, positions, 1] bool, the windows in the place of which are zeros; None for none.
    """

    image: Tensor
    axes: tuple[Axis, ...]
    groups: int = 1
    absent: Tensor | None = None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = tree_map(unfolded, (args, dict(kwargs or {})))
        return func(*given[0], **given[1])

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the tensor."""
        groups = () if self.groups == 1 else (self.groups,)
        return (*groups, len(self.image), prod(axis.positions for axis in self.axes), self.features)

    @property
    def channels(self) -> int:
        """Channels of one group."""
        return self.image.shape[1] // self.groups

    @property
    def taps(self) -> list[int]:
        """Their number along each axis."""
        return [len(axis.offsets) for axis in self.axes]

    @property
    def features(self) -> int:
        """Size of one window."""
        return self.channels * prod(self.taps)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the pixels."""
        return self.image.dtype

    @property
    def device(self) -> torch.device:
        """The device of the pixels."""
        return self.image.device

    def new_zeros(self, *shape: int) -> Tensor:
        """A tensor of zeros, of the same dtype and device."""
        return self.image.new_zeros(*shape)

    def new_ones(self, *shape: int) -> Tensor:
        """A tensor of ones, of the same dtype and device."""
        return self.image.new_ones(*shape)

    def clone(self) -> Patches:
        """The same windows, of an image of their own."""
        return replace(self, image=self.image.clone())

    def masked_fill(self, mask: Tensor, value: float) -> Patches:
        """With zeros in the place of some windows; the mask is [batch, positions, 1], bool."""
        assert value == 0
        return replace(self, absent=mask if self.absent is None else self.absent | mask)

    def flatten(self, start: int, end: int) -> PatchRows:
        """Examples and positions as one; the arguments are -3 and -2, as ``Tensor.flatten`` is told."""
        assert (start, end) == (-3, -2)
        return PatchRows(self)

    def sum(self, dim: int | None = None) -> Tensor:
        """The sum of all entries, 0-d; with ``dim=-2`` the sums over positions, [*groups, batch, features]."""
        if dim is None:
            return PatchRows(self).sum(dim=-2).sum()
        assert dim == -2
        if self.absent is not None:
            return torch.cat([piece.to_dense().sum(dim=-2) for piece in self.by_examples()], dim=-2)
        return self._features_last(window_sums(self.image, self.axes))

    def _features_last(self, sums: Tensor) -> Tensor:
        """[batch, groups * channels, *taps] as [*groups, batch, features]."""
        by_group = rearrange(sums, "n (g c) ... -> g n (c ...)", g=self.groups)
        return by_group if self.groups > 1 else by_group.squeeze(0)

    def _padded(self) -> Tensor:
        """The image with the margins that windows read, and no pixel that is none of theirs at either end."""
        before, after = [], []
        for axis in reversed(self.axes):
            before += [-(axis.stride * axis.start + min(axis.offsets)), 0]
            after += [0, axis.stride * (axis.stop - 1) + max(axis.offsets) - (axis.places - 1)]
        # All margins before anything is cut off, which may be longer than what there was.
        margins = [one + other for one, other in zip(before, after, strict=True)]
        added = F.pad(self._spread(), [max(margin, 0) for margin in margins])
        return F.pad(added, [min(margin, 0) for margin in margins])

    def _spread(self) -> Tensor:
        """The image with the zeros between its pixels."""
        if all(axis.spread == 1 for axis in self.axes):
            return self.image
        places = self.image.new_zeros(*self.image.shape[:2], *(axis.places for axis in self.axes))
        places[tuple(slice(None, None, step) for step in (1, 1, *(axis.spread for axis in self.axes)))] = self.image
        return places

    def to_dense(self) -> Tensor:
        """The tensor itself, with as many numbers as the image has times the taps: the windows are unfolded."""
        x = self._padded()
        for index, axis in enumerate(self.axes):
            x = x.unfold(2 + index, axis.reach + 1, axis.stride)[..., :: abs(axis.dilation)]
            x = x.flip(-1) if axis.dilation < 0 else x
        o, k = (" ".join(f"{letter}{index}" for index in range(len(self.axes))) for letter in "ok")
        rows = rearrange(x, f"n (g c) {o} {k} -> g n ({o}) (c {k})", g=self.groups)
        rows = rows if self.groups > 1 else rows.squeeze(0)
        return rows if self.absent is None else rows.masked_fill(self.absent, 0)

    def picked(self, rows: Tensor) -> Tensor:
        """Some rows, counted over examples and positions, [*groups, rows, features]; the others are not unfolded."""
        pixels = rearrange(self._padded(), "n c ... -> n ... c")
        space = pixels.shape[1:-1]
        at, step, shifts = torch.zeros_like(rows), 1, rows.new_zeros(())
        for size, axis in zip(reversed(space), reversed(self.axes), strict=True):
            at += step * axis.stride * (rows % axis.positions)
            first = 0 if axis.dilation > 0 else axis.reach
            own = first + axis.dilation * torch.arange(len(axis.offsets), device=rows.device)
            shifts = (step * own).reshape(-1, *[1] * shifts.dim()) + shifts
            rows, step = rows.div(axis.positions, rounding_mode="floor"), step * size
        at += step * rows
        windows = pixels.flatten(0, -2)[at.unsqueeze(-1) + shifts.flatten()]
        found = rearrange(windows, "r k (g c) -> g r (c k)", g=self.groups)
        return found if self.groups > 1 else found.squeeze(0)

    def pieces(self) -> Iterator[Patches]:
        """Pieces whose windows take no more memory than the image, or ``MIN_ELEMENTS``, as far as that can be.

        Some examples each, or some of the positions along the first axis of one.
        """
        lines = self._lines_at_a_time
        for piece in self.by_examples():
            yield from piece._by_lines(lines) if lines < self.axes[0].positions else [piece]

    def by_examples(self) -> Iterator[Patches]:
        """Pieces of some examples each, as many as ``pieces`` has, or one."""
        step = max(self._lines_at_a_time // max(self.axes[0].positions, 1), 1)
        for start in range(0, max(len(self.image), 1), step):
            some = slice(start, start + step)
            yield replace(self, image=self.image[some], absent=None if self.absent is None else self.absent[some])

    @property
    def _lines_at_a_time(self) -> int:
        """How many of the positions along the first axis have windows that take so much memory."""
        each = self.groups * self.features * prod(axis.positions for axis in self.axes[1:])
        return max(max(self.image.numel(), MIN_ELEMENTS) // max(each, 1), 1)

    def _by_lines(self, lines: int) -> Iterator[Patches]:
        """Pieces of some positions along the first axis."""
        first, *others = self.axes
        each = prod(axis.positions for axis in others)
        for start in range(first.start, first.stop, lines):
            stop = min(start + lines, first.stop)
            rows = slice((start - first.start) * each, (stop - first.start) * each)
            absent = None if self.absent is None else self.absent[:, rows]
            yield replace(self, axes=(replace(first, start=start, stop=stop), *others), absent=absent)

    # -- two ways to their second moment, and which is taken -----------------------------------------------------------

    def unfolded_moment(self) -> Tensor:
        """The sum of a a^T over all windows a, [*groups, features, features]: windows some at a time."""
        upper = self.new_zeros(*self.shape[:-3], self.features, self.features)
        for piece in self.pieces():
            add_gram(upper, piece.to_dense().flatten(-3, -2))
        return mirrored(upper)

    def correlated_moment(self) -> Tensor:
        """The same from products of the image with itself shifted; of no window is absent."""
        assert self.absent is None
        x = rearrange(self.image, "n (g c) ... -> g n ... c", g=self.groups)
        blocks, dims = window_moment(x, self.axes), len(self.axes)
        u, v = (" ".join(f"{letter}{index}" for index in range(dims)) for letter in "uv")
        moment = rearrange(blocks, f"{u} {v} g c d -> g (c {u}) (d {v})")
        return moment if self.groups > 1 else moment.squeeze(0)

    @property
    def unfolded_work(self) -> int:
        """Multiplications of ``unfolded_moment``, and what takes as long."""
        rows, d = prod(self.shape[:-1]), self.features
        return gram_flops(rows, d, self.device) // 2 + MOVED * rows * d + self._started

    @property
    def correlated_work(self) -> int:
        """Multiplications of ``correlated_moment``, and what takes as long."""
        matrices, C = self.groups * len(self.image), self.channels
        # Of a row of few channels the product takes as long as its numbers take to be found, once in each image.
        each = (
            number * (matrices * rows * ((channels * C) ** 2 + 2 * MOVED) + self._started)
            for number, rows, channels in moment_products(self.axes)
        )
        # Each pair of taps is a block that is put in its place.
        blocks = MOVED * self.groups * self.features**2 // 8 + self._started * prod(self.taps) ** 2 // 8
        return sum(each) + MOVED * self.image.numel() + blocks

    @property
    def _started(self) -> int:
        return STARTED.get(self.device.type, LAUNCHED)

    @property
    def correlates(self) -> bool:
        """Whether the second moment is made of products of the image with itself."""
        return self.absent is None and self.correlated_work < self.unfolded_work

    @property
    def moment_flops(self) -> int | None:
        """Operations of the products that the second moment is made of; None where windows are unfolded."""
        if not self.correlates:
            return None
        each = (number * rows * channels**2 for number, rows, channels in moment_products(self.axes))
        return 2 * self.groups * len(self.image) * self.channels**2 * sum(each)


@dataclass(frozen=True, eq=False)
class PatchRows:
    """The rows of patches, [*groups, batch * positions, features]: what moments are summed over.

    Args:
        patches: the patches.
    """

    patches: Patches

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the tensor."""
        *groups, batch, positions, features = self.patches.shape
        return (*groups, batch * positions, features)

    def sum(self, dim: int) -> Tensor:
        """The sum over all rows, [*groups, features]; ``dim`` is -2."""
        assert dim == -2
        patches = self.patches
        if patches.absent is not None:
            return patches.sum(dim=-2).sum(dim=-2)
        return replace(patches, image=patches.image.sum(0, keepdim=True)).sum(dim=-2).squeeze(-2)

    def index_select(self, dim: int, rows: Tensor) -> Tensor:
        """Some of the rows, [*groups, rows, features]; ``dim`` is -2."""
        assert dim == -2 and self.patches.absent is None
        return self.patches.picked(rows)

    def square(self) -> PatchRows:
        """Every entry squared."""
        return PatchRows(replace(self.patches, image=self.patches.image.square()))


def unfolded(a: Any) -> Any:
    """The tensor that patches stand for; anything else as it is."""
    return a.to_dense() if isinstance(a, Patches) else a


def outer_products(rows: PatchRows, *, out: Tensor | None = None) -> Tensor:
    """The sum of the outer products of rows, [*groups, features, features]: the cheaper way, by counted work."""
    patches = rows.patches
    moment = patches.correlated_moment() if patches.correlates else patches.unfolded_moment()
    return moment if out is None else out.copy_(moment)
