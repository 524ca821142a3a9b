"""Likelihoods of counts: Poisson and negative binomial by log rate, binomial by logit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import LikelihoodError
from .base import is_positive, uniforms
from .elementwise import Elementwise
from .quantiles import gamma_quantile, poisson_quantile


def _no_count(y: Tensor) -> Tensor:
    """Where it is not one of 0, 1, 2, ..."""
    return ~((y >= 0) & y.isfinite() & (y == y.floor()))


class Poisson(Elementwise):
    """Counts whose mean and variance are exp(outputs); what nn.PoissonNLLLoss(log_input=True) stands for.

    Args:
        event_dims: as of ``Elementwise``.
        reduction: likewise.
        divisor: likewise.

    Source: McCullagh & Nelder 1989, chapter 6: for log rates the Fisher is exp(outputs), the Hessian at any label.
    """

    def _draw(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.poisson(f.exp().contiguous(), generator=generator)

    def _score(self, f: Tensor, y: Tensor) -> Tensor:
        return f.exp() - y

    def _log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        return y * f - f.exp() - torch.lgamma(y + 1)

    def _information(self, f: Tensor) -> Tensor:
        return f.exp()

    def _kl(self, f: Tensor, g: Tensor) -> Tensor:
        return f.exp() * (f - g) - f.exp() + g.exp()

    def _unsupported(self, y: Tensor) -> Tensor:
        return _no_count(y)

    def _impossible(self, y: Tensor) -> Tensor:
        return ~((y >= 0) & y.isfinite())


class NegativeBinomial(Elementwise):
    """Overdispersed counts of mean mu = exp(outputs) and variance mu + mu^2 / size: a Poisson with a gamma rate.

    Args:
        size: the fixed size r > 0; the Poisson is its limit.
        event_dims: as of ``Elementwise``.
        reduction: likewise.
        divisor: likewise.

    Raises:
        LikelihoodError: a size that is not a positive number.

    Source: McCullagh & Nelder 1989, section 6.2.3; the Fisher of the log mean is r mu / (r + mu).
    """

    def __init__(
        self,
        size: float = 1.0,
        *,
        event_dims: tuple[int, ...] | None = None,
        reduction: str = "mean",
        divisor: float | None = None,
    ) -> None:
        super().__init__(event_dims=event_dims, reduction=reduction, divisor=divisor)
        if not is_positive(size):
            raise LikelihoodError(f"NegativeBinomial(size={size!r}): expected a positive number.")
        self.size = float(size)

    def _draw(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        # Both uniforms of an element lie together, so that the stream is that of the elements in order.
        u = uniforms((*f.shape, 2), f, generator)
        rate = gamma_quantile(u[..., 0], torch.full_like(f, self.size)) * f.exp() / self.size
        return poisson_quantile(u[..., 1], rate).to(f.dtype)

    def _score(self, f: Tensor, y: Tensor) -> Tensor:
        return self.size * (f.exp() - y) / (self.size + f.exp())

    def _log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        r = torch.full_like(f, self.size)
        constant = torch.lgamma(y + r) - torch.lgamma(r) - torch.lgamma(y + 1) + r * r.log()
        return constant + y * f - (y + r) * (r + f.exp()).log()

    def _information(self, f: Tensor) -> Tensor:
        return self.size * f.exp() / (self.size + f.exp())

    def _kl(self, f: Tensor, g: Tensor) -> Tensor:
        r, mean = self.size, f.exp()
        return mean * (f - g) + (mean + r) * ((r + g.exp()).log() - (r + mean).log())

    def _unsupported(self, y: Tensor) -> Tensor:
        return _no_count(y)

    def _settings(self) -> dict[str, Any]:
        return {"size": self.size, **super()._settings()}


class Binomial(Elementwise):
    """Counts of successes among ``total_count`` trials of probability sigmoid(outputs).

    Where the number of trials differs between terms, ``Bernoulli`` with it bound as the terms' weights has the same
    Fisher: n p (1 - p).

    Args:
        total_count: the number of trials n, a positive integer.
        event_dims: as of ``Elementwise``.
        reduction: likewise.
        divisor: likewise.

    Raises:
        LikelihoodError: a total_count that is not a positive integer.

    Source: McCullagh & Nelder 1989, chapter 4; for logits the Fisher is the Hessian n p (1 - p) at any label.
    """

    def __init__(
        self,
        total_count: int = 1,
        *,
        event_dims: tuple[int, ...] | None = None,
        reduction: str = "mean",
        divisor: float | None = None,
    ) -> None:
        super().__init__(event_dims=event_dims, reduction=reduction, divisor=divisor)
        self.total_count = check_count(self._name, total_count)

    def _draw(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        u = uniforms((*f.shape, self.total_count), f, generator)
        return (u < f.sigmoid().unsqueeze(-1)).sum(-1).to(f.dtype)

    def _score(self, f: Tensor, y: Tensor) -> Tensor:
        return self.total_count * f.sigmoid() - y

    def _log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        n = torch.full_like(f, self.total_count)
        ways = torch.lgamma(n + 1) - torch.lgamma(y + 1) - torch.lgamma(n - y + 1)
        return ways + y * F.logsigmoid(f) + (n - y) * F.logsigmoid(-f)

    def _information(self, f: Tensor) -> Tensor:
        return self.total_count * f.sigmoid() * (-f).sigmoid()

    def _kl(self, f: Tensor, g: Tensor) -> Tensor:
        one = f.sigmoid() * (F.logsigmoid(f) - F.logsigmoid(g))
        return self.total_count * (one + (-f).sigmoid() * (F.logsigmoid(-f) - F.logsigmoid(-g)))

    def _unsupported(self, y: Tensor) -> Tensor:
        return _no_count(y) | (y > self.total_count)

    def _settings(self) -> dict[str, Any]:
        return {"total_count": self.total_count, **super()._settings()}


def check_count(name: str, total_count: object) -> int:
    """The number of trials, or a LikelihoodError that names the class."""
    if not isinstance(total_count, int) or isinstance(total_count, bool) or total_count < 1:
        raise LikelihoodError(
            f"{name}(total_count={total_count!r}): expected a positive integer, the number of trials of every term; "
            f"where it differs, bind it as the terms' weight of one trial (kc.Bernoulli, kc.Categorical)."
        )
    return total_count
