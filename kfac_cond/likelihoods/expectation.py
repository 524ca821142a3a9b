"""Kinds of expectation over y: what is sent back through the model, one draw or one column at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import LikelihoodError
from .base import Likelihood


def sampled_scores(
    likelihood: Likelihood,
    outputs: Tensor,
    *,
    generators: Sequence[torch.Generator | None] = (None,),
    draws: Sequence[Tensor] | None = None,
) -> Iterator[tuple[Tensor, float]]:
    """Weighted scores of labels drawn from p(y | outputs), one a draw: the Monte Carlo Fisher.

    Args:
        likelihood: bound to the batch.
        outputs: what parametrises p; used without its graph.
        generators: one a draw.
        draws: drawn labels to use in place of sampling, one tensor a draw.

    Returns:
        An iterator of (score times sqrt(kappa), shaped as the outputs; weight 1/k in the mean over k draws).

    Raises:
        LikelihoodError: no draw, or a bare tensor in place of a sequence of them.

    Source: Martens & Grosse 2015 (arXiv:1503.05671), section 5.
    """
    if isinstance(draws, Tensor):
        raise LikelihoodError(
            f"draws is a tensor of shape {tuple(draws.shape)}, expected a sequence of them, one a draw: draws=[labels]."
        )
    count = len(generators) if draws is None else len(draws)
    if count == 0:
        raise LikelihoodError("there is no draw: expected at least one generator, or one tensor of drawn labels.")
    outputs = outputs.detach()
    likelihood.check(outputs)
    labels = iter(draws) if draws is not None else (likelihood.sample(outputs, generator) for generator in generators)
    return ((likelihood.weighted_score(outputs, drawn), 1 / count) for drawn in labels)


def exact_scores(likelihood: Likelihood, outputs: Tensor) -> Iterator[tuple[Tensor, float]]:
    """Weighted columns of the output Fisher's square root, one a term of an example and a column: type-2, no draws.

    Args:
        likelihood: bound to the batch.
        outputs: what parametrises p; used without its graph.

    Returns:
        An iterator of (column times sqrt(kappa), shaped as the outputs; weight 1).

    Source: Eschenhagen et al. 2023 (arXiv:2311.00636), on the exact expectation over labels.
    """
    outputs = outputs.detach()
    return ((likelihood.weighted(column, outputs), 1.0) for column in likelihood.fisher_columns(outputs))
