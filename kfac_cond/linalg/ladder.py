"""What both factorisations share: the rungs of the failure ladder, batches of equal sizes, the one host read."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from math import prod

import torch
from torch import Tensor

from .sides import Diagonal, Side


class Rung(IntEnum):
    """How far a factorisation had to climb before it gave a usable result."""

    FIRST = 0
    """It succeeded as asked."""
    MORE_DAMPING = 1
    """It succeeded with more on the diagonal than was asked."""
    DOUBLE = 2
    """It succeeded as asked, in float64."""
    PREVIOUS = 3
    """It failed; the previous result stands in."""
    IDENTITY = 4
    """It failed and there was no previous result; the identity stands in."""


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64."""
    return device.type != "mps"


TOGETHER = {"cpu": 2**18}
"""Numbers of the matrices of one batched call at most, by type of device, unless one alone has more: the host
factorises them one after another in any case, and a small work buffer is not fetched from the system anew."""


def size_groups(matrices: Sequence[Side], indices: Sequence[int]) -> list[list[int]]:
    """The indices of matrices that share one batched call, in order of appearance.

    They have one size, dtype and device, and are whole all or diagonal all.
    """
    groups: dict[tuple[bool, int, torch.dtype, torch.device], list[int]] = {}
    for index in indices:
        matrix = matrices[index]
        key = (isinstance(matrix, Diagonal), matrix.shape[-1], matrix.dtype, matrix.device)
        groups.setdefault(key, []).append(index)
    return [part for group in groups.values() for part in _in_parts(matrices, group)]


def _in_parts(matrices: Sequence[Side], group: Sequence[int]) -> list[list[int]]:
    """One group as parts of no more numbers than go together on its device."""
    most = TOGETHER.get(matrices[group[0]].device.type)
    parts: list[list[int]] = [[]]
    room = most
    for index in group:
        size = prod(matrices[index].shape)
        if most is not None and room is not None:
            if size > room and parts[-1]:
                parts.append([])
                room = most
            room -= size
        parts[-1].append(index)
    return parts


def stack_flat(matrices: Sequence[Tensor]) -> Tensor:
    """A copy of matrices of one size, all their leading dimensions in one: [..., d, d] each -> [k, d, d]."""
    return torch.cat([matrix.reshape(-1, *matrix.shape[-2:]) for matrix in matrices])


def read_status(flags: Sequence[Tensor]) -> list[bool]:
    """The flags on the host, in one transfer whatever their number.

    This is the one place where a factorisation waits for the device. It is affordable because it happens once per
    refresh of the inverses (once more for each rung that something has to climb), never once per step, and because
    everything the refresh computes is queued before it.

    Args:
        flags: bool tensors of one dimension each. On the meta device there is nothing to read: all count as true.
    """
    if not flags:
        return []
    if any(flag.is_meta for flag in flags):
        return [True] * sum(flag.numel() for flag in flags)
    device = flags[0].device
    status: list[bool] = torch.cat([flag.to(device) for flag in flags]).tolist()
    return status
