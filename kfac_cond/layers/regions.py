"""Which part of a tensor a rank has: rows, columns and so on by dimension, and what it is to be multiplied with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

Indices = range | tuple[int, ...]
"""The places along one dimension, in order: a range where they follow one another."""


@dataclass(frozen=True)
class Region:
    """A part of a tensor: all entries whose places are among these.

    Args:
        where: the places by dimension.
        addend: where several ranks have numbers for the same entries that are to be added, which of them these are.
        weight: what they are multiplied with before they are added.
        shares: what entries of the tensor are divided by on the way back, so that they add up to it again.
    """

    where: tuple[Indices, ...]
    addend: tuple[int, ...] = ()
    weight: float = 1.0
    shares: int = 1

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Region:
        """All of a tensor."""
        return cls(tuple(range(size) for size in shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """How many places there are, by dimension."""
        return tuple(map(len, self.where))

    @property
    def numel(self) -> int:
        """How many entries."""
        return prod(self.shape)

    def of(self, tensor: Tensor) -> Tensor:
        """These entries of a tensor, as they are on the rank that has them; a view where they lie side by side."""
        for dim, places in enumerate(self.where):
            if isinstance(places, range):
                tensor = tensor.narrow(dim, places.start, len(places))
            else:
                tensor = tensor.index_select(dim, torch.tensor(places, dtype=torch.long, device=tensor.device))
        return tensor if self.shares == 1 else tensor / self.shares

    def add_to(self, tensor: Tensor, entries: Tensor) -> None:
        """Add these entries to a tensor that the others are added to as well."""
        added = entries.to(tensor.dtype)
        added = added if self.weight == 1 else added * self.weight
        if all(isinstance(places, range) for places in self.where):
            Region(self.where).of(tensor).add_(added)
        else:
            grid = [torch.tensor(places, dtype=torch.long, device=tensor.device) for places in self.where]
            tensor.index_put_(tuple(torch.meshgrid(*grid, indexing="ij")), added, accumulate=True)


def region_of(
    shape: Sequence[int], sizes: Sequence[int], coordinate: Sequence[int], placements: Sequence[Any]
) -> Region:
    """What a rank has of a tensor that is laid out on a mesh.

    Args:
        shape: of the whole tensor.
        sizes: of the mesh, by its dimensions.
        coordinate: of the rank on the mesh.
        placements: by dimension of the mesh.

    Source: torch.distributed.tensor; its ``Shard`` cuts as ``torch.chunk`` does, from the first dimension of the mesh
    to the last; a ``_StridedShard`` is cut after those that follow it, as ``fully_shard`` does with what
    ``parallelize_module`` cut.
    """
    cuts: dict[int, list[tuple[int, int, int]]] = {}
    addend, weight, shares = [], 1.0, 1
    for size, place, one in zip(sizes, coordinate, placements, strict=True):
        if one.is_partial():
            averaged = one.reduce_op == "avg"
            addend.append(place)
            weight, shares = (weight / size, shares) if averaged else (weight, shares * size)
        elif not one.is_replicate():
            cuts.setdefault(one.dim % len(shape), []).append((size, place, getattr(one, "split_factor", 1)))
    where = tuple(_cut(range(n), _in_order(cuts.get(dim, []))) for dim, n in enumerate(shape))
    return Region(where, tuple(addend), weight, shares)


def region_here(tensor: Any) -> Region | None:
    """What this rank has of a DTensor; None where it is not on its mesh."""
    mesh = tensor.device_mesh
    place = mesh.get_coordinate()
    return None if place is None else region_of(tensor.shape, tuple(mesh.mesh.shape), place, tensor.placements)


def regions_by_rank(tensor: Any) -> dict[int, Region]:
    """What each rank has of a DTensor, by its number among all processes."""
    mesh = tensor.device_mesh
    sizes = tuple(mesh.mesh.shape)
    ranks = mesh.mesh.flatten().tolist()
    places = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).reshape(-1, len(sizes)).tolist()
    return {
        rank: region_of(tensor.shape, sizes, place, tensor.placements)
        for rank, place in zip(ranks, places, strict=True)
    }


def rows_of(shape: Sequence[int], ranks: int) -> list[Region]:
    """What each of so many ranks has where a tensor is cut along its first dimension."""
    rest = Region.whole(shape[1:]).where
    return [Region((_cut(range(shape[0]), [(ranks, rank, 1)]), *rest)) for rank in range(ranks)]


def missing_entries(shape: Sequence[int], regions: Mapping[Any, Region]) -> int:
    """How many entries of a tensor no rank has; none of them twice, since ranks have the same places or others."""
    return prod(shape) - sum(prod(map(len, where)) for where in {region.where for region in regions.values()})


def _in_order(cuts: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The cuts along one dimension in the order they were made; a strided one after all that it counts strides of."""
    if not cuts:
        return []
    (size, place, stride), rest = cuts[0], cuts[1:]
    if stride > 1 and prod(size for size, _, _ in rest) == stride:
        return [*_in_order(rest), (size, place, 1)]
    return [cuts[0], *_in_order(rest)]


def _cut(places: range, cuts: Sequence[tuple[int, int, int]]) -> Indices:
    """What is left of some places: of each of ``stride`` chunks the chunk that is this rank's."""
    found: Sequence[int] = places
    for size, place, stride in cuts:
        if stride == 1:
            found = _chunk(found, size, place)
        else:
            found = [n for index in range(stride) for n in _chunk(_chunk(found, stride, index), size, place)]
    if not found:
        return range(0)
    together = range(found[0], found[0] + len(found))
    return together if list(found) == list(together) else tuple(found)


def _chunk(places: Sequence[int], number: int, index: int) -> Sequence[int]:
    """One of the chunks that ``torch.chunk`` makes; empty where it makes fewer."""
    size = -(-len(places) // number)
    return places[index * size : (index + 1) * size]
