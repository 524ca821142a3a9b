"""From owners to those who need it: what each rank has, brought together in one buffer a dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .group import Group
from .layout import Stretches, offsets


def exchanged(
    stretches: Stretches,
    mine: Mapping[str, Tensor],
    group: Group,
    ranks: list[int],
    *,
    sizes: Mapping[str, int],
    device: torch.device,
    what: str,
) -> dict[str, Tensor]:
    """What the ranks of a group have of each layer, flat, on all of them: one message from each, side by side.

    Args:
        stretches: which layers come from which rank.
        mine: the numbers of the layers that come from this rank; of one that is absent zeros are sent.
        group: that it travels in.
        ranks: the names that ``stretches`` has for the group's ranks, in their order.
        sizes: how many numbers each layer has.
        device: of the buffers.
        what: it is for, in messages.

    Raises:
        RankError: a rank did not take part.
    """
    views, started = [], []
    for dtype, several in stretches.items():
        buffer = torch.zeros(sum(one.numel for one in several), dtype=dtype, device=device)
        for one, place in zip(several, offsets(several), strict=True):
            assert one.root is not None
            parts = torch.split(buffer[place], [sizes[name] for name in one.names])
            if one.root == ranks[group.rank]:
                for name, part in zip(one.names, parts, strict=True):
                    if name in mine:
                        part.copy_(mine[name].reshape(-1))
            views += list(zip(one.names, parts, strict=True))
            started.append(group.broadcast(buffer[place], ranks.index(one.root), what))
    for work in started:
        work.wait()
    return dict(views)


class Placeholder(NamedTuple):
    """A tensor that travels by itself, in what is pickled."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def union(mine: Any, group: Group, device: torch.device, what: str) -> list[Any]:
    """The nested dictionaries of tensors and plain values of all ranks, on all of them; it waits for the device.

    Args:
        mine: of this rank.
        group: of all ranks.
        device: that tensors travel on and end on.
        what: it is for, in messages.

    Raises:
        RankError: a rank did not take part.
    """
    tensors: list[Tensor] = []
    skeletons = group.objects(_taken_out(mine, tensors), what)
    found = []
    for rank, skeleton in enumerate(skeletons):
        wanted: list[Placeholder] = []
        _put_back(skeleton, wanted.append)
        buffers = {}
        for dtype in dict.fromkeys(one.dtype for one in wanted):
            if rank == group.rank:
                buffer = torch.cat([one.detach().to(device).reshape(-1) for one in tensors if one.dtype == dtype])
            else:
                buffer = torch.empty(_numel(wanted, dtype), dtype=dtype, device=device)
            group.broadcast(buffer, rank, what).wait()
            buffers[dtype] = iter(torch.split(buffer, [_size(one) for one in wanted if one.dtype == dtype]))
        found.append(_put_back(skeleton, partial(_next, buffers)))
    return found


def _next(buffers: Mapping[torch.dtype, Iterator[Tensor]], one: Placeholder) -> Tensor:
    """The next tensor of a placeholder's dtype, in memory of its own."""
    return next(buffers[one.dtype]).reshape(one.shape).clone()


def _size(one: Placeholder) -> int:
    return torch.Size(one.shape).numel()


def _numel(several: list[Placeholder], dtype: torch.dtype) -> int:
    return sum(_size(one) for one in several if one.dtype == dtype)


def _taken_out(value: Any, tensors: list[Tensor]) -> Any:
    """The same with a placeholder for each tensor, which is noted."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return Placeholder(value.dtype, tuple(value.shape))
    if isinstance(value, dict):
        return {key: _taken_out(one, tensors) for key, one in value.items()}
    return value


def _put_back(value: Any, tensor: Callable[[Placeholder], Any]) -> Any:
    """The same with what ``tensor`` gives for each placeholder."""
    if isinstance(value, Placeholder):
        return tensor(value)
    if isinstance(value, dict):
        return {key: _put_back(one, tensor) for key, one in value.items()}
    return value
