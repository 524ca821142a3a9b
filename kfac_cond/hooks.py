"""Hooks that are objects: inert in a deep copy and after pickling, and able to say whose they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from .errors import CaptureError


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


def leaves_graph() -> bool:
    """Whether what this thread computes now leaves an ordinary graph: with gradients, and no part of anything else.

    A recomputation inside a backward is not, nor a call inside ``torch.func.grad``, ``vmap`` and the like, whose
    tensors stand for others.
    """
    return torch.is_grad_enabled() and not in_backward() and torch._C._functorch.peek_interpreter_stack() is None


def in_custom_function() -> bool:
    """Whether this thread is inside the forward of somebody's autograd function, as reentrant checkpointing is one.

    Torch runs it with gradients and with forward-mode differentiation off; ``no_grad`` puts off the first alone, and
    ``inference_mode`` says so itself. Whether gradients were on outside of it is not to be seen from within.
    """
    return not (torch.is_grad_enabled() or torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())


def hidden(name: str) -> CaptureError:
    """The error for a module that is called there."""
    return CaptureError(
        f"'{name}' was called inside an autograd function of its own, as reentrant activation checkpointing is one: no "
        f"gradient of its output is to be seen there. Checkpoint with use_reentrant=False, or leave it out "
        f"(rules={{'{name}': dict(exclude=True)}}, or requires_grad_(False))."
    )
