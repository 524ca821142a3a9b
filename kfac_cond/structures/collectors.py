"""What a structure accumulates of each batch, and which block it becomes: one small class a structure.

Sums over examples add, so that two pieces of data, or two draws with their weights, are one after the other. What a
structure asks for decides what is captured: A and G, pairs (a, g) of each example, or both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from einops import einsum
from torch import Tensor

from ..layers.layout import MAX_FACTOR_DIM, WeightLayout
from ..linalg.moments import of_unit_trace
from ..linalg.pairs import (
    example_rows,
    input_moment,
    input_moment_diagonal,
    output_moment,
    output_moment_diagonal,
    row_moments,
    squared_gradients,
)
from ..linalg.sides import whole
from ..statistics import combined
from .base import Block, require_dense
from .dense import DenseBlock
from .diagonal import DiagonalBlock
from .kronecker import KroneckerBlock
from .unit_wise import UnitWiseBlock, require_unit_wise

Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""(a, g) by layer name."""
Sums = dict[int, Tensor]
"""A sum by slot, divided by nothing yet: see ``Slots`` in statistics."""
Scales = Mapping[int, Tensor]
"""By slot, what its sum is multiplied by in F, 0-d."""


class Collector(ABC):
    """What one layer's block is made of; (a, g) are in the form of ``linalg.pairs``, F is their sum over M.

    Args:
        layout: how the layer's parameters sit in its matrix.
        name: the layer's name.
    """

    #: Whether the block is made of A and G.
    moments: ClassVar[bool] = False
    #: Whether it is made of the pairs (a, g) of each example.
    pairs: ClassVar[bool] = True
    #: Names of the attributes that hold sums by slot.
    summed: ClassVar[tuple[str, ...]] = ()

    #: Size of the largest side of a Kronecker product that is kept whole.
    max_factor_dim: int = MAX_FACTOR_DIM

    def __init__(self, layout: WeightLayout, name: str) -> None:
        self.layout, self.name = layout, name

    def limit_sides(self, max_factor_dim: int) -> None:
        """Keep sides up to a size whole; called before anything is added.

        Raises:
            ArgumentError: a side is larger, and the structure has no use for its diagonal.
        """
        self.max_factor_dim = max_factor_dim

    def state(self) -> dict[str, Any]:
        """What was taken in, as plain values and tensors."""
        return {name: dict(getattr(self, name)) for name in self.summed}

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from ``state``."""
        for name in self.summed:
            setattr(self, name, {slot: tensor.to(device) for slot, tensor in state[name].items()})

    @abstractmethod
    def add(self, a: Tensor, g: Tensor, weight: float, slot: int) -> None:
        """Take in one batch and score, with its weight and its slot. Called where ``pairs`` asks for them."""

    @abstractmethod
    def block(self, factors: KroneckerBlock | None, scales: Scales) -> Block | None:
        """The block, from G (x) A where ``moments`` asks for them; None where nothing came in.

        Asked for more than once: of all slots, and of those of each group of draws.

        Args:
            factors: G (x) A of the same slots.
            scales: by slot, what its sum is multiplied by.
        """

    def of_kronecker(self, block: KroneckerBlock) -> Block:
        """A Kronecker block in this storage: what is left to store where F is known to be one."""
        return block


class KroneckerCollector(Collector):
    """'kfac': nothing beside A and G."""

    moments = True
    pairs = False

    def add(self, a: Tensor, g: Tensor, weight: float, slot: int) -> None:
        pass

    def block(self, factors: KroneckerBlock | None, scales: Scales) -> Block | None:
        return factors


class SummedCollector(Collector):
    """One sum over examples, of a function of their pairs."""

    summed: ClassVar[tuple[str, ...]] = ("sums",)

    def __init__(self, layout: WeightLayout, name: str) -> None:
        super().__init__(layout, name)
        self.sums: Sums = {}

    @abstractmethod
    def summand(self, a: Tensor, g: Tensor) -> Tensor:
        """What one batch and score adds."""

    @abstractmethod
    def stored(self, matrix: Tensor) -> Block:
        """The block, from the sum as it is in F."""

    def add(self, a: Tensor, g: Tensor, weight: float, slot: int) -> None:
        add_to(self.sums, slot, self.summand(a, g), weight)

    def block(self, factors: KroneckerBlock | None, scales: Scales) -> Block | None:
        return self.stored(combined(self.sums, scales)) if self.sums else None


class DiagonalCollector(SummedCollector):
    """'diagonal': the sum of V_n squared."""

    def summand(self, a: Tensor, g: Tensor) -> Tensor:
        return squared_gradients(a, g)

    def stored(self, matrix: Tensor) -> Block:
        return DiagonalBlock(self.layout, matrix, self.name)

    def of_kronecker(self, block: KroneckerBlock) -> Block:
        return self.stored(block.diagonal())


class DenseCollector(SummedCollector):
    """'block': the sum of vec V_n vec V_n^T."""

    def __init__(self, layout: WeightLayout, name: str) -> None:
        super().__init__(layout, name)
        require_dense(layout.numel, f"layer '{name}'")

    def summand(self, a: Tensor, g: Tensor) -> Tensor:
        rows = example_rows(a, g)
        return rows.mT @ rows

    def stored(self, matrix: Tensor) -> Block:
        return DenseBlock(self.layout, matrix, self.name)

    def of_kronecker(self, block: KroneckerBlock) -> Block:
        return self.stored(block.to_dense())


class UnitWiseCollector(SummedCollector):
    """'unit_wise': for each row of the layer's matrix the sum of V_n[o] V_n[o]^T."""

    def __init__(self, layout: WeightLayout, name: str) -> None:
        super().__init__(layout, name)
        require_unit_wise(layout, f"layer '{name}'")

    def summand(self, a: Tensor, g: Tensor) -> Tensor:
        return row_moments(a, g)

    def stored(self, matrix: Tensor) -> Block:
        return UnitWiseBlock(self.layout, matrix, self.name)

    def of_kronecker(self, block: KroneckerBlock) -> Block:
        A, G = block.sides
        return self.stored(einsum(G.diagonal(dim1=-2, dim2=-1), whole(A), "... o, ... i j -> ... o i j"))


class TraceRestrictedCollector(Collector):
    """'tkfac': R = sum V V^T and C = sum V^T V, both exact; R (x) C / tr has their traces, and F's.

    Of a side that is too large the diagonal alone is summed; traces need no more.

    Source: Gao et al. 2020 (arXiv:2011.10741), with an example's positions summed before anything is squared.
    """

    summed: ClassVar[tuple[str, ...]] = ("R", "C")

    def __init__(self, layout: WeightLayout, name: str) -> None:
        super().__init__(layout, name)
        self.R: Sums = {}
        self.C: Sums = {}

    def add(self, a: Tensor, g: Tensor, weight: float, slot: int) -> None:
        diagonal = self.layout.diagonal_sides(self.max_factor_dim)
        of_A = input_moment_diagonal if "A" in diagonal else input_moment
        of_G = output_moment_diagonal if "G" in diagonal else output_moment
        add_to(self.R, slot, of_G(a, g), weight)
        add_to(self.C, slot, of_A(a, g), weight)

    def block(self, factors: KroneckerBlock | None, scales: Scales) -> Block | None:
        if not self.R:
            return None
        R, C = combined(self.R, scales), combined(self.C, scales)
        return KroneckerBlock(self.layout, of_unit_trace(C, leading=len(self.layout.matrix_shape) - 2), R, self.name)


def add_to(sums: Sums, slot: int, summand: Tensor, weight: float) -> None:
    """Add weight times the summand to a slot's sum, in place where there is one."""
    if slot in sums:
        sums[slot].add_(summand, alpha=weight)
    else:
        sums[slot] = summand * weight
