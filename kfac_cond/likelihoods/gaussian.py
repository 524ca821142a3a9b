"""The Gaussian likelihood of fixed scalar variance: outputs are means."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import LikelihoodError
from .base import is_positive, uniforms
from .elementwise import Elementwise
from .quantiles import standard_normal


class Gaussian(Elementwise):
    """Independent normal labels around the outputs, with one fixed variance; nn.MSELoss is variance 1/2.

    Args:
        variance: sigma^2 > 0, in squared units of the labels.
        event_dims: the dimensions whose elements make one term, never 0; () makes every element a term. None: (N,) is
            N terms, of (N, C) the vector of C is one term, and more dimensions are refused.
        reduction: 'mean' over terms or 'sum'.
        divisor: M, where it is neither.

    Raises:
        LikelihoodError: a variance that is not a positive number, or event_dims that are no dimensions.

    Source: Martens 2020 (arXiv:1412.1193), section 9: the Fisher of the mean is I / sigma^2.
    """

    def __init__(
        self,
        variance: float = 1.0,
        *,
        event_dims: tuple[int, ...] | None = None,
        reduction: str = "mean",
        divisor: float | None = None,
    ) -> None:
        super().__init__(event_dims=event_dims, reduction=reduction, divisor=divisor)
        if not is_positive(variance):
            raise LikelihoodError(f"Gaussian(variance={variance!r}): expected a positive number, sigma^2.")
        self.variance = float(variance)

    def _draw(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        # Labels keep float32 at least: rounded to half precision they would change the variance of the score.
        return f + math.sqrt(self.variance) * standard_normal(uniforms(tuple(f.shape), f, generator), f.dtype)

    def _score(self, f: Tensor, y: Tensor) -> Tensor:
        return (f - y) / self.variance

    def _log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        return -0.5 * ((y - f).square() / self.variance + math.log(2 * math.pi * self.variance))

    def _information(self, f: Tensor) -> Tensor:
        return f.new_full(f.shape, 1 / self.variance)

    def _kl(self, f: Tensor, g: Tensor) -> Tensor:
        return (f - g).square() / (2 * self.variance)

    def _unsupported(self, y: Tensor) -> Tensor:
        return ~y.isfinite()

    def _settings(self) -> dict[str, Any]:
        return {"variance": self.variance, **super()._settings()}
