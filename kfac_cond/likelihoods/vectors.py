"""Likelihoods of vectors: Gaussians with a covariance or a predicted variance, and counts over classes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import LikelihoodError
from .base import uniforms
from .counts import check_count
from .quantiles import standard_normal
from .vectorwise import Vectorwise


class MultivariateGaussian(Vectorwise):
    """Normal vectors around the outputs, with one fixed covariance.

    Args:
        covariance: (E,) a variance of each output, or (E, E) positive definite, in squared units of the labels.
        dim: the dimension of the vector, never 0.
        reduction: 'mean' over terms or 'sum'.
        divisor: M, where it is neither.

    Raises:
        LikelihoodError: a covariance that is no positive vector and no symmetric positive definite matrix, or outputs
            of another size along ``dim``.

    Source: Martens 2020 (arXiv:1412.1193), section 9: the Fisher of the mean is the inverse covariance.
    """

    def __init__(
        self, covariance: Tensor, *, dim: int = -1, reduction: str = "mean", divisor: float | None = None
    ) -> None:
        super().__init__(dim=dim, reduction=reduction, divisor=divisor)
        if not isinstance(covariance, Tensor) or covariance.ndim not in (1, 2):
            raise LikelihoodError(
                "MultivariateGaussian(covariance): expected a tensor (E,) of variances or (E, E); one variance for all "
                "outputs is kc.Gaussian(variance)."
            )
        matrix = covariance.detach().double()
        matrix = matrix.diag() if matrix.ndim == 1 else matrix
        factor, failed = torch.linalg.cholesky_ex(matrix) if matrix.shape[0] == matrix.shape[1] else (matrix, 1)
        if failed or not torch.allclose(matrix, matrix.T) or not factor.isfinite().all():
            raise LikelihoodError(
                f"MultivariateGaussian(covariance of shape {tuple(covariance.shape)}): expected positive variances or "
                f"a symmetric positive definite matrix."
            )
        self._factor: Tensor = factor
        #: L^-T: with covariance L L^T, the square root of its inverse.
        self._whitening: Tensor = torch.linalg.solve_triangular(
            factor, torch.eye(len(factor)).to(factor), upper=False
        ).T
        self._log_determinant = float(2 * factor.diagonal().log().sum())

    def check(self, outputs: Tensor) -> None:
        """Refuse outputs whose size along ``dim`` is not that of the covariance."""
        super().check(outputs)
        (size,) = self._event_sizes(outputs)
        if size != len(self._factor):
            raise LikelihoodError(
                f"{self!r}: outputs of shape {tuple(outputs.shape)} have {size} entries along dimension {self.dim}, "
                f"expected {len(self._factor)}, the size of the covariance."
            )

    def _draw(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        z = standard_normal(uniforms(tuple(f.shape), f, generator), f.dtype)
        return f + z @ self._factor.to(f).T

    def _whiten(self, values: Tensor) -> Tensor:
        return values @ self._whitening.to(values)

    def _score(self, f: Tensor, y: Tensor) -> Tensor:
        return self._whiten(f - y) @ self._whitening.to(f).T

    def _log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        constant = f.shape[-1] * math.log(2 * math.pi) + self._log_determinant
        return -0.5 * (self._whiten(y - f).square().sum(-1) + constant)

    def _root(self, f: Tensor) -> Tensor:
        return self._whitening.to(f).expand(*f.shape, f.shape[-1])

    def _kl(self, f: Tensor, g: Tensor) -> Tensor:
        return 0.5 * self._whiten(f - g).square().sum(-1)

    def _settings(self) -> dict[str, Any]:
        return {"covariance": f"{len(self._factor)} x {len(self._factor)}", **super()._settings()}


class HeteroscedasticGaussian(Vectorwise):
    """Independent normal labels whose mean and log-variance are both predicted.

    The outputs along ``dim`` are D means, then D log-variances; labels have D entries there. The Fisher has both parts:
    1 / variance for a mean and 1/2 for a log-variance.

    Args:
        dim: the dimension of the 2 D outputs, never 0.
        reduction: 'mean' over terms or 'sum'.
        divisor: M, where it is neither.

    Raises:
        LikelihoodError: an odd number of outputs along ``dim``.

    Source: Nix & Weigend 1994, Estimating the mean and variance of the target probability distribution, equation 1.
    """

    def check(self, outputs: Tensor) -> None:
        """Refuse outputs that are no means and log-variances."""
        super().check(outputs)
        (size,) = self._event_sizes(outputs)
        if size % 2 or size == 0:
            raise LikelihoodError(
                f"{self!r}: outputs of shape {tuple(outputs.shape)} have {size} entries along dimension {self.dim}, "
                f"expected an even number: means, then as many log-variances."
            )

    def _label_size(self, size: int) -> int:
        return size // 2

    def _draw(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        mean, log_variance = f.chunk(2, -1)
        z = standard_normal(uniforms(tuple(mean.shape), f, generator), f.dtype)
        return mean + (log_variance / 2).exp() * z

    def _score(self, f: Tensor, y: Tensor) -> Tensor:
        mean, log_variance = f.chunk(2, -1)
        precision = (-log_variance).exp()
        return torch.cat([(mean - y) * precision, 0.5 - 0.5 * (y - mean).square() * precision], -1)

    def _log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        mean, log_variance = f.chunk(2, -1)
        squares = (y - mean).square() * (-log_variance).exp()
        return -0.5 * (squares + log_variance + math.log(2 * math.pi)).sum(-1)

    def _root(self, f: Tensor) -> Tensor:
        _, log_variance = f.chunk(2, -1)
        return torch.diag_embed(torch.cat([(-log_variance / 2).exp(), torch.full_like(log_variance, 0.5**0.5)], -1))

    def _kl(self, f: Tensor, g: Tensor) -> Tensor:
        (mean, s), (other, t) = f.chunk(2, -1), g.chunk(2, -1)
        return 0.5 * (torch.expm1(s - t) - (s - t) + (mean - other).square() * (-t).exp()).sum(-1)


class Multinomial(Vectorwise):
    """Counts over classes of ``total_count`` draws with softmax probabilities; labels are shaped as the outputs.

    Where the number of draws differs between terms, ``Categorical`` with it bound as the terms' weights has the same
    Fisher: n (diag(p) - p p^T).

    Args:
        total_count: the number of draws n, a positive integer.
        dim: the dimension of the classes, never 0.
        reduction: 'mean' over terms or 'sum'.
        divisor: M, where it is neither.

    Raises:
        LikelihoodError: a total_count that is not a positive integer.

    Source: McCullagh & Nelder 1989, section 5.3; for logits the Fisher is the Hessian at any label.
    """

    def __init__(
        self, total_count: int, *, dim: int = -1, reduction: str = "mean", divisor: float | None = None
    ) -> None:
        super().__init__(dim=dim, reduction=reduction, divisor=divisor)
        self.total_count = check_count(self._name, total_count)

    def _draw(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        cdf = f.softmax(-1).cumsum(-1)
        # Divided by its own end, so that the classes that u < 1 can reach all have a probability.
        u = uniforms((*f.shape[:-1], self.total_count), f, generator).to(f.dtype)
        drawn = torch.searchsorted(cdf / cdf[..., -1:], u, right=True).clamp_max(f.shape[-1] - 1)
        return torch.zeros_like(f).scatter_add_(-1, drawn, torch.ones_like(u))

    def _score(self, f: Tensor, y: Tensor) -> Tensor:
        return self.total_count * f.softmax(-1) - y

    def _log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        ways = math.lgamma(self.total_count + 1) - torch.lgamma(y + 1).sum(-1)
        return ways + (y * f.log_softmax(-1)).sum(-1)

    def _root(self, f: Tensor) -> Tensor:
        p = f.softmax(-1)
        root: Tensor = torch.diag_embed(p.sqrt()) - p.unsqueeze(-1) * p.sqrt().unsqueeze(-2)
        scale: float = self.total_count**0.5
        return scale * root

    def _kl(self, f: Tensor, g: Tensor) -> Tensor:
        return self.total_count * (f.softmax(-1) * (f.log_softmax(-1) - g.log_softmax(-1))).sum(-1)

    def _unsupported(self, y: Tensor) -> Tensor:
        return ((y < 0) | (y != y.floor())).any(-1) | (y.sum(-1) != self.total_count)

    def _settings(self) -> dict[str, Any]:
        return {"total_count": self.total_count, **super()._settings()}
