"""Hooks that are objects: inert in a deep copy and after pickling, and able to say whose they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn


class Owner(Protocol):
    """Whoever puts hooks on a model."""

    def paused(self) -> AbstractContextManager[None]:
        """A context in which its hooks do nothing."""

    def remove(self) -> None:
        """Take its hooks off."""


class Hook:
    """A callable for ``register_*_hook`` that does nothing once its model has been copied or pickled.

    Args:
        call: what to call; None for a hook that does nothing.
        owner: whose hook it is.
    """

    def __init__(self, call: Callable[..., Any] | None = None, owner: Owner | None = None) -> None:
        self._call = call
        self.owner = owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Under tracing the hook would become part of a compiled graph; there it stays out.
        if self._call is None or torch.compiler.is_compiling():
            return None
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


def hook_owners(model: nn.Module) -> Iterator[Owner]:
    """Whoever has hooks of this library on ``model`` or a part of it."""
    seen: set[int] = set()
    for module in model.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if isinstance(hook, Hook) and hook.owner is not None and id(hook.owner) not in seen:
                seen.add(id(hook.owner))
                yield hook.owner


def in_backward() -> bool:
    """Whether this thread is inside an autograd backward, as a recomputation of activation checkpointing is."""
    return bool(torch._C._current_graph_task_id() != -1)
