"""The optimizer's boundary: what happens before and after a step of each attached optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .checks import is_damping
from .errors import ArgumentError, AttachError
from .hooks import Hook, in_backward
from .layers.layer import Layer


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

    def remove(self) -> None:
        """Take its hooks off the model and the optimizers."""

    def hold_shards(self) -> None:
        """Have the model hold the parameters that optimizers step."""

    def captures_now(self) -> bool:
        """Whether this step takes in factors or refreshes inverses."""

    def before_step(self, names: list[str], rates: Mapping[int, float | Tensor], grad_scale: Tensor | None) -> bool:
        """Take in what was captured and precondition these layers; False where none of them has a gradient."""

    def advance(self, skipped: Tensor | None) -> None:
        """Count one step; ``skipped`` is a flag on the device that takes it back."""


@dataclass(eq=False)
class _Attached:
    handles: list[RemovableHandle] = field(default_factory=list)
    #: The step under way changes nothing, known on the host.
    overflowed: bool = False
    #: The step under way changes nothing where this flag is set, known on the device.
    skipped: Tensor | None = None
    #: Whether a layer had a gradient in the step under way.
    touched: bool = False
    #: The layers that the step under way moves.
    names: list[str] = field(default_factory=list)


class Attachments:
    """The optimizers of one preconditioner.

    A round is at most one step of each of them, with no forward of the model between two: a layer is preconditioned
    once a round, by the first optimizer that holds any of its parameters, and the round counts as one step, if any of
    it took place. Optimizers are held weakly: one that is dropped is forgotten.
    """

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self._attached: WeakKeyDictionary[Optimizer, _Attached] = WeakKeyDictionary()
        self._stepped: WeakSet[Optimizer] = WeakSet()
        self._done: set[str] = set()
        self._skipped: list[Tensor | None] = []

    def __bool__(self) -> bool:
        return bool(self._attached)

    def __len__(self) -> int:
        return len(self._attached)

    def add(self, *optimizers: Optimizer) -> None:
        """Attach to optimizers; to one that is attached already, nothing happens."""
        if not optimizers:
            raise AttachError(
                "attach() got no optimizer: pass those whose steps are to be preconditioned, attach(optimizer). With "
                "any other stepper call kfac.update(outputs) after the forward, kfac.precondition() before the step."
            )
        found = [_unwrapped(optimizer) for optimizer in optimizers]
        for optimizer in found:
            self._check(optimizer)
            list(_damped_parameters(optimizer))
        for optimizer in found:
            if optimizer not in self._attached:
                self._attached[optimizer] = _Attached(
                    [
                        optimizer.register_step_pre_hook(Hook(self._before, self._stepper)),
                        optimizer.register_step_post_hook(Hook(self._after, self._stepper)),
                    ]
                )

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
        self._skipped.clear()

    def end_round(self) -> None:
        """Count the round where a step of it took place, and begin a new one."""
        if self._skipped:
            flags = [flag for flag in self._skipped if flag is not None]
            # Skipped is only what all of its optimizers skipped.
            whole = len(flags) == len(self._skipped)
            self._stepper.advance(torch.stack([flag.to(flags[0].device) for flag in flags]).all() if whole else None)
        self.new_round()

    def dampings(self) -> dict[str, float]:
        """What the parameter groups of the optimizers say of layers' damping; read anew, since schedulers change it.

        Raises:
            ArgumentError: two groups that hold parts of one layer say different things, or no damping.
        """
        said = {id(p): given for optimizer in self._attached for given, p in _damped_parameters(optimizer)}
        found: dict[str, float] = {}
        for name, layer in self._stepper.layers.items() if said else ():
            own = {path: said[id(p)] for path, p in layer.parameters.items() if id(p) in said}
            if len(set(own.values())) > 1:
                raise ArgumentError(
                    f"layer '{name}' is in parameter groups of several dampings, {own}: a layer has one. Put its "
                    f"parameters in groups that agree, or give it its own, rules={{'{name}': dict(damping=...)}}"
                )
            if own:
                found[name] = next(iter(own.values()))
        return found

    def _check(self, optimizer: Optimizer) -> None:
        parameters = {name: p for layer in self._stepper.layers.values() for name, p in layer.parameters.items()}
        rates = _rates([optimizer])
        if not any(id(parameter) in rates for parameter in parameters.values()):
            raise AttachError(
                f"this {type(optimizer).__name__} holds {len(rates)} parameters, and none is one that KFAC covers "
                f"({', '.join(list(parameters)[:3])}, ...): build it from the parameters of the same model."
            )
        for name, parameter in parameters.items():
            if getattr(parameter, "_in_backward_optimizers", None):
                raise AttachError(_in_backward_message(f"parameter '{name}' is stepped"))

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if in_backward():
            raise AttachError(_in_backward_message(f"this {type(optimizer).__name__} stepped"))
        if not self._stepper.active:
            return None
        attached = self._attached[optimizer]
        attached.overflowed, attached.skipped, attached.touched = False, None, False
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
        attached = self._attached[optimizer]
        self._stepper.hold_shards()
        if optimizer in self._stepped:
            # It has had its step of this round: a new one begins, whether or not the others stepped.
            self.end_round()
        found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            # A fused optimizer decides on the device; only where factors would change must the host know.
            if self._stepper.captures_now():
                attached.overflowed = bool(found_inf.item())
                if attached.overflowed:
                    return
            else:
                attached.skipped = found_inf.detach().reshape(()) > 0
        attached.names = self._held_by(optimizer)
        names = [name for name in attached.names if name not in self._done]
        rates = _rates(self._attached)
        grad_scale = getattr(optimizer, "grad_scale", None)
        attached.touched |= self._stepper.before_step(names, rates, grad_scale)

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        attached = self._attached[optimizer]
        if not self._stepper.active or attached.overflowed:
            return
        if attached.touched:
            self._skipped.append(attached.skipped)
        self._stepped.add(optimizer)
        self._done.update(attached.names)
        if len(self._stepped) == len(self._attached):
            self.end_round()

    def _held_by(self, optimizer: Optimizer) -> list[str]:
        """The layers of which the optimizer holds a parameter."""
        rates = _rates([optimizer])
        return [
            name
            for name, layer in self._stepper.layers.items()
            if any(id(p) in rates for p in layer.parameters.values())
        ]


def _rates(optimizers: Iterable[Optimizer]) -> dict[int, float | Tensor]:
    """The learning rate of each parameter, by identity; read anew, since groups and schedulers change them."""
    return {
        id(p): group.get("lr", 1.0)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }


def _damped_parameters(optimizer: Optimizer) -> Iterable[tuple[float, Tensor]]:
    """The parameters of groups that have a damping, with it."""
    for index, group in enumerate(optimizer.param_groups):
        given = group.get("damping")
        if given is None:
            continue
        if not is_damping(given):
            raise ArgumentError(
                f"parameter group {index} of {type(optimizer).__name__} has damping={given!r}: expected a finite "
                f"number >= 0, or None"
            )
        for p in group["params"]:
            yield float(given), p


def _unwrapped(optimizer: object) -> Optimizer:
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(optimizer, Optimizer):
        # Accelerate and the like wrap an optimizer in one; the inner one does the step.
        return _unwrapped(inner) if isinstance(inner, Optimizer) else optimizer
    remedy = (
        "pass its .optimizer"
        if isinstance(inner, Optimizer)
        else "with any other stepper call kfac.update(outputs) after the forward, kfac.precondition() before the step"
    )
    raise AttachError(f"attach() got {type(optimizer).__name__}: expected a torch.optim.Optimizer; {remedy}.")


def _in_backward_message(what: str) -> str:
    return (
        f"{what} inside the backward pass (optimizer-in-backward): gradients must all be there before they are "
        f"preconditioned. Step after loss.backward()."
    )
