"""When factors are captured, when inverses are refreshed, and how fast the average forgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .checks import is_number, is_whole
from .errors import ArgumentError

#: A period in steps, a callable of the step that says whether it is due, or None for never.
When = int | Callable[[int], bool] | None


@dataclass(frozen=True)
class Adaptive:
    """Refresh a layer where its factors have moved, in place of a period.

    Looked at once a period of ``factors``, which reads one number a layer from the device.

    Args:
        change: the relative change in the Frobenius norm, of A or of G since the layer's last refresh, beyond which it
            is refreshed.
    """

    change: float = 0.2

    def __post_init__(self) -> None:
        if not (is_number(self.change) and self.change > 0):
            raise ArgumentError(f"Adaptive(change={self.change!r}): expected a positive number, as 0.2 for a fifth")

    def __str__(self) -> str:
        return f"where factors change by {100 * self.change:g} %"


@dataclass(frozen=True)
class Schedule:
    """What happens at which optimizer step, counted from 0.

    Args:
        factors: capture every so many steps, the first step included; a callable of the step; or None for never.
        inverses: refresh the inverses likewise; or ``kc.Adaptive(change)``, by how far the factors have moved.
        decay: rho of the moving average per capture, in [0, 1); a number or a callable of the step.
        warmup: during so many first steps the inverses are also refreshed at 1, 2, 4, 8 ... times the period of
            ``factors``, since the first averages change fast. It needs a number for ``factors``.
        patience: refreshes in a row that may fail (a layer's factorisation, or a whole interval without one finite
            capture) before the run is stopped with a NumericalError.
        stagger: spread the refreshes of the layers over the steps of a period by their cost, so that no step takes much
            longer than another; the first refresh, and those of the warm-up, are of all layers. It needs a number for
            ``inverses``.
    """

    factors: When = 10
    inverses: When | Adaptive = 100
    decay: float | Callable[[int], float] = 0.95
    warmup: int = 0
    patience: int = 10
    stagger: bool = False

    def __post_init__(self) -> None:
        for name in ("factors", "inverses"):
            value = getattr(self, name)
            if name == "inverses" and isinstance(value, Adaptive):
                continue
            if value is not None and not callable(value) and not (is_whole(value) and value >= 1):
                raise ArgumentError(
                    f"Schedule({name}={value!r}): expected a number of steps >= 1, a callable of the step, or None for "
                    f"never"
                )
        if not callable(self.decay) and not _is_share(self.decay):
            raise ArgumentError(
                f"Schedule(decay={self.decay!r}): expected a number in [0, 1), or a callable of the step"
            )
        for name, least in (("warmup", 0), ("patience", 1)):
            value = getattr(self, name)
            if not (is_whole(value) and value >= least):
                raise ArgumentError(f"Schedule({name}={value!r}): expected a whole number >= {least}")
        if not isinstance(self.stagger, bool):
            raise ArgumentError(f"Schedule(stagger={self.stagger!r}): expected True or False")
        if self.stagger and not is_whole(self.inverses):
            raise ArgumentError(
                f"Schedule(stagger=True, inverses={self.inverses!r}): expected a number of steps, over which the "
                f"refreshes are spread"
            )

    def __str__(self) -> str:
        spread = ", layer by layer" if self.stagger else ""
        return f"factors {_in_words(self.factors)}, inverses {_in_words(self.inverses)}{spread}"

    def factors_due(self, step: int) -> bool:
        """Whether a forward at ``step`` is captured."""
        return _due(self.factors, step)

    def inverses_due(self, step: int) -> bool:
        """Whether the inverses are refreshed at ``step``, or looked at: where they are staggered or adaptive."""
        if isinstance(self.inverses, Adaptive):
            return self.factors_due(step)
        return _due(self.inverses, step) or self.warming(step)

    def warming(self, step: int) -> bool:
        """Whether all inverses are refreshed at ``step`` for the warm-up."""
        if step >= self.warmup or not (is_whole(self.factors) and is_whole(self.inverses)):
            return False
        multiple, rest = divmod(step, self.factors)
        return rest == 0 and multiple & (multiple - 1) == 0

    def offsets(self, costs: Mapping[str, int]) -> dict[str, int]:
        """The step within a period of ``inverses`` at which each layer is refreshed, where they are staggered.

        The dearest first, each to the step with the least to do so far: the same wherever it is computed. Steps that
        capture factors have enough to do.

        Args:
            costs: of a refresh, by layer, in any unit.

        Source: Graham 1969 (Bounds on multiprocessing timing anomalies), longest processing time first.
        """
        if not self.stagger:
            return {}
        assert is_whole(self.inverses)
        load = dict.fromkeys(self._free_steps(self.inverses), 0)
        found: dict[str, int] = {}
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            found[name] = min(load, key=lambda step: (load[step], step))
            load[found[name]] += costs[name]
        return found

    def _free_steps(self, period: int) -> range | list[int]:
        """The steps of a period of the inverses that capture nothing; all of them, where there are none such."""
        if is_whole(self.factors) and self.factors > 1 and period % self.factors == 0:
            return [step for step in range(period) if step % self.factors]
        return range(period)

    def decay_at(self, step: int) -> float:
        """rho at ``step``."""
        decay = self.decay(step) if callable(self.decay) else self.decay
        if not _is_share(decay):
            raise ArgumentError(f"Schedule.decay gave {decay!r} at step {step}: expected a number in [0, 1)")
        return decay


class Clock:
    """Counts steps against a schedule, without asking the device at every one whether it skipped.

    A fused optimizer under a gradient scaler decides on the device whether its step counts. Such steps are counted
    here and taken back when the count is settled, which is done only where something may be due: the count is never
    too low, so nothing due is missed. A step at which something is due must be known to count before it is counted.

    Args:
        schedule: what is due when.
        step: the count to start from.
    """

    def __init__(self, schedule: Schedule, step: int = 0) -> None:
        self.schedule = schedule
        #: Whether what this step's forwards left has been taken in.
        self.taken_in = False
        self._step = step
        self._skipped: Tensor | None = None
        self._factors_due: bool | None = None

    @property
    def step(self) -> int:
        """The number of steps so far; waits for the device where it may have skipped some."""
        if self._skipped is not None:
            self._step -= int(self._skipped.item())
            self._skipped = None
        return self._step

    @property
    def at_most(self) -> int:
        """The number of steps so far, if the device skipped none of the last; never waits."""
        return self._step

    def factors_due(self) -> bool:
        """Whether forwards of this step are captured."""
        if self._factors_due is None:
            self._factors_due = self.schedule.factors_due(self._step) and self.schedule.factors_due(self.step)
        return self._factors_due

    def inverses_due(self) -> bool:
        """Whether the inverses are refreshed at this step."""
        return self.schedule.inverses_due(self._step) and self.schedule.inverses_due(self.step)

    def advance(self, skipped: Tensor | None = None) -> None:
        """Count one step; ``skipped``, a flag on the device, takes it back."""
        if skipped is not None:
            self._skipped = skipped.long() if self._skipped is None else self._skipped + skipped
        self._step += 1
        self._factors_due, self.taken_in = None, False


def _is_share(value: object) -> bool:
    return is_number(value) and 0 <= value < 1


def _due(when: When, step: int) -> bool:
    if when is None:
        return False
    return bool(when(step)) if callable(when) else step % when == 0


def _in_words(when: When | Adaptive) -> str:
    if isinstance(when, Adaptive):
        return str(when)
    if when is None:
        return "never"
    if callable(when):
        return "when its callable says"
    return "every step" if when == 1 else f"every {when} steps"
