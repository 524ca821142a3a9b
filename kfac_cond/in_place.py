"""Gradients overwritten by their preconditioned ones: no layer's matrix is put together, none is kept beside them.

The products are those of ``KroneckerBlock.matvec``, which is the plain way and takes any gradient: here a weight and a
bias are multiplied where they are. What goes this way is found, and the memory for it had, before the first is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layers.layer import Layer
from .sharing import Shared
from .structures import KroneckerBlock


@dataclass(frozen=True)
class Place:
    """One layer's gradient, and the inverses of its sides.

    Args:
        weight: the gradient of the weight as it lies in memory, [d_out, k].
        bias: that of the bias, [d_out]; None where there is none.
        A: inverse of the input side, [d_in, d_in], d_in = k, or k + 1 with a bias.
        G: inverse of the output side, [d_out, d_out].
    """

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    G: Tensor

    def overwrite(self, scratch: Tensor) -> None:
        """Write G V A over V = [weight, bias], whose last column is multiplied by itself.

        Args:
            scratch: one dimension, of at least as many numbers as the weight.
        """
        d_out, k = self.weight.shape
        inner = scratch[: d_out * k].view(d_out, k)
        last = None if self.bias is None else torch.mv(self.weight, self.A[k, :k]).add_(self.bias * self.A[k, k])
        torch.mm(self.weight, self.A[:k, :k], out=inner)
        if self.bias is not None and last is not None:
            inner.addr_(self.bias, self.A[k, :k])
            torch.mv(self.G, last, out=self.bias)
        torch.mm(self.G, inner, out=self.weight)


def places(
    layers: Mapping[str, Layer],
    names: Sequence[str],
    gradients: Mapping[str, Mapping[str, Tensor]],
    shared: Shared,
) -> dict[str, Place]:
    """Those of the layers whose gradients can be overwritten where they are, the same on all ranks.

    Args:
        layers: by name.
        names: of those that are asked for; the same on all ranks.
        gradients: by layer and parameter.
        shared: has the inverses, and the ranks that take part.
    """
    inverted = [name for name in names if name in shared.factors.inverted]
    if shared.ranks().exchanges(inverted):
        return {}
    found = {name: _place(layers[name], gradients[name], shared) for name in inverted if name in gradients}
    return {name: place for name, place in found.items() if place is not None}


def overwrite(found: Mapping[str, Place]) -> None:
    """Write each layer's preconditioned gradient over its gradient; one piece of memory serves all on a device."""
    largest: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    for weight in sorted((place.weight for place in found.values()), key=Tensor.numel):
        largest[weight.device, weight.dtype] = weight
    scratch = {key: torch.empty_like(weight).view(-1) for key, weight in largest.items()}
    for place in found.values():
        place.overwrite(scratch[place.weight.device, place.weight.dtype])


def _place(layer: Layer, gradients: Mapping[str, Tensor], shared: Shared) -> Place | None:
    layout = layer.layout
    tensors = [gradients.get(name) for name in layout.names]
    if layout.weight is None or layout.groups > 1 or layout.transposed or not all(map(_lies_plain, tensors)):
        return None
    weight, bias = gradients[layout.weight], None if layout.bias is None else gradients[layout.bias]
    inverse = shared.factors.inverse_of(layer.name, weight)
    # One that is solved with has no inverses of its sides at hand.
    if type(inverse) is not KroneckerBlock or inverse.diagonal_sides:
        return None
    # What does not fit is refused by the block's own product.
    if inverse.layout != layout or inverse.dtype != weight.dtype:
        return None
    if bias is not None and (bias.dtype, bias.device) != (weight.dtype, weight.device):
        return None
    return Place(weight.view(layout.d_out, -1), None if bias is None else bias.view(-1), inverse.A, inverse.G)


def _lies_plain(gradient: Tensor | None) -> bool:
    """Whether a gradient is there, of no subclass, and in the order of its matrix."""
    return type(gradient) is Tensor and gradient.is_contiguous()
