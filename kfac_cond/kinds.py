"""The kinds of expectation over y: what each of them sends back from the heads of a batch, pass by pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import are_tensors, described
from .data import Data, leading_dimension
from .distributed.meshes import number_of
from .draws import Draws
from .errors import ArgumentError, LikelihoodError
from .heads import Distribution, Head, Sent, exact, invalid_labels, invalid_targets, sampled, slots_of, split
from .layers.shards import cuts_of
from .likelihoods import Product
from .options import Request
from .statistics import Slots

MAX_GROUPS = 8
"""Groups of label draws that are kept apart, each with its own G, for the error of sampling."""


class Expectation:
    """The expectation over y of one pass over data, batch by batch; every pass over the same data takes its own.

    Labels that are drawn go on in one stream from batch to batch, and so do labels that are handed in.

    Args:
        request: for the likelihood, the kind ('forward_only' has no scores), the draws, and labels in place of them.
    """

    def __init__(self, request: Request) -> None:
        self.likelihood, self.kind, self.samples = request.likelihood, request.kind, request.samples
        options = request.options
        # Draws that were handed in are not drawn at all, so that their spread says nothing.
        groups = min(self.samples, MAX_GROUPS) if self.kind == "sampled" and options.draws is None else 1
        self.slots = slots_of(self.likelihood, draws=self.samples, groups=groups)
        seed = options.seed if options.seed is not None else (options.data or Data()).seed
        self.injected = None if options.draws is None else iter(options.draws)
        draws = self.kind == "sampled" and self.injected is None
        self.draws = Draws(seed, rank=number_of(cuts_of(request.model)) if draws else None)

    def scores(self, heads: Sequence[Head], batch: Any, labels: Any) -> tuple[Iterator[Sent], Tensor]:
        """What is sent back from the heads of the next batch.

        Args:
            heads: with the likelihoods bound to the batch.
            batch: as it was yielded; it says how many examples there are.
            labels: the data labels, where there are any.

        Returns:
            (scores or columns times sqrt(kappa), one after another; 0-d bool: some label is out of range).

        Raises:
            LikelihoodError: rows that pose as examples under 'exact', or no labels under 'empirical'.
            ArgumentError: fewer labels handed in than there are batches, or something else than labels.
        """
        invalid = invalid_targets(heads)
        if self.kind == "exact":
            require_examples(heads, batch, "kind='exact'")
            return exact(heads, self.slots), invalid
        if self.kind == "sampled" and self.injected is None:
            return sampled(heads, self.slots, generators=self._generators(heads)), invalid
        drawn = self._next_draws() if self.kind == "sampled" else [self._data_labels(labels)]
        for one in drawn:
            invalid = invalid | invalid_labels(heads, one)
        return sampled(heads, self.slots, draws=drawn), invalid

    def skip(self) -> None:
        """Pass over the labels handed in for a batch that was taken in before."""
        if self.injected is not None:
            next(self.injected, None)

    def finish(self) -> None:
        """Refuse labels that are left over when the data are."""
        if self.injected is not None and next(self.injected, None) is not None:
            raise ArgumentError("Options(draws=...) has more entries than the data have batches")

    def _generators(self, heads: Sequence[Head]) -> dict[str, list[torch.Generator | None]]:
        return {
            head.name: self.draws.generators(step=0, count=self.samples, device=head.outputs.device, head=index)
            for index, head in enumerate(heads)
        }

    def _data_labels(self, labels: Any) -> Mapping[str, Tensor]:
        if labels is None:
            raise LikelihoodError("kind='empirical' needs data labels, and the batch has none: yield (inputs, labels)")
        return split(self.likelihood, labels, "labels")

    def _next_draws(self) -> Sequence[Mapping[str, Tensor]]:
        """The labels handed in for a batch, by head, one mapping a draw."""
        assert self.injected is not None
        drawn = next(self.injected, None)
        if drawn is None:
            raise ArgumentError("Options(draws=...) has fewer entries than the data have batches")
        by_head = isinstance(self.likelihood, Product) and isinstance(drawn, Sequence) and len(drawn) > 0
        if not (are_tensors(drawn) or by_head):
            raise ArgumentError(
                f"Options(draws=...) has {described(drawn)} for a batch: expected a list of label tensors, one a draw"
            )
        return [split(self.likelihood, one, "draws") for one in drawn]


def facts(likelihood: Distribution, kind: str, structure: str, samples: int) -> dict[str, Any]:
    """What a Fisher's ``meta`` says of how it was estimated, before the counts."""
    found: dict[str, Any] = {"likelihood": repr(likelihood), "kind": kind, "structure": structure, "samples": samples}
    if kind in ("empirical", "forward_only"):
        found["note"] = "not the conditional Fisher"
    return found


def counts_of(slots: Slots, divisor: Tensor, examples: int) -> dict[str, Any]:
    """What sums were divided by, for ``meta``: M and whether it adds are by head where there are several."""
    terms = dict(zip(slots.names, divisor.unbind(), strict=True))
    adds = dict(zip(slots.names, slots.adds, strict=True))
    return {"examples": examples, "terms": terms.get("", terms), "adds": adds.get("", adds)}


def require_terms(slots: Slots, divisor: Tensor) -> None:
    """Refuse data in which a head has no valid term; on the meta device nothing is known."""
    if divisor.is_meta:
        return
    barren = [name for name, M in zip(slots.names, divisor.tolist(), strict=True) if not M > 0]
    if barren:
        where = f" of head '{barren[0]}'" if barren[0] else ""
        raise ArgumentError(f"the data have no valid loss term{where} (M = 0): every label is masked or ignored")


def require_examples(heads: Sequence[Head], batch: Any, what: str) -> None:
    """Refuse outputs whose dimension 0 does not count the batch's examples; ``what`` needs it."""
    size = leading_dimension(batch)
    for head in heads:
        found = head.likelihood.examples(head.outputs)
        if size is not None and size != found:
            raise LikelihoodError(
                f"{what} needs one example per index of dimension 0: the batch has {size}, the outputs have {found}. "
                f"Give outputs (N, T, C) with kc.Data(outputs=...)."
            )


def labels_out_of_range(number: int, likelihood: Distribution) -> LikelihoodError:
    """The error for batch ``number``, of which some label is outside the support of p."""
    return LikelihoodError(f"batch {number}: labels out of the range of {likelihood!r}")
