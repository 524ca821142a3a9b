"""From gradients and inverses to preconditioned gradients: all computed before the first is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .errors import ArgumentError
from .layers.layer import Layer
from .structures import Block
from .trust_region import LayerUpdate, TrustRegion


def gradients_of(layer: Layer) -> dict[str, Tensor]:
    """The layer's gradients by parameter name; empty where there are none.

    Raises:
        ArgumentError: a sparse or sharded gradient.
        ModelChangedError: the layer is not what was wrapped.
    """
    layer.check_unchanged()
    found = {name: p.grad for name, p in layer.parameters.items() if p.grad is not None}
    for name, gradient in found.items():
        if gradient.layout is not torch.strided or hasattr(gradient, "full_tensor"):
            raise ArgumentError(
                f"the gradient of '{name}' is {type(gradient).__name__} with layout {gradient.layout}: expected a "
                f"dense tensor. Exclude the layer with rules={{'{layer.name}': dict(exclude=True)}}."
            )
    return found


def layer_update(
    layer: Layer, gradients: Mapping[str, Tensor], inverse: Block, rates: Mapping[int, float | Tensor]
) -> LayerUpdate:
    """One layer's preconditioned gradient; a parameter without a gradient counts as zero.

    Args:
        layer: the layer.
        gradients: its gradients by parameter name, at least one.
        inverse: the damped inverse of its block.
        rates: learning rates by the parameter's identity.
    """
    parameters = layer.parameters
    whole = {name: gradients.get(name, torch.zeros_like(p)) for name, p in parameters.items()}
    matrix = layer.layout.to_matrix({name: gradient.to(inverse.dtype) for name, gradient in whole.items()})
    own = [rates[id(p)] for p in parameters.values() if id(p) in rates]
    return LayerUpdate(matrix, inverse.matvec(matrix), _largest(own), layer.name)


def layer_updates(
    layers: Mapping[str, Layer],
    gradients: Mapping[str, Mapping[str, Tensor]],
    inverse_of: Callable[[str, Tensor], Block | None],
    rates: Mapping[int, float | Tensor],
) -> dict[str, LayerUpdate]:
    """The preconditioned gradients of the layers that have an inverse; nothing is written.

    Args:
        layers: by name.
        gradients: by layer what ``gradients_of`` gives, at least one each.
        inverse_of: of a layer's name and one of its gradients, for where it is and its dtype.
        rates: learning rates by the parameter's identity.
    """
    updates = {}
    for name, found in gradients.items():
        inverse = inverse_of(name, next(iter(found.values())))
        if inverse is not None:
            updates[name] = layer_update(layers[name], found, inverse, rates)
    return updates


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
            gradient.copy_(new[key])
