"""Updates that are looked at before anybody takes them, with the gradient they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LikelihoodError
from ..heads import Distribution
from ..kinds import Expectation
from ..linearised import Gradients, Linearised, Point
from ..options import Batches, Options
from ..output_fisher import OfScores
from ..structures import Fisher
from .requests import linearised, request_of

DAMPING = 1e-2
"""Of the natural-gradient step where nothing else is said: that of ``kc.KFAC``."""


@dataclass(frozen=True)
class Proposal:
    """An update, which nothing has been done with.

    Args:
        update: delta, what would be added to each parameter, by name.
        gradient: of the mean loss, by parameter name; None where nobody knows it.
        labels: whose labels the gradient is at: 'data', 'model' (drawn from it), or 'given' where it was handed in.
        damping: lambda of the update; None where it was handed in.
    """

    update: Mapping[str, Tensor]
    gradient: Mapping[str, Tensor] | None = None
    labels: str = "given"
    damping: float | None = None


def propose(
    model: nn.Module,
    data: Batches,
    likelihood: Distribution | str | nn.Module,
    fisher: Fisher,
    *,
    damping: float = DAMPING,
    options: Options | None = None,
) -> Proposal:
    """The natural-gradient step -(F + lambda)^-1 g of length one, g the gradient of the mean loss over the data.

    g is at the data's labels where the batches have some that the likelihood takes, at labels drawn from the model
    elsewhere: then it has mean zero, and its covariance is F's.

    Args:
        model, data, likelihood, options: as for ``kc.estimate``; data that can be gone through many times.
        fisher: of the model's layers; g is taken in their parameters.
        damping: lambda.
    """
    gradient, labels = mean_gradient(model, data, likelihood, fisher, options=options)
    placed = {name: g.to(block.device) for block in fisher.values() for name, g in _part(gradient, block.layout.names)}
    update = {name: -step for name, step in fisher.solve(placed, damping=damping).items()}
    return Proposal(update, gradient, labels, damping)


def mean_gradient(
    model: nn.Module,
    data: Batches,
    likelihood: Distribution | str | nn.Module,
    fisher: Fisher,
    *,
    options: Options | None = None,
) -> tuple[Gradients, str]:
    """The gradient of the mean loss in the Fisher's parameters, and whose labels it is at: 'data' or 'model'."""
    empirical = linearised(request_of(model, data, likelihood, options, kind="empirical"), fisher)
    try:
        return _gradient(empirical, lambda point, _: [_root(one) for one in point.fishers]), "data"
    except LikelihoodError:
        # No labels, or none that are labels of this likelihood: the digits of images that are to be encoded.
        pass
    drawn = Expectation(request_of(model, data, likelihood, options, kind="sampled"))

    def scores(point: Point, batch: Any) -> Sequence[Tensor]:
        sent, _ = drawn.scores(point.heads, batch, None)
        return [one.score for one in sent]

    exact = linearised(request_of(model, data, likelihood, options), fisher)
    return _gradient(exact, scores), "model"


def _gradient(linear: Linearised, scores: Callable[[Point, Any], Sequence[Tensor]]) -> Gradients:
    """sum_h (w_h / M_h) J^T s, with s the scores of each head times the root of kappa."""
    totals = [dict[str, Tensor]() for _ in linear.slots.names]

    def visitor(batch: Any) -> Tensor:
        point = linear.at(batch)
        last = len(point.heads) - 1
        for index, (head, score) in enumerate(zip(point.heads, scores(point, batch), strict=True)):
            # The root of kappa is in the score, and this is the other.
            vector = head.likelihood.weighted(score, head.outputs.detach())
            found = linear.pulled_back(head, vector, keep=index < last)
            totals[index] = {name: totals[index].get(name, 0) + g.detach() for name, g in found.items()}
        return point.divisor

    divisor = linear.visit(visitor)
    scales = [weight / M for weight, M in zip(linear.slots.weights, divisor.unbind(), strict=True)]
    return {
        name: torch.stack(
            [total[name] * scale.to(total[name]) for total, scale in zip(totals, scales, strict=True)]
        ).sum(0)
        for name in linear.parameters
    }


def _root(fisher: object) -> Tensor:
    """The score of the one label of each term, times the root of kappa."""
    assert isinstance(fisher, OfScores)
    return fisher.roots[0]


def _part(tensors: Mapping[str, Tensor], names: Sequence[str]) -> list[tuple[str, Tensor]]:
    return [(name, tensors[name]) for name in names]
