"""Inverse distribution functions without a closed form, by a fixed number of halvings: no wait for the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import events

_HALVINGS = 64
# Gamma quantiles below exp(-700) are zero in float64 for every purpose.
_LOWEST = -700.0


def standard_normal(u: Tensor, dtype: torch.dtype) -> Tensor:
    """Quantiles of the standard normal at uniforms on [0, 1) that are multiples of 2^-24; never infinite."""
    # The middle of each of the 2^24 steps of u, exact in float32: symmetric.
    end = 1 - 2**-24
    return math.sqrt(2) * (2 * u - end).clamp(-end, end).to(dtype).erfinv()


def gamma_quantile(u: Tensor, concentration: Tensor) -> Tensor:
    """Quantiles of the gamma distribution of rate 1, by halving log x; dtype of the concentration."""
    wide = events.count_dtype(u.device)
    p, a = u.to(wide) + 2**-25, concentration.to(wide)
    low = torch.full_like(p, _LOWEST)
    # 1 - cdf there is below 2^-25 for any concentration.
    high = (a + 12 * a.sqrt() + 30).log()
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = torch.special.gammainc(a, middle.exp()) < p
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high.exp().to(concentration.dtype)


def poisson_quantile(u: Tensor, rate: Tensor) -> Tensor:
    """The least count k with P(count <= k) > u, by halving; dtype of the rate."""
    wide = events.count_dtype(u.device)
    p, mean = u.to(wide) + 2**-25, rate.to(wide)
    low = torch.full_like(p, -1.0)
    high = (mean + 12 * mean.sqrt() + 30).ceil()
    for _ in range(_HALVINGS):
        middle = ((low + high) / 2).floor()
        below = torch.special.gammaincc(middle.clamp_min(0) + 1, mean) < p
        below |= middle < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high.to(rate.dtype)
