"""Who looks on while a step preconditions, and changes nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .sharing import Shared


@dataclass(frozen=True)
class Step:
    """What is about to happen: one optimizer's part of a step.

    Args:
        number: the count of steps.
        gradients: by layer and parameter, of the layers that are stepped; written to in place.
        rates: learning rates by the parameter's identity.
        grad_scale: what a gradient scaler multiplied the gradients with.
        shared: has the layers, their averages and inverses, and the ranks.
        refreshing: the layers whose inverses may be made anew.
    """

    number: int
    gradients: Mapping[str, Mapping[str, Tensor]]
    rates: Mapping[int, float | Tensor]
    grad_scale: Tensor | None
    shared: Shared
    refreshing: Callable[[], set[str]]


class Watcher(Protocol):
    """Someone who looks on. It is on the step path, so that it reads nothing from the device."""

    def around(self, step: Step) -> AbstractContextManager[None]:
        """A context: entered with plain gradients, left with preconditioned ones in the same tensors."""


@contextmanager
def watched(watchers: Iterable[Watcher], step: Step) -> Iterator[None]:
    """Within it the step takes place, and all of them look on."""
    with ExitStack() as stack:
        for watcher in watchers:
            stack.enter_context(watcher.around(step))
        yield
