"""Which layers' inverses are refreshed at a step, by a schedule: all together, one by one, or those that have moved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from .checks import is_whole
from .costs import refresh_flops
from .damping import DampingNow
from .layers.layer import Layer
from .schedules import Adaptive, Clock, Schedule
from .sharing import Shared


class Refreshes:
    """The refreshes of the layers that there are.

    Args:
        schedule: says when.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._change = schedule.inverses.change if isinstance(schedule.inverses, Adaptive) else None
        self._of_all = not schedule.stagger and self._change is None
        self._period = schedule.inverses if is_whole(schedule.inverses) else 1
        self._at: dict[int, list[str]] = {}
        self._layers: Mapping[str, Layer] | None = None

    def now(self, shared: Shared, clock: Clock, damping: DampingNow) -> None:
        """Do what this step has to do.

        A layer at a step of its own is refreshed whether or not the step will count: of a step that is taken back
        nothing was taken in, so that the next one does the same again.

        Raises:
            LikelihoodError, NumericalError: as ``Factors.refresh`` does.
        """
        schedule, step, first = self._schedule, clock.at_most, not shared.factors.inverted
        own, everything = self._own(shared, step), self._of_all or schedule.warming(step)
        due = clock.inverses_due()
        if due or shared.factors.waiting:
            only = () if self._change is None else shared.factors.changed(self._change)
            shared.refresh(damping, only=None if everything else only)
            if self._change is not None:
                shared.factors.remember()
        if not (first or (due and everything)):
            shared.refresh_unread(own, damping)
        shared.rescale(damping)

    def at(self, shared: Shared, step: int) -> set[str]:
        """The layers that may be refreshed at a step; nothing is read."""
        everything = self._of_all or self._change is not None or self._schedule.warming(step)
        due = everything and self._schedule.inverses_due(step)
        return set(shared.layers if due else self._own(shared, step))

    def _own(self, shared: Shared, step: int) -> list[str]:
        """The layers that have this step for their own, found anew where the layers are others than before."""
        if self._layers is not shared.layers:
            self._layers, self._at = shared.layers, defaultdict(list)
            costs = {name: refresh_flops(layer, shared.costing) for name, layer in shared.layers.items()}
            for name, own in self._schedule.offsets(costs).items():
                self._at[own].append(name)
        return self._at.get(step % self._period, [])
