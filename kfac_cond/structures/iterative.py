"""Blocks that are known by their products alone: the verbs by conjugate gradients, Lanczos and random probes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from ..errors import ArgumentError, NumericalError
from ..layers.layout import WeightLayout
from ..linalg import iterative
from .base import Block, Rule, checked_damping, checked_rule, require_dense

Power = Literal["inverse", "sqrt", "inverse_sqrt"]


@dataclass(frozen=True)
class Iteration:
    """How far iterative verbs go.

    Args:
        tolerance: relative residual of ``solve``, relative change of a root's product, relative residual of eigenpairs;
            None takes 1e-11 in float64 and 1e-5 below.
        limit: most steps, and most vectors that are kept at once.
        probes: random vectors behind ``trace``, ``diagonal``, ``logdet`` and ``frobenius_norm``, whose relative error
            falls with their root; P or more of them make these exact but for round-off, at P products or more.
        seed: of the random vectors; the same verb twice gives the same answer.
    """

    tolerance: float | None = None
    limit: int = 1000
    probes: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.limit < 1 or self.probes < 1 or (self.tolerance is not None and not 0.0 < self.tolerance < 1.0):
            raise ArgumentError(f"{self}: expected limit >= 1, probes >= 1 and a tolerance between 0 and 1")

    def tolerance_for(self, dtype: torch.dtype) -> float:
        """The tolerance, or the default of a dtype."""
        return self.tolerance or (1e-11 if dtype == torch.float64 else 1e-5)


class IterativeBlock(Block):
    """A block that only its products define.

    ``solve`` is conjugate gradients. ``sqrt``, ``inverse`` and ``inverse_sqrt`` are blocks whose products iterate.
    ``top_eigenpairs`` is block Lanczos. ``trace``, ``diagonal``, ``frobenius_norm`` and ``logdet`` are stochastic
    estimates, unbiased but for the root in the norm and the steps of the logarithm. ``eigenvalues`` is refused: all P
    of them need the dense matrix.
    """

    iteration: Iteration
    iterative = True

    @property
    def tolerance(self) -> float:
        """The relative tolerance that holds for this dtype."""
        return self.iteration.tolerance_for(self.dtype)

    def inverse(self, *, damping: float = 0.0, rule: Rule = "exact") -> Block:
        if checked_rule(rule) == "factored":
            raise ArgumentError(f"{self.label}: rule='factored' damps two factors, and it has none: use rule='exact'")
        return FunctionBlock(self.layout, self, "inverse", checked_damping(damping), self.iteration, name=self.name)

    def sqrt(self) -> Block:
        return FunctionBlock(self.layout, self, "sqrt", 0.0, self.iteration, name=self.name)

    def inverse_sqrt(self, *, damping: float = 0.0) -> Block:
        added = checked_damping(damping)
        return FunctionBlock(self.layout, self, "inverse_sqrt", added, self.iteration, name=self.name)

    def trace(self) -> Tensor:
        return self._mean_over_probes(lambda z: z @ self._rows(z.unsqueeze(0))[0])

    def logdet(self, *, damping: float = 0.0) -> Tensor:
        added = checked_damping(damping)

        def logarithm(values: Tensor) -> Tensor:
            return _regular(values, added, self).log()

        return self._mean_over_probes(
            lambda z: iterative.function_quadratic(
                self._rows, logarithm, z, tolerance=self.tolerance, limit=self.iteration.limit
            )
        )

    def frobenius_norm(self) -> Tensor:
        return self._mean_over_probes(lambda z: self._rows(z.unsqueeze(0)).square().sum()).sqrt()

    def diagonal(self) -> Tensor:
        total, count = self._flat_zeros(), 0
        for z in self._probes():
            total, count = total + z * self._rows(z.unsqueeze(0))[0], count + 1
        return (total / count).reshape(self.layout.matrix_shape)

    def eigenvalues(self) -> Tensor:
        raise ArgumentError(
            f"{self.label}: all {self.layout.numel} eigenvalues need the dense matrix, which is not made in silence: "
            "use top_eigenpairs(k), or torch.linalg.eigvalsh(block.to_dense())"
        )

    def top_eigenpairs(self, k: int) -> tuple[Tensor, Tensor]:
        size = self.layout.numel
        if not 1 <= k <= size:
            raise ArgumentError(f"{self.label}: asked for {k} eigenpairs, expected 1 to {size}")
        generator = torch.Generator().manual_seed(self.iteration.seed)
        start = torch.randn(k, size, generator=generator, dtype=torch.float64).to(self.device, self.dtype)
        # The root: the error of an eigenvalue is the square of its residual.
        tolerance = max(self.tolerance, torch.finfo(self.dtype).eps * sqrt(size) * 10)
        values, vectors, residual = iterative.top_eigenpairs(
            self._rows, start, tolerance=tolerance, limit=max(self.iteration.limit, k)
        )
        self._converged("top_eigenpairs", residual, sqrt(tolerance))
        return values, vectors.reshape(k, *self.layout.matrix_shape)

    def to_dense(self) -> Tensor:
        """F as a (P x P) tensor by P products; raises ArgumentError above ``MAX_DENSE`` parameters."""
        require_dense(self.layout.numel, self.label)
        dense = self._dense()
        return (dense + dense.mT) / 2

    def _dense(self) -> Tensor:
        return self._rows(torch.eye(self.layout.numel, dtype=self.dtype, device=self.device))

    def _rows(self, rows: Tensor) -> Tensor:
        """Products with flat rows [k, P]."""
        return self._product(rows.reshape(-1, *self.layout.matrix_shape)).reshape(rows.shape)

    def _flat_zeros(self) -> Tensor:
        return torch.zeros(self.layout.numel, dtype=self.dtype, device=self.device)

    def _probes(self) -> Iterator[Tensor]:
        return iterative.probes(self.iteration.probes, self._flat_zeros(), self.iteration.seed)

    def _mean_over_probes(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.stack([function(z) for z in self._probes()]).mean()

    def _converged(self, verb: str, reached: float, tolerance: float) -> None:
        if not reached <= tolerance:
            raise NumericalError(
                f"{self.label}: {verb} stopped at a relative error of {reached:.3g}, expected {tolerance:.3g} within "
                f"{self.iteration.limit} steps: pass damping (a singular matrix has no inverse), look for values that "
                "are not finite, or allow more with Iteration(limit=, tolerance=)"
            )


@dataclass(frozen=True, eq=False, repr=False)
class FunctionBlock(IterativeBlock):
    """A matrix function of another block, by its products alone: nothing is factorised, every product is an iteration.

    Args:
        layout: that of the base.
        base: F.
        power: 'inverse', 'sqrt' or 'inverse_sqrt' of F + damping I.
        damping: lambda.
        iteration: how far to go.
        factor: what the function is multiplied by.
        name: the layer's name, for messages.
    """

    layout: WeightLayout
    base: Block
    power: Power
    damping: float
    iteration: Iteration
    factor: float = 1.0
    name: str = ""

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def label(self) -> str:
        return f"the {self.power} of {self.base.label}"

    def with_iteration(self, iteration: Iteration) -> FunctionBlock:
        return replace(self, base=self.base.with_iteration(iteration), iteration=iteration)

    def to(self, target: torch.device | torch.dtype | str) -> FunctionBlock:
        return replace(self, base=self.base.to(target))

    def _product(self, matrix: Tensor) -> Tensor:
        rows = matrix.reshape(-1, self.layout.numel)
        apply = self._solved if self.power == "inverse" else self._rooted
        results = [apply(row) * self.factor for row in rows]
        return torch.stack(results).reshape(matrix.shape) if results else matrix

    def _scaled(self, factor: float) -> FunctionBlock:
        return replace(self, factor=self.factor * factor)

    def _base_rows(self, rows: Tensor) -> Tensor:
        return self.base._product(rows.reshape(-1, *self.layout.matrix_shape)).reshape(rows.shape)

    def _solved(self, row: Tensor) -> Tensor:
        x, residual = iterative.conjugate_gradients(
            lambda rows: self._base_rows(rows) + self.damping * rows,
            row,
            tolerance=self.tolerance,
            limit=self.iteration.limit,
        )
        self._converged("conjugate gradients", residual, self.tolerance)
        return x

    def _rooted(self, row: Tensor) -> Tensor:
        def function(values: Tensor) -> Tensor:
            return values.sqrt() if self.power == "sqrt" else _regular(values, self.damping, self.base).rsqrt()

        result, change = iterative.function_product(
            self._base_rows, function, row, tolerance=self.tolerance, limit=self.iteration.limit
        )
        self._converged("Lanczos", change, max(self.tolerance, 1e-6))
        return result


def _regular(values: Tensor, damping: float, block: Block) -> Tensor:
    """Eigenvalues in a Krylov space plus the damping, refused where one is zero but for round-off."""
    damped = values + damping
    if not bool(damped.min() > damped.max() * torch.finfo(values.dtype).eps * block.layout.numel):
        raise NumericalError(
            f"{block.label} is singular: its eigenvalues go from {float(values.min()):.3g} to "
            f"{float(values.max()):.3g} in a Krylov space. Pass damping > 0, in the units of the block"
        )
    return damped
