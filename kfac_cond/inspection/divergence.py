"""The divergence of an update: what the Fisher predicts of it, layer by layer, and what it is when it is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..heads import Distribution
from ..likelihoods import Likelihood, events
from ..linearised import Linearised
from ..options import Batches, Options
from ..quadratic import inner
from ..structures import Fisher
from .proposals import DAMPING, Proposal, propose
from .requests import linearised, request_of

SIZE, SIZE_OF_NARROW = 1e-5, 1e-2
"""Nats per loss term that a step is shortened to when it is made; more where weights have 8 or 11 bits."""


UPDATE, RANDOM = "update", ("random", "another")
"""The directions: that of the update, and some that no block has chosen."""
LENGTHS = {UPDATE: (1.0, 0.5), **dict.fromkeys(RANDOM, (1.0,))}
"""The lengths at which steps along each are made, of that which is predicted to reach the size."""

Key = tuple[str | None, str]
"""A layer, or None for all of them, and a direction."""
Parts = Mapping[str, Mapping[str, Tensor]]
"""By layer, by parameter."""
Ratios = Mapping[Key, tuple[float, float | None]]
"""Measured over predicted, and its relative error, where both are known."""


@dataclass(frozen=True)
class LayerKL:
    """The divergence KL(p_theta || p_{theta + delta}) of the part of an update in one layer, all others at rest.

    All but shares and ratios in nats per loss term, of the update at its full length.

    Args:
        predicted: 1/2 delta^T F delta, which of a Kronecker block is 1/2 tr(G D A D^T) for the update D as the layer's
            matrix. Cost: one product with the block.
        share: of it in the sum over layers, from 0 to 1.
        decrease: of the mean loss, -(g^T delta + 1/2 delta^T F delta); None without a gradient.
        measured: from the model moved a short way along the update, on the data F came from, with the likelihood's own
            KL over the square of the length; None where nothing is predicted. Cost: two forwards over the data.
        ratio: measured over predicted; 1 where the block is exact. An update made with an approximation goes where that
            is smallest, and so where it is too small: then the ratio is above 1, often by far.
        scale: measured over predicted along two random directions in place of the update, which no block has chosen. A
            block that is too large by a factor of two shows here as 1/2, whatever its form: averaged over directions it
            is the ratio of the exact trace to the block's, and the trace of 'ekfac' and 'diagonal' is exact. Cost: two
            forwards.
        remainder: relative error of the second order at the longer of the two lengths that were measured, by the
            difference between them: it is proportional to the length, and small where the numbers above hold.
        held_out: measured on other data; None without them. Cost: two forwards over them.

    Source: Martens 2020 (arXiv:1412.1193), section 6, for the quadratic form as twice the divergence.
    """

    predicted: float
    share: float
    decrease: float | None = None
    measured: float | None = None
    ratio: float | None = None
    scale: float | None = None
    remainder: float | None = None
    held_out: float | None = None


@dataclass(frozen=True)
class WholeKL:
    """The divergence of a whole update, all layers at once; see ``LayerKL`` for what the numbers are.

    Args:
        predicted: the sum over layers, as of a block-diagonal F.
        decrease: of the mean loss, likewise.
        measured, ratio, remainder, held_out: of all layers moved together, so that what couples them is in it.
        scale: of all layers, each moved by itself, their divergences added up.
        labels: whose labels the gradient is at, that the update came from: 'data', 'model' or 'given'.
        damping: of the update; None where it was handed in.
    """

    predicted: float
    decrease: float | None = None
    measured: float | None = None
    ratio: float | None = None
    scale: float | None = None
    remainder: float | None = None
    held_out: float | None = None
    labels: str = "given"
    damping: float | None = None


@dataclass(frozen=True)
class _Step:
    """A part of an update at a length: what it moves, how far, and what is predicted of that."""

    part: Mapping[str, Tensor]
    length: float
    predicted: float


def passes(layers: int, *, held_out: bool = False, proposed: bool = False) -> float:
    """Forward-backwards over the data that ``measure`` takes, a forward counted as a third of one.

    Args:
        layers: of the Fisher.
        held_out: whether there are other data, taken for as many as the first.
        proposed: whether the update is handed in.
    """
    forwards = 2 + len(LENGTHS[UPDATE]) * (layers + 1) + len(RANDOM) * layers
    elsewhere = held_out * (1 + len(LENGTHS[UPDATE]) * (layers + 1))
    return (not proposed) + (forwards + elsewhere) / 3


PASSES = passes


def measure(
    model: nn.Module,
    data: Batches,
    likelihood: Distribution | str | nn.Module,
    fisher: Fisher,
    *,
    damping: float = DAMPING,
    proposal: Proposal | None = None,
    held_out: Batches | None = None,
    options: Options | None = None,
) -> tuple[WholeKL, dict[str, LayerKL]]:
    """Predicted against measured divergence of an update, whole and layer by layer.

    Parameters are moved where they are and put back, bitwise, whatever happens in between; buffers, gradients and the
    random state are as before. Masks of dropout are the same before and after each step.

    Args:
        model, likelihood, options: as for ``kc.estimate``.
        data: batches that F came from, that can be gone through many times.
        fisher: what predicts.
        damping: of the natural-gradient step that is looked at where no update is given.
        proposal: another update.
        held_out: other batches.

    Raises:
        ArgumentError: data that can be gone through only once, or an update that does not fit the Fisher.
        LikelihoodError: a likelihood without a KL.
    """
    if proposal is None:
        proposal = propose(model, data, likelihood, fisher, damping=damping, options=options)
    linear = linearised(request_of(model, data, likelihood, options), fisher)
    parts = _parts(fisher, proposal.update)
    predicted = _predicted(fisher, parts)
    directions = {UPDATE: parts, **{what: _parts(fisher, _random(linear, options, what)) for what in RANDOM}}
    steps = _steps(linear, fisher, directions)
    here, there = _ratios(linear, steps), {}
    if held_out is not None:
        updates = {key: several for key, several in steps.items() if key[1] == UPDATE}
        there = _ratios(linearised(request_of(model, held_out, likelihood, options), fisher), updates)
    of_random = [(what, _predicted(fisher, directions[what])) for what in RANDOM]
    numbers: dict[str | None, dict[str, float | None]] = {
        name: {
            **_numbers(name, value, here, there),
            "scale": _scale(fisher if name is None else [name], of_random, here),
        }
        for name, value in predicted.items()
    }
    whole = predicted[None]
    decreases = {name: _decrease(proposal, part, predicted[name]) for name, part in parts.items()}
    found = {
        name: LayerKL(predicted[name], predicted[name] / whole if whole else 0.0, decreases[name], **numbers[name])
        for name in fisher
    }
    known = [one for one in decreases.values() if one is not None]
    decrease = sum(known) if len(known) == len(decreases) else None
    return WholeKL(whole, decrease, **numbers[None], labels=proposal.labels, damping=proposal.damping), found


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


def _parts(fisher: Fisher, update: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The update by layer."""
    missing = [name for name in fisher.parameter_names if name not in update]
    if missing:
        raise ArgumentError(
            f"the update lacks {len(missing)} of the Fisher's parameters, first '{missing[0]}': expected a tensor for "
            f"each of fisher.parameter_names"
        )
    return {name: {one: update[one].detach() for one in block.layout.names} for name, block in fisher.items()}


def _predicted(fisher: Fisher, parts: Parts) -> dict[str | None, float]:
    """1/2 delta^T F delta of each layer, and of all together under None."""
    found: dict[str | None, float] = {
        name: float(fisher[name].kl({one: delta.to(fisher[name].device) for one, delta in part.items()}))
        for name, part in parts.items()
    }
    return {None: sum(found.values()), **found}


def _decrease(proposal: Proposal, part: Mapping[str, Tensor], predicted: float) -> float | None:
    if proposal.gradient is None:
        return None
    gradient = [proposal.gradient[name].to(delta.device) for name, delta in part.items()]
    return -(float(inner(gradient, list(part.values()))) + predicted)


def _random(linear: Linearised, options: Options | None, what: str) -> dict[str, Tensor]:
    """A normal direction in all parameters."""
    seed = None if options is None else options.seed
    seed = (torch.initial_seed() if seed is None else seed) + RANDOM.index(what)
    generator = torch.Generator().manual_seed(seed % 2**63)
    return {
        name: torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.device)
        for name, parameter in linear.parameters.items()
    }


def _steps(linear: Linearised, fisher: Fisher, directions: Mapping[str, Parts]) -> dict[Key, tuple[_Step, ...]]:
    """Of each direction, whole and layer by layer, the steps that are made; none where nothing is predicted of it.

    The longest is predicted to reach the target; all are predicted as far as the parameters do move, which in few bits
    is not quite what they are told.
    """
    target = (SIZE_OF_NARROW if _is_narrow(linear) else SIZE) * _nats_of_a_term(linear)
    found: dict[Key, tuple[_Step, ...]] = {}
    for what, parts in directions.items():
        for name, value in _predicted(fisher, parts).items():
            if name is None and what in RANDOM:
                continue
            those = parts if name is None else {name: parts[name]}
            reaching = sqrt(target / value) if isfinite(value) and value > 0 else 0.0
            lengths = [length * reaching for length in LENGTHS[what] if reaching]
            found[name, what] = tuple(_step(linear, fisher, those, length) for length in lengths)
    return found


def _step(linear: Linearised, fisher: Fisher, parts: Parts, length: float) -> _Step:
    real = {}
    for layer, part in parts.items():
        at = {name: linear.parameters[name].detach() for name in part}
        real[layer] = {name: _there(at[name], delta, length) - at[name] for name, delta in part.items()}
    together = {name: delta for part in parts.values() for name, delta in part.items()}
    return _Step(together, length, sum(_predicted(fisher, real)[layer] for layer in real))


def _ratios(linear: Linearised, steps: Mapping[Key, tuple[_Step, ...]]) -> dict[Key, tuple[float, float | None]]:
    """Measured over predicted, of two lengths at length zero; and the relative error of the longer."""
    values = iter(_divergences(linear, [step for several in steps.values() for step in several]))
    found: dict[Key, tuple[float, float | None]] = {}
    for key, several in steps.items():
        ratios = [next(values) / step.predicted if step.predicted else 0.0 for step in several]
        if len(ratios) == 1:
            found[key] = ratios[0], None
        elif ratios:
            # The error is proportional to the length, to first order.
            longer, shorter = ratios
            ratio = 2 * shorter - longer
            found[key] = ratio, abs(longer / ratio - 1) if ratio else None
    return found


def _numbers(name: str | None, predicted: float, here: Ratios, there: Ratios) -> dict[str, float | None]:
    """What was measured of a layer or of the whole, by the names of ``LayerKL``."""
    ratio, remainder = here.get((name, UPDATE), (None, None))
    held_out, _ = there.get((name, UPDATE), (None, None))
    return {
        "measured": None if ratio is None else ratio * predicted,
        "ratio": ratio,
        "remainder": remainder,
        "held_out": None if held_out is None else held_out * predicted,
    }


def _scale(
    names: Iterable[str], directions: Sequence[tuple[str, Mapping[str | None, float]]], here: Ratios
) -> float | None:
    """Measured over predicted, both summed over layers and random directions; None where nothing is predicted."""
    pairs = [(of[name], here[name, what][0]) for name in names for what, of in directions if (name, what) in here]
    total = sum(predicted for predicted, _ in pairs)
    return sum(predicted * ratio for predicted, ratio in pairs) / total if total else None


def _divergences(linear: Linearised, steps: Sequence[_Step]) -> list[float]:
    """The divergence of each step, per loss term: sum_h (w_h / M_h) KL_h."""
    totals = torch.zeros(len(steps), len(linear.slots.names), dtype=torch.float64)

    def visitor(batch: Any) -> Tensor:
        point = linear.at(batch)
        here = [(head.likelihood, head.outputs.detach()) for head in point.heads]
        divisor = point.divisor
        del point
        for row, step in enumerate(steps):
            with moved(linear.parameters, step.part, step.length):
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


def _nats_of_a_term(linear: Linearised) -> float:
    """What one nat a term is in the units of the loss: 1 for a mean over terms, their number for a sum."""
    terms = [0.0] * len(linear.slots.names)

    def visitor(batch: Any) -> Tensor:
        point = linear.at(batch)
        for index, head in enumerate(point.heads):
            valid = head.likelihood.valid(head.outputs)
            terms[index] += prod(head.likelihood.term_shape(head.outputs)) if valid is None else int(valid.sum())
        return point.divisor

    divisor = linear.visit(visitor).tolist()
    return float(sum(w * T / M for w, T, M in zip(linear.slots.weights, terms, divisor, strict=True)))


def _is_narrow(linear: Linearised) -> bool:
    """Whether some weight has fewer bits than float32."""
    return any(torch.finfo(parameter.dtype).eps > 1e-4 for parameter in linear.parameters.values())
