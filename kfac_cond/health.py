"""What went wrong on the device, noted without waiting for it and read once per refresh."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor

from .errors import LikelihoodError, NumericalError
from .linalg.ladder import Rung
from .statistics import Statistics

logger = logging.getLogger("kfac_cond")

_REMEDY = "look for NaN or infinite inputs, too high a learning rate, or fp16 overflow"


class Flags:
    """What captures said of themselves, counted on the device.

    Args:
        captures: how many; a tensor where ranks have had different numbers of them.
        counts: of each flag.
    """

    def __init__(self, captures: int | Tensor = 0, counts: Mapping[str, Tensor] | None = None) -> None:
        self.captures = captures
        self.counts: dict[str, Tensor] = dict(counts or {})

    def note(self, statistics: Statistics, *, invalid_labels: Tensor) -> None:
        """Add one capture's flags; nothing is read."""
        self.captures += 1
        self.count("captures", ~statistics.finite)
        self.count("usable", statistics.finite & (statistics.divisor > 0).any())
        self.count("labels", invalid_labels)
        for name, flag in statistics.nonfinite.items():
            self.count(f"layer {name}", flag)

    def add(self, other: Flags) -> None:
        """Add the flags of other captures."""
        self.captures = self.captures + other.captures
        for key, count in other.counts.items():
            self.count(key, count)

    def count(self, key: str, flag: Tensor) -> None:
        """Add a flag, or a count, to those under a key."""
        before = self.counts.get(key)
        self.counts[key] = flag.long() if before is None else before.to(flag.device) + flag

    def read(self) -> Counter[str] | None:
        """The counts on the host, with ``number`` of captures; None on the meta device, where nothing can be read."""
        counts = dict(self.counts)
        if isinstance(self.captures, Tensor):
            counts["number"] = self.captures
        if any(count.is_meta for count in counts.values()):
            return None
        read = Counter({} if isinstance(self.captures, Tensor) else {"number": self.captures})
        if counts:
            device = next(iter(counts.values())).device
            numbers = torch.stack([count.to(device) for count in counts.values()]).tolist()
            read.update(dict(zip(counts, numbers, strict=True)))
        return read


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
        #: Layers that at the last read were found to want another refresh: at a step of their own it failed, or was not
        #: enough.
        self.unsettled: Set[str] = set()
        self._warned = False
        self._named: set[tuple[str, Rung]] = set()
        self._unread = Flags()

    def add(self, flags: Flags) -> None:
        """Take in the flags of the captures that a step took; nothing is read."""
        self._unread.add(flags)

    def noted(self, what: str, flags: Mapping[str, Tensor]) -> None:
        """Take in what was found of layers on the step path, 0-d bool by layer; nothing is read."""
        for name, flag in flags.items():
            self._unread.count(f"{what} {name}", flag)

    def unread(self, name: str) -> Tensor | None:
        """What was noted of a layer and not read yet: how often it was left unsettled."""
        return self._unread.counts.get(f"unsettled {name}")

    def told(self, name: str, noted: Tensor | None) -> None:
        """Take over what a layer's owner has noted of it."""
        if noted is not None:
            self._unread.counts[f"unsettled {name}"] = noted

    def restricted(self, names: Iterable[str], *, without: Iterable[str]) -> Health:
        """The same counts for these layers; the failures of those in ``without`` and of new ones start at zero."""
        kept = self.failures.keys() - set(without)
        fresh = copy.copy(self)
        fresh.failures = {name: self.failures[name] if name in kept else 0 for name in names}
        return fresh

    def state(self) -> dict[str, Any]:
        """Plain numbers, what was noted and not read yet among them; waits for the device."""
        unread = dict(self._unread.read() or {})
        return {
            "skipped_captures": self.skipped_captures,
            "barren_intervals": self.barren_intervals,
            "started": self.started,
            "failures": dict(self.failures),
            "captures": unread.pop("number", 0),
            "unread": unread,
        }

    def load_state(self, state: Mapping[str, Any], names: Iterable[str]) -> None:
        """Take over what ``state`` gave, of these layers.

        Raises:
            KeyError, TypeError, ValueError: it is not that.
        """
        self.skipped_captures = int(state["skipped_captures"])
        self.barren_intervals = int(state["barren_intervals"])
        self.started = bool(state["started"])
        self.failures.update({name: int(state["failures"][name]) for name in names})
        self._unread.captures = int(state["captures"])
        self._unread.counts = {str(key): torch.tensor(int(count)) for key, count in state["unread"].items()}

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
        unread, self._unread = self._unread, Flags()
        counts = unread.read()
        if counts is None:
            self.started, self.unsettled = True, set()
            return True
        captures = counts["number"]
        self.unsettled = {name for name in self.failures if counts[f"unsettled {name}"]}
        if not captures:
            return self.started
        bad = counts["captures"]
        self.started = self.started or counts["usable"] > 0
        self.skipped_captures += bad
        self.barren_intervals = self.barren_intervals + 1 if bad == captures else 0
        if counts["labels"]:
            raise LikelihoodError(
                f"{counts['labels']} of the last {captures} captures had labels out of the likelihood's range; their "
                f"statistics were kept out. Check the data labels, ignore_index and injected draws."
            )
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
        # Once; the count goes on in the metrics.
        logger.log(logging.DEBUG if self._warned else logging.WARNING, "%s; they were left out: %s.", found, _REMEDY)
        self._warned = True
        return self.started

    def climbed(self, rungs: Mapping[str, Rung]) -> None:
        """Take in how far each layer's factorisation climbed.

        Raises:
            NumericalError: a layer has had no new inverse for ``patience`` refreshes in a row.
        """
        for name, rung in rungs.items():
            failed = rung >= Rung.PREVIOUS
            self.failures[name] = self.failures.get(name, 0) + 1 if failed else 0
            if rung != Rung.FIRST and (name, rung) not in self._named:
                self._named.add((name, rung))
                logger.warning("layer '%s': its factorisation ended on the rung %s", name, rung.name)
            if self.failures[name] >= self.patience:
                raise NumericalError(
                    f"layer '{name}': no factorisation for {self.failures[name]} refreshes in a row: raise the "
                    f"damping, or {_REMEDY}."
                )
