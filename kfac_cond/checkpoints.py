"""Checkpoints in one file that is there whole or not at all, and is seen to be whole before it is used."""

from __future__ import annotations

import os
import pickle
import zipfile
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful

from .errors import StateError
from .files import replaced


def save_checkpoint(path: str | os.PathLike[str], **parts: Any) -> None:
    """Write what a run needs to go on into one file, as ``torch.save`` does.

    What was at ``path`` before stays until the new file is complete: a full disk, an exception or a kill leaves the
    previous checkpoint as it was.

    Args:
        path: the file.
        parts: by name: whatever has a ``state_dict()`` (model, optimizer, scheduler, ``KFAC``), or plain values.

    Raises:
        OSError, RuntimeError: it could not be written.

    Examples:
        >>> import torch, kfac_cond as kc
        >>> model = torch.nn.Linear(3, 2)
        >>> kfac = kc.KFAC(model, "categorical")
        >>> kc.save_checkpoint("run.pt", model=model, kfac=kfac, step=7)
        >>> saved = kc.load_checkpoint("run.pt")
        >>> kfac.load_state_dict(saved["kfac"])
        Unmatched(missing_keys=[], unexpected_keys=[])
    """
    state = {name: part.state_dict() if isinstance(part, Stateful) else part for name, part in parts.items()}
    with replaced(path) as partial:
        torch.save(state, partial)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``save_checkpoint`` wrote, on the CPU, with the state of each part under its name.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is none.
        StateError: it is truncated, has a byte that changed, or is another kind of file.
    """
    try:
        # Torch itself does not look at the checksums of what it reads.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        loaded = None if damaged is not None else torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise StateError(
            f"{os.fspath(path)} is no checkpoint, or is truncated ({error}): use the one before"
        ) from error
    if damaged is not None:
        raise StateError(f"{os.fspath(path)} is damaged: the checksum of {damaged} is another. Use the one before.")
    if not isinstance(loaded, dict):
        raise StateError(
            f"{os.fspath(path)} holds a {type(loaded).__name__}, expected the parts that kc.save_checkpoint wrote"
        )
    return loaded
