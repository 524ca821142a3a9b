"""Which layers' inverses are refreshed at a step, by a schedule: all together, one by one, or those that have moved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from .checks import is_whole
from .costs import Plan, refresh_flops
from .damping import DampingNow
from .factors import Factors
from .layers.layer import Layer
from .schedules import Adaptive, Clock, Schedule


class Refreshes:
    """The refreshes of some layers.

    Args:
        schedule: says when.
        layers: by name.
        plan: what their costs depend on.
    """

    def __init__(self, schedule: Schedule, layers: Mapping[str, Layer], plan: Plan) -> None:
        self._schedule = schedule
        self._change = schedule.inverses.change if isinstance(schedule.inverses, Adaptive) else None
        self._of_all = not schedule.stagger and self._change is None
        self._period = schedule.inverses if is_whole(schedule.inverses) else 1
        self._at: dict[int, list[str]] = defaultdict(list)
        for name, step in schedule.offsets(
            {name: refresh_flops(layer, plan) for name, layer in layers.items()}
        ).items():
            self._at[step].append(name)

    def now(self, factors: Factors, clock: Clock, damping: DampingNow) -> None:
        """Do what this step has to do.

        A layer at a step of its own is refreshed whether or not the step will count: of a step that is taken back
        nothing was taken in, so that the next one does the same again.

        Raises:
            LikelihoodError, NumericalError: as ``Factors.refresh`` does.
        """
        schedule, step, first = self._schedule, clock.at_most, not factors.inverses
        everything = self._of_all or schedule.warming(step)
        due = clock.inverses_due()
        if due or factors.waiting:
            only = () if self._change is None else factors.changed(self._change)
            factors.refresh(damping, only=None if everything else only)
            if self._change is not None:
                factors.remember()
        factors.rescale(damping)
        if not (first or (due and everything)):
            factors.refresh_unread(self._at.get(step % self._period, ()), damping)
