"""Natural gradient that tunes itself: direction, learning rate, momentum and damping from a quadratic model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .adaptive import LevenbergMarquardt
from .batches import Batch
from .checks import described, is_damping, settings_of
from .data import Data
from .directions import Direction, Preconditioner
from .distributed import Plan
from .errors import ArgumentError, CoverageError, StateError
from .heads import Distribution, Head
from .objective import Objective
from .overhearing import Overhearing
from .schedules import Schedule
from .stepping import Steps
from .trust_region import Bound, as_bound

FORMAT = "kfac_cond.NaturalGradient"
VERSION = 2

DEFAULT = Schedule(factors=1, inverses=5, warmup=8)
"""The first averages change fast: inverses are made anew at the steps 0, 1, 2 and 4 too."""


class NaturalGradient(Optimizer):
    """Minimises h(theta) = loss + l2/2 |theta|^2 by natural gradient; no learning rate is to be given.

    Each step: the gradient is preconditioned into Delta = -(F + gamma^2)^-1 grad h, labels drawn from the model. With
    the step before, delta_0, it spans delta = alpha Delta + mu delta_0; alpha and mu minimise the quadratic model with
    the exact Fisher of the batch (one product with the Jacobian for each direction), damped by lambda + l2. lambda
    follows the reduction ratio. A step after which the loss of its own batch is higher, or not a number, is taken back.
    Once batches disagree on where to go, Delta is of the gradient's average, and between steps the parameters hold the
    average of their iterates.

    Args:
        model: the module to train, in one process.
        likelihood: a likelihood, its name, or the criterion, which is called with (outputs, targets); it is the loss.
        direction: 'kfac', 'ekfac', 'tkfac', 'diagonal', 'exact' (conjugate gradients on the exact Fisher, or
            Hessian-free), 'gram' (the exact solution, for few examples); or ``kc.Direction`` with more to say.
        damping: lambda: ``kc.LevenbergMarquardt``, or the number that it starts from; None finds one by trial steps.
        l2: eta, of weight decay as a term of the objective.
        schedule: when factors are captured and inverted; default every step, and every 5 once the first are over.
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
        schedule = DEFAULT if schedule is None else settings_of(schedule, Schedule, "schedule")
        self._objective = Objective(model, likelihood, data=data)
        self._kfac = (
            None if self.direction.name == "gram" else Preconditioner(self._objective, self.direction, schedule, data)
        )
        self._steps = Steps(
            self._objective, self._kfac, self.direction, self.damping, self.trust_region, lambda: self.state
        )
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
            The objective before the step, l2 term included, 0-d; at the iterate, where parameters hold an average.

        Raises:
            ArgumentError: something else, or autocast.
            CaptureError: a closure that calls the model or the criterion never, or more than once.
            LikelihoodError: outputs or targets that do not fit the likelihood.
            NumericalError: a first batch with statistics that are not finite.
        """
        objective = self._objective
        _refuse_autocast(objective.device)
        objective.l2 = self.param_groups[0]["l2"]
        with self._steps.at_the_iterate():
            return self._step(inputs, targets)

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
        ``predicted`` what the step was predicted to add to the objective; ``averaged`` counts steps since averages
        began; ``rejected`` those taken back.
        """
        found = {} if self._kfac is None else self._kfac.metrics()
        found.pop("kfac/damping", None)
        return {"step": self._steps.steps, "rejected": self._steps.rejected, **self._steps.last, **found}

    def coverage(self) -> Any:
        """What covers each parameter, as ``kc.KFAC.coverage``; None for direction='gram', which needs no cover."""
        return None if self._kfac is None else self._kfac.coverage()

    def remove(self) -> None:
        """Take the hooks off the model; it can be wrapped anew after."""
        if self._kfac is not None:
            self._kfac.remove()

    def state_dict(self) -> dict[str, Any]:
        """Everything a bitwise resume needs, as plain tensors, numbers and strings."""
        return {
            **super().state_dict(),
            "format": FORMAT,
            "version": VERSION,
            "direction": self.direction.name,
            "steps": self._steps.state_dict(),
            "kfac": {} if self._kfac is None else self._kfac.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state of the same model with the same direction.

        Raises:
            StateError: another format, another direction, or another model; nothing is changed then.
            ValueError: other parameters, as of any optimizer.
        """
        _check_state(state_dict, self.direction)
        plain = {key: state_dict[key] for key in ("state", "param_groups")}
        if self._kfac is not None:
            self._kfac.load_state_dict(state_dict["kfac"])
        super().load_state_dict(plain)
        self._steps.load_state_dict(state_dict["steps"])

    def _step(self, inputs: Any, targets: Any) -> Tensor:
        objective = self._objective
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
        self._steps.step(batch, gradient, loss, again)
        return loss

    def _hear(self, heads: tuple[Head, ...]) -> None:
        if self._kfac is not None:
            self._kfac.hear(heads)


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


def _refuse_autocast(device: torch.device) -> None:
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        raise ArgumentError(
            f"NaturalGradient.step under autocast on {device.type}: what a step gains is below the round-off of half "
            f"precision. Call it outside of autocast, or train with kc.KFAC and an optimizer there"
        )


def _check_state(saved: object, direction: Direction) -> None:
    """Refuse what is no state of a NaturalGradient with this direction."""
    if not isinstance(saved, Mapping) or saved.get("format") != FORMAT or saved.get("version") != VERSION:
        found = list(saved)[:8] if isinstance(saved, Mapping) else type(saved).__name__
        raise StateError(
            f"this is not a NaturalGradient state of version {VERSION}: found {found}, expected what "
            f"NaturalGradient.state_dict() returns"
        )
    own, other = direction.factor_damping is not None, bool(saved["steps"]["factor_damping"])
    if saved["direction"] != direction.name or own != other:
        raise StateError(
            f"the state is of direction {saved['direction']!r} {'with' if other else 'without'} a factor damping, this "
            f"one of {direction.name!r} {'with' if own else 'without'} one: pass the direction that was saved"
        )
