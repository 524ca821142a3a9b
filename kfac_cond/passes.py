"""One pass over data: every batch forward, its scores back, and what each structure keeps of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Capture, counted, gathered
from .checks import described
from .data import Data, call_model
from .errors import ArgumentError, CaptureError, LikelihoodError, NumericalError
from .forwards import Pairs, Wanted
from .guards import kept_state, without_autocast
from .hooks import hook_owners
from .kinds import Expectation, facts, labels_out_of_range
from .layers.survey import Layer
from .likelihoods import Categorical, Likelihood
from .listening import bound_to_batch
from .options import Batches, Kind, Options
from .progress import tracked
from .statistics import Statistics
from .structures import Fisher, Joint, KroneckerBlock, LayerByLayer

logger = logging.getLogger("kfac_cond")


class Pass:
    """One pass over data: what is the same for every batch."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        likelihood: Likelihood,
        kind: Kind,
        samples: int,
        options: Options,
        stored: Sequence[LayerByLayer | Joint],
    ) -> None:
        self.model, self.layers, self.likelihood, self.stored = model, layers, likelihood, stored
        self.kind, self.samples = kind, samples
        self.data = options.data or Data()
        self.expectation = Expectation(kind, samples, options)
        self.progress = options.progress
        self.call: tuple[tuple[Any, ...], dict[str, Any], Any] = ((), {}, None)
        self.wanted = self._wanted()
        self.capture = Capture(
            model,
            layers,
            due=lambda: True,
            owner=None,
            positions=self.data.pick_positions,
            heard=self._called,
            wanted=self.wanted,
        )

    def _wanted(self) -> Wanted:
        """What the structures ask of the capture, together."""
        if self.kind == "forward_only":
            return Wanted(frozenset(self.layers), frozenset(), self._take)
        moments = frozenset[str]().union(*(one.moments for one in self.stored))
        return Wanted(moments, frozenset[str]().union(*(one.pairs for one in self.stored)), self._take)

    def _take(self, pairs: Pairs, weight: float) -> None:
        for one in self.stored:
            if asked := {name: pair for name, pair in pairs.items() if name in one.pairs}:
                one.take(asked, weight)

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.call = (args, kwargs, output)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks on, whoever else listens paused; buffers and the random state as before afterwards."""
        with ExitStack() as stack:
            for owner in hook_owners(self.model):
                stack.enter_context(owner.paused())
            stack.enter_context(kept_state(self.model))
            stack.callback(self.capture.remove)
            self.capture.install()
            yield

    def run(self, data: Batches) -> Statistics:
        """The statistics of all batches."""
        total: Statistics | None = None
        with self.listening():
            batches = checked_batches(data() if callable(data) else data)
            # Closed even after an exception, which would leave a progress bar on the terminal.
            with closing(tracked(batches, description="Fisher", show=self.progress)) as shown:
                for number, batch in enumerate(shown):
                    statistics = self.statistics(number, batch)
                    total = statistics if total is None else total.merged(statistics)
        if total is None:
            raise ArgumentError("data yielded no batch: an iterator that was used up already? Pass a list or a loader.")
        self.expectation.finish()
        return total

    def statistics(self, number: int, batch: Any) -> Statistics:
        """The statistics of one batch, seen to be finite."""
        with torch.enable_grad():
            output, targets = call_model(self.model, batch)
        args, kwargs, _ = self.call
        outputs = self.data.pick_outputs(args, kwargs, output)
        labels = self.data.pick_targets(args, kwargs, output) if targets is None else targets
        if not (self.likelihood.needs_targets or isinstance(self.likelihood, Categorical)):
            # Labels that mean nothing to p, say the digits of the images that an autoencoder is given.
            targets = None
        bound = bound_to_batch(
            self.likelihood, self.data, outputs, args=args, kwargs=kwargs, output=output, targets=targets
        )
        if bound.needs_targets:
            raise LikelihoodError(f"{bound!r} needs data labels, and the batch has none: yield (inputs, labels)")
        found, invalid = self._sums(bound, outputs, batch, labels)
        self.capture.forget()
        if found is None:
            raise CaptureError(
                "the model's outputs do not depend on any layer that was captured: were they computed under no_grad, "
                "or in a compiled model? Pass the plain module."
            )
        self._check_usable(number, found, invalid)
        return found

    def _sums(
        self, bound: Likelihood, outputs: Tensor, batch: Any, labels: Tensor | None
    ) -> tuple[Statistics | None, Tensor]:
        """The sums of one batch, and whether some label is out of range."""
        if self.kind == "forward_only":
            invalid = bound.invalid_targets(outputs)
            with without_autocast(outputs.device):
                sums = self.capture.inputs()
                return counted(sums, outputs, bound, invalid) if sums else None, invalid
        scores, invalid = self.expectation.scores(bound, outputs, batch, labels)
        return gathered(self.capture, outputs, bound, scores, invalid=invalid), invalid

    def _check_usable(self, number: int, statistics: Statistics, invalid: Tensor) -> None:
        if statistics.finite.is_meta or bool(statistics.finite):
            return
        if bool(invalid):
            raise labels_out_of_range(number, self.likelihood)
        bad = [name for name, flag in statistics.nonfinite.items() if bool(flag)]
        raise NumericalError(
            f"batch {number}: statistics that are not finite in {len(bad)} of {len(self.layers)} layers, first in "
            f"'{bad[0]}': look for NaN or infinite inputs or weights."
        )

    def fishers(self, total: Statistics, factors: Mapping[str, KroneckerBlock], words: Sequence[str]) -> list[Fisher]:
        """The sums divided, in each of the structures."""
        fishers = []
        for word, one in zip(words, self.stored, strict=True):
            counts: dict[str, Any] = {"examples": total.examples, "terms": total.divisor}
            if word == "kfac" and not total.divisor.is_meta:
                # What a merge of A over different data needs; the other Kronecker pairs do not merge by it.
                counts["positions"] = {name: float(sums.A_count) for name, sums in total.layers.items()}
            known = self.kind == "forward_only"
            blocks = one.of_kronecker(factors) if known else one.blocks(factors, total.divisor)
            meta = facts(self.likelihood, self.kind, word, self.samples)
            fishers.append(Fisher(blocks, meta={**meta, "counts": counts}))
        return fishers

    def factors(self, total: Statistics) -> dict[str, KroneckerBlock]:
        """G (x) A of the layers that took part and whose moments were asked for."""
        missing = [name for name in self.layers if name not in total.layers]
        if missing:
            logger.warning("layers that never took part in a forward have no block: %s", ", ".join(missing))
        if not total.divisor.is_meta and not bool(total.divisor > 0):
            raise ArgumentError("the data have no valid loss term (M = 0): every label is masked or ignored")
        factors = {}
        for name, layer in self.layers.items():
            sums = total.layers.get(name)
            if sums is None or name not in self.wanted.moments:
                continue
            A = sums.A / sums.A_count
            if self.kind == "forward_only":
                G = torch.eye(layer.layout.d_out, dtype=A.dtype, device=A.device)
                G = G.expand(*layer.layout.matrix_shape[:-2], *G.shape).contiguous()
            else:
                G = sums.G / total.divisor.to(sums.G.device)
            factors[name] = KroneckerBlock(layer.layout, A, G, name=name)
        return factors


def checked_batches(data: Any) -> Iterable[Any]:
    """The same data, unless they are one batch: the rows of a tensor, or the keys of a mapping, would pass for some."""
    if isinstance(data, Tensor | Mapping):
        raise ArgumentError(f"data is {described(data)}, which is one batch: expected batches, pass [x]")
    if not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise ArgumentError(
            f"data is {described(data)}: expected batches (a list, a loader), or a function that yields them"
        )
    batches: Iterable[Any] = data
    return batches
