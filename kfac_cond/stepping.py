"""The steps of the natural gradient: how far along which directions, what they did, and what follows for the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adaptive import FactorDamping, LevenbergMarquardt, calibrated
from .batches import Batch
from .directions import Direction, Preconditioner, Tensors, solver_of
from .objective import Objective
from .quadratic import QuadraticModel, inner, quadratic_model
from .smoothing import Smoothing
from .trust_region import Bound

LEAST_EXAMPLES = 128
"""In products with the exact Fisher, where the batch has them."""

TRIES = 4
"""Shorter steps that are tried where the loss is higher after one, before it is taken back."""


class Trial(NamedTuple):
    """A step that was taken, and may be taken back: sums of directions, and what the parameters were."""

    step: Tensors
    before: Tensors


class Outcome(NamedTuple):
    """What a step did to the objective of its batch, and was predicted to do.

    ``predicted`` is M(delta) - M(0) with F + eta I, ``slope`` its linear part; ``fresh`` is what the step before added
    to the objective of this batch, from the model of this batch.
    """

    before: float
    after: float
    predicted: float
    slope: float
    fresh: float
    rate: float
    momentum: float

    @property
    def ratio(self) -> float:
        """The reduction ratio."""
        return (self.after - self.before) / self.predicted if self.predicted < 0 else math.nan


class Steps:
    """A model on its way: its objective, where steps go, and how much they are damped.

    Args:
        objective: of the model.
        kfac: the preconditioner; None where the direction needs none.
        direction, damping, trust_region: as of ``kc.NaturalGradient``.
        state: gives the optimizer's state, by parameter; the step before is kept there.
    """

    def __init__(
        self,
        objective: Objective,
        kfac: Preconditioner | None,
        direction: Direction,
        damping: LevenbergMarquardt,
        trust_region: Bound | None,
        state: Callable[[], Any],
    ) -> None:
        self.objective, self.kfac, self.direction = objective, kfac, direction
        self.damping, self.trust_region = damping, trust_region
        self._solver = solver_of(direction, objective, kfac)
        self._state = state
        self.smoothing = Smoothing(direction.average, objective.tensors, state)
        #: Calls of ``step``, and steps that were taken back.
        self.steps, self.rejected = 0, 0
        #: Whether lambda is one that was given or found, and not the scale that trials begin at.
        self.calibrated = damping.started
        #: Whether the inverses in use are of another damping than lambda now.
        self.stale = False
        #: What the last step was predicted to add to the objective of its own batch.
        self.predicted = 0.0
        #: Numbers of the last step, for a logger.
        self.last: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step, but for the preconditioner and what is by parameter."""
        own = self.direction.factor_damping
        return {
            "steps": self.steps,
            "rejected": self.rejected,
            "calibrated": self.calibrated,
            "stale": self.stale,
            "predicted": self.predicted,
            "averaged": self.smoothing.count,
            "last": dict(self.last),
            "damping": self.damping.state_dict(),
            "factor_damping": {} if own is None else own.state_dict(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave, of the same direction."""
        self.damping.load_state_dict(saved["damping"])
        if self.direction.factor_damping is not None:
            self.direction.factor_damping.load_state_dict(saved["factor_damping"])
        self.steps, self.rejected = int(saved["steps"]), int(saved["rejected"])
        self.stale, self.predicted = bool(saved["stale"]), float(saved["predicted"])
        self.calibrated, self.smoothing.count = bool(saved["calibrated"]), int(saved["averaged"])
        self.last = {str(key): float(value) for key, value in saved["last"].items()}

    @property
    def _added(self) -> float:
        """lambda + eta."""
        return self.damping.value + self.objective.l2

    @property
    def gamma(self) -> float:
        """The root of what damps the preconditioner: tied, or its own."""
        own, tied = self.direction.factor_damping, math.sqrt(self._added)
        return tied if own is None else own.at(tied)

    def at_the_iterate(self) -> AbstractContextManager[None]:
        """Have the parameters hold the last iterate within, and after it the average where there is one."""
        rejected = self.rejected
        return self.smoothing.at_the_iterate(lambda: self.rejected == rejected)

    @torch.no_grad()
    def step(self, batch: Batch, gradient: Tensors, loss: Tensor, again: Callable[[], Tensor]) -> None:
        """One step from the gradient at the parameters as they are.

        Args:
            batch: what it is of.
            gradient: of the objective.
            loss: the objective, 0-d.
            again: the objective at the parameters as they are then.
        """
        part = self._part(batch)
        if not self.damping.started:
            self.damping.start(self._steepness(part, gradient))
        self._take_in()
        if self.steps >= self.direction.burn_in:
            if not self.calibrated:
                self._calibrate(part, gradient, loss, again)
            own = self.direction.factor_damping
            if own is not None and own.due(self.steps):
                self._search(own, part, gradient)
            self._move(part, gradient, loss, again)
        if self.kfac is not None:
            self.kfac.advance(None)
        self.steps += 1

    def _part(self, batch: Batch) -> Batch:
        """The examples of products with the exact Fisher, others at every step."""
        wanted = max(LEAST_EXAMPLES, math.ceil(self.direction.share * (batch.size or 0)))
        return batch.part(max(1, (batch.size or 0) // wanted), self.steps)

    def _take_in(self) -> None:
        """Take in the factors of this step's forward, and invert where due or where lambda has jumped."""
        if self.kfac is not None:
            self.kfac.square = self.gamma**2
            self.kfac.take_in()
        if self.stale:
            self._invert(self.gamma)
        self.stale = False

    def _invert(self, gamma: float) -> None:
        if self.kfac is not None:
            self.kfac.square = gamma**2
            self.kfac.invert()

    def _steepness(self, part: Batch, gradient: Tensors) -> float:
        """g^T F g / g^T g, the curvature along the gradient: the scale that trials of lambda begin at."""
        (row,) = self.objective.pushed(part, [gradient])
        found = float(inner([row], [row]) / inner(gradient, gradient))
        # Without a gradient, or without curvature along it, any scale will do.
        return found if math.isfinite(found) and found > 0.0 else 1.0

    def _modelled(self, part: Batch, gradient: Tensors) -> tuple[list[Tensors], QuadraticModel, Tensor]:
        """The directions of this step, the model in their span, and where in it to go."""
        directions = self._solver.directions(self.smoothing.smooth(gradient), part, self._added)
        before = [self._state()[p].get("previous") for p in self.objective.tensors]
        if all(one is not None for one in before):
            directions.append(before)
        model = quadratic_model(self.objective.pushed(part, directions), directions, gradient)
        coefficients = model.coefficients(self._added)
        if self.trust_region is not None:
            bound = self.trust_region.bound(model.quadratic_form(coefficients), model.square(coefficients))
            coefficients = coefficients * bound
        return directions, model, coefficients

    def _move(self, part: Batch, gradient: Tensors, loss: Tensor, again: Callable[[], Tensor]) -> None:
        """Step, look at the loss, and go less far or not at all where it is higher."""
        directions, model, coefficients = self._modelled(part, gradient)
        trial = self._moved(directions, coefficients)
        looks = self.damping.looks(self.steps)
        found = self._read(model, coefficients, loss, self._looked(trial, again) if looks else loss)
        if self._momentous:
            self.damping.saw(found.fresh, self.predicted)
        fresh = self.damping.fresh_ratio
        # Below the round-off of the losses nothing is said.
        noise = 10 * torch.finfo(loss.dtype).eps * abs(found.before)
        length, usable = 1.0, math.isfinite(found.before)
        self.last = {"damping": self.damping.value, "gamma": self.gamma, "fresh": fresh}
        self.last |= {"rate": found.rate, "momentum": found.momentum, "predicted": found.predicted}
        self.last |= {"ratio": found.ratio if looks else math.nan}
        if not (usable and found.after <= found.before + noise):
            length = self._shortened(trial, found, again) if usable else 0.0
            self.stale = True
            self.damping.reject()
        elif looks and self.damping.due(self.steps) and abs(found.predicted) > noise:
            self.damping.update(found.ratio)
        self.last["length"] = length
        self.predicted = length * found.slope + length**2 * (found.predicted - found.slope)
        self._keep(trial, length)
        if self.damping.due(self.steps):
            self.smoothing.judge(fresh)
        self.last["averaged"] = self.smoothing.count

    @property
    def _momentous(self) -> bool:
        """Whether there is a step before."""
        return "previous" in self._state()[self.objective.tensors[0]]

    def _read(self, model: QuadraticModel, coefficients: Tensor, loss: Tensor, after: Tensor) -> Outcome:
        """What a step did and was predicted to do, read from the device in one transfer."""
        eta = self.objective.l2
        numbers = [loss, after, model.change(coefficients, eta), model.slopes @ coefficients]
        # Back along the step before, the last direction: what it added to the objective of this batch.
        numbers += [model.slopes[-1] - model.matrix(eta)[-1, -1] / 2, coefficients[0], coefficients[-1]]
        found = Outcome(*torch.stack([one.to(coefficients) for one in numbers]).tolist())
        return found if self._momentous else found._replace(momentum=0.0)

    def _keep(self, trial: Trial, length: float) -> None:
        """Remember the step as the one before, or take it back where nothing is left of it."""
        for p, step in zip(self.objective.tensors, trial.step, strict=True):
            self._state()[p].pop("previous", None)
            if length > 0.0:
                self._state()[p]["previous"] = step if length == 1.0 else step * length
        if length == 0.0:
            self._take_back(trial)
            self.rejected += 1
        else:
            self.smoothing.keep()

    def _shortened(self, trial: Trial, found: Outcome, again: Callable[[], Tensor]) -> float:
        """Find a shorter step the same way that does not raise the loss; 0 where there is none.

        The next length is the minimum of the parabola through what is known, between a tenth and a half of the last.
        """
        length, after, slope = 1.0, found.after, found.slope
        for _ in range(TRIES):
            change = (after - found.before) / length
            best = -slope / (2 * (change - slope)) if math.isfinite(change) and change > slope else 0.0
            length *= min(max(best, 0.1), 0.5)
            for p, start, step in zip(self.objective.tensors, trial.before, trial.step, strict=True):
                torch.add(start, step, alpha=length, out=p)
            after = float(self._looked(trial, again))
            if after <= found.before:
                return length
        return 0.0

    def _moved(self, directions: list[Tensors], coefficients: Tensor) -> Trial:
        """Move the parameters by sum_i c_i d_i."""
        tensors = self.objective.tensors
        trial = Trial([torch.zeros_like(p) for p in tensors], [p.detach().clone() for p in tensors])
        for factor, direction in zip(coefficients, directions, strict=True):
            for step, one in zip(trial.step, direction, strict=True):
                step.addcmul_(one, factor.to(step))
        for p, step in zip(tensors, trial.step, strict=True):
            p.add_(step)
        return trial

    def _looked(self, trial: Trial, again: Callable[[], Tensor]) -> Tensor:
        """The objective after a step; whatever is raised there leaves the parameters as they were before it."""
        try:
            return again()
        except BaseException:
            self._take_back(trial)
            raise

    def _take_back(self, trial: Trial) -> None:
        """Leave the parameters as they were before it."""
        for p, before in zip(self.objective.tensors, trial.before, strict=True):
            p.copy_(before)

    def _calibrate(self, part: Batch, gradient: Tensors, loss: Tensor, again: Callable[[], Tensor]) -> None:
        """Find lambda by trial steps, each taken back."""

        def trial(value: float) -> tuple[float, float]:
            self.damping.start(value)
            self._invert(self.gamma)
            directions, model, coefficients = self._modelled(part, gradient)
            moved = self._moved(directions, coefficients)
            change = self._looked(moved, again) - loss
            self._take_back(moved)
            read = [change, model.change(coefficients, self.objective.l2)]
            measured, predicted = torch.stack([one.to(coefficients) for one in read]).tolist()
            return (measured / predicted if predicted < 0 else math.nan), measured

        self.damping.start(calibrated(trial, self.damping.value))
        self.calibrated = True
        self._invert(self.gamma)

    def _search(self, own: FactorDamping, part: Batch, gradient: Tensors) -> None:
        """Try three gammas, and go on with the one whose step is predicted to gain the most."""
        candidates = own.candidates(math.sqrt(self._added), math.sqrt(self.objective.l2))
        changes = []
        for gamma in candidates:
            self._invert(gamma)
            _, model, coefficients = self._modelled(part, gradient)
            changes.append(float(model.change(coefficients, self._added)))
        self._invert(own.choose(candidates, changes))
