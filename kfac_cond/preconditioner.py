"""KFAC: an existing model, loop and optimizer, with gradients preconditioned by the conditional Fisher."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import state
from .attachment import Attachments
from .capture import Capture, gathered
from .coverage import Coverage
from .damping import Damping, as_damping
from .data import Data
from .draws import Draws
from .errors import ArgumentError, AttachError, CaptureError, CoverageError, NotReadyError
from .gradients import gradients_of, layer_update, trust_region_scale, write
from .health import Health
from .hooks import hook_owners
from .layers.naming import named_modules
from .layers.survey import Layer, Survey, survey
from .likelihoods import Likelihood, sampled_scores
from .listening import Listener, bound_to_batch
from .schedules import Clock, Schedule
from .statistics import MovingAverage, Statistics
from .structures import Block, Fisher, KroneckerBlock, damped_inverses_of
from .trust_region import TrustRegion

logger = logging.getLogger("kfac_cond")


class KFAC:
    """Preconditions a model's gradients with Kronecker factors of its conditional Fisher (K-FAC).

    Labels for the factors are drawn from the model's own p(y | x), never taken from the data set. The model, its
    gradients and its random state are unchanged but for the preconditioned ``.grad`` of covered layers at each step.

    Two ways to use it. ``attach(optimizer)``: from then on the criterion's calls (or the model's forwards) are listened
    to and the optimizer's step preconditions. Or by hand: ``update(outputs)`` after the forward, ``precondition()``
    before the optimizer's step.

    Args:
        model: the module to train.
        likelihood: the criterion module that the training loop calls, a likelihood, or its name; it sets the scale of
            the Fisher (its stated reduction), and what a label is.
        damping: lambda of F + lambda I, a number, a callable of the step, or ``kc.Damping``.
        schedule: what is done at which step; default ``Schedule()``.
        structure: 'kfac'.
        rules: settings by layer-name pattern, {pattern: dict(sharing=, damping=, exclude=)}.
        trust_region: shortens each update, say ``kc.KLClip(1e-3)``.
        data: where to find masks, positions and outputs in a batch, and the seed.

    Raises:
        CoverageError: the model has no layer that can be covered.
        AttachError: the model is already wrapped.
        ArgumentError: an argument out of range.

    Example:
        >>> import torch, kfac_cond as kc
        >>> model, criterion = torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> kfac = kc.KFAC(model, criterion, damping=1e-2)
        >>> kfac.attach(optimizer)
        >>> loss = criterion(model(torch.randn(5, 3)), torch.tensor([0, 1, 0, 1, 1]))
        >>> loss.backward()
        >>> optimizer.step()

    Source: Martens & Grosse 2015 (arXiv:1503.05671); Grosse & Martens 2016 (arXiv:1602.01407).
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str | nn.Module,
        *,
        damping: float | Callable[[int], float] | Damping = 1e-2,
        schedule: Schedule | None = None,
        structure: str = "kfac",
        rules: Mapping[str, Mapping[str, Any]] | None = None,
        trust_region: TrustRegion | None = None,
        data: Data | None = None,
    ) -> None:
        self._refuse_second(model)
        if structure != "kfac":
            raise ArgumentError(f"structure={structure!r}: KFAC trains with 'kfac'")
        self.damping = as_damping(damping)
        self.schedule = schedule or Schedule()
        self.trust_region = trust_region
        self._model = model
        self._rules = dict(rules or {})
        self._data = data or Data()
        self._listener = Listener(likelihood, self._data, due=self._due, heard=self._hear)
        self._survey = _covering(model, self._rules)
        self._draws = Draws(self._data.seed)
        self._attachments = Attachments(self)
        self._clock = Clock(self.schedule)
        self._paused = False
        self._explicit = False
        self._heard_alone = False
        self._named_missing = False
        self._pending: Statistics | None = None
        self._scale: Tensor | None = None
        self._inverses: dict[str, Block] = {}
        self._average = MovingAverage(self.layers)
        self._health = Health(self.layers, patience=self.schedule.patience)
        self._capture = self._listening_capture()
        self._capture.install()

    # -- what it knows ------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The covered layers by canonical name."""
        return self._survey.layers

    @property
    def step(self) -> int:
        """Steps counted so far; skipped mixed-precision steps do not count."""
        return self._clock.step

    @property
    def active(self) -> bool:
        """Whether it is not paused."""
        return not self._paused

    def coverage(self) -> Coverage:
        """Every trainable parameter: covered or not, why, and what to do. ``print`` it, or read ``.share``."""
        return Coverage(self._survey.rows)

    def metrics(self) -> dict[str, Any]:
        """Numbers for a logger as a flat dict; tensors among them are on the device and are not waited for."""
        metrics: dict[str, Any] = {
            "kfac/step": self._clock.at_most,
            "kfac/damping": self.damping.at(self._clock.at_most),
            "kfac/skipped_captures": self._health.skipped_captures,
            "kfac/failed_layers": sum(count > 0 for count in self._health.failures.values()),
        }
        if self._scale is not None:
            metrics["kfac/trust_region_scale"] = self._scale
        return metrics

    def fisher(self) -> Fisher:
        """The Fisher from the moving averages as they are now: a mapping from layer name to block.

        Raises:
            NotReadyError: nothing was captured yet.
        """
        if not self._average.ready:
            raise NotReadyError("no factors yet: run a training step (or kfac.update) before kfac.fisher()")
        meta = {"likelihood": repr(self._listener.likelihood), "kind": "sampled", "structure": "kfac"}
        return Fisher(self._blocks(), meta={**meta, "step": self._clock.at_most, "average": True})

    def __repr__(self) -> str:
        table = self.coverage()
        mode = f"attached to {len(self._attachments)} optimizer(s)" if self._attachments else "not attached"
        heard = self._listener.criterion or self._listener.likelihood
        return (
            f"KFAC of {type(self._model).__name__}: {len(self.layers)} layers, {100 * table.share:.1f} % of "
            f"{table.parameters:,} trainable numbers\n"
            f"  likelihood {heard!r}; damping {self.damping.at(self._clock.at_most):g} ({self.damping.rule}); "
            f"factors {_when(self.schedule.factors)}, inverses {_when(self.schedule.inverses)}\n"
            f"  step {self._clock.at_most}, {mode}{', paused' if self._paused else ''}; factors of {len(self._average.ready)}, "
            f"inverses of {len(self._inverses)} layers"
        )

    # -- what a user calls --------------------------------------------------------------------------------------------

    def attach(self, *optimizers: Optimizer) -> None:
        """Listen from now on, and precondition at each step of these optimizers. Attaching twice changes nothing.

        Order within a step: unscale (GradScaler), clip, precondition, the optimizer's own step. A closure's
        gradients are preconditioned after each of its evaluations.

        Raises:
            AttachError: not a torch optimizer, one without covered parameters, or one that steps inside backward.
        """
        self._attachments.add(*optimizers)
        if not self._explicit:
            self._listener.start(self)

    def update(
        self, outputs: Tensor, *, targets: Tensor | None = None, draws: Tensor | Sequence[Tensor] | None = None
    ) -> None:
        """Capture the factors of the forward that gave ``outputs``; call it before ``loss.backward()``.

        Once called it is the only source: the criterion or the forward is no longer listened to. Where no factors are
        due it does nothing.

        Args:
            outputs: what parametrises p, of the model's forward, with its graph.
            targets: the batch's data labels; they serve masks and class weights alone, never as the labels drawn.
            draws: labels in place of the sampled ones: one tensor, or one for each draw.

        Raises:
            CaptureError: outputs that no captured forward computed, that were used already, or whose graph is freed.
            LikelihoodError: outputs, targets or draws that do not fit the likelihood.
        """
        self._explicit = True
        self._listener.stop()
        if not self._due():
            return
        bound = bound_to_batch(self._listener.likelihood, self._data, outputs, targets=targets)
        if bound.needs_targets:
            raise CaptureError(f"{bound!r} needs the data labels: call kfac.update(outputs, targets=labels)")
        drawn = [draws] if isinstance(draws, Tensor) else draws
        if not (self._send(outputs, bound, drawn) or self._send(outputs, bound, drawn, again=True)):
            raise CaptureError(
                f"no captured forward of {type(self._model).__name__} computed these outputs (of shape "
                f"{tuple(outputs.shape)}): pass the tensor that the model returned, with gradients enabled, once for "
                f"each forward."
            )

    def precondition(self, *, lr: float | None = None) -> None:
        """Replace the gradients of covered layers by preconditioned ones, and count one step; for use without attach.

        Args:
            lr: the learning rate of the step to come; a trust region needs it.

        Raises:
            NotReadyError: no factors were captured yet.
            AttachError: an attached optimizer does this already.
        """
        if self._attachments:
            raise AttachError("an attached optimizer's step preconditions already: leave out kfac.precondition()")
        if self._pending is None and not self._average.ready:
            raise NotReadyError(
                "precondition() before any factors: call kfac.update(outputs) after the forward and before "
                "loss.backward(), or kfac.attach(optimizer)"
            )
        if self.trust_region is not None and lr is None:
            raise ArgumentError("precondition() with a trust region needs the learning rate: precondition(lr=...)")
        rate = 1.0 if lr is None else lr
        rates = {id(p): rate for layer in self.layers.values() for p in layer.parameters.values()}
        self.before_step(list(self.layers), rates, None)
        self.advance(None)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it nothing is captured, gradients are left as they are, and no step is counted."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def refresh(self) -> None:
        """Look at the model again after layers were added, replaced, frozen or unfrozen; keep what still fits."""
        fresh = _covering(self._model, self._rules)
        changed = [name for name, layer in self.layers.items() if fresh.layers.get(name) != layer]
        for name in changed:
            self._inverses.pop(name, None)
        self._average = self._average.restricted(fresh.layers, without=changed)
        self._health = Health(fresh.layers, patience=self.schedule.patience)
        self._survey, self._pending, self._named_missing = fresh, None, False
        self._capture.remove()
        self._capture = self._listening_capture()
        self._capture.install()

    def remove(self) -> None:
        """Take everything off the model, the criterion and the optimizers; nothing of it remains."""
        self._capture.remove()
        self._listener.stop()
        self._attachments.remove()
        self._pending = None

    def state_dict(self) -> dict[str, Any]:
        """Everything a bitwise resume needs, as plain tensors, numbers and strings by layer name."""
        return state.save(
            self.layers,
            average=self._average,
            inverses=self._inverses,
            health=self._health,
            numbers={"step": self.step, "seed": self._draws.seed},
        )

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over a state of the same model; tensors go where the model is.

        Raises:
            StateError: another format, other layers or other shapes; nothing is changed then.
        """
        loaded = state.load(saved, self.layers, patience=self.schedule.patience)
        self._average, self._inverses = loaded.average, loaded.inverses
        self._health = loaded.health
        self._draws = Draws(loaded.seed)
        self._clock, self._pending = Clock(self.schedule, loaded.step), None
        self._attachments.new_round()

    # -- capture ------------------------------------------------------------------------------------------------------

    def _due(self) -> bool:
        """Whether forwards are captured now."""
        return not self._paused and not self._clock.taken_in and self._clock.factors_due()

    def _hear(self, outputs: Tensor, likelihood: Likelihood) -> None:
        """Take in outputs that the listener heard of; those of other models are ignored."""
        likelihood.check(outputs)
        if not self._send(outputs, likelihood, None, replaceable=True) and self._capture.came_from_spent(outputs):
            raise CaptureError(
                "the loss was called twice on one forward of the wrapped model: the library cannot know how the two "
                "are weighted. Call kfac.update(outputs) once for the outputs that parametrise p."
            )

    def _send(
        self,
        outputs: Tensor,
        likelihood: Likelihood,
        draws: Sequence[Tensor] | None,
        *,
        again: bool = False,
        replaceable: bool = False,
    ) -> bool:
        """Send scores back from ``outputs`` and keep the statistics; False where no forward of ours was reached."""
        count = 1 if draws is None else len(draws)
        generators = self._draws.generators(step=self._clock.at_most, count=count, device=outputs.device)
        invalid = likelihood.invalid_targets(outputs)
        for labels in draws or ():
            invalid = invalid | likelihood.invalid_labels(outputs, labels)
        scores = sampled_scores(likelihood, outputs, generators=generators, draws=draws)
        statistics = gathered(
            self._capture, outputs, likelihood, scores, invalid=invalid, again=again, replaceable=replaceable
        )
        if statistics is None:
            return False
        if again and self._heard_alone:
            # An explicit update takes the place of all that was heard on its own.
            self._pending = None
        self._heard_alone = replaceable
        self._health.note(statistics, invalid_labels=invalid)
        self._pending = statistics if self._pending is None else self._pending.merged(statistics)
        return True

    def _listening_capture(self) -> Capture:
        return Capture(
            self._model,
            self.layers,
            due=self._due,
            owner=self,
            positions=self._data.pick_positions,
            heard=self._listener.root,
        )

    # -- the step -----------------------------------------------------------------------------------------------------

    def captures_now(self) -> bool:
        """Whether this step takes in factors or refreshes inverses."""
        return not self._clock.taken_in and (self._clock.factors_due() or self._clock.inverses_due())

    @torch.no_grad()
    def before_step(self, names: list[str], rates: Mapping[int, float | Tensor], grad_scale: Tensor | None) -> None:
        """Take in what was captured, then precondition the gradients of the layers named."""
        gradients = {name: found for name in names if (found := gradients_of(self.layers[name]))}
        if not gradients:
            return
        if not self._clock.taken_in:
            self._take_in()
        updates = {}
        for name, found in gradients.items():
            inverse = self._inverse_of(name, next(iter(found.values())))
            if inverse is not None:
                updates[name] = layer_update(self.layers[name], found, inverse, rates)
        if updates and self.trust_region is not None:
            self._scale = trust_region_scale(self.trust_region, updates, grad_scale)
        write(self.layers, gradients, updates, self._scale)

    def advance(self, skipped: Tensor | None) -> None:
        """Count one step; ``skipped`` is a flag on the device that takes it back."""
        self._clock.advance(skipped)
        self._capture.forget()

    def _take_in(self) -> None:
        """Bring a due step's capture into the average, and refresh the inverses where due."""
        if self._pending is not None:
            self._average.update(self._pending, decay=self.schedule.decay_at(self._clock.at_most))
            self._pending = None
            self._name_missing()
        elif self._clock.factors_due() and not (self._explicit and self._average.ready):
            raise self._listener.nothing_heard(forwards=bool(self._capture.waiting))
        if self._average.ready and (self._clock.inverses_due() or not self._inverses):
            self._refresh_inverses()
        self._clock.taken_in = True

    def _name_missing(self) -> None:
        """After the first capture: every layer that should have fired has, or is named."""
        missing = [name for name in self.layers if name not in self._capture.fired]
        if self._named_missing or not missing:
            return
        self._named_missing = True
        logger.warning(
            "%d of %d layers did not take part in the first forward: %s. Until they do, their gradients are left as "
            "they are. A layer does not fire where its module is not called (its weight is used functionally), or is "
            "called under no_grad, in reentrant activation checkpointing (use use_reentrant=False) or in a compiled "
            "model. Exclude it with rules={name: dict(exclude=True)} if that is meant.",
            len(missing),
            len(self.layers),
            ", ".join(missing),
        )

    def _refresh_inverses(self) -> None:
        if not self._health.read(first=not self._inverses):
            return
        blocks = self._blocks()
        dampings = {
            name: self.damping.of(block.A, block.G, step=self._clock.at_most, override=self.layers[name].rule.damping)
            for name, block in blocks.items()
        }
        self._inverses, rungs = damped_inverses_of(blocks, dampings, rule=self.damping.rule, previous=self._inverses)
        self._health.climbed(rungs)

    def _blocks(self) -> dict[str, KroneckerBlock]:
        return {
            name: KroneckerBlock(self.layers[name].layout, *self._average.factors(name), name=name)
            for name in self._average.ready
        }

    def _inverse_of(self, name: str, like: Tensor) -> Block | None:
        """The layer's inverse, where its gradient is."""
        self.layers[name].check_unchanged()
        inverse = self._inverses.get(name)
        if inverse is not None and inverse.device != like.device:
            inverse = self._inverses[name] = inverse.to(like.device)
        return inverse

    @staticmethod
    def _refuse_second(model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model is {type(model).__name__}: expected a torch.nn.Module")
        if any(isinstance(owner, KFAC) for owner in hook_owners(model)):
            raise AttachError("this model is already wrapped by a KFAC: use that one, or call its remove() first")


def _covering(model: nn.Module, rules: Mapping[str, Mapping[str, Any]]) -> Survey:
    """The layers of a model, at least one."""
    found = survey(model, rules)
    if not found.layers:
        reasons = "; ".join(f"{row.path}: {row.reason}" for row in found.rows[:5]) or "no trainable parameter"
        raise CoverageError(f"{type(model).__name__} has no layer that KFAC covers ({reasons})")
    for name, module in named_modules(model):
        if isinstance(module, nn.DataParallel):
            raise CoverageError(
                f"'{name or type(model).__name__}' is nn.DataParallel, whose replicas lose their hooks: use "
                f"DistributedDataParallel, or the plain module"
            )
    return found


def _when(when: object) -> str:
    if when is None:
        return "never"
    return "when its callable says" if callable(when) else f"every {when} steps"
