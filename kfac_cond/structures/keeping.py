"""Structures that go through the pairs of a pass once more, since what they sum depends on all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..layers.layout import WeightLayout
from ..linalg.pairs import input_moment, output_moment, squared_gradients_in_bases
from ..statistics import combined
from .base import Block
from .collectors import Collector, Scales, Sums, add_to
from .eigen import EigenBlock
from .kronecker import KroneckerBlock

logger = logging.getLogger("kfac_cond")


class KeepingCollector(Collector):
    """The pairs themselves, which what comes after the pass goes through again: the same data and draws, no forward.

    Memory: N positions (d_in + d_out) numbers a draw, where a is shared by the draws of a batch.
    """

    def __init__(self, layout: WeightLayout, name: str) -> None:
        super().__init__(layout, name)
        self.kept: list[tuple[Tensor, Tensor, float, int]] = []

    def state(self) -> dict[str, Any]:
        return {**super().state(), "kept": list(self.kept)}

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        super().load_state(state, device)
        self.kept = [(a.to(device), g.to(device), weight, slot) for a, g, weight, slot in state["kept"]]

    def add(self, a: Tensor, g: Tensor, weight: float, slot: int) -> None:
        self.kept.append((a, g, weight, slot))

    def total(self, summand: Callable[[Tensor, Tensor], Tensor], scales: Scales) -> Tensor:
        """A function of the pairs as it is in F."""
        sums: Sums = {}
        for a, g, weight, slot in self.kept:
            if slot in scales:
                add_to(sums, slot, summand(a, g), weight)
        return combined(sums, scales)


class EigenCollector(KeepingCollector):
    """'ekfac': the Kronecker eigenbasis, with eigenvalues (1/M) sum E[(U_G^T V_n U_A)^2] of the same data and draws.

    Once it has the basis, in a second pass, it keeps no pairs.

    Source: George et al. 2018 (arXiv:1806.03884), section 3.
    """

    moments = True
    summed: ClassVar[tuple[str, ...]] = ("sums",)
    basis: EigenBlock | None = None

    def __init__(self, layout: WeightLayout, name: str) -> None:
        super().__init__(layout, name)
        self.sums: Sums = {}

    def look_again(self, factors: KroneckerBlock) -> None:
        """Take the eigenbasis that the eigenvalues are estimated in."""
        self.basis = factors.eigen()

    def add(self, a: Tensor, g: Tensor, weight: float, slot: int) -> None:
        if self.basis is None:
            super().add(a, g, weight, slot)
            return
        squares = squared_gradients_in_bases(a, g, self.basis.basis_A, self.basis.basis_G)
        add_to(self.sums, slot, squares, weight)

    def block(self, factors: KroneckerBlock | None, scales: Scales) -> Block | None:
        if factors is None:
            return None
        if self.basis is None:
            self.look_again(factors)
            while self.kept:
                self.add(*self.kept.pop(0))
        if not self.sums or self.basis is None:
            return None
        return replace(self.basis, values=combined(self.sums, scales))

    def of_kronecker(self, block: KroneckerBlock) -> Block:
        return block.eigen()


class NearestCollector(KeepingCollector):
    """'kpsvd': the G (x) A nearest to F in the Frobenius norm, by power iteration on the rearranged sum.

    F rearranged as a (d_out^2 x d_in^2) matrix, sum vec(V V'...) of which no entry is formed, maps A to sum V A V^T and
    G back to sum V^T G V; its leading pair of singular vectors, positive semi-definite both, is the nearest product.

    Source: Van Loan & Pitsianis 1993; Koroko et al. 2022 (arXiv:2201.10285), KPSVD.
    """

    #: Iterations at most, and the relative change of A at which it stops before, in multiples of round-off.
    iterations: ClassVar[int] = 500
    tolerance: ClassVar[float] = 16.0
    #: A of all slots, from which that of a group of draws is one iteration away.
    found: Tensor | None = None

    def limit_sides(self, max_factor_dim: int) -> None:
        if self.layout.diagonal_inputs:
            raise ArgumentError(
                f"layer '{self.name}': structure='kpsvd' keeps both sides whole, and the layer's input side is known "
                f"by its diagonal alone: use 'kfac', 'ekfac' or 'tkfac' for it, with structure='mixed' and a rule"
            )
        largest = max(self.layout.d_in, self.layout.d_out)
        if largest > max_factor_dim:
            raise ArgumentError(
                f"layer '{self.name}': structure='kpsvd' keeps both sides whole, one of them has {largest} rows, and "
                f"max_factor_dim is {max_factor_dim}: use 'kfac', 'ekfac' or 'tkfac', which keep its diagonal, or set "
                f"max_factor_dim={largest} in Options or in a rule for the layer"
            )

    def block(self, factors: KroneckerBlock | None, scales: Scales) -> Block | None:
        if not self.kept:
            return None
        A = self._nearest(scales) if self.found is None else self._next(self.found, scales)
        self.found = A if self.found is None else self.found
        return KroneckerBlock(self.layout, A, self._output_moment(A, scales), self.name)

    def _nearest(self, scales: Scales) -> Tensor:
        # The first half step, from G = I, gives the trace-restricted A; the scale is in G alone, by the last half step.
        A = before = _unit(self.total(input_moment, scales))
        round_off = self.tolerance * torch.finfo(A.dtype).eps
        for _ in range(self.iterations):
            before, A = A, self._next(A, scales)
            if bool((torch.linalg.matrix_norm(A - before) <= round_off).all()):
                break
        else:
            logger.warning(
                "layer '%s': the nearest Kronecker product still moves by %.1e after %d iterations: others are as "
                "near, or nearly.",
                self.name,
                torch.linalg.matrix_norm(A - before).max(),
                self.iterations,
            )
        return A

    def _next(self, A: Tensor, scales: Scales) -> Tensor:
        """A after one iteration."""
        G = _unit(self._output_moment(A, scales))
        return _unit(self.total(partial(input_moment, weight=G), scales))

    def _output_moment(self, A: Tensor, scales: Scales) -> Tensor:
        """The sum of V A V^T: the best G for an A of norm one."""
        return self.total(partial(output_moment, weight=A), scales)


def _unit(matrix: Tensor) -> Tensor:
    """Each matrix divided by its Frobenius norm; one that is zero stays so."""
    norm = torch.linalg.matrix_norm(matrix, keepdim=True)
    return matrix / torch.where(norm > 0, norm, 1)
