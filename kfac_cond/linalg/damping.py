"""How a damping lambda of the whole block is split between its two Kronecker factors, and scaled to the block."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .moments import trace
from .sides import Side


def factored_damping(A: Side, G: Side, damping: float | Tensor) -> tuple[Tensor, Tensor]:
    """The factors' own dampings: A + pi sqrt(lambda) I and G + sqrt(lambda) / pi I.

    pi^2 = (tr A / dim A) / (tr G / dim G), so that the product is unchanged under A -> c A, G -> G / c. Where a trace
    is not positive and finite, pi = 1. Nothing is read on the host.

    Args:
        A: [..., d_in, d_in].
        G: [..., d_out, d_out].
        damping: lambda >= 0, in the units of the block G (x) A; a number, or a tensor that broadcasts to [...].

    Returns:
        (damping_A, damping_G), each [...].

    Source: Martens & Grosse 2015 (arXiv:1503.05671), section 6.3.
    """
    mean_A = trace(A) / A.shape[-1]
    mean_G = trace(G) / G.shape[-1]
    usable = (mean_A > 0) & (mean_G > 0) & torch.isfinite(mean_A) & torch.isfinite(mean_G)
    one = torch.ones_like(mean_A)
    # The quotient of the roots: the quotient itself may leave float32 where its root does not.
    pi = torch.where(usable, mean_A, one).sqrt() / torch.where(usable, mean_G, torch.ones_like(mean_G)).sqrt()
    root = damping.sqrt() if isinstance(damping, Tensor) else math.sqrt(damping)
    return pi * root, root / pi


def mean_eigenvalue(A: Side, G: Side) -> Tensor:
    """The mean eigenvalue of G (x) A: tr A tr G / (dim A dim G).

    Args:
        A: [..., d_in, d_in].
        G: [..., d_out, d_out].

    Returns:
        [...].
    """
    return (trace(A) / A.shape[-1]) * (trace(G) / G.shape[-1])


def relative_damping(A: Side, G: Side, fraction: float | Tensor, floor: float) -> Tensor:
    """A damping that follows the scale of the block: a fraction of its mean eigenvalue, and never below a floor.

    Args:
        A: [..., d_in, d_in].
        G: [..., d_out, d_out].
        fraction: the fraction of the mean eigenvalue, without unit; a number, or a tensor that broadcasts to [...].
        floor: the smallest damping given, in the units of the block; positive.

    Returns:
        [...].
    """
    return torch.clamp(mean_eigenvalue(A, G) * fraction, min=floor)
