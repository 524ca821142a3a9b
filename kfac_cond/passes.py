"""One pass over data: every batch forward, its scores back, and what each structure keeps of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .capture import Capture
from .checks import described
from .data import Data, call_model
from .errors import ArgumentError, CaptureError, NumericalError, StateError
from .forwards import Pairs, Wanted
from .gathering import counted, gathered
from .guards import undisturbed, without_autocast
from .heads import Head, bound_to_batch, invalid_targets, meaningful, picked, require_targets
from .kinds import Expectation, counts_of, facts, labels_out_of_range, require_terms
from .layers.layer import Layer
from .linalg.sides import stored_identity
from .options import Request
from .partial import Partial, digest_of_batch, random_state, restore_random_state
from .progress import tracked
from .statistics import Statistics, combined
from .structures import Block, Fisher, Joint, KroneckerBlock, LayerByLayer

logger = logging.getLogger("kfac_cond")


Make = Callable[[frozenset[str]], tuple[Mapping[str, Layer], Sequence[LayerByLayer | Joint]]]


class Pass:
    """One pass over data: what is the same for every batch.

    Args:
        request: what is asked for.
        make: what collects each estimate, and the layers by name, where it is known which of them have a weight that is
            used without a call of their module.
    """

    def __init__(self, request: Request, make: Make) -> None:
        self.request, self._make = request, make
        self.model, self.likelihood, options = request.model, request.likelihood, request.options
        self.kind = request.kind
        self.data = options.data or Data()
        self.expectation = Expectation(request)
        self.slots = self.expectation.slots
        self.progress = options.progress
        self.dtype = options.dtype
        self.call: tuple[tuple[Any, ...], dict[str, Any], Any] = ((), {}, None)
        self._take_layers(frozenset())

    def _take_layers(self, functional: frozenset[str]) -> None:
        """Begin with the layers there are, given which have a weight that is used functionally."""
        self.functional = functional
        self.layers, self.stored = self._make(functional)
        self.wanted = self._wanted()
        self.capture = Capture(
            self.model,
            self.layers,
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
        # All calls are ours here, so that a model which hides its own call by compiling it is heard as well.
        with undisturbed(self.model):
            try:
                self.capture.install()
                yield
            finally:
                # The one there is now: a fallback puts another in its place.
                self.capture.remove()

    def run(self, partial: Partial, earlier: Sequence[Statistics] = ()) -> Statistics:
        """The statistics of all batches.

        Args:
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
            data = self.request.data
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
        self.expectation.finish()
        return self._used(total)

    @staticmethod
    def _used(total: Statistics) -> Statistics:
        """Without the layers that were called on no position at all, as an expert that no row was routed to."""
        layers = {name: sums for name, sums in total.layers.items() if sums.A_count.is_meta or bool(sums.A_count > 0)}
        return replace(total, layers=layers)

    # How far a pass got ----------------------------------------------------------------------------------------------

    def _state(self, done: int, last: Any, total: Statistics, earlier: Sequence[Statistics]) -> dict[str, Any]:
        """Everything that going on after ``done`` batches needs."""
        return {
            "batches": done,
            "last": digest_of_batch(last),
            "total": total.state(),
            "earlier": [one.state() for one in earlier],
            "stored": [one.state() for one in self.stored],
            "draws": self.expectation.draws.state(),
            "random": random_state(),
            "functional": sorted(self.functional),
        }

    def _resumed(self, partial: Partial, number: int) -> dict[str, Any] | None:
        """The state that this pass, or one after it, goes on from; what the structures had taken in is theirs again."""
        state = partial.found
        if state is None or len(state["earlier"]) < number:
            return None
        self._take_layers(frozenset(state["functional"]))
        devices = self._devices()
        for one, saved in zip(self.stored, state["stored"], strict=True):
            one.load_state(saved, devices)
        self.expectation.draws.load_state(state["draws"])
        return state

    def _restored(self, state: Mapping[str, Any]) -> Statistics:
        return Statistics.restored(state, self.slots, self._devices())

    def _devices(self) -> dict[str, torch.device]:
        return {name: layer.device for name, layer in self.layers.items()}

    def _skip(self, number: int, batch: Any, state: Mapping[str, Any]) -> None:
        """Pass over a batch that was taken in before, the last of which must be the one that was."""
        self.expectation.skip()
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
        if self._falls_back(number, heads):
            return self.statistics(number, batch)
        found, invalid = self._sums(heads, batch, labels)
        self.capture.forget()
        if found is None:
            raise CaptureError(
                "the model's outputs do not depend on any layer that was captured: were they computed under no_grad, "
                "or in a compiled model? Pass the plain module."
            )
        self._check_usable(number, found, invalid)
        return found

    def _falls_back(self, number: int, heads: Sequence[Head]) -> bool:
        """Whether the first forward used weights otherwise than by calls; then it is to be run again.

        Raises:
            CaptureError: a later one did, of which the 2nd, 4th, 8th ... are looked at.
        """
        looked = not number & (number + 1)
        functional = self.capture.used_functionally(head.outputs for head in heads) if looked else set()
        if functional and number:
            raise CaptureError(
                f"batch {number} uses the weight of {', '.join(sorted(functional))} without a call of its module, "
                f"which batch 0 did not: expected the same of all batches. Put such a batch first, or leave the layers "
                f"out with rules={{name: dict(exclude=True)}}."
            )
        if functional:
            self.capture.remove()
            self._take_layers(self.functional | functional)
            self.capture.install()
        return bool(functional)

    def _sums(self, heads: Sequence[Head], batch: Any, labels: Any) -> tuple[Statistics | None, Tensor]:
        """The sums of one batch, and whether some label is out of range."""
        if self.kind == "forward_only":
            invalid = invalid_targets(heads)
            with without_autocast(heads[0].outputs.device):
                sums = self.capture.inputs()
                return counted(self.capture.layers, sums, heads, self.slots, invalid) if sums else None, invalid
        scores, invalid = self.expectation.scores(heads, batch, labels)
        return gathered(self.capture, heads, scores, slots=self.slots, invalid=invalid), invalid

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

    def fishers(self, total: Statistics, words: Sequence[str]) -> list[Fisher]:
        """The sums divided, in each of the structures; nothing else is to read them afterwards."""
        counts = self._counts(total)
        # First: a collector stays in the bases that it is first asked for.
        several = self.slots.groups > 1
        everything = self._blocks(self.factors(total, spent=not several), total, None)
        # Group by group: what the draws of each alone give.
        groups = [
            (self.slots.share(group), self._blocks(self.factors(total, group), total, group))
            for group in range(self.slots.groups if several else 0)
        ]
        fishers = []
        for index, word in enumerate(words):
            # What a merge of A over different data needs; the other Kronecker pairs do not merge by it.
            own = {
                key: value
                for key, value in counts.items()
                if key not in ("positions", "of_gradients") or word == "kfac"
            }
            of_groups = [(share, blocks[index]) for share, blocks in groups]
            meta = {**facts(self.likelihood, self.kind, word, self.request.samples), "counts": own}
            fishers.append(Fisher(everything[index], meta=meta, groups=of_groups))
        return fishers

    def _counts(self, total: Statistics) -> dict[str, Any]:
        counts = counts_of(self.slots, total.divisor, total.examples)
        if not total.divisor.is_meta:
            of_inputs = {n: sums for n, sums in total.layers.items() if self.layers[n].gradient_sums is None}
            counts["positions"] = {name: float(sums.A_count) for name, sums in of_inputs.items()}
            if of_gradients := [name for name in total.layers if name not in of_inputs]:
                counts["of_gradients"] = of_gradients
        return counts

    def _blocks(
        self, factors: Mapping[str, KroneckerBlock], total: Statistics, group: int | None
    ) -> list[dict[str, Block]]:
        """The blocks of each structure, of all draws or of one group of them."""
        if self.kind == "forward_only":
            return [one.of_kronecker(factors) for one in self.stored]
        scales = self.slots.scales(total.divisor, group)
        return [one.blocks(factors, scales) for one in self.stored]

    def factors(self, total: Statistics, group: int | None = None, *, spent: bool = False) -> dict[str, KroneckerBlock]:
        """G (x) A of the layers that took part and whose moments were asked for; with ``group`` of its draws alone.

        The sums are divided where they are if they are ``spent``: nothing reads them afterwards.
        """
        factors = {}
        scales = self.slots.scales(total.divisor, group)
        for name, layer in self.layers.items():
            sums = total.layers.get(name)
            if sums is None or name not in self.wanted.moments:
                continue
            A = sums.A.div_(sums.A_count) if spent else sums.A / sums.A_count
            if self.kind == "forward_only":
                _, shape = layer.layout.side_shapes(layer.max_factor_dim)
                leading = len(layer.layout.matrix_shape) - 2
                G = stored_identity(shape, leading=leading, like=A)
            else:
                G = combined(sums.G, scales, spent=spent)
            factors[name] = KroneckerBlock(layer.layout, *layer.factors(A, G), name=name)
        return factors

    def check_complete(self, total: Statistics) -> None:
        """Name the layers that never took part, and refuse data in which a head has no valid term."""
        missing = [name for name in self.layers if name not in total.layers]
        if missing:
            logger.warning(
                "layers that never took part in a forward, or on no position, have no block: %s", ", ".join(missing)
            )
        require_terms(self.slots, total.divisor)


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
