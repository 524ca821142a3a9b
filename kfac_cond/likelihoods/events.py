"""Axis arithmetic between outputs and their terms and events, and the dtypes in which likelihoods compute."""

from __future__ import annotations

import torch
from torch import Tensor


def event_axes(dims: tuple[int, ...], ndim: int) -> tuple[int, ...] | None:
    """The dimensions as ascending numbers from 1 on, or None where they do not exist, repeat or contain dimension 0."""
    if any(not -ndim <= dim < ndim for dim in dims):
        return None
    axes = tuple(sorted(dim % ndim for dim in dims))
    return None if 0 in axes or len(set(axes)) < len(axes) else axes


def to_events(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Outputs as [*terms, E]: the event's axes moved last and flattened; E = 1 where there are none."""
    if not axes:
        return values.unsqueeze(-1)
    last = tuple(range(-len(axes), 0))
    return values.movedim(axes, last).flatten(-len(axes))


def from_events(values: Tensor, axes: tuple[int, ...], event_shape: tuple[int, ...]) -> Tensor:
    """The inverse of ``to_events``."""
    if not axes:
        return values.squeeze(-1)
    last = tuple(range(-len(axes), 0))
    return values.reshape(*values.shape[:-1], *event_shape).movedim(last, axes)


def spread(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    """A tensor of the terms' shape with a dimension of size 1 at each of the event's axes."""
    for axis in axes:
        values = values.unsqueeze(axis)
    return values


def widened(values: Tensor) -> Tensor:
    """The values in float32 at least."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def count_dtype(device: torch.device) -> torch.dtype:
    """The dtype of counts: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
