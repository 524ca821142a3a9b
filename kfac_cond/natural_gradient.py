"""Natural gradient that tunes itself: direction, learning rate, momentum and damping from a quadratic model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .adaptive import FactorDamping, LevenbergMarquardt, calibrated
from .batches import Batch
from .checks import described, is_damping, settings_of
from .data import Data
from .directions import Direction, Preconditioner, Tensors, solver_of
from .distributed import Plan
from .errors import ArgumentError, CoverageError, StateError
from .heads import Distribution, Head
from .objective import Objective
from .overhearing import Overhearing
from .quadratic import QuadraticModel, inner, quadratic_model
from .schedules import Schedule
from .trust_region import Bound, as_bound

LEAST_EXAMPLES = 128
"""In products with the exact Fisher, where the batch has them."""

TRIES = 4
"""Shorter steps that are tried where the loss is higher after one, before it is taken back."""

FORMAT = "kfac_cond.NaturalGradient"
VERSION = 1


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


class NaturalGradient(Optimizer):
    """Minimises h(theta) = loss + l2/2 |theta|^2 by natural gradient; no learning rate is to be given.

    Each step: the gradient is preconditioned into Delta = -(F + gamma^2)^-1 grad h, labels drawn from the model. With
    the step before, delta_0, it spans delta = alpha Delta + mu delta_0; alpha and mu minimise the quadratic model with
    the exact Fisher of the batch (one product with the Jacobian for each direction), damped by lambda + l2. lambda
    follows the reduction ratio. A step after which the loss of its own batch is higher, or not a number, is taken back.

    Args:
        model: the module to train, in one process.
        likelihood: a likelihood, its name, or the criterion, which is called with (outputs, targets); it is the loss.
        direction: 'kfac', 'ekfac', 'tkfac', 'diagonal', 'exact' (conjugate gradients on the exact Fisher, or
            Hessian-free), 'gram' (the exact solution, for few examples); or ``kc.Direction`` with more to say.
        damping: lambda: ``kc.LevenbergMarquardt``, or the number that it starts from; None finds one by trial steps.
        l2: eta, of weight decay as a term of the objective.
        schedule: when factors are captured and inverted; default every step and every 5.
        trust_region: bounds each step, by its KL divergence with exact products, ``kc.KLClip(max_kl)``, or by its
            length, ``kc.NormConstraint(max_norm)``.
        data: where to find masks, outputs and labels in a batch, and the seed of the labels drawn.

    Raises:
        CoverageError: no layer can be covered, or the model is trained by several processes.
        AttachError: the model is wrapped already.
        ArgumentError: an argument out of range.

    Examples:
        >>> import torch, kfac_cond as kc
        >>> model, inputs = torch.nn.Linear(3, 2), torch.randn(20, 3)
        >>> optimizer = kc.NaturalGradient(model, kc.Gaussian(), damping=1e-6)
        >>> before = optimizer.step(inputs, inputs[:, :2])
        >>> after = optimizer.step(inputs, inputs[:, :2])
        >>> bool(after < before)
        True

    Source: Martens & Grosse 2015 (arXiv:1503.05671), sections 6 and 7.
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
        _refuse_ranks(model)
        schedule = Schedule(factors=1, inverses=5) if schedule is None else settings_of(schedule, Schedule, "schedule")
        self._objective = Objective(model, likelihood, data=data)
        self._kfac = (
            None if self.direction.name == "gram" else Preconditioner(self._objective, self.direction, schedule, data)
        )
        self._solver = solver_of(self.direction, self._objective, self._kfac)
        self._steps, self._rejected = 0, 0
        #: Whether the inverses in use are of another damping than lambda now.
        self._stale = False
        #: What the last step was predicted to add to the objective of its own batch.
        self._predicted = 0.0
        self._last: dict[str, float] = {}
        super().__init__(self._objective.tensors, {"l2": float(l2)})

    # -- what a user calls --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, inputs: Any, targets: Any = None) -> Tensor:  # type: ignore[override]
        """One step on a batch.

        ``step(inputs, targets)`` calls the model and the loss itself; ``.grad`` is not touched. ``step(closure)`` is
        for a loop that has a closure: it calls the model and the criterion once, goes back through the loss and
        returns it, and is called once more where the loss after the step is looked at. With a likelihood in place of
        the criterion it is the closure that says the loss; labels that the Fisher needs are picked by
        ``kc.Data(targets=)``.

        The host waits for the device once a step, for the two losses and what was predicted of them; and where
        inverses are refreshed.

        Args:
            inputs: a tensor, or a mapping of the model's keyword arguments; or a closure.
            targets: the data labels, as the loss takes them.

        Returns:
            The objective before the step, l2 term included, 0-d.

        Raises:
            ArgumentError: something else.
            CaptureError: a closure that calls the model or the criterion never, or more than once.
            LikelihoodError: outputs or targets that do not fit the likelihood.
            NumericalError: a first batch with statistics that are not finite.
        """
        objective = self._objective
        objective.l2 = self.param_groups[0]["l2"]
        if callable(inputs) and targets is None:
            batch, found = Overhearing(objective, self._hear).run(inputs)
            gradient, again = objective.left_behind(), lambda: objective.called_again(inputs)
        else:
            batch = Batch.of(inputs, targets)
            found, heads = objective.here(batch)
            self._hear(heads)
            gradient, again = objective.gradient(found), lambda: objective.again(batch)
        loss = objective.value(found)
        del found
        self._step(batch, gradient, loss, again)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused but for the one group there is: damping, rate and momentum are of all parameters together.

        Raises:
            ArgumentError: a second group.
        """
        if self.param_groups:
            raise ArgumentError(
                "NaturalGradient has one parameter group, since its damping, rate and momentum are of all parameters "
                "together: freeze what is not to train with requires_grad_(False), and make a new NaturalGradient "
                "where the model has grown"
            )
        super().add_param_group(param_group)

    def metrics(self) -> dict[str, Any]:
        """Numbers for a logger as a flat dict, of the last step that moved.

        ``damping`` is lambda and ``gamma`` the root of what damps the preconditioner; ``rate`` and ``momentum`` are
        alpha and mu; ``ratio`` is the reduction ratio, NaN where the loss after the step was not looked at;
        ``predicted`` what the step was predicted to add to the objective; ``rejected`` counts steps taken back.
        """
        found = {} if self._kfac is None else self._kfac.metrics()
        found.pop("kfac/damping", None)
        return {"step": self._steps, "rejected": self._rejected, **self._last, **found}

    def coverage(self) -> Any:
        """What covers each parameter, as ``kc.KFAC.coverage``; None for direction='gram', which needs no cover."""
        return None if self._kfac is None else self._kfac.coverage()

    def remove(self) -> None:
        """Take the hooks off the model; it can be wrapped anew after."""
        if self._kfac is not None:
            self._kfac.remove()

    def state_dict(self) -> dict[str, Any]:
        """Everything a bitwise resume needs, as plain tensors, numbers and strings."""
        own = self.direction.factor_damping
        return {
            **super().state_dict(),
            "format": FORMAT,
            "version": VERSION,
            "direction": self.direction.name,
            "steps": self._steps,
            "rejected": self._rejected,
            "stale": self._stale,
            "predicted": self._predicted,
            "last": dict(self._last),
            "damping": self.damping.state_dict(),
            "factor_damping": {} if own is None else own.state_dict(),
            "kfac": {} if self._kfac is None else self._kfac.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state of the same model with the same direction.

        Raises:
            StateError: another format, another direction, or another model; nothing is changed then.
            ValueError: other parameters, as of any optimizer.
        """
        own = self.direction.factor_damping
        _check_state(state_dict, self.direction.name, own)
        plain = {key: state_dict[key] for key in ("state", "param_groups")}
        if self._kfac is not None:
            self._kfac.load_state_dict(state_dict["kfac"])
        super().load_state_dict(plain)
        self.damping.load_state_dict(state_dict["damping"])
        if own is not None:
            own.load_state_dict(state_dict["factor_damping"])
        self._steps, self._rejected = int(state_dict["steps"]), int(state_dict["rejected"])
        self._stale, self._predicted = bool(state_dict["stale"]), float(state_dict["predicted"])
        self._last = {str(key): float(value) for key, value in state_dict["last"].items()}

    # -- the step -----------------------------------------------------------------------------------------------------

    @property
    def _added(self) -> float:
        """lambda + eta."""
        return self.damping.value + self._objective.l2

    @property
    def _gamma(self) -> float:
        own, tied = self.direction.factor_damping, math.sqrt(self._added)
        return tied if own is None else own.at(tied)

    def _hear(self, heads: tuple[Head, ...]) -> None:
        if self._kfac is not None:
            self._kfac.hear(heads)

    def _step(self, batch: Batch, gradient: Tensors, loss: Tensor, again: Callable[[], Tensor]) -> None:
        part, starting = self._part(batch), not self.damping.started
        if starting:
            self.damping.start(self._steepness(part, gradient))
        self._take_in()
        if self._steps >= self.direction.burn_in:
            if starting:
                self._calibrate(part, gradient, loss, again)
            own = self.direction.factor_damping
            if own is not None and own.due(self._steps):
                self._search(own, part, gradient)
            self._move(part, gradient, loss, again)
        if self._kfac is not None:
            self._kfac.advance(None)
        self._steps += 1

    def _part(self, batch: Batch) -> Batch:
        """The examples of products with the exact Fisher, others at every step."""
        wanted = max(LEAST_EXAMPLES, math.ceil(self.direction.share * (batch.size or 0)))
        return batch.part(max(1, (batch.size or 0) // wanted), self._steps)

    def _take_in(self) -> None:
        """Take in the factors of this step's forward, and invert where due or where lambda has jumped."""
        if self._kfac is not None:
            self._kfac.square = self._gamma**2
            self._kfac.take_in()
        if self._stale:
            self._invert(self._gamma)
        self._stale = False

    def _invert(self, gamma: float) -> None:
        if self._kfac is not None:
            self._kfac.square = gamma**2
            self._kfac.invert()

    def _steepness(self, part: Batch, gradient: Tensors) -> float:
        """g^T F g / g^T g, the curvature along the gradient: the scale that trials of lambda begin at."""
        (row,) = self._objective.pushed(part, [gradient])
        return float(inner([row], [row]) / inner(gradient, gradient))

    def _modelled(self, part: Batch, gradient: Tensors) -> tuple[list[Tensors], QuadraticModel, Tensor]:
        """The directions of this step, the model in their span, and where in it to go."""
        directions = self._solver.directions(gradient, part, self._added)
        before = [self.state[p].get("previous") for p in self._objective.tensors]
        if all(one is not None for one in before):
            directions.append(before)
        model = quadratic_model(self._objective.pushed(part, directions), directions, gradient)
        coefficients = model.coefficients(self._added)
        if self.trust_region is not None:
            bound = self.trust_region.bound(model.quadratic_form(coefficients), model.square(coefficients))
            coefficients = coefficients * bound
        return directions, model, coefficients

    def _move(self, part: Batch, gradient: Tensors, loss: Tensor, again: Callable[[], Tensor]) -> None:
        """Step, look at the loss, and go less far or not at all where it is higher."""
        directions, model, coefficients = self._modelled(part, gradient)
        trial = self._moved(directions, coefficients)
        looks = self.damping.looks(self._steps)
        found = self._read(model, coefficients, loss, again() if looks else loss)
        if self._momentous:
            self.damping.saw(found.fresh, self._predicted)
        # Below the round-off of the losses nothing is said.
        noise = 10 * torch.finfo(loss.dtype).eps * abs(found.before)
        length, usable = 1.0, math.isfinite(found.before)
        self._last = {"damping": self.damping.value, "gamma": self._gamma, "fresh": self.damping.fresh_ratio}
        self._last |= {"rate": found.rate, "momentum": found.momentum, "predicted": found.predicted}
        self._last |= {"ratio": found.ratio if looks else math.nan}
        if not (usable and found.after <= found.before + noise):
            length = self._shortened(trial, found, again) if usable else 0.0
            self._stale = True
            self.damping.reject()
        elif looks and self.damping.due(self._steps) and abs(found.predicted) > noise:
            self.damping.update(found.ratio)
        self._last["length"] = length
        self._predicted = length * found.slope + length**2 * (found.predicted - found.slope)
        self._keep(trial, length)

    @property
    def _momentous(self) -> bool:
        """Whether there is a step before."""
        return "previous" in self.state[self._objective.tensors[0]]

    def _read(self, model: QuadraticModel, coefficients: Tensor, loss: Tensor, after: Tensor) -> Outcome:
        """What a step did and was predicted to do, read from the device in one transfer."""
        eta = self._objective.l2
        numbers = [loss, after, model.change(coefficients, eta), model.slopes @ coefficients]
        # Back along the step before, the last direction: what it added to the objective of this batch.
        numbers += [model.slopes[-1] - model.matrix(eta)[-1, -1] / 2, coefficients[0], coefficients[-1]]
        found = Outcome(*torch.stack([one.to(coefficients) for one in numbers]).tolist())
        return found if self._momentous else found._replace(momentum=0.0)

    def _keep(self, trial: Trial, length: float) -> None:
        """Remember the step as the one before, or take it back where nothing is left of it."""
        for p, step in zip(self._objective.tensors, trial.step, strict=True):
            self.state[p].pop("previous", None)
            if length > 0.0:
                self.state[p]["previous"] = step if length == 1.0 else step * length
        if length == 0.0:
            self._take_back(trial)
            self._rejected += 1

    def _shortened(self, trial: Trial, found: Outcome, again: Callable[[], Tensor]) -> float:
        """Find a shorter step the same way that does not raise the loss; 0 where there is none.

        The next length is the minimum of the parabola through what is known, between a tenth and a half of the last.
        """
        length, after, slope = 1.0, found.after, found.slope
        for _ in range(TRIES):
            change = (after - found.before) / length
            best = -slope / (2 * (change - slope)) if math.isfinite(change) and change > slope else 0.0
            length *= min(max(best, 0.1), 0.5)
            for p, start, step in zip(self._objective.tensors, trial.before, trial.step, strict=True):
                torch.add(start, step, alpha=length, out=p)
            after = float(again())
            if after <= found.before:
                return length
        return 0.0

    def _moved(self, directions: list[Tensors], coefficients: Tensor) -> Trial:
        """Move the parameters by sum_i c_i d_i."""
        tensors = self._objective.tensors
        trial = Trial([torch.zeros_like(p) for p in tensors], [p.detach().clone() for p in tensors])
        for factor, direction in zip(coefficients, directions, strict=True):
            for step, one in zip(trial.step, direction, strict=True):
                step.addcmul_(one, factor.to(step))
        for p, step in zip(tensors, trial.step, strict=True):
            p.add_(step)
        return trial

    def _take_back(self, trial: Trial) -> None:
        """Leave the parameters as they were before it."""
        for p, before in zip(self._objective.tensors, trial.before, strict=True):
            p.copy_(before)

    def _calibrate(self, part: Batch, gradient: Tensors, loss: Tensor, again: Callable[[], Tensor]) -> None:
        """Find lambda by trial steps, each taken back."""

        def trial(value: float) -> tuple[float, float]:
            self.damping.start(value)
            self._invert(self._gamma)
            directions, model, coefficients = self._modelled(part, gradient)
            moved = self._moved(directions, coefficients)
            change = again() - loss
            self._take_back(moved)
            read = [change, model.change(coefficients, self._objective.l2)]
            measured, predicted = torch.stack([one.to(coefficients) for one in read]).tolist()
            return (measured / predicted if predicted < 0 else math.nan), measured

        self.damping.start(calibrated(trial, self.damping.value))
        self._invert(self._gamma)

    def _search(self, own: FactorDamping, part: Batch, gradient: Tensors) -> None:
        """Try three gammas, and go on with the one whose step is predicted to gain the most."""
        candidates = own.candidates(math.sqrt(self._added), math.sqrt(self._objective.l2))
        changes = []
        for gamma in candidates:
            self._invert(gamma)
            _, model, coefficients = self._modelled(part, gradient)
            changes.append(float(model.change(coefficients, self._added)))
        self._invert(own.choose(candidates, changes))


def _as_rule(damping: object) -> LevenbergMarquardt:
    if isinstance(damping, LevenbergMarquardt):
        return damping
    if damping is None or is_damping(damping):
        return LevenbergMarquardt(damping)
    raise ArgumentError(
        f"damping is {described(damping)}: expected a number to start from, kc.LevenbergMarquardt(...), or None to "
        f"find one by trial steps"
    )


def _refuse_ranks(model: nn.Module) -> None:
    if isinstance(model, DistributedDataParallel) or Plan().world > 1:
        raise CoverageError(
            f"NaturalGradient of {type(model).__name__} on several ranks: its quadratic model is of the batch of one "
            f"process. Train with kc.KFAC and an optimizer there, which add up over ranks, or on one rank"
        )


def _check_state(saved: object, direction: str, own: FactorDamping | None) -> None:
    """Refuse what is no state of a NaturalGradient with this direction."""
    if not isinstance(saved, Mapping) or saved.get("format") != FORMAT or saved.get("version") != VERSION:
        found = list(saved)[:8] if isinstance(saved, Mapping) else type(saved).__name__
        raise StateError(
            f"this is not a NaturalGradient state of version {VERSION}: found {found}, expected what "
            f"NaturalGradient.state_dict() returns"
        )
    if saved["direction"] != direction or bool(saved["factor_damping"]) != (own is not None):
        raise StateError(
            f"the state is of direction {saved['direction']!r} {'with' if saved['factor_damping'] else 'without'} a "
            f"factor damping, this one of {direction!r} {'without' if own is None else 'with'} one: pass the direction "
            f"that was saved"
        )
