"""One pass over data: every batch forward, its scores back, and what each structure keeps of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Capture, counted, gathered
from .checks import are_tensors, described
from .data import Data, call_model, leading_dimension
from .draws import Draws
from .errors import ArgumentError, CaptureError, LikelihoodError, NumericalError, StateError
from .forwards import Pairs, Wanted
from .guards import kept_state, without_autocast
from .heads import (
    Distribution,
    Head,
    Sent,
    bound_to_batch,
    exact,
    invalid_labels,
    invalid_targets,
    meaningful,
    picked,
    require_targets,
    sampled,
    slots_of,
    split,
)
from .hooks import hook_owners
from .layers.survey import Layer
from .likelihoods import Product
from .linalg.sides import stored_identity
from .options import Batches, Kind, Options
from .partial import Partial, digest_of_batch, random_state, restore_random_state
from .progress import tracked
from .statistics import Statistics, combined
from .structures import Block, Fisher, Joint, KroneckerBlock, LayerByLayer

logger = logging.getLogger("kfac_cond")

MAX_GROUPS = 8
"""Groups of label draws that are kept apart, each with its own G, for the error of sampling."""


class Pass:
    """One pass over data: what is the same for every batch."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        likelihood: Distribution,
        kind: Kind,
        samples: int,
        options: Options,
        stored: Sequence[LayerByLayer | Joint],
    ) -> None:
        self.model, self.layers, self.likelihood, self.stored = model, layers, likelihood, stored
        self.kind, self.samples = kind, samples
        self.data = options.data or Data()
        # Groups of draws are kept apart for the error of sampling; draws that were handed in are not drawn at all.
        sampling = kind == "sampled" and options.draws is None
        self.slots = slots_of(likelihood, draws=samples, groups=min(samples, MAX_GROUPS) if sampling else 1)
        self.draws = Draws(options.seed if options.seed is not None else self.data.seed)
        self.progress = options.progress
        self.dtype = options.dtype
        self.injected = None if options.draws is None else iter(options.draws)
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
            return Wanted(frozenset(self.layers), frozenset(), self._take, self.dtype)
        moments = frozenset[str]().union(*(one.moments for one in self.stored))
        pairs = frozenset[str]().union(*(one.pairs for one in self.stored))
        # What is not drawn is not zero on average, so that products between examples would stay; and what couples
        # layers needs all of them example by example.
        by_example = self.kind != "sampled" or any(isinstance(one, Joint) for one in self.stored)
        return Wanted(moments, pairs, self._take, self.dtype, by_example)

    def _take(self, pairs: Pairs, weight: float, slot: int) -> None:
        for one in self.stored:
            if asked := {name: pair for name, pair in pairs.items() if name in one.pairs}:
                one.take(asked, weight, slot)

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

    def run(self, data: Batches, partial: Partial, earlier: Sequence[Statistics] = ()) -> Statistics:
        """The statistics of all batches.

        Args:
            data: the batches.
            partial: where to go on from, and to note how far this got.
            earlier: the statistics of the passes before this one.
        """
        state = self._resumed(partial, len(earlier))
        if state is not None and len(state["earlier"]) > len(earlier):
            return self._restored(state["earlier"][len(earlier)])
        total = None if state is None else self._restored(state["total"])
        done = 0 if state is None else int(state["batches"])
        whole, last, number = True, None, -1
        with self.listening():
            batches = checked_batches(data() if callable(data) else data)
            # Closed even after an exception, which would leave a progress bar on the terminal.
            with closing(tracked(batches, description="Fisher", show=self.progress)) as shown:
                try:
                    for number, batch in enumerate(shown):
                        if state is not None and number < done:
                            self._skip(number, batch, state)
                            continue
                        whole = False
                        statistics = self.statistics(number, batch)
                        total = statistics if total is None else total.merged(statistics)
                        whole, done, last = True, number + 1, batch
                        if partial.due:
                            partial.write(self._state(done, last, total, earlier))
                except BaseException:
                    # In the middle of a batch the sums hold a part of it: then the last write is what there is.
                    if whole and last is not None and total is not None:
                        partial.write(self._state(done, last, total, earlier))
                    raise
        if state is not None and number + 1 < done:
            raise StateError(
                f"the data have {number + 1} batches, and the partial estimate took in {done}: going on needs the same "
                f"batches. Remove the file to start anew."
            )
        if total is None:
            raise ArgumentError("data yielded no batch: an iterator that was used up already? Pass a list or a loader.")
        self._require_all_drawn()
        return total

    # How far a pass got ----------------------------------------------------------------------------------------------

    def _state(self, done: int, last: Any, total: Statistics, earlier: Sequence[Statistics]) -> dict[str, Any]:
        """Everything that going on after ``done`` batches needs."""
        return {
            "batches": done,
            "last": digest_of_batch(last),
            "total": total.state(),
            "earlier": [one.state() for one in earlier],
            "stored": [one.state() for one in self.stored],
            "draws": self.draws.state(),
            "random": random_state(),
        }

    def _resumed(self, partial: Partial, number: int) -> dict[str, Any] | None:
        """The state that this pass, or one after it, goes on from; what the structures had taken in is theirs again."""
        state = partial.found
        if state is None or len(state["earlier"]) < number:
            return None
        devices = self._devices()
        for one, saved in zip(self.stored, state["stored"], strict=True):
            one.load_state(saved, devices)
        self.draws.load_state(state["draws"])
        return state

    def _restored(self, state: Mapping[str, Any]) -> Statistics:
        return Statistics.restored(state, self.slots, self._devices())

    def _devices(self) -> dict[str, torch.device]:
        return {name: layer.like.device for name, layer in self.layers.items()}

    def _skip(self, number: int, batch: Any, state: Mapping[str, Any]) -> None:
        """Pass over a batch that was taken in before, the last of which must be the one that was."""
        if self.injected is not None:
            next(self.injected, None)
        if number + 1 < state["batches"]:
            return
        if digest_of_batch(batch) != state["last"]:
            raise StateError(
                f"batch {number} is not the one that the partial estimate took in: going on needs the same batches in "
                f"the same order (no shuffling, or the same seed). Remove the file to start anew."
            )
        restore_random_state(state["random"])

    # One batch -------------------------------------------------------------------------------------------------------

    def statistics(self, number: int, batch: Any) -> Statistics:
        """The statistics of one batch, seen to be finite."""
        with torch.enable_grad():
            output, targets = call_model(self.model, batch)
        args, kwargs, _ = self.call
        outputs = picked(self.likelihood, self.data, args, kwargs, output)
        labels = self.data.pick_targets(args, kwargs, output) if targets is None else targets
        heads = bound_to_batch(
            self.likelihood,
            self.data,
            outputs,
            args=args,
            kwargs=kwargs,
            output=output,
            targets=meaningful(self.likelihood, targets),
        )
        require_targets(heads, "yield (inputs, labels)")
        found, invalid = self._sums(heads, batch, labels)
        self.capture.forget()
        if found is None:
            raise CaptureError(
                "the model's outputs do not depend on any layer that was captured: were they computed under no_grad, "
                "or in a compiled model? Pass the plain module."
            )
        self._check_usable(number, found, invalid)
        return found

    def _sums(self, heads: Sequence[Head], batch: Any, labels: Any) -> tuple[Statistics | None, Tensor]:
        """The sums of one batch, and whether some label is out of range."""
        if self.kind == "forward_only":
            invalid = invalid_targets(heads)
            with without_autocast(heads[0].outputs.device):
                sums = self.capture.inputs()
                return counted(sums, heads, self.slots, invalid) if sums else None, invalid
        scores, invalid = self._scores(heads, batch, labels)
        return gathered(self.capture, heads, scores, slots=self.slots, invalid=invalid), invalid

    def _scores(self, heads: Sequence[Head], batch: Any, labels: Any) -> tuple[Iterator[Sent], Tensor]:
        invalid = invalid_targets(heads)
        if self.kind == "exact":
            _require_examples(heads, batch)
            return exact(heads, self.slots), invalid
        if self.kind == "empirical":
            if labels is None:
                raise LikelihoodError(
                    "kind='empirical' needs data labels, and the batch has none: yield (inputs, labels)"
                )
            drawn = [split(self.likelihood, labels, "labels")]
        elif self.injected is None:
            return sampled(heads, self.slots, generators=self._generators(heads)), invalid
        else:
            drawn = [split(self.likelihood, one, "draws") for one in self._next_draws()]
        for one in drawn:
            invalid = invalid | invalid_labels(heads, one)
        return sampled(heads, self.slots, draws=drawn), invalid

    def _generators(self, heads: Sequence[Head]) -> dict[str, list[torch.Generator | None]]:
        return {
            head.name: self.draws.generators(step=0, count=self.samples, device=head.outputs.device, head=index)
            for index, head in enumerate(heads)
        }

    def _next_draws(self) -> Sequence[Any]:
        """The labels handed in for a batch, one entry a draw."""
        assert self.injected is not None
        drawn = next(self.injected, None)
        if drawn is None:
            raise ArgumentError("Options(draws=...) has fewer entries than the data have batches")
        by_head = isinstance(self.likelihood, Product) and isinstance(drawn, Sequence) and len(drawn) > 0
        if not (isinstance(drawn, Tensor) or are_tensors(drawn) or by_head):
            raise ArgumentError(
                f"Options(draws=...) has {described(drawn)} for a batch: expected a list of label tensors, one a draw"
            )
        return drawn

    def _require_all_drawn(self) -> None:
        """Refuse injected draws of which some are left when the data are over."""
        if self.injected is not None and next(self.injected, None) is not None:
            raise ArgumentError("Options(draws=...) has more entries than the data have batches")

    def _check_usable(self, number: int, statistics: Statistics, invalid: Tensor) -> None:
        if statistics.finite.is_meta or bool(statistics.finite):
            return
        if bool(invalid):
            raise LikelihoodError(f"batch {number}: labels out of the range of {self.likelihood!r}")
        bad = [name for name, flag in statistics.nonfinite.items() if bool(flag)]
        raise NumericalError(
            f"batch {number}: statistics that are not finite in {len(bad)} of {len(self.layers)} layers, first in "
            f"'{bad[0]}': look for NaN or infinite inputs or weights."
        )

    def fishers(self, total: Statistics, words: Sequence[str]) -> list[Fisher]:
        """The sums divided, in each of the structures."""
        counts = self._counts(total)
        everything = self._blocks(total, None)
        # Group by group: what the draws of each alone give.
        groups = [
            (self.slots.share(group), self._blocks(total, group))
            for group in range(self.slots.groups if self.slots.groups > 1 else 0)
        ]
        fishers = []
        for index, word in enumerate(words):
            meta = {"likelihood": repr(self.likelihood), "kind": self.kind, "structure": word, "samples": self.samples}
            if self.kind in ("empirical", "forward_only"):
                meta["note"] = "not the conditional Fisher"
            # What a merge of A over different data needs; the other Kronecker pairs do not merge by it.
            own = {
                key: value for key, value in counts.items() if key not in ("positions", "universal") or word == "kfac"
            }
            of_groups = [(share, blocks[index]) for share, blocks in groups]
            fishers.append(Fisher(everything[index], meta={**meta, "counts": own}, groups=of_groups))
        return fishers

    def _counts(self, total: Statistics) -> dict[str, Any]:
        terms = dict(zip(self.slots.names, total.divisor.unbind(), strict=True))
        adds = dict(zip(self.slots.names, self.slots.adds, strict=True))
        counts: dict[str, Any] = {
            "examples": total.examples,
            "terms": terms.get("", terms),
            "adds": adds.get("", adds),
        }
        if not total.divisor.is_meta:
            of_inputs = {name: sums for name, sums in total.layers.items() if self.layers[name].modules}
            counts["positions"] = {name: float(sums.A_count) for name, sums in of_inputs.items()}
            if universal := [name for name in total.layers if name not in of_inputs]:
                counts["universal"] = universal
        return counts

    def _blocks(self, total: Statistics, group: int | None) -> list[dict[str, Block]]:
        """The blocks of each structure, of all draws or of one group of them."""
        factors = self.factors(total, group)
        if self.kind == "forward_only":
            return [one.of_kronecker(factors) for one in self.stored]
        scales = self.slots.scales(total.divisor, group)
        return [one.blocks(factors, scales) for one in self.stored]

    def factors(self, total: Statistics, group: int | None = None) -> dict[str, KroneckerBlock]:
        """G (x) A of the layers that took part and whose moments were asked for; with ``group`` of its draws alone."""
        factors = {}
        scales = self.slots.scales(total.divisor, group)
        for name, layer in self.layers.items():
            sums = total.layers.get(name)
            if sums is None or name not in self.wanted.moments:
                continue
            A = sums.A / sums.A_count
            if self.kind == "forward_only":
                _, shape = layer.layout.side_shapes(layer.max_factor_dim)
                leading = len(layer.layout.matrix_shape) - 2
                G = stored_identity(shape, leading=leading, like=A)
            else:
                G = combined(sums.G, scales)
            factors[name] = KroneckerBlock(layer.layout, *layer.factors(A, G), name=name)
        return factors

    def check_complete(self, total: Statistics) -> None:
        """Name the layers that never took part, and refuse data in which a head has no valid term."""
        missing = [name for name in self.layers if name not in total.layers]
        if missing:
            logger.warning("layers that never took part in a forward have no block: %s", ", ".join(missing))
        if total.divisor.is_meta:
            return
        barren = [name for name, M in zip(self.slots.names, total.divisor.tolist(), strict=True) if not M > 0]
        if barren:
            where = f" of head '{barren[0]}'" if barren[0] else ""
            raise ArgumentError(f"the data have no valid loss term{where} (M = 0): every label is masked or ignored")


def _require_examples(heads: Sequence[Head], batch: Any) -> None:
    """Refuse 'exact' where dimension 0 of the outputs does not count the batch's examples."""
    size = leading_dimension(batch)
    for head in heads:
        found = head.likelihood.examples(head.outputs)
        if size is not None and size != found:
            raise LikelihoodError(
                f"kind='exact' needs one example per index of dimension 0: the batch has {size}, the outputs have "
                f"{found}. Give outputs (N, T, C) with kc.Data(outputs=...)."
            )


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
