"""What a structure accumulates of each batch, and which block it becomes: one small class a structure.

Sums over examples add, so that two pieces of data, or two draws with their weights, are one after the other. What a
structure asks for decides what is captured: A and G, pairs (a, g) of each example, or both.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from einops import einsum
from torch import Tensor

from ..errors import ArgumentError
from ..layers.layout import MAX_FACTOR_DIM, JointLayout, WeightLayout
from ..linalg.kronecker import block_diagonal
from ..linalg.moments import of_unit_trace
from ..linalg.pairs import (
    example_rows,
    input_moment,
    input_moment_diagonal,
    output_moment,
    output_moment_diagonal,
    rotated,
    row_moments,
    squared_gradients,
)
from ..linalg.sides import whole
from ..statistics import combined
from .base import Block, require_dense
from .dense import DenseBlock
from .diagonal import DiagonalBlock
from .eigen import EigenBlock
from .kronecker import KroneckerBlock
from .unit_wise import UnitWiseBlock, require_unit_wise

logger = logging.getLogger("kfac_cond")

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
        a, g = rotated(a, self.basis.basis_A), rotated(g, self.basis.basis_G)
        add_to(self.sums, slot, squared_gradients(a, g), weight)

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


#: One word for a layer's storage.
COLLECTORS: dict[str, type[Collector]] = {
    "kfac": KroneckerCollector,
    "ekfac": EigenCollector,
    "tkfac": TraceRestrictedCollector,
    "kpsvd": NearestCollector,
    "diagonal": DiagonalCollector,
    "unit_wise": UnitWiseCollector,
    "block": DenseCollector,
}


def _collector_of(structure: str, layout: WeightLayout, max_factor_dim: int) -> type[Collector]:
    """What collects a layer's block."""
    if structure == "kpsvd" and layout.d_in == 1 and layout.d_out > max_factor_dim:
        # Of all products of a diagonal and a number the nearest has the diagonal of F itself.
        return TraceRestrictedCollector
    return COLLECTORS[structure]


class LayerByLayer:
    """One estimate with a collector for each layer.

    Args:
        layouts: the layers' matrices by name, in order.
        structures: the layers' structures by name.
        twice: whether the data come a second time, so that 'ekfac' need not keep pairs.
        limits: size of the largest side of a Kronecker product that is kept whole, by name.
    """

    def __init__(
        self,
        layouts: Mapping[str, WeightLayout],
        structures: Mapping[str, str],
        *,
        twice: bool = False,
        limits: Mapping[str, int],
    ) -> None:
        self.collectors = {
            name: _collector_of(structures[name], layout, limits[name])(layout, name)
            for name, layout in layouts.items()
        }
        for name, one in self.collectors.items():
            one.limit_sides(limits[name])
        self.moments = frozenset(name for name, one in self.collectors.items() if one.moments)
        #: The layers that wait for the second pass, and those whose pairs are taken in the pass at hand.
        self.waiting = frozenset(
            name for name, one in self.collectors.items() if twice and isinstance(one, EigenCollector)
        )
        self.pairs = frozenset(name for name, one in self.collectors.items() if one.pairs) - self.waiting

    def look_again(self, factors: Mapping[str, KroneckerBlock]) -> None:
        """Begin the second pass, with G (x) A of the first."""
        self.moments, self.pairs = frozenset(), self.waiting & factors.keys()
        for name in self.pairs:
            collector = self.collectors[name]
            assert isinstance(collector, EigenCollector)
            collector.look_again(factors[name])

    def state(self) -> dict[str, Any]:
        """What was taken in, as plain values and tensors."""
        return {name: one.state() for name, one in self.collectors.items()}

    def load_state(self, state: Mapping[str, Any], devices: Mapping[str, torch.device]) -> None:
        """Go on from ``state``, each layer on its device."""
        for name, one in self.collectors.items():
            one.load_state(state[name], devices[name])

    def take(self, pairs: Pairs, weight: float, slot: int) -> None:
        """Take in the pairs of one batch and score, of layers in ``pairs`` alone."""
        for name, pair in pairs.items():
            self.collectors[name].add(*pair, weight, slot)

    def blocks(self, factors: Mapping[str, KroneckerBlock], scales: Scales) -> dict[str, Block]:
        """The blocks of the layers that took part, from G (x) A where they are made of them."""
        found = {name: one.block(factors.get(name), scales) for name, one in self.collectors.items()}
        return {name: block for name, block in found.items() if block is not None}

    def of_kronecker(self, factors: Mapping[str, KroneckerBlock]) -> dict[str, Block]:
        """Blocks that are Kronecker products, each in its storage."""
        return {name: self.collectors[name].of_kronecker(block) for name, block in factors.items()}


class Joint:
    """'dense': the sum of vec V_n vec V_n^T over all layers at once, with what couples them, as one block named '*'.

    Args:
        layouts: the layers' matrices by name, in order.
    """

    moments: frozenset[str] = frozenset()
    waiting: frozenset[str] = frozenset()

    def __init__(self, layouts: Mapping[str, WeightLayout]) -> None:
        self.layouts = dict(layouts)
        self.layout = JointLayout(parts=tuple(layouts.values()))
        self.pairs = frozenset(layouts)
        self.sums: Sums = {}
        require_dense(self.layout.numel, f"structure='dense' over {len(layouts)} layers")

    def look_again(self, factors: Mapping[str, KroneckerBlock]) -> None:
        """Take nothing in the second pass."""
        self.pairs = frozenset()

    def state(self) -> dict[str, Any]:
        """What was taken in, as plain values and tensors."""
        return {"sums": dict(self.sums)}

    def load_state(self, state: Mapping[str, Any], devices: Mapping[str, torch.device]) -> None:
        """Go on from ``state``, on the device of the first layer."""
        device = devices[next(iter(self.layouts))]
        self.sums = {slot: tensor.to(device) for slot, tensor in state["sums"].items()}

    def take(self, pairs: Pairs, weight: float, slot: int) -> None:
        """Take in the pairs of one batch and score; a layer that no gradient reached has zeros."""
        _, some = next(iter(pairs.values()))
        rows = [
            example_rows(*pairs[name]) if name in pairs else some.new_zeros(some.shape[-3], layout.numel)
            for name, layout in self.layouts.items()
        ]
        joined = torch.cat(rows, dim=-1)
        add_to(self.sums, slot, joined.mT @ joined, weight)

    def blocks(self, factors: Mapping[str, KroneckerBlock], scales: Scales) -> dict[str, Block]:
        """The one block."""
        return {"*": DenseBlock(self.layout, combined(self.sums, scales), "*")} if self.sums else {}

    def of_kronecker(self, factors: Mapping[str, KroneckerBlock]) -> dict[str, Block]:
        """Kronecker products along the diagonal of the one block."""
        layout = JointLayout(parts=tuple(block.layout for block in factors.values()))
        return {"*": DenseBlock(layout, block_diagonal([block.to_dense() for block in factors.values()]), "*")}


def add_to(sums: Sums, slot: int, summand: Tensor, weight: float) -> None:
    """Add weight times the summand to a slot's sum, in place where there is one."""
    if slot in sums:
        sums[slot].add_(summand, alpha=weight)
    else:
        sums[slot] = summand * weight


def _unit(matrix: Tensor) -> Tensor:
    """Each matrix divided by its Frobenius norm; one that is zero stays so."""
    norm = torch.linalg.matrix_norm(matrix, keepdim=True)
    return matrix / torch.where(norm > 0, norm, 1)
