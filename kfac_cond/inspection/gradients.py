"""Gradients of the loss at the data labels, piece by piece of the data, and the metric that they are measured in."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..batches import Batch
from ..data import Data
from ..errors import ArgumentError, LikelihoodError
from ..guards import undisturbed
from ..heads import Distribution, Head, divisors
from ..objective import Objective
from ..options import Batches
from ..structures import Block

FRACTION = 1e-3
"""Damping over a block's mean eigenvalue where none is given: little beside what counts, and the block can be inverted.
"""


@dataclass(frozen=True)
class Piece:
    """The gradient of the loss on some examples.

    Args:
        gradient: of the loss in its own scale, by parameter name.
        examples: how many.
        terms: what the loss divides by, 0-d; that of the first head where there are several.
        adds: whether the loss of more data divides by more, as a mean does.
    """

    gradient: dict[str, Tensor]
    examples: int
    terms: Tensor
    adds: bool

    @property
    def per_example(self) -> dict[str, Tensor]:
        """The gradient without the number of examples: as it is for a mean, divided by it for a sum."""
        return self.gradient if self.adds else {name: g / self.examples for name, g in self.gradient.items()}


class DataLoss(Objective):
    """The loss of a model at the data labels.

    Args:
        model: any module.
        given: a likelihood, its name, or the criterion that is called with (outputs, targets).
        data: where to find masks, outputs and labels.
    """

    def loss(self, batch: Batch) -> tuple[Tensor, tuple[Head, ...]]:
        """The loss, 0-d with its graph, and the heads.

        Raises:
            LikelihoodError: no data labels.
        """
        output, targets = self._called(batch)
        args, kwargs = self._called.call
        targets = self.picks.pick_targets(args, kwargs, output) if targets is None else targets
        if targets is None:
            raise LikelihoodError(
                f"{self.likelihood!r}: the gradient of the loss needs data labels, and a batch has none: yield "
                f"(inputs, labels), or pick them with kc.Data(targets=...)"
            )
        heads = self.heads_of(args, kwargs, output, targets)
        return self._loss(heads, targets), heads

    def piece(self, batch: Batch) -> Piece:
        """The gradient on a batch; whoever listens hears of it, unless paused."""
        with torch.enable_grad():
            loss, heads = self.loss(batch)
            found = self.gradient(loss)
        gradient = {name: g.detach() for name, g in zip(self.parameters, found, strict=True)}
        examples = heads[0].likelihood.examples(heads[0].outputs)
        return Piece(gradient, examples, divisors(heads)[0], all(self.slots.adds))


def pieces(
    model: nn.Module,
    data: Batches,
    likelihood: Distribution | str | nn.Module,
    *,
    picks: Data | None = None,
    least: int = 1,
) -> Generator[Piece, None, None]:
    """The gradients of all batches, one at a time; nothing of the model changes, and whoever listens is paused.

    Where the data have fewer batches than ``least``, each is cut into as many parts as make up for it, every so
    many-th example in one. Cost: one forward and backward of the data.

    Args:
        model: in the mode it is in.
        data: batches with labels, or a function that yields them.
        likelihood: a likelihood, its name, or the criterion.
        picks: where to find masks, outputs and labels in a batch.
        least: how many pieces are wanted.

    Raises:
        LikelihoodError: a batch without labels.
        ArgumentError: data that yield nothing, or a batch that is none.
    """
    loss = DataLoss(model, likelihood, data=picks)
    batches = iter(data() if callable(data) else data)
    first = list(islice(batches, least))
    if not first:
        raise ArgumentError("data yielded no batch: an iterator that was used up already? Pass a list or a loader.")
    parts = ceil(least / len(first))
    with undisturbed(loss.model):
        for given in chain(first, batches):
            for part in _cut(batch_of(given), parts):
                yield loss.piece(part)


def mean_gradient(
    model: nn.Module, data: Batches, likelihood: Distribution | str | nn.Module, *, picks: Data | None = None
) -> dict[str, Tensor]:
    """The gradient of the loss over all of the data, by parameter name; cost and errors as for ``pieces``.

    Of several heads whose numbers of terms do not keep their proportion, batches are weighed by those of the first.
    """
    total: dict[str, Tensor] = {}
    terms: Tensor | None = None
    with closing(pieces(model, data, likelihood, picks=picks)) as found:
        for piece in found:
            weight = piece.terms if piece.adds else torch.ones_like(piece.terms)
            for name, g in piece.gradient.items():
                part = g * weight.to(g)
                total[name] = total[name].add_(part) if name in total else part
            terms = weight if terms is None or not piece.adds else terms + weight
    assert terms is not None
    return {name: g / terms.to(g) for name, g in total.items()}


def batch_of(given: Any) -> Batch:
    """What a loader yields as a ``Batch``: a tensor, (inputs, labels), or a mapping of keyword arguments."""
    if isinstance(given, tuple | list) and 1 <= len(given) <= 2 and isinstance(given[0], Tensor | PackedSequence):
        return Batch.of(given[0], given[1] if len(given) == 2 else None)
    return Batch.of(given, None)


def metric_of(block: Block, damping: float | None) -> tuple[Block, float]:
    """(F + lambda I)^-1 of a block, and lambda: as given, or a thousandth of the block's mean eigenvalue.

    Raises:
        NumericalError: the block is not finite, or lambda is 0 and it is singular.
    """
    mean = float(block.trace()) / block.layout.numel
    # Of a block that is zero any multiple of the identity is the same metric.
    chosen = (FRACTION * mean or 1.0) if damping is None else float(damping)
    return block.inverse(damping=chosen), chosen


def of_layer(block: Block, tensors: Mapping[str, Tensor]) -> Tensor:
    """The part of named tensors that a block is of, as its matrix, where the block is."""
    return block._to_matrix({name: tensors[name].to(block.device) for name in block.layout.names})


def cosine(left: Tensor, right: Tensor) -> float | None:
    """The cosine of the angle between two tensors; None where one is zero."""
    lengths = torch.linalg.vector_norm(left) * torch.linalg.vector_norm(right)
    return float((left * right).sum() / lengths) if float(lengths) > 0 else None


def _cut(batch: Batch, parts: int) -> Iterator[Batch]:
    """A batch in so many parts, as far as it has examples for them."""
    number = min(parts, batch.size or 1)
    for offset in range(number):
        yield batch.part(number, offset)
