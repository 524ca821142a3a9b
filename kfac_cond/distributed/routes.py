"""Which part of which gradient goes from which rank to which: to the rank that preconditions its layer, and back.

From what ranks have alone, so that a plan of the messages is made of the same as the messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.regions import Region
from .layout import Message

ALIGNMENT = 16
"""Bytes that parts begin at multiples of, so that one buffer holds numbers of every dtype."""


class Travelling(NamedTuple):
    """What is known of a gradient that travels: its layer, its shape as a whole, and its dtype."""

    layer: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Move(NamedTuple):
    """A part of a gradient on its way."""

    source: int
    target: int
    parameter: str
    region: Region


class Routes:
    """The ways there and back.

    Args:
        gradients: by parameter, in the order that every rank has.
        held: by rank what it has of each parameter.
        to: the rank that preconditions each layer.
    """

    def __init__(
        self, gradients: Mapping[str, Travelling], held: Sequence[Mapping[str, Region]], to: Mapping[str, int]
    ) -> None:
        self.gradients, self.to = gradients, to
        self._held = held

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return len(self._held)

    def there(self) -> Iterator[Move]:
        """Each part once, though several ranks have it: from the target itself, or from whoever has sent least."""
        loads = [0] * self.ranks
        for parameter, one in self.gradients.items():
            target = self.to[one.layer]
            for region, ranks in self._by_region(parameter).items():
                source = target if target in ranks else min(ranks, key=loads.__getitem__)
                loads[source] += self.nbytes(parameter, region)
                yield Move(source, target, parameter, region)

    def back(self) -> Iterator[Move]:
        """To each rank the part that it has, also where others have the same."""
        for parameter, one in self.gradients.items():
            for region, ranks in self._by_region(parameter).items():
                yield from (Move(self.to[one.layer], rank, parameter, region) for rank in ranks)

    def nbytes(self, parameter: str, region: Region) -> int:
        """Bytes that a part takes in a buffer."""
        return -(-region.numel * self.gradients[parameter].dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def messages(self) -> list[Message]:
        """The two collectives."""
        return [self._message(moves) for moves in (self.there(), self.back())] if self.ranks > 1 else []

    def _message(self, moves: Iterable[Move]) -> Message:
        total = stays = 0
        for move in moves:
            nbytes = self.nbytes(move.parameter, move.region)
            total, stays = total + nbytes, stays + nbytes * (move.source == move.target)
        return Message("all_to_all", total, self.ranks, stays)

    def _by_region(self, parameter: str) -> dict[Region, list[int]]:
        """The ranks that have each part which is not empty."""
        found: dict[Region, list[int]] = {}
        for rank, held in enumerate(self._held):
            if parameter in held and held[parameter].numel:
                found.setdefault(held[parameter], []).append(rank)
        return found


class Direction:
    """One of the two ways, as a rank sees it.

    Args:
        routes: it is of.
        moves: of all ranks.
        rank: whose.
    """

    def __init__(self, routes: Routes, moves: Iterable[Move], rank: int) -> None:
        mine = [move for move in moves if rank in (move.source, move.target)]
        self._routes = routes
        self.sent = sorted((move for move in mine if move.source == rank), key=lambda move: move.target)
        self.received = sorted((move for move in mine if move.target == rank), key=lambda move: move.source)
        self.sent_sizes = self._sizes(self.sent, lambda move: move.target)
        self.received_sizes = self._sizes(self.received, lambda move: move.source)

    def _sizes(self, moves: Sequence[Move], other: Callable[[Move], int]) -> list[int]:
        sizes = [0] * self._routes.ranks
        for move in moves:
            sizes[other(move)] += self._routes.nbytes(move.parameter, move.region)
        return sizes

    def views(self, buffer: Tensor, moves: Sequence[Move]) -> Iterator[tuple[Move, Tensor]]:
        """The places of parts in a buffer of bytes, as tensors of their dtypes and shapes."""
        start = 0
        for move in moves:
            dtype, shape = self._routes.gradients[move.parameter].dtype, move.region.shape
            yield move, buffer[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape)
            start += self._routes.nbytes(move.parameter, move.region)
