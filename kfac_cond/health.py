"""What went wrong on the device, noted without waiting for it and read once per refresh."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import LikelihoodError, NumericalError
from .linalg.ladder import Rung
from .statistics import Statistics

logger = logging.getLogger("kfac_cond")

_REMEDY = "look for NaN or infinite inputs, too high a learning rate, or fp16 overflow"


class Health:
    """Counts of captures that were not usable and of factorisations that failed, by layer.

    Args:
        names: the layers.
        patience: intervals between refreshes, or failed factorisations, in a row before the run is stopped.
    """

    def __init__(self, names: Iterable[str], *, patience: int) -> None:
        self.patience = patience
        self.failures: dict[str, int] = dict.fromkeys(names, 0)
        self.skipped_captures = 0
        self.barren_intervals = 0
        self.started = False
        self._captures = 0
        self._rungs: dict[str, Rung] = {}
        self._unread: dict[str, Tensor] = {}

    def note(self, statistics: Statistics, *, invalid_labels: Tensor) -> None:
        """Add one capture's flags; nothing is read."""
        self._captures += 1
        self._count("captures", ~statistics.finite)
        self._count("usable", statistics.finite & (statistics.divisor > 0))
        self._count("labels", invalid_labels)
        for name, flag in statistics.nonfinite.items():
            self._count(f"layer {name}", flag)

    def _count(self, key: str, flag: Tensor) -> None:
        before = self._unread.get(key)
        self._unread[key] = flag.long() if before is None else before.to(flag.device) + flag

    def restricted(self, names: Iterable[str], *, without: Iterable[str]) -> Health:
        """The same counts for these layers; the failures of those in ``without`` and of new ones start at zero."""
        kept = self.failures.keys() - set(without)
        fresh = copy.copy(self)
        fresh.failures = {name: self.failures[name] if name in kept else 0 for name in names}
        return fresh

    def state(self) -> dict[str, Any]:
        """Plain numbers, what was noted and not read yet among them; waits for the device."""
        return {
            "skipped_captures": self.skipped_captures,
            "barren_intervals": self.barren_intervals,
            "started": self.started,
            "failures": dict(self.failures),
            "captures": self._captures,
            "unread": {key: 0 if count.is_meta else int(count.item()) for key, count in self._unread.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state`` gave.

        Raises:
            KeyError, TypeError, ValueError: it is not that.
        """
        self.skipped_captures = int(state["skipped_captures"])
        self.barren_intervals = int(state["barren_intervals"])
        self.started = bool(state["started"])
        self.failures.update({name: int(state["failures"][name]) for name in self.failures})
        self._captures = int(state["captures"])
        self._unread = {str(key): torch.tensor(int(count)) for key, count in state["unread"].items()}

    def read(self, *, first: bool) -> bool:
        """Read the flags, once per refresh; warn by name, or raise where the run should not go on.

        Args:
            first: there is nothing from before to go on with.

        Returns:
            Whether any usable capture has come in so far; without one there is nothing to invert.

        Raises:
            LikelihoodError: labels out of range.
            NumericalError: nothing usable to start from, or none for ``patience`` intervals.
        """
        captures, self._captures = self._captures, 0
        unread, self._unread = self._unread, {}
        if not unread:
            return self.started
        if any(count.is_meta for count in unread.values()):
            self.started = True
            return True
        device = next(iter(unread.values())).device
        numbers = torch.stack([count.to(device) for count in unread.values()]).tolist()
        counts = Counter(dict(zip(unread, numbers, strict=True)))
        if counts["labels"]:
            raise LikelihoodError(
                f"{counts['labels']} of the last {captures} captures had labels out of the likelihood's range; their "
                f"statistics were kept out. Check the data labels, ignore_index and injected draws."
            )
        bad = counts["captures"]
        self.started = self.started or counts["usable"] > 0
        self.skipped_captures += bad
        self.barren_intervals = self.barren_intervals + 1 if bad == captures else 0
        if not bad:
            return self.started
        layers = [key.removeprefix("layer ") for key, count in counts.items() if count and key.startswith("layer ")]
        found = (
            f"{bad} of the last {captures} captures had statistics that are not finite"
            f"{f' (first in layer {layers[0]!r}, in {len(layers)} layers)' if layers else ''}"
        )
        if bad == captures and (first or self.barren_intervals >= self.patience):
            since = "there are none before them" if first else f"so for {self.patience} refreshes in a row"
            raise NumericalError(f"{found}, and {since}: {_REMEDY}.")
        logger.warning("%s; they were left out of the average: %s.", found, _REMEDY)
        return self.started

    def climbed(self, rungs: Mapping[str, Rung]) -> None:
        """Take in how far each layer's factorisation climbed.

        Raises:
            NumericalError: a layer has had no new inverse for ``patience`` refreshes in a row.
        """
        for name, rung in rungs.items():
            failed = rung >= Rung.PREVIOUS
            self.failures[name] = self.failures.get(name, 0) + 1 if failed else 0
            if rung not in (Rung.FIRST, self._rungs.get(name)):
                logger.warning("layer '%s': its factorisation ended on the rung %s", name, rung.name)
            self._rungs[name] = rung
            if self.failures[name] >= self.patience:
                raise NumericalError(
                    f"layer '{name}': no factorisation for {self.failures[name]} refreshes in a row: raise the "
                    f"damping, or {_REMEDY}."
                )
