"""Second moments of the windows of an image, without the windows.

The window at position o has at tap u the pixel stride * o + offset[u]. Summed over **all** positions at which a window
touches the image, the product of two taps depends on the distance of their pixels alone: 13 products for 3 x 3 taps in
place of 81. Each is a product of matrices, of the image with zeros around it and itself shifted. Positions at which a
layer has no output lie along the borders; what they add is the second moment of windows of one dimension less, and is
taken off again. A stride cuts the image into one for each remainder; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import prod

import torch
from torch import Tensor

from .products import gram, tall_product

Index = tuple[int, ...]
"""A number for each axis."""


@dataclass(frozen=True)
class Axis:
    """How windows lie along one axis of an image; pixels outside of it are zero.

    Args:
        size: number of pixels.
        offsets: pixel of each tap in the window at position 0, in the one or the other order.
        stride: pixels from one position to the next.
        start: the first position.
        stop: one more than the last.
        spread: places from one pixel to the next, with zeros between them; positions and offsets are then in places,
            and the stride is one.
    """

    size: int
    offsets: tuple[int, ...]
    stride: int
    start: int
    stop: int
    spread: int = 1

    @property
    def places(self) -> int:
        """Number of pixels with the zeros between them."""
        return self.spread * (self.size - 1) + 1

    @property
    def parts(self) -> list[tuple[slice, Axis]]:
        """Positions with pixels at the same taps, and zeros at all others: these taps, and how they lie on pixels."""
        if self.spread == 1:
            return [(slice(None), self)]
        found = []
        for rest in range(self.spread):
            taps = [tap for tap, offset in enumerate(self.offsets) if (rest + offset) % self.spread == 0]
            start, stop = (-((rest - end) // self.spread) for end in (self.start, self.stop))
            if taps and stop > start:
                offsets = tuple((rest + self.offsets[tap]) // self.spread for tap in taps)
                step = taps[1] - taps[0] if len(taps) > 1 else 1
                found.append((slice(taps[0], taps[-1] + 1, step), Axis(self.size, offsets, 1, start, stop)))
        return found

    @property
    def positions(self) -> int:
        """Number of positions."""
        return self.stop - self.start

    @property
    def dilation(self) -> int:
        """Pixels from one tap to the next; negative where they go back."""
        return self.offsets[1] - self.offsets[0] if len(self.offsets) > 1 else 1

    @property
    def reach(self) -> int:
        """Pixels from the first of a window to the last."""
        return max(self.offsets) - min(self.offsets)

    @property
    def whole(self) -> Axis:
        """The same with all positions at which a tap may be on a pixel, and no others."""
        start = -(max(self.offsets) // self.stride)
        stop = (self.size - 1 - min(self.offsets)) // self.stride + 1
        return replace(self, start=start, stop=max(start, stop))

    @property
    def length(self) -> int:
        """Pixels of one remainder."""
        return -(-self.size // self.stride)

    @property
    def taps(self) -> list[tuple[int, int]]:
        """By tap the remainder of its pixels, and how far they are from the position."""
        return [(offset % self.stride, offset // self.stride) for offset in self.offsets]

    @property
    def gap(self) -> int:
        """Zeros between two images, or two rows of one, over which no two taps of a window reach."""
        distances = [distance for _, distance in self.taps]
        return max(distances) - min(distances)

    def pixels(self, position: int) -> dict[int, int]:
        """The taps on a pixel in the window at a position, which follow one another, each with the pixel."""
        found = {tap: self.stride * position + offset for tap, offset in enumerate(self.offsets)}
        return {tap: pixel for tap, pixel in found.items() if 0 <= pixel < self.size}

    @property
    def outside(self) -> list[dict[int, int]]:
        """The taps on pixels at each position that is not one of these, where there are any."""
        whole = self.whole
        others = [o for o in range(whole.start, whole.stop) if not self.start <= o < self.stop]
        return [pixels for position in others if (pixels := self.pixels(position))]


@dataclass(frozen=True)
class _Plan:
    """Which products the whole is made of.

    Args:
        products: (remainders of one tap, those of the other, distance between them), of each product.
        blocks: for each pair of taps the product, None for zero, and whether it is the transpose.
    """

    products: tuple[tuple[Index, Index, Index], ...]
    blocks: tuple[tuple[int | None, bool], ...]


@lru_cache(maxsize=1024)
def _plan(axes: tuple[Axis, ...]) -> _Plan:
    taps = [tuple(zip(*tap, strict=True)) for tap in product(*(axis.taps for axis in axes))]
    products: dict[tuple[Index, Index, Index], int] = {}
    blocks: list[tuple[int | None, bool]] = []
    for (mine, here), (theirs, there) in product(taps, taps):
        distance = tuple(b - a for a, b in zip(here, there, strict=True))
        back = (theirs, mine, tuple(-d for d in distance))
        if any(abs(d) >= axis.length for d, axis in zip(distance, axes, strict=True)):
            blocks.append((None, False))
        elif back in products and back != (mine, theirs, distance):
            blocks.append((products[back], True))
        else:
            blocks.append((products.setdefault((mine, theirs, distance), len(products)), False))
    return _Plan(tuple(products), tuple(blocks))


def product_count(axes: Sequence[Axis]) -> int:
    """How many products a plan has, without the plan: of many taps it is as long as their number squared."""
    pairs, alone = 1, 1
    for axis in axes:
        every = product(axis.taps, axis.taps)
        found = {(mine, theirs, there - here) for (mine, here), (theirs, there) in every}
        pairs *= sum(abs(distance) < axis.length for *_, distance in found)
        alone *= len({rest for rest, _ in axis.taps})
    # Each once with its transpose, but for those that are their own.
    return (pairs + alone) // 2


def _frames(axes: tuple[Axis, ...]) -> Iterator[tuple[int, dict[int, int], tuple[Axis, ...]]]:
    """What is to be taken off: an axis, the pixels of one position along it that is none, and the other axes.

    Positions are outside along the axis, and along none in front of it.
    """
    for index, axis in enumerate(axes):
        others = (*axes[:index], *(one.whole for one in axes[index + 1 :]))
        for pixels in axis.outside:
            yield index, pixels, others


def window_moment(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """The sum over examples and positions of the outer products of windows.

    Args:
        x: [groups, n, *space, channels].
        axes: one for each axis of space.

    Returns:
        [*taps, *taps, groups, channels, channels]; exactly symmetric.
    """
    if all(axis.spread == 1 for axis in axes):
        return _moment(x, axes)
    taps = [len(axis.offsets) for axis in axes]
    moment = x.new_zeros(*taps, *taps, x.shape[0], x.shape[-1], x.shape[-1])
    for parts in product(*(axis.parts for axis in axes)):
        at = [some for some, _ in parts]
        _at(moment, 0, [*at, *at]).add_(_moment(x, tuple(axis for _, axis in parts)))
    return moment


def _moment(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """It of pixels without zeros between them."""
    if not axes:
        return gram(x)
    moment, dims = _whole_moment(x, axes), len(axes)
    for index, pixels, others in _frames(axes):
        count, first = len(pixels), min(pixels)
        frame = torch.stack([x.select(2 + index, pixel) for pixel in pixels.values()], dim=-2).flatten(-2)
        taken = _moment(frame, others)
        taken = taken.reshape(*taken.shape[:-2], count, x.shape[-1], count, x.shape[-1])
        at = moment.narrow(index, first, count).narrow(dims + index, first, count)
        at -= taken.movedim((-4, -2), (index, dims + index))
    return moment


def _whole_moment(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """It over all positions at which a window touches the image."""
    plan, images = _plan(axes), _Images(x, axes)
    products = [images.product(*one) for one in plan.products]
    zero = x.new_zeros(()).expand(x.shape[0], x.shape[-1], x.shape[-1])
    found = [zero if index is None else products[index].mT if back else products[index] for index, back in plan.blocks]
    taps = [len(axis.offsets) for axis in axes]
    return torch.stack(found).reshape(*taps, *taps, *zero.shape)


class _Images:
    """The image of each remainder as rows, with zeros between whatever is apart.

    What is along the first axis goes first, before the examples: a shift along it leaves nothing to be kept apart.
    """

    def __init__(self, x: Tensor, axes: tuple[Axis, ...]) -> None:
        self.x, self.axes = x, axes
        self.space = [axes[0].length, x.shape[1], *(axis.length + axis.gap for axis in axes[1:])]
        first, _, *others = [prod(self.space[index + 1 :]) for index in range(len(self.space))]
        self.steps = [first, *others]
        self.flat: dict[Index, Tensor] = {}

    def of(self, remainders: Index) -> Tensor:
        """The rows [groups, space, channels] of one remainder."""
        if remainders not in self.flat:
            groups, *_, channels = self.x.shape
            index: list[slice] = [
                slice(first, None, axis.stride) for first, axis in zip(remainders, self.axes, strict=True)
            ]
            pixels = _at(self.x, 2, index).movedim(2, 1)
            rows = pixels.new_zeros(groups, *self.space, channels)
            _at(rows, 1, [slice(size) for size in pixels.shape[1:-1]]).copy_(pixels)
            self.flat[remainders] = rows.flatten(1, -2)
        return self.flat[remainders]

    def product(self, mine: Index, theirs: Index, distance: Index) -> Tensor:
        """The sum over pixels of the outer products of one image with the other, so far away."""
        a, b = self.of(mine), self.of(theirs)
        shift = sum(d * step for d, step in zip(distance, self.steps, strict=True))
        if mine == theirs and shift == 0:
            return gram(a)
        count = max(a.shape[1] - abs(shift), 0)
        return tall_product(
            a.narrow(1, a.shape[1] - count if shift < 0 else 0, count),
            b.narrow(1, b.shape[1] - count if shift > 0 else 0, count),
        )


@lru_cache(maxsize=1024)
def moment_products(axes: tuple[Axis, ...]) -> tuple[tuple[int, int, int], ...]:
    """The products of matrices that ``window_moment`` is made of.

    Returns:
        (number of products, rows of one example in each, channels in multiples of those of x), one after another.
    """
    found: list[tuple[int, int, int]] = []
    for parts in product(*(axis.parts for axis in axes)):
        found += _products(tuple(axis for _, axis in parts))
    return tuple(found)


def _products(axes: tuple[Axis, ...]) -> list[tuple[int, int, int]]:
    """Those of pixels without zeros between them."""
    if not axes:
        return [(1, 1, 1)]
    first, *others = axes
    own = (product_count(axes), first.length * prod(axis.length + axis.gap for axis in others), 1)
    frames = [
        (number, rows, channels * len(pixels))
        for _, pixels, others in _frames(axes)
        for number, rows, channels in _products(others)
    ]
    return [own, *frames]


def window_sums(x: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Sums over positions of the pixels at each tap.

    Args:
        x: [..., *space].
        axes: one for each axis of space.

    Returns:
        [..., *taps].
    """
    for axis in axes:
        # Each goes from the front to the end.
        dim = x.dim() - len(axes)
        at_taps = [x.narrow(dim, 0, 0)] * len(axis.offsets)
        for taps, part in axis.parts:
            at_taps[taps] = [_strided(x, dim, part, offset) for offset in part.offsets]
        x = torch.stack([pixels.sum(dim) for pixels in at_taps], dim=-1)
    return x


def _strided(x: Tensor, dim: int, axis: Axis, offset: int) -> Tensor:
    """The pixels that a tap is on, position by position."""
    first = max(axis.start, -(offset // axis.stride))
    last = min(axis.stop - 1, (axis.size - 1 - offset) // axis.stride)
    if last < first:
        return x.narrow(dim, 0, 0)
    index = slice(axis.stride * first + offset, axis.stride * last + offset + 1, axis.stride)
    return _at(x, dim, [index])


def _at(x: Tensor, dim: int, slices: Sequence[slice]) -> Tensor:
    """A view of some entries along some dimensions, the first of which is given."""
    index = tuple([slice(None)] * dim + list(slices))
    return x[index]
