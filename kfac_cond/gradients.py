"""From gradients and inverses to preconditioned gradients: all computed before the first is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .errors import ArgumentError
from .layers.layer import Layer
from .layers.shards import check_placements, whole, write_into
from .sharing import Shared
from .statistics import statistic_dtype
from .trust_region import LayerUpdate, TrustRegion


def gradients_of(layer: Layer) -> dict[str, Tensor]:
    """The layer's gradients by parameter name; empty where there are none.

    Raises:
        ArgumentError: a sparse gradient, or one sharded in another way than ``fully_shard`` does.
        ModelChangedError: the layer is not what was wrapped.
    """
    layer.check_unchanged()
    found = {name: p.grad for name, p in layer.parameters.items() if p.grad is not None}
    for name, gradient in found.items():
        check_placements(name, gradient)
        if gradient.layout is not torch.strided:
            raise ArgumentError(
                f"the gradient of '{name}' is {type(gradient).__name__} with layout {gradient.layout}: expected a "
                f"dense tensor. Exclude the layer with rules={{'{layer.name}': dict(exclude=True)}}."
            )
    return found


def gradient_matrix(layer: Layer, gradients: Mapping[str, Tensor]) -> Tensor:
    """One layer's gradient as its matrix, in the dtype of its statistics; a parameter without one counts as zero.

    Of shards the gradient is brought together: it is the layer that is preconditioned, never a part of it.

    Args:
        layer: the layer.
        gradients: its gradients by parameter name, at least one.
    """
    dtype = statistic_dtype(next(iter(gradients.values())).dtype)
    found = {
        name: whole(gradients[name] if name in gradients else torch.zeros_like(p))
        for name, p in layer.parameters.items()
    }
    return layer.layout.to_matrix({name: gradient.to(dtype) for name, gradient in found.items()})


def rate_of(layer: Layer, rates: Mapping[int, float | Tensor]) -> float | Tensor:
    """The learning rate of a layer, from those by the parameter's identity."""
    return _largest([rates[id(p)] for p in layer.parameters.values() if id(p) in rates])


def updates_of(
    layers: Mapping[str, Layer],
    names: Sequence[str],
    gradients: Mapping[str, Mapping[str, Tensor]],
    shared: Shared,
    rates: Mapping[int, float | Tensor],
) -> dict[str, LayerUpdate]:
    """The preconditioned gradients of the layers that have an inverse, here or elsewhere; nothing is written.

    Args:
        layers: by name.
        names: of those that are asked for; the same on all ranks.
        gradients: by layer and parameter, as they are on all ranks.
        shared: has the inverses, and the ranks that take part.
        rates: learning rates by the parameter's identity.
    """
    ranks, factors = shared.ranks(), shared.factors
    inverted = [name for name in names if name in factors.inverted]
    matrices = {name: gradient_matrix(layers[name], gradients[name]) for name in inverted if name in gradients}
    mine = {}
    for name, matrix in matrices.items():
        inverse = factors.inverse_of(name, matrix)
        if inverse is not None:
            mine[name] = inverse.matvec(matrix)
    found = ranks.exchanged(inverted, mine)
    return {name: LayerUpdate(one, found[name], rate_of(layers[name], rates), name) for name, one in matrices.items()}


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
    seen = list(updates.values())
    if grad_scale is not None:
        inverse = grad_scale.reciprocal()
        seen = [LayerUpdate(u.gradient * inverse, u.update * inverse, u.rate, u.name) for u in seen]
    return trust_region.scale(seen)


def mean_scale(scale: Tensor | Sequence[Tensor]) -> Tensor:
    """The factor of a trust region, or the mean of those of all layers, 0-d."""
    return scale if isinstance(scale, Tensor) else torch.stack(list(scale)).mean()


def write(
    layers: Mapping[str, Layer],
    gradients: Mapping[str, dict[str, Tensor]],
    updates: Mapping[str, LayerUpdate],
    scale: Tensor | Sequence[Tensor] | None,
) -> None:
    """Write the updates, times ``scale`` or each times its own, into the gradients they were computed from."""
    scales = [scale] * len(updates) if scale is None or isinstance(scale, Tensor) else scale
    for (name, update), one in zip(updates.items(), scales, strict=True):
        matrix = update.update if one is None else update.update * one.to(update.update)
        new = layers[name].layout.from_matrix(matrix)
        for key, gradient in gradients[name].items():
            write_into(gradient, new[key])
