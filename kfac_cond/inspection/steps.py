"""Steps that are made with a model's parameters and taken back, and the divergence of each."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, prod, sqrt
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..likelihoods import Likelihood, events
from ..linearised import Linearised
from ..structures import Fisher

SIZE, SIZE_OF_NARROW = 1e-5, 1e-2
"""Nats per loss term that a step is shortened to when it is made; more where weights or outputs have 8 or 11 bits."""
FAR = 2.0
"""Measured over predicted, above which a step went farther than it was meant to, and is made again shorter."""

Key = TypeVar("Key", bound=Hashable)
Parts = Mapping[str, Mapping[str, Tensor]]
"""By layer, by parameter."""


@dataclass(frozen=True)
class Step:
    """A part of an update at a length.

    Args:
        parts: the update by layer, at its full length.
        length: how much of it is made.
        predicted: 1/2 delta^T F delta of that, as far as the parameters do move: in few bits that is not quite what
            they are told.
    """

    parts: Parts
    length: float
    predicted: float

    @classmethod
    def of(cls, linear: Linearised, fisher: Fisher, parts: Parts, length: float) -> Step:
        """With what the Fisher predicts of it."""
        real = {}
        for layer, part in parts.items():
            at = {name: linear.parameters[name].detach() for name in part}
            real[layer] = {name: _there(at[name], delta, length) - at[name] for name, delta in part.items()}
        return cls(parts, length, sum(predicted(fisher, real).values()))

    @property
    def update(self) -> dict[str, Tensor]:
        """By parameter, at its full length."""
        return {name: delta for part in self.parts.values() for name, delta in part.items()}


@dataclass(frozen=True)
class Ratio:
    """Measured over predicted divergence, in the limit of short steps.

    Args:
        value: from two lengths, the error of each proportional to it; from one, that of it.
        remainder: relative error of the longer; None of one length, and where nothing was measured.
    """

    value: float
    remainder: float | None = None


def predicted(fisher: Fisher, parts: Parts) -> dict[str, float]:
    """1/2 delta^T F delta of each layer."""
    return {
        name: float(fisher[name].kl({one: delta.to(fisher[name].device) for one, delta in part.items()}))
        for name, part in parts.items()
    }


def settled(
    linear: Linearised, fisher: Fisher, directions: Mapping[Key, Parts], lengths: Mapping[Key, Sequence[float]]
) -> tuple[dict[Key, tuple[Step, ...]], dict[Key, Ratio]]:
    """Steps along some directions that are short enough, and measured over predicted divergence of each.

    Every direction is gone along until the target is reached as it is predicted; where that was farther than it was
    meant to be, by the divergence that is then measured, less far. Of a direction of which nothing is predicted there
    are none.

    Args:
        linear: the model over data.
        fisher: predicts.
        directions: by key.
        lengths: by key, the lengths at which steps are made, of that which reaches the target; 1 first.
    """
    target = _target(linear)
    whole = {key: sum(predicted(fisher, parts).values()) for key, parts in directions.items()}
    first = {
        key: Step.of(linear, fisher, parts, sqrt(target / whole[key]))
        for key, parts in directions.items()
        if isfinite(whole[key]) and whole[key] > 0
    }
    reached = _quotients(linear, {(key, 0): step for key, step in first.items()})
    steps: dict[Key, tuple[Step, ...]] = {}
    for key, step in first.items():
        ratio = reached[key, 0]
        unit = step.length / (sqrt(min(ratio, 1e12)) if ratio > FAR else 1.0)
        made = [Step.of(linear, fisher, step.parts, unit * one) for one in lengths[key]]
        steps[key] = tuple(step if one.length == step.length else one for one in made)
    new = {
        (key, place): step
        for key, several in steps.items()
        for place, step in enumerate(several)
        if step is not first[key]
    }
    return steps, _ratios(steps, {**reached, **(_quotients(linear, new) if new else {})})


def ratios(linear: Linearised, steps: Mapping[Key, Sequence[Step]]) -> dict[Key, Ratio]:
    """Measured over predicted divergence of steps that are known to be short enough, over other data."""
    flat = {(key, place): step for key, several in steps.items() for place, step in enumerate(several)}
    return _ratios(steps, _quotients(linear, flat))


def _ratios(steps: Mapping[Key, Sequence[Step]], quotients: Mapping[tuple[Key, int], float]) -> dict[Key, Ratio]:
    found = {}
    for key, several in steps.items():
        longer, *shorter = (quotients[key, place] for place in range(len(several)))
        if not shorter:
            found[key] = Ratio(longer)
            continue
        # Of half the length, so with half the error to first order.
        value = 2 * shorter[0] - longer
        found[key] = Ratio(value, abs(longer / value - 1) if value else None)
    return found


def _quotients(linear: Linearised, steps: Mapping[Key, Step]) -> dict[Key, float]:
    """Measured over predicted of each step."""
    values = divergences(linear, list(steps.values()))
    return {
        key: value / step.predicted if step.predicted else 0.0
        for (key, step), value in zip(steps.items(), values, strict=True)
    }


@contextmanager
def moved(parameters: Mapping[str, Tensor], update: Mapping[str, Tensor], length: float) -> Iterator[None]:
    """Parameters at theta + length delta, and afterwards at theta, to the last bit.

    Through ``.data``: graphs that somebody holds have saved these tensors, and would refuse them after a change that
    they see.
    """
    before = {name: parameters[name].detach().clone() for name in update}
    try:
        for name, value in before.items():
            parameters[name].data.copy_(_there(value, update[name], length))
        yield
    finally:
        for name, value in before.items():
            parameters[name].data.copy_(value)


def _there(value: Tensor, delta: Tensor, length: float) -> Tensor:
    """Where a parameter gets to, in its own dtype."""
    return value + (delta.to(value.device) * length).to(value.dtype)


def divergences(linear: Linearised, steps: Sequence[Step]) -> list[float]:
    """The divergence of each step, per loss term: sum_h (w_h / M_h) KL_h."""
    totals = torch.zeros(len(steps), len(linear.slots.names), dtype=torch.float64)

    def visitor(batch: Any) -> Tensor:
        point = linear.at(batch)
        here = [(head.likelihood, head.outputs.detach()) for head in point.heads]
        divisor = point.divisor
        del point
        for row, step in enumerate(steps):
            with moved(linear.parameters, step.update, step.length):
                there = [head.outputs.detach() for head in linear.at(batch).heads]
            for column, ((likelihood, outputs), other) in enumerate(zip(here, there, strict=True)):
                totals[row, column] += float(weighted_kl(likelihood, outputs, other))
        return divisor

    divisor = linear.visit(visitor).to("cpu", torch.float64)
    found: list[float] = (totals * (torch.tensor(linear.slots.weights, dtype=torch.float64) / divisor)).sum(1).tolist()
    return found


def weighted_kl(likelihood: Likelihood, outputs: Tensor, other: Tensor) -> Tensor:
    """The sum over valid terms of kappa KL(p(. | outputs) || p(. | other)), 0-d, in float64 where the device has it."""
    # What a short step changes is few digits of the outputs, and its divergence the square of that.
    wide = events.count_dtype(outputs.device)
    terms = likelihood.kl_terms(outputs.to(wide), other.to(wide))
    kappa = likelihood.term_weight(outputs)
    # Its value at invalid terms has no meaning; theirs is zero.
    return (terms if kappa is None else torch.where(terms == 0, terms, terms * kappa.to(terms))).sum()


def _target(linear: Linearised) -> float:
    """The divergence that steps should have, in the units of the loss: of a mean over terms, or of a sum of them."""
    terms = [0.0] * len(linear.slots.names)
    dtypes = {parameter.dtype for parameter in linear.parameters.values()}

    def visitor(batch: Any) -> Tensor:
        point = linear.at(batch)
        for index, head in enumerate(point.heads):
            valid = head.likelihood.valid(head.outputs)
            terms[index] += prod(head.likelihood.term_shape(head.outputs)) if valid is None else int(valid.sum())
            dtypes.add(head.outputs.dtype)
        return point.divisor

    divisor = linear.visit(visitor).tolist()
    narrow = any(torch.finfo(dtype).eps > 1e-4 for dtype in dtypes)
    one_nat_a_term = float(sum(w * T / M for w, T, M in zip(linear.slots.weights, terms, divisor, strict=True)))
    return (SIZE_OF_NARROW if narrow else SIZE) * one_nat_a_term
