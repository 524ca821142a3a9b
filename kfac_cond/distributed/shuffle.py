"""Gradients of which each rank has a part: whole to the ranks that precondition their layers, and back in parts.

One message there and one back, of bytes, so that numbers of all dtypes travel together. A rank has whole gradients of
those layers alone that it preconditions, and every layer is preconditioned on one rank, whoever else has its inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..costs import Costing, update_flops
from ..errors import ArgumentError
from ..layers.layer import Layer
from ..layers.regions import Region, missing_entries, region_here, regions_by_rank, rows_of
from ..layers.shards import device_of, is_sharded, local
from ..statistics import count_dtype
from .group import Group
from .layout import Layout, longest_first
from .routes import Direction, Move, Routes, Travelling

THERE = "the gradients of sharded layers on their way to be preconditioned"
BACK = "the preconditioned gradients of sharded layers on their way back"

Gradients = Mapping[str, Mapping[str, Tensor]]
"""By layer and parameter."""


class Shuffle:
    """The parts of some layers' gradients there and back.

    All ranks of the group call its methods, in the same order. A rank that has no gradient of a parameter takes part
    all the same: it adds zeros, and what comes back for it is left.

    Args:
        routes: of the parts.
        group: that they travel in.
        device: of the buffers.
    """

    def __init__(self, routes: Routes, group: Group, device: torch.device) -> None:
        self._routes, self._group, self._device = routes, group, device
        self._there, self._back = (Direction(routes, way, group.rank) for way in (routes.there(), routes.back()))
        self._names = list(routes.to)

    @property
    def here(self) -> list[str]:
        """The layers that this rank preconditions."""
        return [name for name in self._names if self._routes.to[name] == self._group.rank]

    def collected(self, gradients: Gradients, dtypes: Mapping[str, torch.dtype]) -> dict[str, dict[str, Tensor]]:
        """The whole gradients of the layers that this rank preconditions, by layer and parameter.

        Args:
            gradients: as they are on this rank.
            dtypes: that whole gradients are wanted in, by layer.

        Raises:
            RankError: a rank did not take part.
        """
        known = {parameter: one for of_layer in gradients.values() for parameter, one in of_layer.items()}
        whole: dict[str, dict[str, Tensor]] = {name: {} for name in self.here}
        for parameter, one in self._routes.gradients.items():
            if one.layer in whole:
                zeros = torch.zeros(one.shape, dtype=dtypes[one.layer], device=self._device)
                whole[one.layer][parameter] = zeros

        def part(move: Move) -> Tensor | None:
            gradient = known.get(move.parameter)
            return None if gradient is None else local(gradient)

        for move, entries in self._sent(self._there, part, THERE):
            move.region.add_to(whole[self._routes.gradients[move.parameter].layer][move.parameter], entries)
        return whole

    def returned(self, whole: Gradients) -> dict[str, Tensor]:
        """What this rank has, by parameter, of gradients that ranks have whole.

        Args:
            whole: those that were preconditioned on this rank.

        Raises:
            RankError: a rank did not take part.
        """

        def part(move: Move) -> Tensor:
            return move.region.of(whole[self._routes.gradients[move.parameter].layer][move.parameter])

        return {move.parameter: entries for move, entries in self._sent(self._back, part, BACK)}

    def agreed(self, mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One number of each layer, on all ranks, from the rank that preconditions it; none for what is not said is 0.

        Raises:
            RankError: a rank did not take part.
        """
        numbers = torch.zeros(len(self._names), dtype=count_dtype(self._device), device=self._device)
        for place, name in enumerate(self._names):
            if name in mine:
                numbers[place] = mine[name].reshape(())
        self._group.all_reduce(numbers, "what the trust region measured of each layer").wait()
        return dict(zip(self._names, numbers.unbind(), strict=True))

    def _sent(
        self, direction: Direction, part: Callable[[Move], Tensor | None], what: str
    ) -> list[tuple[Move, Tensor]]:
        """Send what ``part`` gives for each move, and what came."""
        sizes, others = direction.sent_sizes, direction.received_sizes
        outgoing = torch.zeros(sum(sizes), dtype=torch.uint8, device=self._device)
        for move, view in direction.views(outgoing, direction.sent):
            entries = part(move)
            if entries is not None:
                view.copy_(entries)
        if self._group.size == 1:
            return list(direction.views(outgoing, direction.received))
        incoming = torch.empty(sum(others), dtype=torch.uint8, device=self._device)
        self._group.all_to_all(incoming, outgoing, others, sizes, what).wait()
        return list(direction.views(incoming, direction.received))


class Shuffles:
    """The shuffles of a run, each made once for the layers, the ranks and the placements that it is of.

    Args:
        group: the ranks with different data.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._made: dict[Hashable, Shuffle] = {}
        self._groups: dict[tuple[int, ...], Group] = {}

    def clear(self) -> None:
        """Forget those made, where layers or who works on them changed."""
        self._made.clear()

    def of(self, layers: Mapping[str, Layer], gradients: Gradients, costing: Costing, works: Sequence[str]) -> Shuffle:
        """The shuffle of some layers; all ranks call it.

        Args:
            layers: by name, the same on all ranks.
            gradients: as they are on this rank, those there are.
            costing: what costs depend on.
            works: the layers of which this rank has the inverses.

        Raises:
            ArgumentError: parts that do not make up a gradient, on all ranks alike.
            RankError: a rank did not take part.
        """
        # A parameter without a gradient has parts as its gradient would have.
        tensors = {
            parameter: gradients.get(name, {}).get(parameter, tensor)
            for name, layer in layers.items()
            for parameter, tensor in layer.parameters.items()
        }
        key = (tuple(layers), tuple((parameter, _laid_out(one)) for parameter, one in tensors.items()))
        if key not in self._made:
            self._made[key] = self._make(layers, tensors, costing, works)
        return self._made[key]

    def _make(
        self,
        layers: Mapping[str, Layer],
        tensors: Mapping[str, Tensor],
        costing: Costing,
        works: Sequence[str],
    ) -> Shuffle:
        travelling = _travelling(layers, tensors)
        ranks = exchanging([*_members(self._group)], list(tensors.values()))
        group = self._of_ranks(tuple(ranks))
        held = {parameter: region for parameter, one in tensors.items() if (region := _held(one)) is not None}
        wrong = [
            parameter for parameter, region in held.items() if region.shape != tuple(local(tensors[parameter]).shape)
        ]
        mine: dict[str, Any] = {"held": held, "works": [name for name in layers if name in set(works)], "wrong": wrong}
        found = [mine] if group.size == 1 else group.objects(mine, "who has which part of which gradient")
        _check(travelling, found)
        able = {name: [rank for rank, one in enumerate(found) if name in one["works"]] for name in layers}
        to = _preconditioning(layers, costing, able, group.size)
        device = device_of(next(one for one in tensors.values() if is_sharded(one)))
        return Shuffle(Routes(travelling, [one["held"] for one in found], to), group, device)

    def _of_ranks(self, ranks: tuple[int, ...]) -> Group:
        """The group of these ranks: one there is where there is one."""
        if ranks == _members(self._group):
            return self._group
        if ranks not in self._groups:
            everybody = Group()
            self._groups[ranks] = everybody if len(ranks) == everybody.size else everybody.part(list(ranks))
        return self._groups[ranks]


def planned(layout: Layout, group: Group | None) -> Routes | None:
    """The routes of all sharded layers, from shapes and placements alone; None where there are none.

    Args:
        layout: of some layers on some ranks.
        group: these ranks; None for ranks that are not there, which have parts as ``fully_shard`` makes them.
    """
    layers = {name: layer for name, layer in layout.layers.items() if layer.sharded}
    tensors = {parameter: tensor for layer in layers.values() for parameter, tensor in layer.parameters.items()}
    if not layers:
        return None
    if group is None:
        by_tensor = {name: rows_of(one.shape, layout.grid.world) for name, one in tensors.items()}
    else:
        ranks = exchanging(_members(group), list(tensors.values()))
        by_tensor = {name: _by_place(one, ranks) for name, one in tensors.items()}
    held = [dict(zip(by_tensor, of_rank, strict=True)) for of_rank in zip(*by_tensor.values(), strict=True)]
    # Ranks with the same data follow one another on a mesh.
    same = len(held) // layout.grid.world
    able = {name: [rank for rank in range(len(held)) if layout.works(rank // same, name)] for name in layers}
    return Routes(_travelling(layers, tensors), held, _preconditioning(layers, layout.costing, able, len(held)))


def exchanging(ranks: Sequence[int], tensors: Sequence[Tensor]) -> list[int]:
    """The ranks that parts are exchanged among: the fewest that have all parts, and all that have different data.

    Args:
        ranks: those with different data, by their numbers among all processes.
        tensors: the gradients.
    """
    meshes = [one.device_mesh.mesh.flatten().tolist() for one in tensors if is_sharded(one)]  # type: ignore[attr-defined]
    for several in (list(ranks), sorted(max(meshes, key=len, default=[]))):
        if all(set(several) >= set(one) for one in (ranks, *meshes)):
            return several
    return list(range(dist.get_world_size()))


def _by_place(tensor: Tensor, ranks: Sequence[int]) -> list[Region]:
    """What each of these ranks has of a tensor; those that are not on its mesh have what those on one like it have."""
    if not is_sharded(tensor):
        return [Region.whole(tensor.shape)] * len(ranks)
    known = regions_by_rank(tensor)
    others = list(known.values())
    return [known.get(rank, others[place % len(others)]) for place, rank in enumerate(ranks)]


def _preconditioning(
    layers: Mapping[str, Layer], costing: Costing, able: Mapping[str, Sequence[int]], ranks: int
) -> dict[str, int]:
    """The rank that preconditions each layer, of those that have its inverse."""
    return longest_first(
        {name: float(update_flops(layer, costing)) for name, layer in layers.items()}, ranks, among=able
    )


def _travelling(layers: Mapping[str, Layer], tensors: Mapping[str, Tensor]) -> dict[str, Travelling]:
    return {
        parameter: Travelling(name, tuple(tensors[parameter].shape), tensors[parameter].dtype)
        for name, layer in layers.items()
        for parameter in layer.parameters
    }


def _members(group: Group) -> tuple[int, ...]:
    return (dist.get_rank(),) if group.size == 1 else tuple(group.ranks)


def _held(tensor: Tensor) -> Region | None:
    """What this rank has of a tensor."""
    return region_here(tensor) if is_sharded(tensor) else Region.whole(tensor.shape)


def _laid_out(tensor: Tensor) -> Hashable:
    """What its parts depend on."""
    if not is_sharded(tensor):
        return tuple(tensor.shape), tensor.dtype
    return tuple(tensor.shape), tensor.dtype, tensor.device_mesh, tuple(tensor.placements)  # type: ignore[attr-defined]


def _check(travelling: Mapping[str, Travelling], found: Sequence[Mapping[str, Any]]) -> None:
    """Refuse parts that are not those of their placements, or that leave some of a gradient out."""
    for parameter, one in travelling.items():
        wrong = [rank for rank, of_rank in enumerate(found) if parameter in of_rank["wrong"]]
        held = {rank: of_rank["held"][parameter] for rank, of_rank in enumerate(found) if parameter in of_rank["held"]}
        missing = missing_entries(one.shape, held)
        if wrong or missing:
            said = f"another size on rank {wrong[0]}" if wrong else f"{missing} of its entries on none"
            raise ArgumentError(
                f"the gradient of '{parameter}' in layer '{one.layer}', of shape {one.shape}, is a DTensor of which "
                f"{len(held)} ranks have parts, and there is {said}: expected parts as its placements cut it. Make its "
                f"sizes multiples of the mesh's, or exclude the layer with rules={{'{one.layer}': dict(exclude=True)}}."
            )
