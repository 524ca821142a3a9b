"""The quadratic model of an objective in the span of a few directions: step length and momentum, and what they gain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .statistics import count_dtype, statistic_dtype


@dataclass(frozen=True)
class QuadraticModel:
    """M(delta) = h + g^T delta + 1/2 delta^T (F + lambda I) delta for delta = sum_i c_i d_i.

    With the directions d = (Delta, delta_0), a preconditioned gradient and the step before, c is (alpha, mu): a
    learning rate and a momentum that no schedule has to give. ``curvature`` is a Gram matrix of pushed-forward
    directions, so that it is positive semi-definite by construction. Nothing is read by the host.

    Args:
        curvature: d_i^T F d_j, [k, k], in the units of F.
        squares: d_i^T d_j, [k, k].
        slopes: g^T d_i, [k], g the gradient of the objective.
        precision: relative error of the entries; two directions that differ by less are one.

    Source: Martens & Grosse 2015 (arXiv:1503.05671), sections 6.4 and 7.
    """

    curvature: Tensor
    squares: Tensor
    slopes: Tensor
    precision: float = 1e-12

    def matrix(self, damping: float | Tensor) -> Tensor:
        """d_i^T (F + lambda I) d_j, [k, k]."""
        return self.curvature + damping * self.squares

    def coefficients(self, damping: float | Tensor) -> Tensor:
        """c* [k], the minimum of M over the span.

        A direction that is zero, or a combination of those before it, gets the coefficient 0: of two that are collinear
        the first is left, with the 1 x 1 solution alpha = -g^T Delta / Delta^T (F + lambda I) Delta.

        Args:
            damping: lambda, without which F is, and the l2 term where there is one.
        """
        full = self.matrix(damping)
        size = full.diagonal()
        scale = torch.where(size > 0, size, 1).rsqrt()
        # Of directions with one length each, so that what is small is small beside them.
        unit = full * scale[:, None] * scale
        kept = self._independent(unit, size > 0)
        identity = torch.eye(len(size), dtype=full.dtype, device=full.device)
        unit = torch.where(kept[:, None] & kept, unit, identity)
        right = torch.where(kept, -self.slopes * scale, 0)
        found, _ = torch.linalg.solve_ex(unit, right)
        return torch.where(kept, found * scale, 0)

    def change(self, coefficients: Tensor, damping: float | Tensor = 0.0) -> Tensor:
        """M(delta) - M(0), 0-d: what the step is predicted to add to the objective."""
        return self.slopes @ coefficients + coefficients @ self.matrix(damping) @ coefficients / 2

    def quadratic_form(self, coefficients: Tensor) -> Tensor:
        """delta^T F delta, 0-d: twice the KL divergence of the step to second order, per loss term."""
        return coefficients @ self.curvature @ coefficients

    def square(self, coefficients: Tensor) -> Tensor:
        """delta^T delta, 0-d."""
        return coefficients @ self.squares @ coefficients

    def _independent(self, unit: Tensor, usable: Tensor) -> Tensor:
        """Which directions are no combination of those before, bool [k]: by the pivots of Cholesky."""
        kept: list[Tensor] = []
        rows: list[Tensor] = []
        for index in range(len(unit)):
            row = torch.zeros_like(unit[index])
            for before, (other, keep) in enumerate(zip(rows, kept, strict=True)):
                length = torch.where(keep, other[before], 1)
                row[before] = torch.where(keep, (unit[index, before] - row @ other) / length, 0)
            rest = unit[index, index] - row @ row
            keep = usable[index] & (rest > self.precision)
            row[index] = torch.where(keep, rest, 1).sqrt()
            rows.append(row)
            kept.append(keep)
        return torch.stack(kept)


def quadratic_model(
    pushed: Sequence[Tensor], directions: Sequence[Sequence[Tensor]], gradient: Sequence[Tensor]
) -> QuadraticModel:
    """The model from directions that were pushed forward to the outputs.

    Args:
        pushed: S^T J d_i / sqrt(M) of each direction, as a flat row.
        directions: d_i, a tensor for each parameter.
        gradient: of the objective, a tensor for each parameter.
    """
    slopes = torch.stack([inner(gradient, one) for one in directions])
    precision = 100 * torch.finfo(pushed[0].dtype).eps
    return QuadraticModel(_gram([[row] for row in pushed]), _gram(directions), slopes, precision)


def _gram(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """All inner products, each computed once, so that the matrix is symmetric to the last bit."""
    number = len(rows)
    found = {(i, j): inner(rows[i], rows[j]) for i in range(number) for j in range(i + 1)}
    return torch.stack([found[max(i, j), min(i, j)] for i in range(number) for j in range(number)]).view(number, number)


def inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """The inner product of two lists of tensors, 0-d, added up in float64 where the device has it."""
    dtype = count_dtype(left[0].device)
    parts = [torch.dot(_flat(a), _flat(b)).to(dtype) for a, b in zip(left, right, strict=True)]
    return torch.stack(parts).sum()


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1).to(statistic_dtype(x.dtype))
