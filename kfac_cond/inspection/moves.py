"""How far weights moved, in the metric of a Fisher: what fine-tuning changed, and what it may have forgotten."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..checks import described
from ..errors import ArgumentError
from ..layers.naming import join, named_modules
from ..layers.shards import brought_together
from ..structures import Block


@dataclass(frozen=True)
class WeightChange:
    """The change d = theta_b - theta_a of a layer's weights.

    Args:
        start: |theta_a|.
        norm: |d|.
        relative: |d| / |theta_a|; None where that is zero.
        forgetting: d^T F_a d / 2: to second order the KL divergence, per loss term, of the first model's predictions on
            the first's data from what they become; the risk of forgetting.
        back: d^T F_b d / 2, the same for the second model's predictions on its own data, were the weights moved back.

    Cost: a product with each block.
    Source: Kirkpatrick et al. 2017 (arXiv:1612.00796), section 2, for the diagonal Fisher.
    """

    start: float
    norm: float
    relative: float | None
    forgetting: float
    back: float

    @classmethod
    def together(cls, layers: Iterable[WeightChange]) -> WeightChange:
        """Of all layers of a block-diagonal Fisher."""
        every = list(layers)
        start, norm = math.hypot(*(one.start for one in every)), math.hypot(*(one.norm for one in every))
        return cls._of(start, norm, sum(one.forgetting for one in every), sum(one.back for one in every))

    @classmethod
    def _of(cls, start: float, norm: float, forgetting: float, back: float) -> WeightChange:
        return cls(start, norm, norm / start if start > 0 else None, forgetting, back)


def weights_of(model: object, which: str) -> Mapping[str, Tensor]:
    """The weights of a model, or of a state dict, by canonical name."""
    if isinstance(model, nn.Module):
        return {
            join(owner, attribute): parameter
            for owner, module in named_modules(model)
            for attribute, parameter in module._parameters.items()
            if parameter is not None
        }
    if isinstance(model, Mapping) and all(isinstance(value, Tensor) for value in model.values()):
        return model
    raise ArgumentError(f"the {which} of models is {described(model)}: expected a torch.nn.Module or its state_dict()")


def change_of(mine: Block, theirs: Block, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> WeightChange:
    """The change of one layer's weights.

    Args:
        mine, theirs: the blocks F_a and F_b of the layer, of one dtype and device.
        before, after: weights by canonical name, those of other layers among them.

    Raises:
        ArgumentError: a weight of the layer that is missing, or of another shape.
    """
    start, end = (_matrix(mine, weights, which) for weights, which in ((before, "first"), (after, "second")))
    moved = end - start
    return WeightChange._of(float(start.norm()), float(moved.norm()), float(mine.kl(moved)), float(theirs.kl(moved)))


def _matrix(block: Block, weights: Mapping[str, Tensor], which: str) -> Tensor:
    for name in block.layout.names:
        if name not in weights:
            raise ArgumentError(f"{block.label}: '{name}' is not among the weights of the {which} model")
    own = {name: brought_together(weights[name].detach()) for name in block.layout.names}
    try:
        return block.layout.to_matrix(own).to(block.device, block.dtype)
    except ArgumentError as error:
        raise ArgumentError(f"{block.label}: of the {which} model {error}") from None
