"""Natural gradient that tunes itself: direction, learning rate, momentum and damping from a quadratic model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .adaptive import FactorDamping, LevenbergMarquardt, calibrated
from .checks import described, is_damping, settings_of
from .data import Data
from .directions import Direction, Exact, Kernel, Preconditioned, Preconditioner, Solver, Tensors
from .errors import ArgumentError, StateError
from .heads import Distribution
from .objective import Batch, Objective
from .quadratic import QuadraticModel, inner, quadratic_model
from .schedules import Schedule
from .trust_region import Bound, as_bound

LEAST_EXAMPLES = 128
"""In products with the exact Fisher, where the batch has them."""


class NaturalGradient(Optimizer):
    """...
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Distribution | str | nn.Module,
        *,
        direction: str | Direction = "kfac",
        damping: float | LevenbergMarquardt | None = None,
        l2: float = 0.0,
        schedule: Schedule | None = None,
        trust_region: Bound | None = None,
        data: Data | None = None,
    ) -> None:
        self.direction = Direction(direction) if isinstance(direction, str) else direction
        if not isinstance(self.direction, Direction):
            raise ArgumentError(f"direction is {described(direction)}: expected a word, or kc.Direction(...)")
        if not is_damping(l2):
            raise ArgumentError(f"l2={l2!r}: expected a finite number >= 0")
        self.damping = _as_rule(damping)
        self.trust_region = as_bound(trust_region)
        self.objective = Objective(model, likelihood, data=data)
        schedule = Schedule(factors=1, inverses=5) if schedule is None else settings_of(schedule, Schedule, "schedule")
        self._kfac: Preconditioner | None = None
        if self.direction.name != "gram":
            self._kfac = Preconditioner(self.objective, self.direction, schedule, data)
        self._solver = self._made_solver()
        self._steps = 0
        self._rejected = 0
        self._stale = False
        self._last: dict[str, float] = {}
        super().__init__(self.objective.tensors, {"l2": float(l2)})

    def _made_solver(self) -> Solver:
        if self._kfac is None:
            return Kernel(self.objective)
        if self.direction.name == "exact":
            return Exact(self.objective, self._kfac, self.direction.iteration)
        return Preconditioned(self.objective, self._kfac)

    # -- what a user calls --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, inputs: Any, targets: Any = None) -> Tensor:
        self.objective.l2 = self.param_groups[0]["l2"]
        batch = Batch(inputs, targets)
        found = self.objective.here(batch)
        loss = self.objective.value(found.loss)
        if self._kfac is not None:
            self._kfac.hear(found.heads)
        gradient = self.objective.gradient(found.loss)
        del found
        starting = not self.damping.started
        if starting:
            self.damping.start(self._steepest(batch, gradient))
        self._take_in()
        if self._steps >= self.direction.burn_in:
            if starting:
                self._calibrate(batch, gradient, loss)
            self._move(batch, gradient, loss)
        if self._kfac is not None:
            self._kfac.advance(None)
        self._steps += 1
        return loss

    def metrics(self) -> dict[str, Any]:
        """Numbers for a logger as a flat dict."""
        found: dict[str, Any] = {} if self._kfac is None else self._kfac.metrics()
        found.pop("kfac/damping", None)
        return found | {"step": self._steps, "rejected": self._rejected, **self._last}

    # -- the step -----------------------------------------------------------------------------------------------------

    @property
    def _added(self) -> float:
        return self.damping.value + self.objective.l2

    def _gamma(self) -> float:
        own = self.direction.factor_damping
        tied = math.sqrt(self._added)
        return tied if own is None else own.at(tied)

    def _take_in(self) -> None:
        if self._kfac is None:
            return
        self._kfac.square = self._gamma() ** 2
        self._kfac.take_in()
        if self._stale:
            self._kfac.invert()
        self._stale = False

    def _part(self, batch: Batch) -> Batch:
        size = batch.size
        if size is None:
            return batch
        wanted = max(LEAST_EXAMPLES, math.ceil(self.direction.share * size))
        return batch.part(max(1, size // wanted), self._steps)

    def _steepest(self, batch: Batch, gradient: Tensors) -> float:
        """g^T F g / g^T g: the curvature along the gradient."""
        (row,) = self.objective.pushed(self._part(batch), [gradient])
        found = inner([row], [row]) / inner(gradient, gradient)
        return float(found)

    def _directions(self, part: Batch, gradient: Tensors) -> list[Tensors]:
        found = self._solver.directions(gradient, part, self._added)
        before = [self.state[p].get("previous") for p in self.objective.tensors]
        if all(one is not None for one in before):
            found.append(before)
        return found

    def _tried(self, part: Batch, gradient: Tensors) -> tuple[list[Tensors], QuadraticModel, Tensor]:
        directions = self._directions(part, gradient)
        model = quadratic_model(self.objective.pushed(part, directions), directions, gradient)
        c = model.coefficients(self._added)
        if self.trust_region is not None:
            c = c * self.trust_region.bound(model.quadratic_form(c), model.square(c))
        return directions, model, c

    def _move(self, batch: Batch, gradient: Tensors, loss: Tensor) -> None:
        part = self._part(batch)
        if self.direction.factor_damping is not None and self.direction.factor_damping.due(self._steps):
            self._search(part, gradient)
        directions, model, c = self._tried(part, gradient)
        delta, kept = self._moved(directions, c)
        looks = self.damping.looks(self._steps)
        after = self.objective.again(batch) if looks else loss
        numbers = [loss, after, model.change(c, self.objective.l2), c[0], c[-1]]
        before, now, predicted, rate, momentum = torch.stack([one.to(c) for one in numbers]).tolist()
        self._last = {"damping": self.damping.value, "gamma": self._gamma(), "rate": rate, "momentum": momentum if len(c)>1 else 0.0,
            "predicted": predicted, "ratio": (now - before) / predicted if predicted < 0 else math.nan}
        noise = 10 * torch.finfo(loss.dtype).eps * abs(before)
        if looks and not now <= before + noise or not math.isfinite(before):
            for p, one in zip(self.objective.tensors, kept, strict=True):
                p.copy_(one)
                self.state[p].pop("previous", None)
            self._rejected += 1
            self.damping.reject()
            self._stale = True
            return
        for p, one in zip(self.objective.tensors, delta, strict=True):
            self.state[p]["previous"] = one
        if looks and self.damping.due(self._steps) and abs(predicted) > noise:
            self.damping.update(self._last["ratio"])

    def _moved(self, directions: list[Tensors], c: Tensor) -> tuple[Tensors, Tensors]:
        """Move the parameters by sum_i c_i d_i; gives the step and what they were."""
        factors = c.unbind()
        delta, kept = [], []
        for index, p in enumerate(self.objective.tensors):
            step = directions[0][index] * factors[0].to(p)
            for factor, direction in zip(factors[1:], directions[1:], strict=True):
                step = step + factor.to(p) * direction[index]
            kept.append(p.detach().clone())
            p.add_(step)
            delta.append(step)
        return delta, kept

    def _search(self, part: Batch, gradient: Tensors) -> None:
        own = self.direction.factor_damping
        assert own is not None and self._kfac is not None
        tied = math.sqrt(self._added)
        candidates = own.candidates(tied, math.sqrt(self.objective.l2))
        changes = []
        for gamma in candidates:
            self._kfac.square = gamma**2
            self._kfac.invert()
            _, model, c = self._tried(part, gradient)
            changes.append(float(model.change(c, self._added)))
        self._kfac.square = own.choose(candidates, changes) ** 2
        self._kfac.invert()

    def _calibrate(self, batch: Batch, gradient: Tensors, loss: Tensor) -> None:
        part = self._part(batch)

        def trial(value: float) -> tuple[float, float]:
            """(reduction ratio, change) of the first step with this lambda."""
            self.damping.start(value)
            if self._kfac is not None:
                self._kfac.square = self._gamma() ** 2
                self._kfac.invert()
            directions, model, c = self._tried(part, gradient)
            _, kept = self._moved(directions, c)
            after = self.objective.again(batch)
            for p, one in zip(self.objective.tensors, kept, strict=True):
                p.copy_(one)
            numbers = [after - loss, model.change(c, self.objective.l2)]
            change, predicted = torch.stack([one.to(c) for one in numbers]).tolist()
            self.trials.append((value, change, predicted, c.tolist()))
            return change / predicted if predicted < 0 else math.nan, change
        self.trials = []
        best = calibrated(trial, self.damping.value)
        self.damping.start(best)
        if self._kfac is not None:
            self._kfac.square = self._gamma() ** 2
            self._kfac.invert()


def _as_rule(damping: object) -> LevenbergMarquardt:
    if isinstance(damping, LevenbergMarquardt):
        return damping
    if damping is None or is_damping(damping):
        return LevenbergMarquardt(damping)
    raise ArgumentError(
        f"damping is {described(damping)}: expected a number to start from, kc.LevenbergMarquardt(...), or None"
    )
