"""Counter-based label draws: a seed and a step give the generators, so that numbers alone are saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

POSITIONS = 2**31
"""In the place of a head: the streams that positions are chosen by."""


class Draws:
    """Generators of label draws: one for each draw of a step, the same whenever that step comes.

    Micro-batches of one step go on in the same stream, so that on CPU the draw of an example does not depend on how
    the data are split. The global generator is neither read from nor advanced. Data-parallel ranks differ.

    Args:
        seed: None takes ``torch.initial_seed()``.
        rank: this process among those with different data; None asks ``torch.distributed`` where it draws.
    """

    def __init__(self, seed: int | None = None, *, rank: int | None = None) -> None:
        self.seed = torch.initial_seed() if seed is None else int(seed)
        self.rank = rank
        self._step = -1
        self._streams: dict[tuple[int, int, torch.device], torch.Generator] = {}

    def generators(self, *, step: int, count: int, device: torch.device, head: int = 0) -> list[torch.Generator | None]:
        """The generators of ``count`` draws of a head at ``step``; None each on the meta device: it draws nothing."""
        if device.type == "meta":
            return [None] * count
        if step != self._step:
            self._step = step
            self._streams.clear()
        return [self._stream(head, draw, device) for draw in range(count)]

    def restart(self) -> None:
        """Begin the label streams of the step under way anew; positions were chosen already, and stay."""
        self._streams = {key: stream for key, stream in self._streams.items() if key[0] == POSITIONS}

    def state(self) -> dict[str, Any]:
        """Where the streams of the step under way stand, as plain numbers and tensors."""
        streams = [
            {"head": head, "draw": draw, "device": str(device), "state": stream.get_state()}
            for (head, draw, device), stream in self._streams.items()
        ]
        return {"step": self._step, "streams": streams}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken; a stream of a device that is not there starts its step anew.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: it is not such a state.
        """
        self._step = int(state["step"])
        self._streams.clear()
        for entry in state["streams"]:
            device = torch.device(entry["device"])
            if device.type == "cpu" or torch.get_device_module(device).is_available():
                key = (int(entry["head"]), int(entry["draw"]), device)
                self._streams[key] = torch.Generator(device).set_state(entry["state"].cpu())

    def _stream(self, head: int, draw: int, device: torch.device) -> torch.Generator:
        stream = self._streams.get((head, draw, device))
        if stream is None:
            rank = self.rank
            if rank is None:
                rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
            key = [self.seed % 2**64, self._step, draw, rank, *([head] if head else [])]
            words = np.random.SeedSequence(key).generate_state(1, np.uint64)
            # Half of the range: a seed is a signed number to some devices.
            stream = torch.Generator(device=device).manual_seed(int(words[0]) >> 1)
            self._streams[head, draw, device] = stream
        return stream
