"""How far an estimate got, in a file: interrupted, it goes on where it was, to the very same numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ArgumentError, StateError
from .files import replaced
from .layers.shards import whole
from .linalg.sparse import SparseRows

FORMAT = "kfac_cond.partial"
VERSION = 2

#: The time between two writes is at least this many times what the last one took: writing stays below a tenth of all.
SPARING = 10.0


class Partial:
    """The file of one estimate: read at its start, written between batches, gone when it is over.

    Args:
        path: of the file; None keeps nothing.
        request: what was asked for, as plain values: a file of another request is refused.

    Raises:
        ArgumentError: there is no such folder.
        StateError: the file is there and is no such file, or of another request; it says which and what differs.
    """

    def __init__(self, path: str | os.PathLike[str] | None, request: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None and not self.path.parent.is_dir():
            raise ArgumentError(f"Options(partial='{self.path}'): there is no folder {self.path.parent}")
        self.request = dict(request)
        #: What was in the file at the start, or None.
        self.found = None if self.path is None or not self.path.exists() else self._read(self.path)
        self._written, self._took = monotonic(), 0.0

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        return self.path is not None and monotonic() - self._written >= SPARING * self._took

    def write(self, state: Mapping[str, Any]) -> None:
        """Write a state of plain values and tensors, all of it or nothing."""
        if self.path is None:
            return
        begun = monotonic()
        with replaced(self.path) as file:
            torch.save({"format": FORMAT, "version": VERSION, "request": self.request, "state": dict(state)}, file)
        self._written = monotonic()
        self._took = self._written - begun

    def remove(self) -> None:
        """Remove the file: the estimate is complete."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self, path: Path) -> dict[str, Any]:
        remedy = f"remove {path} to start anew"
        try:
            with torch.serialization.safe_globals([SparseRows]):
                held = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged archive makes of it
            reason = str(error).split("\n")[0][:120]
            raise StateError(f"{path} is no partial estimate, or is damaged ({reason}): {remedy}") from error
        if not isinstance(held, dict) or held.get("format") != FORMAT or {"request", "state"} - set(held):
            raise StateError(f"{path} is not a partial estimate: give Options(partial=...) a path of its own")
        if held.get("version") != VERSION:
            raise StateError(f"{path} has version {held.get('version')!r}, this library reads {VERSION}: {remedy}")
        for key in {**self.request, **held["request"]}:
            then, now = held["request"].get(key), self.request.get(key)
            if then != now:
                raise StateError(
                    f"{path} is of another estimate: its {key} is {_short(then)}, now it is {_short(now)}. Ask "
                    f"for the same again, or {remedy}"
                )
        return dict(held["state"])


def digest_of_model(model: nn.Module) -> str:
    """A digest of the parameters, buffers and mode that outputs depend on: two sums of each, not all of their bytes."""
    total = sha256(str([module.training for module in model.modules()]).encode())
    named = [*model.named_parameters(), *model.named_buffers()]
    wide = [x.detach().double() for _, x in named]
    sums = [torch.stack([whole(x.sum()), whole(x.square().sum())]) for x in wide]
    for (name, x), pair in zip(named, [one.cpu() for one in sums], strict=True):
        total.update(f"{name} {tuple(x.shape)} {x.dtype} {pair.tolist()}".encode())
    return total.hexdigest()


def digest_of_batch(batch: Any) -> str:
    """A digest of the tensors of a batch, by which it is known again."""
    total = sha256()
    for x in _tensors(batch):
        total.update(f"{x.dtype} {tuple(x.shape)}".encode())
        # A tensor of its own: one number alone may have a stride that no view as bytes takes.
        flat = torch.empty(x.numel(), dtype=x.dtype).copy_(x.detach().reshape(-1))
        total.update(flat.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def random_state() -> dict[str, Tensor]:
    """Where the global random streams stand, by device; dropout draws from them."""
    state = {"cpu": torch.get_rng_state()}
    if (kind := _accelerator()) is not None:
        state[kind.type] = torch.get_device_module(kind).get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Tensor]) -> None:
    """Go on where ``random_state`` was taken, on the devices that are there."""
    torch.set_rng_state(state["cpu"])
    kind = _accelerator()
    if kind is not None and kind.type in state:
        torch.get_device_module(kind).set_rng_state(state[kind.type])


def _accelerator() -> torch.device | None:
    """The accelerator that is there; a build for one may run where there is none."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from _tensors(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
