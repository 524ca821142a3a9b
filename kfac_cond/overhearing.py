"""What a closure says of itself while it runs: how it called the model, and what it called the criterion with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch
from .checks import described
from .errors import ArgumentError, CaptureError
from .heads import Head, picked
from .hooks import Hook, leaves_graph
from .likelihoods import heard_call
from .objective import Objective

REMEDY = "or use step(inputs, targets), which calls the model and the loss itself"

Hear = Callable[[tuple[Head, ...]], None]


class Overhearing:
    """Listens to one run of a closure: a call of the model with gradients, and one of the criterion.

    Args:
        objective: whose model and criterion are meant.
        hear: called with the heads while their graph is there.
    """

    def __init__(self, objective: Objective, hear: Hear) -> None:
        self._objective, self._hear = objective, hear
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
        self._targets: list[Any] = []

    def run(self, closure: Callable[[], Any]) -> tuple[Batch, Tensor]:
        """Run it; gives how the model was called, and the loss.

        Raises:
            CaptureError: the model or the criterion was not called once.
            ArgumentError: no loss came back.
        """
        model, criterion = self._objective.model, self._objective.criterion
        self._objective.begin()
        with ExitStack() as stack, torch.enable_grad():
            stack.callback(model.register_forward_hook(Hook(self._model), with_kwargs=True).remove)
            if criterion is not None:
                stack.callback(criterion.register_forward_pre_hook(Hook(self._criterion), with_kwargs=True).remove)
            loss = closure()
        if not (isinstance(loss, Tensor) and loss.ndim == 0):
            raise ArgumentError(f"the closure returned {described(loss)}: expected the loss, a 0-d tensor")
        self._once(type(model).__name__, len(self._calls))
        if criterion is not None:
            self._once(type(criterion).__name__, len(self._targets))
        args, kwargs, _ = self._calls[0]
        return Batch(args, kwargs, self._targets[0] if self._targets else None), loss

    def _model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not leaves_graph():
            return
        self._calls.append((args, kwargs, output))
        if self._objective.criterion is None:
            self._hear(self._objective.heads_of(args, kwargs, output, None))

    def _criterion(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (leaves_graph() and self._calls):
            return
        outputs, targets = heard_call(module, args, kwargs)
        call = self._calls[-1]
        if not any(one is outputs for one in picked(self._objective.likelihood, self._objective.picks, *call).values()):
            raise CaptureError(
                f"the closure called {type(module).__name__} with another tensor than the model returned: hand the "
                f"outputs to the criterion as they are, {REMEDY}"
            )
        self._targets.append(targets)
        self._hear(self._objective.heads_of(*call, targets))

    @staticmethod
    def _once(name: str, times: int) -> None:
        if times != 1:
            raise CaptureError(
                f"the closure called {name} {times} times with gradients: expected once, since the quadratic model is "
                f"of one batch; join micro-batches into one, {REMEDY}"
            )
