"""What a batch is to everything below: its heads, each a tensor of outputs with the likelihood bound to the batch.

A model with one distribution has one head, named ''. What heads leave is kept apart until it is divided, since each has
an M of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .data import Data
from .errors import KFACError, LikelihoodError
from .layers.shards import brought_together
from .likelihoods import Categorical, Likelihood, Product, exact_scores, sampled_scores
from .statistics import Slots

Distribution = Likelihood | Product


@dataclass(frozen=True)
class Head:
    """One head on one batch.

    Args:
        name: '' where the model has one distribution.
        likelihood: bound to the batch.
        outputs: what parametrises it.
    """

    name: str
    likelihood: Likelihood
    outputs: Tensor


@dataclass(frozen=True)
class Sent:
    """A score to be sent back from a head's outputs.

    Args:
        outputs: of the head, with their graph.
        score: shaped as they.
        weight: of its second moment.
        slot: where that is added.
    """

    outputs: Tensor
    score: Tensor
    weight: float
    slot: int

    def one_by_one(self) -> Iterator[Tensor]:
        """The score of each example by itself, zero for the others."""
        for index in range(len(self.score)):
            score = torch.zeros_like(self.score)
            score[index] = self.score[index]
            yield score


def slots_of(likelihood: Distribution, *, draws: int = 1, groups: int = 1) -> Slots:
    """The slots of a likelihood's heads and of ``groups`` groups that the label draws are dealt to in turn."""
    if not isinstance(likelihood, Product):
        return Slots((1.0,), (likelihood.reduction != "sum",), draws=draws, groups=groups)
    adds = tuple(head.reduction != "sum" for head in likelihood.heads.values())
    return Slots(tuple(likelihood.weights.values()), adds, draws=draws, groups=groups, names=tuple(likelihood.heads))


def split(likelihood: Distribution, values: Any, what: str = "outputs", *, partly: bool = False) -> dict[str, Any]:
    """Values by head: outputs, data labels, masks or drawn labels; see ``Product.split``."""
    if isinstance(likelihood, Product):
        return dict(likelihood.split(values, what, partly=partly))
    return {"": values}


def picked(
    likelihood: Distribution, data: Data, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> dict[str, Tensor]:
    """The outputs of each head from a call of the model."""
    if isinstance(likelihood, Product):
        return likelihood.split(output if data.outputs is None else data.outputs(args, kwargs, output))
    return {"": data.pick_outputs(args, kwargs, output)}


def bound_to_batch(
    likelihood: Distribution,
    data: Data,
    outputs: Mapping[str, Tensor],
    *,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    output: Any = None,
    targets: Any = None,
) -> tuple[Head, ...]:
    """The heads of a batch, with its labels and valid terms as given and as ``data`` picks them from the call.

    Raises:
        LikelihoodError: outputs, labels or masks that do not fit a head, or heads of different numbers of examples.
    """
    kwargs = kwargs or {}
    # What is drawn and scored is whole, on every rank of a tensor-parallel mesh alike.
    outputs = brought_together(dict(outputs))
    if isinstance(likelihood, Product):
        likelihood.check(outputs)
    else:
        likelihood.check(outputs[""])
    if targets is None and likelihood.needs_targets:
        targets = data.pick_targets(args, kwargs, output)
    targets = brought_together(targets)
    labels = {} if targets is None else split(likelihood, targets, "targets", partly=True)
    masks: dict[str, Tensor | None] = {}
    if isinstance(likelihood, Product) and data.mask is not None:
        given = split(likelihood, data.mask(args, kwargs, output), "masks", partly=True)
        masks = {name: mask.detach().bool() for name, mask in given.items()}
    else:
        for name, one in heads_of(likelihood).items():
            masks[name] = data.pick_mask(args, kwargs, output, tuple(one.term_shape(outputs[name])))
    masks = brought_together(masks)
    bound = {name: one.bind(labels.get(name), mask=masks.get(name)) for name, one in heads_of(likelihood).items()}
    return tuple(Head(name, one, outputs[name]) for name, one in bound.items())


def heads_of(likelihood: Distribution) -> dict[str, Likelihood]:
    """The likelihoods by head."""
    return likelihood.heads if isinstance(likelihood, Product) else {"": likelihood}


def meaningful(likelihood: Distribution, targets: Any) -> Any:
    """A batch's data labels, without those that mean nothing to p: say the digits of the images an autoencoder gets."""
    asking = [name for name, one in heads_of(likelihood).items() if one.needs_targets or isinstance(one, Categorical)]
    if targets is None or not asking:
        return None
    found = split(likelihood, targets, "targets", partly=True)
    kept = {name: found.get(name) for name in asking}
    return kept if isinstance(likelihood, Product) else kept[""]


def require_targets(heads: Sequence[Head], remedy: str, kind: type[KFACError] = LikelihoodError) -> None:
    """Refuse heads that need data labels (class weights, say) and have none; ``remedy`` says how to give them."""
    for head in heads:
        if head.likelihood.needs_targets:
            raise kind(f"{head.likelihood!r} needs data labels, and there are none: {remedy}")


def invalid_targets(heads: Sequence[Head]) -> Tensor:
    """Whether some bound data label cannot be one: 0-d bool, on the first head's device."""
    return _any([head.likelihood.invalid_targets(head.outputs) for head in heads])


def invalid_labels(heads: Sequence[Head], labels: Mapping[str, Tensor]) -> Tensor:
    """Whether some drawn label, by head, lies outside the support: 0-d bool."""
    return _any([head.likelihood.invalid_labels(head.outputs, labels[head.name]) for head in heads])


def sampled(
    heads: Sequence[Head],
    slots: Slots,
    *,
    generators: Mapping[str, Sequence[torch.Generator | None]] | None = None,
    draws: Sequence[Mapping[str, Tensor]] | None = None,
) -> Iterator[Sent]:
    """Scores of labels drawn from each head, or given, draw by draw.

    Heads go back one by one: labels of different heads are independent, so what a joint backward would add, the
    products of one head's gradients with another's, is noise.

    Args:
        heads: of a batch.
        slots: where second moments are added.
        generators: by head, one a draw.
        draws: drawn labels in place of sampling, by head, one mapping a draw.
    """
    for index, head in enumerate(heads):
        given = None if draws is None else [draw[head.name] for draw in draws]
        streams = (None,) if generators is None else generators[head.name]
        scores = sampled_scores(head.likelihood, head.outputs, generators=streams, draws=given)
        for draw, (score, weight) in enumerate(scores):
            yield Sent(head.outputs, score, weight, slots.index(index, draw))


def exact(heads: Sequence[Head], slots: Slots) -> Iterator[Sent]:
    """The columns of each head's square root of the output Fisher, one by one."""
    for index, head in enumerate(heads):
        for column, weight in exact_scores(head.likelihood, head.outputs):
            yield Sent(head.outputs, column, weight, slots.index(index, 0))


def divisors(heads: Sequence[Head]) -> Tensor:
    """M of each head: [heads]."""
    found = [head.likelihood.terms(head.outputs) for head in heads]
    return torch.stack([one.to(found[0].device) for one in found])


def _any(flags: Sequence[Tensor]) -> Tensor:
    return torch.stack([flag.to(flags[0].device) for flag in flags]).any()
