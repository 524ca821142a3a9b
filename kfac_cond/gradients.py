"""From gradients and inverses to preconditioned gradients: all computed before the first is written.

Gradients of which each rank has a part are preconditioned where they are brought together, each on one rank; see
``distributed.shuffle``. Where all ranks need all of them, they are brought together on each with ``full_tensor()``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .distributed import Shuffle, is_initialised
from .errors import ArgumentError
from .in_place import overwrite, places
from .layers.layer import Layer
from .layers.shards import check_placements, local, whole, write_into
from .sharing import Shared
from .statistics import statistic_dtype
from .trust_region import LayerUpdate, TrustRegion, measures_layers


def gradients_of(layer: Layer) -> dict[str, Tensor]:
    """The layer's gradients by parameter name; empty where there are none.

    Raises:
        ArgumentError: a sparse gradient, or a sharded one that is a part of something else than a sum or a mean.
        ModelChangedError: the layer is not what was wrapped.
    """
    found = {name: p.grad for name, p in layer.unchanged_parameters.items() if p.grad is not None}
    for name, gradient in found.items():
        check_placements(name, gradient)
        if gradient.layout is not torch.strided:
            raise ArgumentError(
                f"the gradient of '{name}' is {type(gradient).__name__} with layout {gradient.layout}: expected a "
                f"dense tensor. Exclude the layer with rules={{'{layer.name}': dict(exclude=True)}}."
            )
    return found


def precondition(
    layers: Mapping[str, Layer],
    names: Sequence[str],
    gradients: Mapping[str, Mapping[str, Tensor]],
    shared: Shared,
    rates: Mapping[int, float | Tensor],
    trust_region: TrustRegion | None,
    grad_scale: Tensor | None,
) -> Tensor | Sequence[Tensor] | None:
    """Replace the gradients of the layers that have an inverse, here or elsewhere, by preconditioned ones.

    Args:
        layers: by name.
        names: of those that are asked for; the same on all ranks.
        gradients: by layer and parameter.
        shared: has the inverses, and the ranks that take part.
        rates: learning rates by the parameter's identity.
        trust_region: says how far to go; None for all the way.
        grad_scale: what a gradient scaler multiplied the gradients with.

    Returns:
        What the trust region gave; None where nothing was asked of it.
    """
    parted = _parted(layers, names, shared, trust_region)
    matrices: dict[str, Tensor] | None = None if trust_region is None else {}
    # A trust region is asked before anything is written.
    over = places(layers, names, gradients, shared) if trust_region is None else {}
    rest = [name for name in names if name not in parted and name not in over]
    results = preconditioned(layers, rest, gradients, shared, matrices)
    updates = {
        name: LayerUpdate(one, results[name], rate_of(layers[name], rates), name)
        for name, one in (matrices or {}).items()
    }
    if not parted:
        scale = trust_region_scale(trust_region, updates, grad_scale) if updates and trust_region is not None else None
        overwrite(over)
        write(layers, gradients, results, scale)
        return scale
    shuffle = shared.ranks().shuffle(parted, gradients)
    own = _collected(layers, gradients, shuffle, shared, rates)
    order = [name for name in names if name in gradients and (name in results or name in parted)]
    scale = None
    if order and trust_region is not None:
        together = {name: one for name, one in (updates | own).items() if name in order}
        scale = scale_over_ranks(trust_region, together, grad_scale, shuffle, order)
    factors = {} if scale is None else dict(zip(order, _each(scale, len(order)), strict=True))
    sent = {name: layers[name].layout.from_matrix(_scaled(one.update, factors.get(name))) for name, one in own.items()}
    del own
    parts = shuffle.returned(sent)
    overwrite(over)
    write(layers, gradients, results, None if scale is None else [factors[name] for name in results])
    for name in parted:
        for key, gradient in gradients.get(name, {}).items():
            if key in parts:
                local(gradient).copy_(parts[key])
    return scale


def _parted(
    layers: Mapping[str, Layer], names: Sequence[str], shared: Shared, trust_region: TrustRegion | None
) -> list[str]:
    """The layers of which ranks have parts, and that one rank preconditions for all."""
    if not (is_initialised() and measures_layers(trust_region)):
        return []
    inverted = [name for name in names if name in shared.factors.inverted]
    return [name for name in inverted if layers[name].sharded]


def _collected(
    layers: Mapping[str, Layer],
    gradients: Mapping[str, Mapping[str, Tensor]],
    shuffle: Shuffle,
    shared: Shared,
    rates: Mapping[int, float | Tensor],
) -> dict[str, LayerUpdate]:
    """The updates of the layers that this rank preconditions for all."""
    here = {name: layers[name] for name in shuffle.here}
    firsts = {name: next(iter((gradients.get(name) or layer.parameters).values())) for name, layer in here.items()}
    dtypes = {name: statistic_dtype(first.dtype) for name, first in firsts.items()}
    whole_gradients = shuffle.collected(gradients, dtypes)
    found = {}
    for name, layer in here.items():
        matrix = layer.layout.to_matrix(whole_gradients.pop(name))
        inverse = shared.factors.inverse_of(name, matrix)
        update = matrix if inverse is None else inverse.matvec(matrix)
        found[name] = LayerUpdate(matrix, update, rate_of(layer, rates), name)
    return found


def gradient_matrix(layer: Layer, gradients: Mapping[str, Tensor]) -> Tensor:
    """One layer's gradient as its matrix, in the dtype of its statistics; a parameter without one counts as zero.

    Of shards the gradient is brought together, on all ranks of its mesh: it is the layer that is preconditioned, never
    a part of it.

    Args:
        layer: the layer.
        gradients: its gradients by parameter name, at least one.
    """
    dtype = statistic_dtype(next(iter(gradients.values())).dtype)
    if len(gradients) < len(layer.layout.names):
        gradients = {name: gradients.get(name, torch.zeros_like(p)) for name, p in layer.parameters.items()}
    return layer.layout.to_matrix({name: whole(gradient).to(dtype) for name, gradient in gradients.items()})


def rate_of(layer: Layer, rates: Mapping[int, float | Tensor]) -> float | Tensor:
    """The learning rate of a layer, from those by the parameter's identity."""
    return _largest([rates[id(p)] for p in layer.parameters.values() if id(p) in rates])


def preconditioned(
    layers: Mapping[str, Layer],
    names: Sequence[str],
    gradients: Mapping[str, Mapping[str, Tensor]],
    shared: Shared,
    matrices: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The preconditioned gradients, as matrices, of layers that have an inverse, here or elsewhere; none is written.

    Args:
        layers: by name.
        names: of those that are asked for; the same on all ranks.
        gradients: by layer and parameter, as they are on all ranks.
        shared: has the inverses, and the ranks that take part.
        matrices: where the gradients as matrices are put; None where each is let go once it is multiplied.
    """
    ranks, factors = shared.ranks(), shared.factors
    inverted = [name for name in names if name in factors.inverted]
    there = [name for name in inverted if name in gradients]
    mine = {}
    for name in there:
        matrix = gradient_matrix(layers[name], gradients[name])
        inverse = factors.inverse_of(name, matrix)
        if inverse is not None:
            mine[name] = inverse.matvec(matrix)
        if matrices is not None:
            matrices[name] = matrix
    found = ranks.exchanged(inverted, mine)
    return {name: found[name] for name in there}


def _largest(rates: Sequence[float | Tensor]) -> float | Tensor:
    """The largest of a layer's learning rates, so that a bound on its step holds for each; 1 where there is none."""
    numbers = [rate for rate in rates if not isinstance(rate, Tensor)]
    largest: float | Tensor = max(numbers, default=0.0 if rates else 1.0)
    for rate in rates:
        if isinstance(rate, Tensor):
            largest = torch.maximum(rate, torch.as_tensor(largest, dtype=rate.dtype, device=rate.device))
    return largest


def trust_region_scale(
    trust_region: TrustRegion, updates: Mapping[str, LayerUpdate], grad_scale: Tensor | None
) -> Tensor | Sequence[Tensor]:
    """The factors that the trust region gives for gradients with the gradient scaler's factor taken out."""
    return trust_region.scale(list(_unscaled(updates, grad_scale).values()))


def scale_over_ranks(
    trust_region: Any,
    updates: Mapping[str, LayerUpdate],
    grad_scale: Tensor | None,
    shuffle: Shuffle,
    order: Sequence[str],
) -> Tensor | Sequence[Tensor]:
    """The same where no rank has all updates, from one number of each layer.

    Args:
        trust_region: one that says so with ``by_layer``.
        updates: those that there are here.
        grad_scale: what a gradient scaler multiplied the gradients with.
        shuffle: of the layers that one rank preconditions for all.
        order: of all layers, on whatever rank.
    """
    measured = {name: trust_region.measure(one) for name, one in _unscaled(updates, grad_scale).items()}
    agreed = shuffle.agreed({name: measured[name] for name in shuffle.here if name in measured})
    like = next(iter(agreed.values()))
    return trust_region.factors([(agreed[name] if name in agreed else measured[name].to(like)) for name in order])  # type: ignore[no-any-return]


def _unscaled(updates: Mapping[str, LayerUpdate], grad_scale: Tensor | None) -> dict[str, LayerUpdate]:
    """The updates with the gradient scaler's factor taken out."""
    if grad_scale is None:
        return dict(updates)
    inverse = grad_scale.reciprocal()
    return {
        name: LayerUpdate(one.gradient * inverse, one.update * inverse, one.rate, one.name)
        for name, one in updates.items()
    }


def mean_scale(scale: Tensor | Sequence[Tensor]) -> Tensor:
    """The factor of a trust region, or the mean of those of all layers, 0-d."""
    return scale if isinstance(scale, Tensor) else torch.stack(list(scale)).mean()


def write(
    layers: Mapping[str, Layer],
    gradients: Mapping[str, Mapping[str, Tensor]],
    updates: Mapping[str, Tensor],
    scale: Tensor | Sequence[Tensor] | None,
) -> None:
    """Write the updates, times ``scale`` or each times its own, into the gradients they were computed from."""
    scales = [None] * len(updates) if scale is None else _each(scale, len(updates))
    for (name, update), one in zip(updates.items(), scales, strict=True):
        new = layers[name].layout.from_matrix(_scaled(update, one))
        for key, gradient in gradients[name].items():
            write_into(gradient, new[key])


def _each(scale: Tensor | Sequence[Tensor], number: int) -> Sequence[Tensor]:
    """The factor of each of so many layers."""
    return [scale] * number if isinstance(scale, Tensor) else scale


def _scaled(update: Tensor, factor: Tensor | None) -> Tensor:
    return update if factor is None else update * factor.to(update)
