"""Likelihoods of real, positive, fractional and circular labels, each element by itself."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import LikelihoodError
from .base import is_positive, uniforms
from .elementwise import Elementwise

# Steps of half a circle in the von Mises quantile table; its error is below that of float32 uniforms.
_ANGLES = 2**14


class _Shaped(Elementwise):
    """One output an element, and one fixed positive number."""

    _parameter: str

    def __init__(self, value: float, event_dims: tuple[int, ...] | None, reduction: str, divisor: float | None) -> None:
        super().__init__(event_dims=event_dims, reduction=reduction, divisor=divisor)
        if not is_positive(value):
            raise LikelihoodError(f"{self._name}({self._parameter}={value!r}): expected a positive number.")
        self._value = float(value)

    def _settings(self) -> dict[str, Any]:
        return {self._parameter: self._value, **super()._settings()}


class Laplace(_Shaped):
    """Labels with density exp(-|y - output| / scale) / (2 scale); scale 1 is what nn.L1Loss stands for.

    Args:
        scale: b > 0, in units of the labels.
        event_dims: as of ``Elementwise``.
        reduction: likewise.
        divisor: likewise.

    The Fisher is 1 / b^2; the Hessian of -log p is zero at almost every label, and not the Fisher.

    Raises:
        LikelihoodError: a scale that is not a positive number.

    Source: Kotz, Kozubowski & Podgorski 2001, The Laplace Distribution and Generalizations, section 2.6.
    """

    _parameter = "scale"

    def __init__(
        self,
        scale: float = 1.0,
        *,
        event_dims: tuple[int, ...] | None = None,
        reduction: str = "mean",
        divisor: float | None = None,
    ) -> None:
        super().__init__(scale, event_dims, reduction, divisor)

    def _draw(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        # The middle of each of the 2^24 steps of u: symmetric, never infinite, never the median itself.
        v = 2 * uniforms(tuple(f.shape), f, generator).to(f.dtype) - (1 - 2**-24)
        return f - self._value * v.sign() * torch.log1p(-v.abs())

    def _score(self, f: Tensor, y: Tensor) -> Tensor:
        return (f - y).sign() / self._value

    def _log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        return -(f - y).abs() / self._value - math.log(2 * self._value)

    def _information(self, f: Tensor) -> Tensor:
        return f.new_full(f.shape, self._value**-2)

    def _kl(self, f: Tensor, g: Tensor) -> Tensor:
        apart = (f - g).abs() / self._value
        return torch.expm1(-apart) + apart

    def _unsupported(self, y: Tensor) -> Tensor:
        return ~y.isfinite()


class Gamma(_Shaped):
    """Positive labels of mean mu = exp(outputs) and variance dispersion mu^2.

    Args:
        dispersion: phi > 0, the squared coefficient of variation; the gamma's concentration is 1 / phi.
        event_dims: as of ``Elementwise``.
        reduction: likewise.
        divisor: likewise.

    Raises:
        LikelihoodError: a dispersion that is not a positive number.

    Source: McCullagh & Nelder 1989, chapter 8; the Fisher of the log mean is 1 / phi.
    """

    _parameter = "dispersion"

    def __init__(
        self,
        dispersion: float = 1.0,
        *,
        event_dims: tuple[int, ...] | None = None,
        reduction: str = "mean",
        divisor: float | None = None,
    ) -> None:
        super().__init__(dispersion, event_dims, reduction, divisor)

    def _draw(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        drawn = _standard_gamma(f.new_full(f.shape, 1 / self._value), generator)
        return drawn * self._value * f.exp()

    def _score(self, f: Tensor, y: Tensor) -> Tensor:
        return (1 - y * (-f).exp()) / self._value

    def _log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        k = 1 / self._value
        return k * (math.log(k) - f) + (k - 1) * y.log() - k * y * (-f).exp() - math.lgamma(k)

    def _information(self, f: Tensor) -> Tensor:
        return f.new_full(f.shape, 1 / self._value)

    def _kl(self, f: Tensor, g: Tensor) -> Tensor:
        return (g - f + torch.expm1(f - g)) / self._value

    def _unsupported(self, y: Tensor) -> Tensor:
        return ~((y > 0) & y.isfinite())


class Beta(_Shaped):
    """Labels in (0, 1) of mean mu = sigmoid(outputs) and variance dispersion mu (1 - mu).

    Args:
        dispersion: phi in (0, 1); the two concentrations are mu c and (1 - mu) c with c = 1 / phi - 1.
        event_dims: as of ``Elementwise``.
        reduction: likewise.
        divisor: likewise.

    Raises:
        LikelihoodError: a dispersion that is not a number between 0 and 1.

    Source: Ferrari & Cribari-Neto 2004, Beta regression for modelling rates and proportions, equations 4 to 9.
    """

    _parameter = "dispersion"

    def __init__(
        self,
        dispersion: float = 0.1,
        *,
        event_dims: tuple[int, ...] | None = None,
        reduction: str = "mean",
        divisor: float | None = None,
    ) -> None:
        super().__init__(dispersion, event_dims, reduction, divisor)
        if self._value >= 1:
            raise LikelihoodError(f"Beta(dispersion={dispersion!r}): expected a number between 0 and 1.")
        self._concentration = 1 / self._value - 1

    def _concentrations(self, f: Tensor) -> tuple[Tensor, Tensor]:
        return self._concentration * f.sigmoid(), self._concentration * (-f).sigmoid()

    def _draw(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        # Both gammas of an element lie together, so that the stream is that of the elements in order.
        drawn = _standard_gamma(torch.stack(self._concentrations(f), -1), generator)
        return _inside(drawn[..., 0] / drawn.sum(-1))

    def _score(self, f: Tensor, y: Tensor) -> Tensor:
        a, b = self._concentrations(f)
        y = _inside(y)
        surprise = torch.digamma(a) - torch.digamma(b) - torch.logit(y)
        return a * (-f).sigmoid() * surprise

    def _log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        a, b = self._concentrations(f)
        y = _inside(y)
        return (a - 1) * y.log() + (b - 1) * torch.log1p(-y) + _log_beta_inverse(a, b)

    def _information(self, f: Tensor) -> Tensor:
        a, b = self._concentrations(f)
        slope = a * (-f).sigmoid()
        return slope.square() * (torch.polygamma(1, a) + torch.polygamma(1, b))

    def _kl(self, f: Tensor, g: Tensor) -> Tensor:
        a, b = self._concentrations(f)
        c, d = self._concentrations(g)
        means = (a - c) * torch.digamma(a) + (b - d) * torch.digamma(b)
        return means + _log_beta_inverse(a, b) - _log_beta_inverse(c, d)

    def _unsupported(self, y: Tensor) -> Tensor:
        return ~((y > 0) & (y < 1))


class VonMises(_Shaped):
    """Angles around the outputs, in radians, with one fixed concentration.

    Args:
        concentration: kappa > 0 of density exp(kappa cos(y - output)); where large, the variance is near 1 / kappa.
        event_dims: as of ``Elementwise``.
        reduction: likewise.
        divisor: likewise.

    Labels may be any angle; drawn ones lie within half a circle of the output.

    Raises:
        LikelihoodError: a concentration that is not a positive number.

    Source: Mardia & Jupp 2000, Directional Statistics, section 3.5.4; the Fisher of the direction is kappa I1 / I0.
    """

    _parameter = "concentration"

    def __init__(
        self,
        concentration: float = 1.0,
        *,
        event_dims: tuple[int, ...] | None = None,
        reduction: str = "mean",
        divisor: float | None = None,
    ) -> None:
        super().__init__(concentration, event_dims, reduction, divisor)
        kappa = torch.tensor(self._value, dtype=torch.float64, device="cpu")
        i0 = torch.special.i0e(kappa)
        #: Mean of cos(y - output), A(kappa) = I1 / I0.
        self._resultant = float(torch.special.i1e(kappa) / i0)
        self._log_normaliser = math.log(2 * math.pi) + float(i0.log()) + self._value

    def _quantiles(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """(angles from 0 to where the density ends, their cdf from 0 to 1), of |y - output|."""
        end = min(math.pi, 9 / math.sqrt(self._value))
        angles = torch.linspace(0, end, _ANGLES + 1, dtype=f.dtype, device=f.device)
        density = (self._value * (angles.cos() - 1)).exp()
        cdf = torch.cumulative_trapezoid(density, angles)
        return angles, torch.cat([cdf.new_zeros(1), cdf / cdf[-1]])

    def _draw(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        v = 2 * uniforms(tuple(f.shape), f, generator).to(f.dtype) - (1 - 2**-24)
        angles, cdf = self._quantiles(f)
        above = torch.searchsorted(cdf, v.abs().contiguous()).clamp(1, _ANGLES)
        start, width = cdf[above - 1], (cdf[above] - cdf[above - 1]).clamp_min(torch.finfo(f.dtype).tiny)
        part = ((v.abs() - start) / width).clamp(0, 1)
        return f + v.sign() * torch.lerp(angles[above - 1], angles[above], part)

    def _score(self, f: Tensor, y: Tensor) -> Tensor:
        return self._value * (f - y).sin()

    def _log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        return self._value * (f - y).cos() - self._log_normaliser

    def _information(self, f: Tensor) -> Tensor:
        return f.new_full(f.shape, self._value * self._resultant)

    def _kl(self, f: Tensor, g: Tensor) -> Tensor:
        # 1 - cos, without cancellation where the directions are close.
        return self._value * self._resultant * 2 * ((f - g) / 2).sin().square()

    def _unsupported(self, y: Tensor) -> Tensor:
        return ~y.isfinite()


def _standard_gamma(concentration: Tensor, generator: torch.Generator | None) -> Tensor:
    """Gamma draws of rate 1, never zero."""
    drawn: Tensor = torch._standard_gamma(concentration.contiguous(), generator=generator)
    return drawn.clamp_min(torch.finfo(drawn.dtype).tiny)


def _inside(y: Tensor) -> Tensor:
    """Labels kept off 0 and 1, where a density and its score are infinite."""
    info = torch.finfo(y.dtype)
    return y.clamp(info.tiny, 1 - info.eps / 2)


def _log_beta_inverse(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
