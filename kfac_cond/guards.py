"""Contexts that leave a model and the random state as they were."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .hooks import hook_owners


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast off on ``device``: inside it a product of float32 tensors would be done in half precision."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class _EagerStance:
    """The compiler's stance, one for all threads: plain Python while anybody asks for it, then as it was."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asking = 0
        self._stance: Any = None

    def enter(self) -> None:
        with self._lock:
            if self._asking == 0:
                self._stance = torch.compiler.set_stance("force_eager")
            self._asking += 1

    def leave(self) -> None:
        with self._lock:
            self._asking -= 1
            if self._asking == 0:
                self._stance.__exit__(None, None, None)


_EAGER = _EagerStance()


class EagerForwards:
    """Runs compiled parts of a model as plain Python during some forwards: in compiled code inner hooks do not fire.

    Args:
        model: looked through at each such forward, since parts may be compiled at any time; without compiled parts
            nothing is done.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._inside = False

    def enter(self) -> None:
        """From now on, eagerly."""
        if not self._inside and any(map(is_compiled, self._model.modules())):
            _EAGER.enter()
            self._inside = True

    def leave(self) -> None:
        """As it was before ``enter``, if that did anything."""
        if self._inside:
            _EAGER.leave()
            self._inside = False


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of a module run compiled: of ``torch.compile(module)``, ``module.compile()``, or its forward."""
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    return in_place or hasattr(module.forward, "_torchdynamo_orig_callable")


RandomState = tuple[torch.device, Tensor, Tensor | None]
"""A device, the global generator's state, and that of the device's own where it has one."""


def random_state(device: torch.device) -> RandomState:
    """What random numbers on ``device`` are drawn from next."""
    own = None if device.type in ("cpu", "meta") else torch.get_device_module(device).get_rng_state(device)
    return device, torch.get_rng_state(), own


@contextmanager
def repeated(state: RandomState | None) -> Iterator[None]:
    """Random numbers are drawn anew from ``state``; afterwards it is as if none had been. None: nothing is done."""
    if state is None:
        yield
        return
    device, general, own = state
    kind = device.type if own is not None else "cuda"
    with torch.random.fork_rng(devices=[] if own is None else [device], device_type=kind):
        torch.set_rng_state(general)
        if own is not None:
            torch.get_device_module(device).set_rng_state(own, device)
        yield


def unpacked_graph(freed: Iterable[Tensor] = ()) -> AbstractContextManager[Any]:
    """A graph that keeps its tensors itself, where activation checkpointing would drop and recompute them.

    Args:
        freed: tensors whose memory goes to something else once the call is over, of which it keeps copies.
    """
    storages = {one.untyped_storage().data_ptr() for one in freed}

    def pack(x: Tensor) -> Tensor:
        return x.clone() if storages and x.untyped_storage().data_ptr() in storages else x

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)


@contextmanager
def kept_running_statistics(model: nn.Module) -> Iterator[None]:
    """Running statistics of norm layers as before afterwards.

    A backward through activation checkpointing runs that part of the forward again, and would update them once more.
    """
    running = [
        buffer
        for module in model.modules()
        if isinstance(module, _NormBase) and module.training and module.track_running_stats
        for buffer in module.buffers(recurse=False)
    ]
    before = [buffer.clone() for buffer in running]
    try:
        yield
    finally:
        for buffer, value in zip(running, before, strict=True):
            # Through .data: the graph that the user's own backward still needs has saved these buffers, and would
            # refuse them after a change that it sees.
            buffer.data.copy_(value)


@contextmanager
def kept_state(model: nn.Module) -> Iterator[None]:
    """Buffers of ``model`` and the global random state as before afterwards."""
    held = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    with ExitStack() as stack:
        for kind in {device.type for device in devices} or {"cuda"}:
            same = [device for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=same, device_type=kind))
        try:
            yield
        finally:
            for module, name, buffer, value in held:
                _put_back(module, name, buffer, value)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Whoever has hooks on ``model`` paused, compiled parts run eagerly, its state as before afterwards."""
    eager = EagerForwards(model)
    with ExitStack() as stack:
        for owner in hook_owners(model):
            stack.enter_context(owner.paused())
        stack.enter_context(kept_state(model))
        eager.enter()
        stack.callback(eager.leave)
        yield


def _put_back(module: nn.Module, name: str, buffer: Tensor, value: Tensor) -> None:
    """The same tensor with the same values, whether it was changed in place, resized or replaced."""
    if buffer.shape == value.shape:
        buffer.data.copy_(value)
    else:
        buffer.data = value
    module._buffers[name] = buffer
