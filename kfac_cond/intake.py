"""From outputs that were heard of, or handed in, to the statistics that the step to come takes in."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .capture import Capture
from .checks import check_update
from .data import Data
from .distributed import Captured, Ranks, synchronises
from .distributed.ranks import Alone
from .distributed.reduce import Reduction
from .draws import POSITIONS, Draws
from .errors import AttachError, CaptureError, LikelihoodError
from .forwards import Run
from .gathering import gathered
from .heads import (
    Distribution,
    Head,
    bound_to_batch,
    invalid_labels,
    invalid_targets,
    require_targets,
    sampled,
    slots_of,
    split,
)
from .health import Flags
from .hooks import Owner
from .layers.layer import Layer
from .layers.summed import Bases
from .likelihoods import Product
from .listening import Listener
from .statistics import Statistics

logger = logging.getLogger("kfac_cond")


class When(NamedTuple):
    """What an intake asks of the steps.

    Args:
        due: whether outputs heard of at this moment are captured.
        forward_due: the same, asked at a forward.
        step: the count of steps, for the draws.
    """

    due: Callable[[], bool]
    forward_due: Callable[[], bool]
    step: Callable[[], int]


class Intake:
    """Listens to a model and its loss, draws labels and gathers statistics until a step takes them.

    Args:
        model: the wrapped module.
        likelihood: what p(y | outputs) is, or the criterion that the loop calls.
        data: where to find what a forward does not say, and the seed.
        owner: whose hooks these are.
        when: says what is captured.
        ranks: those that take part in the run.
        bases: those in use, of layers that are kept in one.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Distribution | str | nn.Module,
        data: Data,
        *,
        owner: Owner,
        when: When,
        ranks: Callable[[], Ranks],
        bases: Callable[[], Mapping[str, Bases]],
    ) -> None:
        self.listener = Listener(likelihood, data, due=when.due, heard=self._hear, ours=self._ours)
        self.draws = Draws(data.seed)
        #: What is summed apart of each capture.
        self.slots = slots_of(self.listener.likelihood)
        #: Whether ``update`` was called: from then on it is the only source.
        self.explicit = False
        self._model = model
        self._data = data
        self._owner = owner
        self._when = when
        self._ranks = ranks
        self._bases = bases
        self._capture: Capture | None = None
        self._heard_alone = False
        self._named_missing = False
        self._stopped = False
        self._reached: set[str] = set()
        self._taken = 0
        #: The layers watched whose weight was seen to be used without a call of their module.
        self.functional: set[str] = set()
        self._pending: Statistics | None = None
        #: Whether a forward that may be heard for again has the sums of inputs that are pending.
        self._lent = False
        self._flags = Flags()
        #: What is on its way to the ranks that keep it.
        self._sent: list[Reduction | Alone] = []

    @property
    def capture(self) -> Capture:
        """The hooks on the model."""
        assert self._capture is not None
        return self._capture

    @property
    def source(self) -> str:
        """Where outputs come from, in words."""
        if self.explicit:
            return "of outputs given to update()"
        criterion = self.listener.criterion
        return f"heard at the calls of {type(criterion).__name__}" if criterion is not None else "heard at the forward"

    @property
    def pending(self) -> bool:
        """Whether something was gathered that no step has taken."""
        return self._pending is not None or bool(self._sent)

    def watch(self, layers: Mapping[str, Layer]) -> None:
        """Put hooks on these layers in place of those there were; what was gathered is let go."""
        if self._capture is not None:
            self._capture.remove()
        self._drop()
        self._named_missing, self._reached, self.functional = False, set(), set()
        self._capture = Capture(
            self._model,
            layers,
            due=self._when.forward_due,
            owner=self._owner,
            positions=self._data.pick_positions,
            heard=self.listener.root,
            run=Run(self._bases, self._for_positions),
        )
        self._capture.install()

    def require_on_model(self) -> None:
        """Refuse to go on once the hooks were taken off.

        Raises:
            AttachError: they were.
        """
        if self._stopped:
            raise AttachError(
                "this KFAC was removed from its model: make a new one, kc.KFAC(model, ...), and hand it the state of "
                "this one with load_state_dict where it is to go on. To stop for a while only, use kfac.paused()."
            )

    def start(self) -> None:
        """Listen to the criterion or the forward from now on, unless updates are explicit."""
        if not self.explicit:
            self.listener.start()

    def stop(self) -> None:
        """Take all hooks off, for good."""
        self._stopped = True
        self.capture.remove()
        self.listener.stop()
        self._drop()

    @property
    def gathered(self) -> tuple[Statistics, Flags] | None:
        """What this rank gathered since the last step that took something in, with its flags; or None."""
        parts = [(one.captured.statistics, one.captured.flags) for one in self._sent]
        parts += [(self._pending, self._flags)] if self._pending is not None else []
        return _merged(parts) if parts else None

    def restart(self, draws: Draws, gathered: tuple[Statistics, Flags] | None) -> None:
        """Go on from a saved state: its draws, and what had been gathered when it was saved."""
        self.draws = draws
        self._drop()
        self._pending, self._flags = gathered or (None, Flags())
        self._heard_alone = False
        self.capture.forget()

    def refuse_silence(self, *, allowed: bool) -> None:
        """Raise where a due step has a forward whose outputs nobody told of, or none at all and that is not allowed."""
        forwards = bool(self.capture.waiting)
        # By hand one may leave steps out, but not forget the forward that was captured for one.
        if not (self.explicit and allowed and not forwards):
            raise self.listener.nothing_heard(forwards=forwards, explicit=self.explicit)

    def take(self) -> Captured | None:
        """What all ranks gathered, with the sums of the layers kept here, and nothing of it is left; or None.

        Raises:
            RankError: a rank did not take part.
        """
        self._send_off()
        parts = [sent.wait(functional=self.looking) for sent in self._sent]
        self._taken += bool(parts)
        self._drop()
        if not parts:
            return None
        # The sums are changed in place, and let go, layer by layer: forwards have them no longer.
        self.capture.spent.clear()
        statistics, flags = _merged([(one.statistics, one.flags) for one in parts])
        return Captured(statistics, flags, set().union(*(one.functional for one in parts)))

    def _send_off(self) -> None:
        """Begin to bring what was gathered together with what the other ranks did."""
        if self._pending is not None:
            captured = Captured(self._pending, self._flags, self.functional & self.capture.layers.keys())
            self._sent.append(self._ranks().reduced(captured))
            self._pending, self._flags = None, Flags()

    @property
    def looking(self) -> bool:
        """Whether the graphs of this step are looked at for other uses of weights: after 0, 1, 3, 7 ... captures."""
        return not (self._taken & (self._taken + 1))

    @property
    def missing(self) -> list[str]:
        """The layers that no score has reached yet, once any was reached."""
        reached = self._reached | self.functional
        return [name for name in self.capture.layers if name not in reached] if reached else []

    def name_missing(self) -> None:
        """After the first capture: every layer that should have fired has, or is named."""
        layers, missing = self.capture.layers, self.missing
        if self._named_missing:
            return
        self._named_missing = True
        raw = [name for name in missing if not layers[name].modules]
        if raw:
            logger.warning(
                "no gradient of the outputs that parametrise p reaches %d of %d parameters in the universal form: %s. "
                "Their gradients are left as they are. They are unused, or belong to another head: choose it with "
                "data=kc.Data(outputs=...) or kfac.update(outputs), or exclude them by a rule.",
                len(raw),
                sum(not layer.modules for layer in layers.values()),
                ", ".join(raw),
            )
        missing = [name for name in missing if name not in raw]
        silent = [name for name in missing if name not in self.capture.fired]
        if silent:
            logger.warning(
                "%d of %d layers did not take part in the first forward: %s. Until they do, their gradients are left "
                "as they are. A layer does not fire where its module is not called (its weight is used functionally), "
                "or is called under no_grad, in reentrant activation checkpointing (use use_reentrant=False) or in a "
                "compiled model. Exclude it with rules={name: dict(exclude=True)} if that is meant.",
                len(silent),
                len(layers),
                ", ".join(silent),
            )
        apart = [name for name in missing if name in self.capture.fired]
        if apart:
            logger.warning(
                "%d of %d layers were called, but the outputs that parametrise p do not depend on them: %s. Their "
                "gradients are left as they are. Another head than the one given? Choose it with "
                "data=kc.Data(outputs=...) or kfac.update(outputs), or exclude them by a rule.",
                len(apart),
                len(layers),
                ", ".join(apart),
            )
        if self.capture.masks == (True, False):
            logger.warning(
                "a mask of real positions was found, and no layer has positions of that shape: padded positions count "
                "like real ones. Layers must be (batch, length, ...) or flattened batch-first."
            )

    def take_heads(self, heads: Sequence[Head]) -> None:
        """Gather from the outputs of one forward that whoever made it hands over, and hear of nothing else.

        Raises:
            CaptureError: no forward of the model that was captured computed them.
        """
        self.explicit = True
        if self._when.due() and not self._send(heads, None):
            raise CaptureError(
                f"no captured forward of {type(self._model).__name__} computed the outputs of this step: call the "
                f"model itself, with gradients enabled"
            )

    def _drop(self) -> None:
        self._pending, self._flags, self._sent = None, Flags(), []

    def update(self, outputs: Any, *, targets: Any, draws: Any) -> None:
        """Gather from one forward's outputs; see ``KFAC.update``."""
        if not isinstance(self.listener.likelihood, Product):
            check_update(outputs, targets, draws)
        self.require_on_model()
        if self._when.due():
            self._gather(outputs, targets, draws)
        self.explicit = True
        self.listener.stop()

    def _gather(self, outputs: Any, targets: Any, draws: Any) -> None:
        likelihood = self.listener.likelihood
        heads = bound_to_batch(likelihood, self._data, split(likelihood, outputs), targets=targets)
        require_targets(heads, "call kfac.update(outputs, targets=labels)", CaptureError)
        several = draws is None or (isinstance(draws, Sequence) and not hasattr(draws, "_fields"))
        drawn = draws if several else [draws]
        if drawn is not None:
            drawn = [split(likelihood, one, "draws") for one in drawn]
        if not self.explicit:
            # Labels drawn for what was heard on its own are let go with it, and the stream of this step starts anew: a
            # resumed run, which hears its first forward as well, then draws what the uninterrupted one does.
            self.draws.restart()
        if not (self._replace_heard(heads, drawn) or self._send(heads, drawn)):
            shapes = ", ".join(str(tuple(head.outputs.shape)) for head in heads)
            raise CaptureError(
                f"no captured forward of {type(self._model).__name__} computed these outputs (of shape "
                f"{shapes}): pass the tensor that the model returned, with gradients enabled, once for "
                f"each forward."
            )

    def _for_positions(self, device: torch.device) -> torch.Generator | None:
        """The stream of this step that positions are chosen by."""
        self.draws.rank = self._ranks().rank
        return self.draws.generators(step=self._when.step(), count=1, device=device, head=POSITIONS)[0]

    def _replace_heard(self, heads: Sequence[Head], drawn: Sequence[Mapping[str, Tensor]] | None) -> bool:
        """Gather from a forward that was heard on its own before; all that was heard so far is let go."""
        return self._heard_alone and self._send(heads, drawn, again=True)

    def _hear(self, heads: Sequence[Head]) -> None:
        """Gather from outputs that the listener heard of; those of other models are ignored."""
        try:
            reached = self._send(heads, None, replaceable=True)
        except LikelihoodError:
            # A criterion may serve other models too, on outputs of other forms.
            if any(self._ours(head.outputs) for head in heads):
                raise
            return
        if not reached and any(self.capture.computed(head.outputs, spent=True) for head in heads):
            raise CaptureError(
                "the loss was called twice on one forward of the wrapped model: the library cannot know how the two "
                "are weighted. For mixed-up labels pass the mixed probabilities as the target of one call; for several "
                "heads give KFAC kc.Product({head: likelihood}, weights=...) in place of the criterion; else call "
                "kfac.update(outputs) once for the outputs that parametrise p."
            )

    def _ours(self, outputs: Tensor) -> bool:
        """Whether a forward held, waiting or sent back to, computed these outputs."""
        held = self.capture
        return outputs.requires_grad and (held.computed(outputs, spent=False) or held.computed(outputs, spent=True))

    def _send(
        self,
        heads: Sequence[Head],
        draws: Sequence[Mapping[str, Tensor]] | None,
        *,
        again: bool = False,
        replaceable: bool = False,
    ) -> bool:
        """Send the heads' scores back and keep the statistics; False where no forward of ours was reached."""
        self.draws.rank = self._ranks().rank
        before = self.draws.state()
        generators = {
            head.name: self.draws.generators(step=self._when.step(), count=1, device=head.outputs.device, head=index)
            for index, head in enumerate(heads)
        }
        invalid = invalid_targets(heads)
        for labels in draws or ():
            invalid = invalid | invalid_labels(heads, labels)
        scores = sampled(heads, self.slots, generators=generators, draws=draws)
        functional = self.capture.used_functionally(head.outputs for head in heads) if self.looking else set()
        statistics = gathered(
            self.capture, heads, scores, slots=self.slots, invalid=invalid, again=again, replaceable=replaceable
        )
        if statistics is None:
            # Nobody's labels: those of the next outputs are what they would have been.
            self.draws.load_state(before)
            return False
        self.functional |= functional
        if again:
            for sent in self._sent:
                # Buffers are let go once nothing is under way in them.
                sent.wait(functional=False)
            self._drop()
        self._heard_alone = replaceable
        self._reached |= statistics.layers.keys()
        self._flags.note(statistics, invalid_labels=invalid)
        with torch.no_grad():
            self._add(statistics, lent=replaceable)
            if synchronises(self._model):
                # The last of its step: it travels beside the backward.
                self._send_off()
        return True

    def _add(self, statistics: Statistics, *, lent: bool) -> None:
        """Add a capture to what is pending; of one alone no sum is copied."""
        if self._pending is not None:
            mine = self._pending.with_own_inputs() if self._lent else self._pending
            statistics = mine.merged(statistics.with_own_inputs() if lent else statistics)
            lent = False
        self._pending, self._lent = statistics, lent


def _merged(parts: Sequence[tuple[Statistics, Flags]]) -> tuple[Statistics, Flags]:
    """Several captures as one; what is one already is not touched."""
    if len(parts) == 1:
        return parts[0]
    flags = Flags()
    for _, one in parts:
        flags.add(one)
    return reduce(Statistics.merged, [copy.deepcopy(one) for one, _ in parts]), flags
