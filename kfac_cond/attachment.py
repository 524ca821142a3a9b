"""The optimizer's boundary: what happens before and after a step of each attached optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .errors import AttachError
from .hooks import Hook, in_backward
from .layers.survey import Layer


class Stepper(Protocol):
    """What the boundary needs of the preconditioner."""

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The covered layers."""

    @property
    def active(self) -> bool:
        """Whether it is not paused."""

    def paused(self) -> AbstractContextManager[None]:
        """A context in which nothing of it happens."""

    def captures_now(self) -> bool:
        """Whether this step takes in factors or refreshes inverses."""

    def before_step(self, names: list[str], rates: Mapping[int, float | Tensor], grad_scale: Tensor | None) -> None:
        """Take in what was captured, then precondition the gradients of these layers."""

    def advance(self, skipped: Tensor | None) -> None:
        """Count one step."""


@dataclass
class _Attached:
    optimizer: Optimizer
    handles: list[RemovableHandle] = field(default_factory=list)
    overflowed: bool = False
    skipped: Tensor | None = None


class Attachments:
    """The optimizers of one preconditioner.

    A round is one step of each of them: a layer is preconditioned once a round, by the first optimizer that holds any
    of its parameters, and the step is counted once.
    """

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self._attached: dict[int, _Attached] = {}
        self._stepped: set[int] = set()
        self._done: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._attached)

    def __len__(self) -> int:
        return len(self._attached)

    def add(self, *optimizers: Optimizer) -> None:
        """Attach to optimizers; to one that is attached already, nothing happens."""
        found = [_unwrapped(optimizer) for optimizer in optimizers]
        for optimizer in found:
            self._check(optimizer)
        for optimizer in found:
            if id(optimizer) in self._attached:
                continue
            attached = _Attached(optimizer)
            attached.handles = [
                optimizer.register_step_pre_hook(Hook(self._before, self._stepper)),
                optimizer.register_step_post_hook(Hook(self._after, self._stepper)),
            ]
            self._attached[id(optimizer)] = attached

    def remove(self) -> None:
        """Leave all optimizers as they were."""
        for attached in self._attached.values():
            for handle in attached.handles:
                handle.remove()
        self._attached.clear()
        self.new_round()

    def new_round(self) -> None:
        """Forget which optimizers have stepped."""
        self._stepped.clear()
        self._done.clear()

    def _check(self, optimizer: Optimizer) -> None:
        parameters = {name: p for layer in self._stepper.layers.values() for name, p in layer.parameters.items()}
        if not set(map(id, parameters.values())) & _rates(optimizer).keys():
            raise AttachError(
                f"this {type(optimizer).__name__} holds {len(_rates(optimizer))} parameters, and none is one that KFAC "
                f"covers ({', '.join(list(parameters)[:3])}, ...): build it from the parameters of the same model."
            )
        for name, parameter in parameters.items():
            if getattr(parameter, "_in_backward_optimizers", None):
                raise AttachError(_in_backward_message(f"parameter '{name}' is stepped"))

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if in_backward():
            raise AttachError(_in_backward_message(f"this {type(optimizer).__name__} stepped"))
        if not self._stepper.active:
            return None
        # Torch passes the optimizer itself as the first of args.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._precondition(optimizer)
            return None

        def preconditioned() -> Any:
            loss = closure()
            self._precondition(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": preconditioned}
        return (args[0], preconditioned, *args[2:]), kwargs

    def _precondition(self, optimizer: Optimizer) -> None:
        attached = self._attached[id(optimizer)]
        if id(optimizer) in self._stepped:
            # It has had its step of this round: a new one begins, whether or not the others stepped.
            self._stepper.advance(None)
            self.new_round()
        attached.overflowed, attached.skipped = False, None
        found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            # A fused optimizer decides on the device; only where factors would change must the host know.
            if self._stepper.captures_now():
                attached.overflowed = bool(found_inf.item())
                if attached.overflowed:
                    return
            else:
                attached.skipped = found_inf.detach() > 0
        rates = _rates(optimizer)
        names = [
            name
            for name, layer in self._stepper.layers.items()
            if name not in self._done and any(id(p) in rates for p in layer.parameters.values())
        ]
        self._stepper.before_step(names, rates, getattr(optimizer, "grad_scale", None))

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        attached = self._attached[id(optimizer)]
        if not self._stepper.active or attached.overflowed:
            return
        rates = _rates(optimizer)
        self._stepped.add(id(optimizer))
        self._done.update(
            name
            for name, layer in self._stepper.layers.items()
            if any(id(p) in rates for p in layer.parameters.values())
        )
        if len(self._stepped) == len(self._attached):
            self._stepper.advance(attached.skipped)
            self.new_round()


def _rates(optimizer: Optimizer) -> dict[int, float | Tensor]:
    """The learning rate of each parameter, by identity; read anew, since groups and schedulers change them."""
    return {id(p): group.get("lr", 1.0) for group in optimizer.param_groups for p in group["params"]}


def _unwrapped(optimizer: object) -> Optimizer:
    if isinstance(optimizer, Optimizer):
        # Accelerate and the like wrap an optimizer in one; the inner one does the step.
        inner = getattr(optimizer, "optimizer", None)
        return _unwrapped(inner) if isinstance(inner, Optimizer) else optimizer
    raise AttachError(
        f"attach() got {type(optimizer).__name__}: expected a torch.optim.Optimizer. With any other stepper call "
        f"kfac.update(outputs) after the forward and kfac.precondition() before the step."
    )


def _in_backward_message(what: str) -> str:
    return (
        f"{what} inside the backward pass (optimizer-in-backward): gradients must all be there before they are "
        f"preconditioned. Step after loss.backward()."
    )
