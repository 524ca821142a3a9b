"""Damping that follows how well the quadratic model predicts: Levenberg-Marquardt, and the preconditioner's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .checks import is_damping, is_number, is_size
from .errors import ArgumentError, StateError

UP = 0.55
"""Where a first lambda is, by logarithm, between what gains half of the most and the curvature along the gradient."""

BEYOND = 1e-3
"""Of lambda, how far it falls on where the batch after a step gains little by it."""


class LevenbergMarquardt:
    """lambda from the reduction ratio rho = (h(theta + delta) - h(theta)) / (M(delta) - M(0)).

    The model M is that with F + eta I, without lambda: where it is right rho is 1, and the damping falls. Every
    ``every`` steps lambda is multiplied by omega = ``decay`` ^ ``every`` where rho > 3/4, and divided by it where
    rho < 1/4. After a step that was taken back it is multiplied by ``growth``.

    Two losses of one batch say nothing of the others: where batches are small or noisy every step looks good on its
    own, and lambda would fall to where it does harm. So it falls freely only while the next batch gains by the steps as
    well, which the model of that batch says of the step before, g^T delta_0 - 1/2 delta_0^T (F + eta I) delta_0, at no
    cost. Once that is less than ``fresh`` of what was predicted it falls to a thousandth of what it was, and stays
    until it is three times as much.

    It is a callable of the step, so that it is a damping for ``kc.KFAC`` too: there the loop measures the two losses,
    and calls ``update(rho)``.

    Args:
        initial: lambda at the start, in the units of the mean loss's Fisher; None has ``kc.NaturalGradient`` find it by
            trial steps.
        every: T1, steps between two changes; None keeps lambda but for steps that were taken back.
        check: steps between two looks at the loss after the step, which cost a forward each: a step that is not looked
            at is not taken back. A divisor of ``every``.
        decay: the factor of one step.
        growth: of a step that was taken back.
        fresh: the share of what steps were predicted to gain that the batch after each must have gained, for lambda to
            fall freely; minus infinity to leave that out. On one and the same batch it is near 1.
        least: of lambda at the least.
        most: at the most.

    Raises:
        ArgumentError: a number out of range.

    Source: Martens & Grosse 2015 (arXiv:1503.05671), section 6.5; More 1978 for the rule.
    """

    def __init__(
        self,
        initial: float | None = None,
        *,
        every: int | None = 5,
        check: int = 1,
        decay: float = 0.95,
        growth: float = 1.5,
        fresh: float = 0.25,
        least: float = 1e-8,
        most: float = 1e8,
    ) -> None:
        if initial is not None and not (is_damping(initial) and least <= initial <= most):
            raise ArgumentError(
                f"LevenbergMarquardt(initial={initial!r}): expected a number from least={least!r} to most={most!r}, or "
                f"None to find one by trial steps"
            )
        for name, period in (("every", 1 if every is None else every), ("check", check)):
            if not is_size(period):
                raise ArgumentError(f"LevenbergMarquardt({name}={period!r}): expected a number of steps >= 1")
        if every is not None and every % check:
            raise ArgumentError(f"LevenbergMarquardt(check={check}): expected a divisor of every={every}")
        if not (is_number(decay) and 0 < decay <= 1):
            raise ArgumentError(f"LevenbergMarquardt(decay={decay!r}): expected a number in (0, 1]")
        if not (is_number(growth) and 1 < growth < math.inf):
            raise ArgumentError(f"LevenbergMarquardt(growth={growth!r}): expected a number above 1")
        if not is_number(fresh):
            raise ArgumentError(f"LevenbergMarquardt(fresh={fresh!r}): expected a number, as 0.25 for a quarter")
        if not (is_damping(least) and is_damping(most) and least < most):
            raise ArgumentError(f"LevenbergMarquardt(least={least!r}, most={most!r}): expected 0 <= least < most")
        self.initial, self.every, self.check = initial, every, check
        self.decay, self.growth, self.least, self.most = decay, growth, least, most
        self.fresh = fresh
        self._value = initial
        #: lambda when the next batch first gained too little; 0 while it gains enough.
        self._turn = 0.0
        #: Sums since the last change: what steps added to the objective of the batch after theirs, and of their own.
        self._added, self._predicted = 0.0, 0.0

    @property
    def started(self) -> bool:
        """Whether there is a lambda."""
        return self._value is not None

    @property
    def value(self) -> float:
        """lambda now.

        Raises:
            ArgumentError: none was given, and nobody has found one.
        """
        if self._value is None:
            raise ArgumentError(
                "LevenbergMarquardt() has no lambda yet: kc.NaturalGradient finds one at its first step; elsewhere "
                "give LevenbergMarquardt(initial=...)"
            )
        return self._value

    def __call__(self, step: int) -> float:
        """lambda, whatever the step."""
        return self.value

    def start(self, value: float) -> None:
        """Go on from this lambda, within the bounds."""
        self._value = min(max(value, self.least), self.most)

    def due(self, step: int) -> bool:
        """Whether lambda may change after ``step``, counted from 0."""
        return self.every is not None and (step + 1) % self.every == 0

    def looks(self, step: int) -> bool:
        """Whether the loss after ``step`` is looked at."""
        return (step + 1) % self.check == 0

    def saw(self, added: float, predicted: float) -> None:
        """Take in what a step added to the objective of the next batch, and what it was predicted to of its own."""
        if math.isfinite(added) and math.isfinite(predicted):
            self._added += added
            self._predicted += predicted

    @property
    def fresh_ratio(self) -> float:
        """What steps since the last change gained on the batch after theirs, over what was predicted; 1 of none."""
        return self._added / self._predicted if self._predicted < 0 else 1.0

    def update(self, ratio: float) -> None:
        """Take in the reduction ratio of a step; one that is NaN says that the model was wrong."""
        omega, fresh = self.decay ** (self.every or 1), self.fresh_ratio
        self._added, self._predicted = 0.0, 0.0
        if not ratio >= 0.25:
            self.start(self.value / omega)
        elif ratio > 0.75:
            if fresh > 3 * self.fresh:
                self._turn = 0.0
            elif fresh <= self.fresh:
                self._turn = self._turn or float(self.value)
            floor = min(BEYOND * self._turn, self.value)
            self.start(max(self.value * omega, floor))

    def reject(self) -> None:
        """A step was taken back."""
        self.start(self.value * self.growth)

    def state_dict(self) -> dict[str, Any]:
        """lambda, and what was seen since it last changed."""
        return {"value": self._value, "added": self._added, "predicted": self._predicted, "turn": self._turn}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave.

        Raises:
            StateError: it is not that.
        """
        value = _damping_in(saved, "lambda")
        sums = [one for one in map(saved.get, ("added", "predicted", "turn")) if isinstance(one, float)]
        if len(sums) < 3:
            raise StateError(f"the state of lambda has the sums {sums}: expected three numbers, the file is damaged")
        self._value = value
        self._added, self._predicted, self._turn = sums

    def __repr__(self) -> str:
        value = "to be found" if self._value is None else f"{self._value:g}"
        return f"LevenbergMarquardt({value}, every={self.every})"


class FactorDamping:
    """gamma, the square root of what damps the preconditioner, found by trying three of them.

    Every ``every`` steps gamma, gamma omega and gamma / omega are tried, omega = ``decay`` ^ ``every``, and that one
    goes on whose step the quadratic model, with exact products, says to gain the most. It starts from the tied value,
    sqrt(lambda + eta). Each try inverts all factors.

    Args:
        every: T2, steps between two tries.
        decay: the factor of one step; None for sqrt(0.95).

    Raises:
        ArgumentError: a number out of range.

    Source: Martens & Grosse 2015 (arXiv:1503.05671), section 6.6.
    """

    def __init__(self, every: int = 20, *, decay: float | None = None) -> None:
        decay = math.sqrt(0.95) if decay is None else decay
        if not is_size(every):
            raise ArgumentError(f"FactorDamping(every={every!r}): expected a number of steps >= 1")
        if not (is_number(decay) and 0 < decay < 1):
            raise ArgumentError(f"FactorDamping(decay={decay!r}): expected a number in (0, 1)")
        self.every, self.decay = every, decay
        self._value: float | None = None

    def at(self, tied: float) -> float:
        """gamma now; ``tied`` is sqrt(lambda + eta), from which it starts."""
        if self._value is None:
            self._value = tied
        return self._value

    def due(self, step: int) -> bool:
        """Whether three are tried at ``step``, counted from 0."""
        return step % self.every == 0

    def candidates(self, tied: float, least: float) -> tuple[float, ...]:
        """gamma and its neighbours, none below ``least``, sqrt(eta)."""
        now, omega = self.at(tied), self.decay**self.every
        return tuple(dict.fromkeys(max(one, least) for one in (now, now * omega, now / omega)))

    def choose(self, candidates: Sequence[float], changes: Sequence[float]) -> float:
        """Go on with the candidate of the lowest M(delta) - M(0); those that are not finite are out."""
        usable = [(change, gamma) for gamma, change in zip(candidates, changes, strict=True) if math.isfinite(change)]
        if usable:
            self._value = min(usable)[1]
        return self.at(candidates[0])

    def state_dict(self) -> dict[str, Any]:
        """gamma, which is all that changes."""
        return {"value": self._value}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave.

        Raises:
            StateError: it is not that.
        """
        self._value = _damping_in(saved, "gamma")

    def __repr__(self) -> str:
        return f"FactorDamping(every={self.every})"


def calibrated(
    trial: Callable[[float], tuple[float, float]], start: float, *, factor: float = 10.0, limit: int = 8
) -> float:
    """Find the lambda of a first step by taking it with several.

    From ``start`` on lambda falls, past those that gain no more, or by a model that is not fair: a step with little
    damping may gain ten times what those between do. The largest that gains half of the most is fast on that batch, and
    fits what is of that batch alone; at ``start`` the step is one of gradient descent, which fits what many batches
    share. It goes on a little above the geometric mean of the two. Where the model is not fair at the start lambda
    grows until it is.

    Args:
        trial: of lambda; gives the reduction ratio of its step, and what the step added to the objective.
        start: a lambda of the size of the curvature along the gradient.
        factor: between two of them.
        limit: trials.
    """
    value = start
    ratio, change = trial(value)
    if not ratio >= 0.5:
        for _ in range(limit - 1):
            value *= factor
            if trial(value)[0] >= 0.25:
                break
        return value
    gains = {value: change}
    for _ in range(limit - 1):
        value /= factor
        ratio, change = trial(value)
        if ratio >= 0.25 and change < min(gains.values()):
            gains[value] = change
    fast = max(value for value, change in gains.items() if change <= min(gains.values()) / 2)
    return fast * math.pow(start / fast, UP)


def _damping_in(saved: Mapping[str, Any], symbol: str) -> float | None:
    """What a state has of lambda or gamma, None where none was found yet; nothing else is taken for one."""
    value = saved.get("value", math.nan) if isinstance(saved, Mapping) else math.nan
    if not (value is None or is_damping(value)):
        raise StateError(f"the state has {symbol} = {value!r}: expected a number, the file is damaged")
    return value
