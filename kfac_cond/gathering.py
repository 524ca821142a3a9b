"""The statistics of one batch: scores sent back through a capture, with what the likelihoods say of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from .capture import Capture
from .guards import without_autocast
from .heads import Head, Sent, divisors
from .layers.layer import Layer
from .statistics import LayerSums, Slots, Statistics, check_finite


def gathered(
    capture: Capture,
    heads: Sequence[Head],
    scores: Iterable[Sent],
    *,
    slots: Slots,
    invalid: Tensor,
    again: bool = False,
    replaceable: bool = False,
) -> Statistics | None:
    """The statistics of one batch: scores sent back from its heads, with the counts and flags of their likelihoods.

    Args:
        capture: holds the forward that computed the outputs.
        heads: of the batch; they say M and N.
        scores: of the heads' outputs.
        slots: what is summed apart.
        invalid: 0-d bool, some label is out of range: such a batch counts as not finite.
        again, replaceable: as for ``Capture.send_back``.

    Returns:
        None where the outputs do not come from any forward held.
    """
    examples = heads[0].likelihood.examples(heads[0].outputs)
    with without_autocast(heads[0].outputs.device):
        sums = capture.send_back(scores, slots=len(slots), examples=examples, again=again, replaceable=replaceable)
    return None if sums is None else counted(capture.layers, sums, heads, slots, invalid)


def counted(
    layers: Mapping[str, Layer], sums: dict[str, LayerSums], heads: Sequence[Head], slots: Slots, invalid: Tensor
) -> Statistics:
    """Sums of one batch with the counts and flags that the likelihoods give its outputs."""
    examples = heads[0].likelihood.examples(heads[0].outputs)
    finite, nonfinite = check_finite({name: layers[name].largest(one.A, one.G) for name, one in sums.items()})
    return Statistics(sums, divisors(heads), slots, examples, finite & ~invalid.to(finite.device), nonfinite)
