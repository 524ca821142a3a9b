"""How an update lies to the gradient and to the weights: lengths, their ratios and the angle, by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data import Data
from ..errors import ArgumentError
from ..heads import Distribution
from ..layers.naming import join, named_modules
from ..options import Batches
from ..structures import Block, Fisher
from .gradients import cosine, mean_gradient, metric_of, of_layer

PASSES = 1.0
"""A forward and a backward of the data, where no gradient is handed in; else none."""


@dataclass(frozen=True)
class UpdateGeometry:
    """The gradient g of a layer, its preconditioned gradient u = (F + lambda I)^-1 g, and its weights w.

    All lengths are Euclidean, over the layer's trainable parameters; a step is minus the learning rate times u.

    Args:
        gradient_norm: |g|, of the loss in its own scale.
        update_norm: |u|.
        weight_norm: |w|.
        amplification: |u| / |g|; between 1 / (largest eigenvalue + lambda) and 1 / (smallest + lambda). None of a
            gradient that is zero.
        gradient_to_weight: |g| / |w|; None of weights that are zero.
        update_to_weight: |u| / |w|; times the learning rate it is the relative change of one step.
        cosine: u^T g / (|u| |g|), in (0, 1]: at 1 the update is the gradient times a number, and the step one of SGD;
            None of a gradient that is zero.
        slope: g^T u: what a step of rate eta takes from the loss, over eta, to first order.
        damping: lambda, in the units of F.

    Cost: a solve for each layer, after a forward and a backward of the data where no gradient is handed in.
    Source: Martens & Grosse 2015 (arXiv:1503.05671), section 6; You et al. 2017 (arXiv:1708.03888) for the ratios.
    """

    gradient_norm: float
    update_norm: float
    weight_norm: float
    amplification: float | None
    gradient_to_weight: float | None
    update_to_weight: float | None
    cosine: float | None
    slope: float
    damping: float


def measure(
    model: nn.Module,
    data: Batches | None,
    likelihood: Distribution | str | nn.Module,
    fisher: Fisher,
    *,
    damping: float | None = None,
    gradient: Mapping[str, Tensor] | None = None,
    picks: Data | None = None,
) -> dict[str, UpdateGeometry]:
    """The geometry of one update, layer by layer.

    Args:
        model: whose weights they are.
        data: batches with labels; not looked at where there is a gradient.
        likelihood: of the loss, or the criterion.
        fisher: whose layers are measured.
        damping: lambda; None for a thousandth of each block's mean eigenvalue.
        gradient: of the loss by parameter name, as ``mean_gradient`` gives it; None to take it from the data.
        picks: where to find masks, outputs and labels in a batch.

    Raises:
        ArgumentError: neither data nor a gradient.
        LikelihoodError: a batch without labels.
        NumericalError: a block without an inverse.
    """
    if gradient is None:
        if data is None:
            raise ArgumentError("the geometry of an update needs a gradient: pass gradient=, or data with labels")
        gradient = mean_gradient(model, data, likelihood, picks=picks)
    weights = {
        join(owner, name): p.detach()
        for owner, module in named_modules(model)
        for name, p in module._parameters.items()
        if p is not None
    }
    return {name: geometry(block, gradient, weights, damping=damping) for name, block in fisher.items()}


def geometry(
    block: Block, gradient: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, damping: float | None
) -> UpdateGeometry:
    """That of one layer; arguments as for ``measure``, weights by parameter name."""
    metric, used = metric_of(block, damping)
    g, w = of_layer(block, gradient), of_layer(block, weights)
    u = metric.matvec(g)
    of_g, of_u, of_w = (float(torch.linalg.vector_norm(x)) for x in (g, u, w))
    return UpdateGeometry(
        gradient_norm=of_g,
        update_norm=of_u,
        weight_norm=of_w,
        amplification=_over(of_u, of_g),
        gradient_to_weight=_over(of_g, of_w),
        update_to_weight=_over(of_u, of_w),
        cosine=cosine(u, g),
        slope=float((g * u).sum()),
        damping=used,
    )


def _over(number: float, other: float) -> float | None:
    return number / other if other > 0 else None
