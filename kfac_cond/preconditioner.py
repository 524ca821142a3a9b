"""KFAC: an existing model, loop and optimizer, with gradients preconditioned by the conditional Fisher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import state
from .attachment import Attachments
from .checks import checked_rules, settings_of
from .coverage import Coverage, coverage_of_wrapped
from .damping import Damping, DampingNow, as_damping
from .data import Data
from .distributed import Plan, PlanTable, StaticGraph
from .errors import ArgumentError, AttachError, NotReadyError
from .gradients import gradients_of, mean_scale, precondition
from .guards import without_autocast
from .heads import Distribution
from .intake import Intake, When
from .layers.layer import Layer
from .layers.shards import hold_shards
from .layers.summed import TRAINED
from .refreshes import Refreshes
from .schedules import Clock, Schedule
from .sharing import Shared
from .structures import Fisher
from .trust_region import TrustRegion, as_trust_region
from .watching import Step, Watcher, watched
from .wrapping import Wrapped, refuse_wrapped

Outputs = Tensor | Mapping[str, Tensor] | tuple[Tensor, ...]
"""One tensor; for a ``kc.Product`` a mapping by head, or whatever the model returns them in."""
Draws = Outputs | Sequence[Outputs]


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
        structure: what a layer's block is kept as: 'kfac'; 'tkfac', whose factors are the two partial traces of the
            block with an example's positions summed first; 'ekfac', whose eigenvalues are averages of squared weight
            gradients in the eigenbasis of the factors; or 'diagonal'. All but 'kfac' read a layer's inputs again once
            scores come back.
        rules: settings by layer-name pattern, {pattern: dict(structure=, sharing=, damping=, exclude=,
            max_factor_dim=, fraction=, storage=)}.
        trust_region: scales each update, say ``kc.KLClip(1e-3)`` or ``kc.Graft("sgd")``; or several, in their order.
        data: where to find masks, positions and outputs in a batch, and the seed.

    Raises:
        CoverageError: the model has no layer that can be covered.
        AttachError: the model is already wrapped.
        ArgumentError: an argument out of range.

    Examples:
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
        likelihood: Distribution | str | nn.Module,
        *,
        damping: float | Callable[[int], float] | Damping = 1e-2,
        schedule: Schedule | None = None,
        structure: str = "kfac",
        rules: Mapping[str, Mapping[str, Any]] | None = None,
        trust_region: TrustRegion | Sequence[TrustRegion] | None = None,
        data: Data | None = None,
    ) -> None:
        refuse_wrapped(model, KFAC)
        if structure not in TRAINED:
            raise ArgumentError(f"structure={structure!r}: KFAC trains with one of {', '.join(TRAINED)}")
        self.damping = as_damping(damping)
        self.schedule = settings_of(schedule, Schedule, "schedule")
        self.trust_region = as_trust_region(trust_region)
        #: Layers that had a gradient while no score had reached them.
        self._apart: set[str] = set()
        self._wrapped = Wrapped(model, checked_rules(rules), structure)
        self._attachments = Attachments(self)
        self._clock = Clock(self.schedule)
        self._paused = False
        self._scale: Tensor | Sequence[Tensor] | None = None
        self._static_graph = StaticGraph(model)
        self._intake = Intake(
            model,
            likelihood,
            settings_of(data, Data, "data"),
            owner=self,
            when=When(self._due, self._forward_due, lambda: self._clock.at_most),
            ranks=lambda: self._shared.ranks(),
            bases=lambda: self._shared.factors.bases,
        )
        self._intake.watch(self.layers)
        self._shared = Shared(self._wrapped, self._intake.slots, lambda: self.damping.rule, self.schedule)
        self._refreshes = Refreshes(self.schedule)
        #: Who looks on at every step.
        self.watchers: list[Watcher] = []

    # -- what it knows ------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The covered layers by canonical name."""
        return self._wrapped.layers

    @property
    def step(self) -> int:
        """Steps counted so far; skipped mixed-precision steps do not count."""
        return self._clock.step

    @property
    def active(self) -> bool:
        """Whether it is not paused."""
        return not self._paused

    def coverage(self) -> Coverage:
        """Every trainable parameter: what covers it at what cost, or why nothing does; ``print`` it.

        After the first capture a layer that has had gradients and that no score has reached counts as not covered until
        one does; one that was not used at all is said to be so.
        """
        missing, costing = self._intake.missing, self._shared.costing
        return coverage_of_wrapped(self._wrapped.now(), self.layers, costing, missing=missing, graded=self._apart)

    def plan(self, world: int | None = None) -> PlanTable:
        """Owners, memory, operations and messages, layer by layer, for ``world`` ranks or those there are; print it."""
        return self._shared.table(world)

    def metrics(self) -> dict[str, Any]:
        """Numbers for a logger as a flat dict; tensors among them are on the device and are not waited for.

        ``unsettled_layers`` counts the layers whose refresh at a step of their own failed, or was not enough, as the
        last read found; ``plain_layers`` those whose gradients are left as they are: not used so far, or on no
        position, or waiting for more draws.
        """
        metrics: dict[str, Any] = {
            "kfac/step": self._clock.at_most,
            "kfac/damping": self.damping.at(self._clock.at_most),
            **self._shared.factors.metrics(),
        }
        if self._scale is not None:
            metrics["kfac/trust_region_scale"] = mean_scale(self._scale)
        return metrics

    def fisher(self) -> Fisher:
        """The Fisher from the moving averages as they are now: a mapping from layer name to block, of all layers used.

        Where layers are shared out among ranks, they are brought together on all of them, and all must call it.

        Raises:
            NotReadyError: nothing was captured yet.
        """
        if not (self._shared.factors.ready and self._shared.factors.health.started):
            raise NotReadyError("no factors yet: run a training step (or kfac.update) before kfac.fisher()")
        meta = {
            "likelihood": repr(self._intake.listener.likelihood),
            "kind": "sampled",
            "structure": self._wrapped.structure,
        }
        whole = self._shared.whole()
        # A copy: the averages are changed in place by the steps to come.
        blocks = copy.deepcopy(whole.blocks(whole.average.seen()))
        return Fisher(blocks, meta={**meta, "step": self._clock.at_most, "average": True})

    def __repr__(self) -> str:
        table, step = self.coverage(), self._clock.at_most
        listener, number = self._intake.listener, len(self._attachments)
        mode = f"attached to {number} optimizer{'s' * (number != 1)}" if number else "not attached to an optimizer"
        lines = (
            f"KFAC of {type(self._wrapped.model).__name__}: {len(self.layers)} layers, {100 * table.share:.1f} % of "
            f"{table.parameters:,} trainable numbers",
            f"likelihood {listener.likelihood!r}, {self._intake.source}",
            f"damping {self.damping.described(step)}; {self.schedule}",
            f"step {step}, {mode}{', paused' if self._paused else ''}",
            *self._shared.factors.summary(),
        )
        return "\n  ".join(lines)

    # -- what a user calls --------------------------------------------------------------------------------------------

    def attach(self, *optimizers: Optimizer) -> None:
        """Listen from now on, and precondition at each step of these optimizers. Attaching twice changes nothing.

        Order within a step: unscale (GradScaler), clip, precondition, the optimizer's own step. A closure's
        gradients are preconditioned after each of its evaluations. Several optimizers that step between two forwards
        make one step; a trust region bounds the part of each by itself. A batch whose step a GradScaler skips changes
        nothing; what was captured of it counts with the next one's, at the same parameters.

        Raises:
            AttachError: none, no torch optimizer, one without covered parameters, or one that steps inside backward;
                or this KFAC was removed.
        """
        self._intake.require_on_model()
        self._attachments.add(*optimizers)
        self._intake.start()

    def distribute(self, plan: Plan) -> None:
        """Share the layers out among the ranks of a run (``Plan()`` unless said); between steps, and on all ranks.

        Raises:
            ArgumentError: not a plan, or within a step.
        """
        if self._intake.pending:
            raise ArgumentError("distribute() between a forward and its step: call it before the forward")
        self._shared.distribute(plan)

    def update(self, outputs: Outputs, *, targets: Outputs | None = None, draws: Draws | None = None) -> None:
        """Capture the factors of the forward that gave ``outputs``; call it before ``loss.backward()``.

        Once called it is the only source: the criterion or the forward is no longer listened to. Where no factors are
        due it does nothing.

        Args:
            outputs: what parametrises p, of the model's forward, with its graph; a tensor, or by head for a product.
            targets: the batch's data labels; they serve masks and class weights alone, never as the labels drawn.
            draws: labels in place of the sampled ones: those of one draw, or a list with those of each.

        Raises:
            ArgumentError: one of them is no tensor.
            AttachError: this KFAC was removed.
            CaptureError: outputs that no captured forward computed, that were used already, or whose graph is freed.
            LikelihoodError: outputs, targets or draws that do not fit the likelihood.
        """
        self._intake.update(outputs, targets=targets, draws=draws)

    def precondition(self, *, lr: float | None = None) -> None:
        """Replace the gradients of covered layers by preconditioned ones, and count one step; for use without attach.

        Args:
            lr: the learning rate of the step to come; a trust region needs it.

        Raises:
            NotReadyError: no factors were captured yet, or there are no gradients.
            ArgumentError: a trust region without the learning rate, or a gradient that is not a dense tensor.
            AttachError: an attached optimizer does this already.
        """
        if self._attachments:
            raise AttachError("an attached optimizer's step preconditions already: leave out kfac.precondition()")
        if self._paused:
            return
        if not (self._intake.pending or self._shared.factors.ready):
            raise NotReadyError(
                "precondition() before any factors: call kfac.update(outputs) after the forward and before "
                "loss.backward(), or kfac.attach(optimizer)"
            )
        if getattr(self.trust_region, "needs_rate", self.trust_region is not None) and lr is None:
            raise ArgumentError("precondition() with a trust region needs the learning rate: precondition(lr=...)")
        self.hold_shards()
        rates = {id(p): 1.0 if lr is None else lr for layer in self.layers.values() for p in layer.parameters.values()}
        if not self.before_step(list(self.layers), rates, None):
            raise NotReadyError("precondition() found no gradient of a covered layer: call it after loss.backward()")
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
        self._intake.require_on_model()
        self._watch(self._wrapped.look_again())

    def _watch(self, changed: Sequence[str]) -> None:
        """Go on with the layers there are now, keeping what still fits."""
        self._shared.changed(changed)
        self._intake.watch(self.layers)

    def remove(self) -> None:
        """Take everything off the model, the criterion and the optimizers; nothing of it remains."""
        self._intake.stop()
        self._attachments.remove()

    def state_dict(self) -> dict[str, Any]:
        """Everything a bitwise resume needs, as plain tensors, numbers and strings by layer name.

        It does not depend on which rank owns what. Where layers are shared out among ranks, they are brought together
        on all of them: all must call it, and each needs the memory of 'replicate' for it.
        """
        return state.save(
            self._shared.whole(),
            gathered=self._intake.gathered,
            draws=self._intake.draws,
            slots=self._intake.slots,
            step=self.step,
            functional=self._wrapped.functional,
            ranks=self._shared.ranks(),
            trust_region=self.trust_region,
        )

    def load_state_dict(self, saved: Mapping[str, Any], *, strict: bool = True) -> state.Unmatched:
        """Take over a state of the same model; tensors go where the model is. All ranks of a run call it.

        Args:
            saved: what ``state_dict`` gave.
            strict: refuse a state of other layers, as ``nn.Module`` does; without it take over what fits.

        Returns:
            The layers that the state has not, which stay as they are, and those that the model has not.

        Raises:
            StateError: another format, other shapes, or other layers where ``strict``; nothing is changed then.
            RankError: another rank refused its state, has that of another step, or did not take part.
        """
        ranks, slots, patience = self._shared.ranks(), self._intake.slots, self.schedule.patience
        with ranks.alike("the state") as noted:
            functional = state.functional_of(saved)
            layers = self._wrapped.now(functional).layers
            loaded = state.load(saved, layers, slots=slots, patience=patience, ranks=ranks, strict=strict)
            noted.update(step=loaded.step, missing=loaded.unmatched.missing_keys)
            # Of a copy: it is taken over by all ranks or by none.
            state.load_trust_region(saved, copy.deepcopy(self.trust_region))
        state.load_trust_region(saved, self.trust_region)
        self._wrapped.look_again(functional)
        self._intake.watch(self.layers)
        self._shared.load(loaded)
        self._clock = Clock(self.schedule, loaded.step)
        self._intake.restart(loaded.draws, loaded.gathered)
        self._attachments.new_round()
        return loaded.unmatched

    # -- when ---------------------------------------------------------------------------------------------------------

    def _factors_due(self) -> bool:
        """Whether this step takes factors in: when scheduled, and until a capture has had a valid loss term at all."""
        if self._static_graph.holds(self._clock.at_most):
            return False
        started = self._shared.factors.health.started or not (self._shared.factors.ready or self._static_graph.held)
        return not started or self._clock.factors_due()

    def _due(self) -> bool:
        """Whether outputs heard of now are captured."""
        return not self._paused and not self._clock.taken_in and self._factors_due()

    def _forward_due(self) -> bool:
        """Whether a forward now is captured; one after an optimizer's step belongs to the next step."""
        if not self._paused:
            self._attachments.end_round()
        return self._due()

    # -- the step -----------------------------------------------------------------------------------------------------

    def hold_shards(self) -> None:
        """Have the modules hold their shards, where a backward left the parameters whole."""
        hold_shards(self._wrapped.model)

    def captures_now(self) -> bool:
        """Whether this step takes in factors or refreshes inverses."""
        return not self._clock.taken_in and (self._factors_due() or self._clock.inverses_due())

    @torch.no_grad()
    def before_step(self, names: list[str], rates: Mapping[int, float | Tensor], grad_scale: Tensor | None) -> bool:
        """Take in what was captured and precondition the layers named; False where none of them has a gradient."""
        gradients = {name: found for name in names if (found := gradients_of(self.layers[name]))}
        if not gradients:
            return False
        refreshing = partial(self._refreshes.at, self._shared, self._clock.at_most)
        now = Step(self._clock.at_most, gradients, rates, grad_scale, self._shared, refreshing)
        with without_autocast(self.layers[next(iter(gradients))].device), watched(self.watchers, now):
            if not self._clock.taken_in:
                self._take_in()
            self._apart.update(name for name in self._intake.missing if name in gradients)
            scale = precondition(self.layers, names, gradients, self._shared, rates, self.trust_region, grad_scale)
            self._scale = self._scale if scale is None else scale
        return True

    def advance(self, skipped: Tensor | None) -> None:
        """Count one step; ``skipped`` is a flag on the device that takes it back."""
        self._clock.advance(skipped)
        self._intake.capture.forget()

    def damping_now(self) -> DampingNow:
        """The damping of this step, layer by layer."""
        return DampingNow(self.damping, self._clock.at_most, self._attachments.dampings())

    def _take_in(self) -> None:
        """Bring a due step's capture into the average, and refresh the inverses where due."""
        if self._factors_due():
            self._wrapped.require_unchanged()
        # What may be refused is asked for before anything changes.
        decay = self.schedule.decay_at(self._clock.at_most) if self._intake.pending else 0.0
        self.damping.at(self._clock.at_most)
        damping = self.damping_now()
        captured = self._intake.take()
        if captured is not None:
            for name in captured.functional:
                captured.statistics.layers.pop(name, None)
            self._shared.factors.add(captured.statistics, captured.flags, decay=decay, step=self._clock.at_most)
            if captured.functional:
                self._watch(self._wrapped.without_a_form(captured.functional))
            else:
                self._intake.name_missing()
        elif self._factors_due():
            self._intake.refuse_silence(allowed=bool(self._shared.factors.ready))
        self._refreshes.now(self._shared, self._clock, damping)
        self._clock.taken_in = True
