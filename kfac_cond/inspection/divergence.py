"""The divergence of an update: what the Fisher predicts of it, layer by layer, and what it is when it is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..heads import Distribution
from ..linearised import Linearised
from ..options import Batches, Options
from ..quadratic import inner
from ..structures import Fisher
from .proposals import DAMPING, Proposal, propose
from .requests import linearised, request_of
from .steps import Parts, Ratio, predicted, ratios, settled

UPDATE, RANDOM = "update", ("random", "another")
"""The directions: that of the update, and some that no block has chosen."""
LENGTHS = {UPDATE: (1.0, 0.5), **dict.fromkeys(RANDOM, (1.0,))}
"""The lengths at which steps along each are made, of that which is predicted to reach the size."""

Key = tuple[str | None, str]
"""A layer, or None for all of them, and a direction."""


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
        measured: of all layers moved together, so that what couples them is in it; so are the next, but for the scale.
        ratio: measured over predicted.
        scale: of all layers, each moved by itself, their divergences added up.
        remainder: relative error of the second order.
        held_out: measured on other data; None without them.
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


def passes(layers: int, *, held_out: bool = False, proposed: bool = False) -> float:
    """Forward-backwards over the data that ``measure`` takes, a forward counted as a third of one.

    Where a step turns out to go farther than it was predicted to, it is made once more.

    Args:
        layers: of the Fisher.
        held_out: whether there are other data, taken for as many as the first.
        proposed: whether the update is handed in.
    """
    forwards = 3 + len(LENGTHS[UPDATE]) * (layers + 1) + len(RANDOM) * layers
    elsewhere = held_out * (1 + len(LENGTHS[UPDATE]) * (layers + 1))
    return (not proposed) + (forwards + elsewhere) / 3


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
    directions: dict[Key, Parts] = {(None, UPDATE): parts, **_by_layer(UPDATE, parts)}
    for what in RANDOM:
        directions |= _by_layer(what, _parts(fisher, _random(linear, options, what)))
    steps, here = settled(linear, fisher, directions, {key: LENGTHS[key[1]] for key in directions})
    there: Mapping[Key, Ratio] = {}
    if held_out is not None:
        updates = {key: several for key, several in steps.items() if key[1] == UPDATE}
        there = ratios(linearised(request_of(model, held_out, likelihood, options), fisher), updates)
    sizes = {key: sum(predicted(fisher, those).values()) for key, those in directions.items()}
    whole = sizes[None, UPDATE]
    decreases = {name: _decrease(proposal, part, sizes[name, UPDATE]) for name, part in parts.items()}
    found = {}
    for name in fisher:
        size = sizes[name, UPDATE]
        numbers = _numbers(name, [name], sizes, here, there)
        found[name] = LayerKL(size, size / whole if whole else 0.0, decreases[name], **numbers)
    known = [one for one in decreases.values() if one is not None]
    decrease = sum(known) if len(known) == len(decreases) else None
    numbers = _numbers(None, fisher, sizes, here, there)
    return WholeKL(whole, decrease, **numbers, labels=proposal.labels, damping=proposal.damping), found


def _by_layer(what: str, parts: Parts) -> dict[Key, Parts]:
    return {(name, what): {name: part} for name, part in parts.items()}


def _parts(fisher: Fisher, update: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The update by layer."""
    missing = [name for name in fisher.parameter_names if name not in update]
    if missing:
        raise ArgumentError(
            f"the update lacks {len(missing)} of the Fisher's parameters, first '{missing[0]}': expected a tensor for "
            f"each of fisher.parameter_names"
        )
    return {name: {one: update[one].detach() for one in block.layout.names} for name, block in fisher.items()}


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


def _numbers(
    name: str | None,
    layers: Iterable[str],
    sizes: Mapping[Key, float],
    here: Mapping[Key, Ratio],
    there: Mapping[Key, Ratio],
) -> dict[str, float | None]:
    """What was measured of a layer or of the whole, by the names of ``LayerKL``; the scale is that of some layers."""
    of_update, elsewhere = here.get((name, UPDATE)), there.get((name, UPDATE))
    size = sizes[name, UPDATE]
    keys = [(layer, what) for layer in layers for what in RANDOM if (layer, what) in here]
    total = sum(sizes[key] for key in keys)
    return {
        "measured": None if of_update is None else of_update.value * size,
        "ratio": None if of_update is None else of_update.value,
        "scale": sum(sizes[key] * here[key].value for key in keys) / total if total else None,
        "remainder": None if of_update is None else of_update.remainder,
        "held_out": None if elsewhere is None else elsewhere.value * size,
    }
