"""The kinds of expectation over y: what each of them sends back from the outputs of a batch, pass by pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from .checks import are_tensors, described
from .data import Data, leading_dimension
from .draws import Draws
from .errors import ArgumentError, LikelihoodError
from .likelihoods import Likelihood, exact_scores, sampled_scores
from .options import Kind, Options


class Expectation:
    """The expectation over y of one pass over data, batch by batch; every pass over the same data takes its own.

    Labels that are drawn go on in one stream from batch to batch, and so do labels that are handed in.

    Args:
        kind: any but 'forward_only', which has no scores.
        samples: label draws a batch.
        options: for the seed, and labels in place of drawn ones.
    """

    def __init__(self, kind: Kind, samples: int, options: Options) -> None:
        self.kind, self.samples = kind, samples
        self.draws = Draws(options.seed if options.seed is not None else (options.data or Data()).seed)
        self.injected = None if options.draws is None else iter(options.draws)

    def scores(
        self, bound: Likelihood, outputs: Tensor, batch: Any, labels: Tensor | None
    ) -> tuple[Iterator[tuple[Tensor, float]], Tensor]:
        """What is sent back from the outputs of the next batch.

        Args:
            bound: the likelihood, bound to the batch.
            outputs: what parametrises p.
            batch: as it was yielded; it says how many examples there are.
            labels: the data labels, where there are any.

        Returns:
            ((score or column times sqrt(kappa), its weight), one after another; 0-d bool: some label is out of range).

        Raises:
            LikelihoodError: rows that pose as examples under 'exact', or no labels under 'empirical'.
            ArgumentError: fewer labels handed in than there are batches, or something else than labels.
        """
        invalid = bound.invalid_targets(outputs)
        if self.kind == "exact":
            require_examples(bound, outputs, batch, "kind='exact'")
            return exact_scores(bound, outputs), invalid
        if self.kind == "empirical":
            if labels is None:
                raise LikelihoodError(
                    "kind='empirical' needs data labels, and the batch has none: yield (inputs, labels)"
                )
            drawn: Sequence[Tensor] = [labels]
        elif self.injected is None:
            generators = self.draws.generators(step=0, count=self.samples, device=outputs.device)
            return sampled_scores(bound, outputs, generators=generators), invalid
        else:
            drawn = self._next_draws()
        for one in drawn:
            invalid = invalid | bound.invalid_labels(outputs, one)
        return sampled_scores(bound, outputs, draws=drawn), invalid

    def finish(self) -> None:
        """Refuse labels that are left over when the data are."""
        if self.injected is not None and next(self.injected, None) is not None:
            raise ArgumentError("Options(draws=...) has more entries than the data have batches")

    def _next_draws(self) -> Sequence[Tensor]:
        """The labels handed in for a batch, one tensor a draw."""
        assert self.injected is not None
        drawn = next(self.injected, None)
        if drawn is None:
            raise ArgumentError("Options(draws=...) has fewer entries than the data have batches")
        if not (isinstance(drawn, Tensor) or are_tensors(drawn)):
            raise ArgumentError(
                f"Options(draws=...) has {described(drawn)} for a batch: expected a list of label tensors, one a draw"
            )
        return drawn


def facts(likelihood: Likelihood, kind: str, structure: str, samples: int) -> dict[str, Any]:
    """What a Fisher's ``meta`` says of how it was estimated, before the counts."""
    found: dict[str, Any] = {"likelihood": repr(likelihood), "kind": kind, "structure": structure, "samples": samples}
    if kind in ("empirical", "forward_only"):
        found["note"] = "not the conditional Fisher"
    return found


def require_examples(bound: Likelihood, outputs: Tensor, batch: Any, what: str) -> None:
    """Refuse outputs whose dimension 0 does not count the batch's examples; ``what`` needs it."""
    size, found = leading_dimension(batch), bound.examples(outputs)
    if size is not None and size != found:
        raise LikelihoodError(
            f"{what} needs one example per index of dimension 0: the batch has {size}, the outputs have {found}. Give "
            f"outputs (N, T, C) with kc.Data(outputs=...)."
        )


def labels_out_of_range(number: int, likelihood: Likelihood) -> LikelihoodError:
    """The error for batch ``number``, of which some label is outside the support of p."""
    return LikelihoodError(f"batch {number}: labels out of the range of {likelihood!r}")
