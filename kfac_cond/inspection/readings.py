"""Numbers of one step: measured on the device, on their way to the host without anybody waiting, and there by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor

from ..statistics import count_dtype
from .findings import Finding

ABSENT = -inf
"""What stands for a number that there is not: over ranks the largest is taken, which is that of whoever has it."""


@dataclass(frozen=True)
class Reading:
    """What was measured at one step.

    Args:
        step: the count of steps.
        whole: numbers of the whole, by quantity.
        layers: by layer and quantity; what there is not is absent.
        spectra: by layer and side, the diagonal of a factor, or its eigenvalues where the inverse is in their basis.
        findings: what is to be looked at.
    """

    step: int
    whole: Mapping[str, float]
    layers: Mapping[str, Mapping[str, float]]
    spectra: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    findings: Sequence[Finding] = ()

    def flat(self) -> dict[str, float]:
        """All numbers by one tag each: 'kfac/quantity', and 'kfac_quantity/layer', which groups layers by quantity."""
        found = {f"kfac/{quantity}": value for quantity, value in self.whole.items()}
        for layer, numbers in self.layers.items():
            found |= {f"kfac_{quantity}/{layer or 'model'}": value for quantity, value in numbers.items()}
        return found


class Measured:
    """Numbers of some layers on the device, in an order that does not depend on which of them there are.

    Args:
        device: where they are brought together.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._keys: list[tuple[str, str, int]] = []
        self._parts: list[Tensor] = []

    def add(self, layer: str, names: Iterable[str], values: Mapping[str, Tensor]) -> None:
        """Take in numbers, 0-d each; of ``names`` that have no value it is noted that there is none."""
        for name in names:
            value = values.get(name)
            self._put(layer, name, 1, None if value is None else value.reshape(1))

    def add_row(self, layer: str, name: str, size: int, values: Tensor | None) -> None:
        """Take in so many numbers at once."""
        self._put(layer, f"[{name}", size, None if values is None else values.reshape(-1))

    def _put(self, layer: str, name: str, size: int, values: Tensor | None) -> None:
        self._keys.append((layer, name, size))
        dtype = count_dtype(self.device)
        if values is None:
            self._parts.append(torch.full((size,), ABSENT, dtype=dtype, device=self.device))
        else:
            there = values.to(self.device, dtype, non_blocking=True)
            self._parts.append(torch.nan_to_num(there, nan=inf, posinf=inf, neginf=ABSENT))

    def vector(self) -> Tensor:
        """All of them as one."""
        return torch.cat([torch.empty(0, dtype=count_dtype(self.device), device=self.device), *self._parts])

    def named(self, numbers: Sequence[float]) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, Any]]]:
        """Numbers by layer and name, and rows likewise, of what ``vector`` became on the host."""
        single: dict[str, dict[str, float]] = {}
        rows: dict[str, dict[str, Any]] = {}
        start = 0
        for layer, name, size in self._keys:
            values = numbers[start : start + size]
            start += size
            if values and values[0] == ABSENT:
                continue
            if name.startswith("["):
                rows.setdefault(layer, {})[name[1:]] = tuple(values)
            else:
                single.setdefault(layer, {})[name] = values[0]
        return single, rows


class Arriving:
    """A vector on its way to the host: nobody waits for it who does not ask for the numbers.

    Args:
        vector: on whatever device; not changed until it has arrived.
    """

    def __init__(self, vector: Tensor) -> None:
        self._there, self._event = vector, None
        if vector.device.type in ("cpu", "meta"):
            return
        module = torch.get_device_module(vector.device)
        if not (hasattr(module, "Event") and hasattr(module, "current_stream")):
            return
        self._there = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
        self._there.copy_(vector, non_blocking=True)
        self._event = module.Event()
        self._event.record(module.current_stream(vector.device))

    @property
    def arrived(self) -> bool:
        """Whether asking for the numbers waits for nothing."""
        return bool(self._event.query()) if self._event is not None else self._there.device.type in ("cpu", "meta")

    def numbers(self) -> list[float] | None:
        """The numbers, waited for if need be; None on the meta device, where there are none."""
        if self._there.is_meta:
            return None
        if self._event is not None:
            self._event.synchronize()
        found: list[float] = self._there.tolist()
        return found
