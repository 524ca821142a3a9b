"""What a structure accumulates of each batch, and which block it becomes: one small class a structure.

Sums over examples add, so that two pieces of data, or two draws with their weights, are one after the other. What a
structure asks for decides what is captured: A and G, pairs (a, g) of each example, or both.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar

import torch
from einops import einsum
from torch import Tensor

from ..layers.layout import JointLayout, WeightLayout
from ..linalg.kronecker import block_diagonal
from ..linalg.moments import trace
from ..linalg.pairs import example_rows, input_moment, row_moments, squared_gradients
from .base import Block, require_dense
from .dense import DenseBlock
from .diagonal import DiagonalBlock
from .eigen import EigenBlock
from .kronecker import KroneckerBlock
from .unit_wise import UnitWiseBlock, require_unit_wise

logger = logging.getLogger("kfac_cond")

Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""(a, g) by layer name."""


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

    def __init__(self, layout: WeightLayout, name: str) -> None:
        self.layout, self.name = layout, name

    @abstractmethod
    def add(self, a: Tensor, g: Tensor, weight: float) -> None:
        """Take in one batch and draw; ``weight`` is that of the draw. Called where ``pairs`` asks for them."""

    @abstractmethod
    def block(self, factors: KroneckerBlock | None, divisor: Tensor) -> Block | None:
        """The block, from G (x) A where ``moments`` asks for them, and M; None where nothing came in."""

    def of_kronecker(self, block: KroneckerBlock) -> Block:
        """A Kronecker block in this storage: what is left to store where F is known to be one."""
        return block


class KroneckerCollector(Collector):
    """'kfac': nothing beside A and G."""

    moments = True
    pairs = False

    def add(self, a: Tensor, g: Tensor, weight: float) -> None:
        pass

    def block(self, factors: KroneckerBlock | None, divisor: Tensor) -> Block | None:
        return factors


class SummedCollector(Collector):
    """One sum over examples, of a function of their pairs."""

    sum: Tensor | None = None

    @abstractmethod
    def summand(self, a: Tensor, g: Tensor) -> Tensor:
        """What one batch and draw adds."""

    def add(self, a: Tensor, g: Tensor, weight: float) -> None:
        self.sum = added(self.sum, self.summand(a, g), weight)


class DiagonalCollector(SummedCollector):
    """'diagonal': the sum of V_n squared."""

    def summand(self, a: Tensor, g: Tensor) -> Tensor:
        return squared_gradients(a, g)

    def block(self, factors: KroneckerBlock | None, divisor: Tensor) -> Block | None:
        return (
            None if self.sum is None else DiagonalBlock(self.layout, self.sum / divisor.to(self.sum.device), self.name)
        )

    def of_kronecker(self, block: KroneckerBlock) -> Block:
        return DiagonalBlock(self.layout, block.diagonal(), self.name)


class DenseCollector(SummedCollector):
    """'block': the sum of vec V_n vec V_n^T."""

    def __init__(self, layout: WeightLayout, name: str) -> None:
        super().__init__(layout, name)
        require_dense(layout.numel, f"layer '{name}'")

    def summand(self, a: Tensor, g: Tensor) -> Tensor:
        rows = example_rows(a, g)
        return rows.mT @ rows

    def block(self, factors: KroneckerBlock | None, divisor: Tensor) -> Block | None:
        return None if self.sum is None else DenseBlock(self.layout, self.sum / divisor.to(self.sum.device), self.name)

    def of_kronecker(self, block: KroneckerBlock) -> Block:
        return DenseBlock(self.layout, block.to_dense(), self.name)


class UnitWiseCollector(SummedCollector):
    """'unit_wise': for each row of the layer's matrix the sum of V_n[o] V_n[o]^T."""

    def __init__(self, layout: WeightLayout, name: str) -> None:
        super().__init__(layout, name)
        require_unit_wise(layout, f"layer '{name}'")

    def summand(self, a: Tensor, g: Tensor) -> Tensor:
        return row_moments(a, g)

    def block(self, factors: KroneckerBlock | None, divisor: Tensor) -> Block | None:
        return (
            None if self.sum is None else UnitWiseBlock(self.layout, self.sum / divisor.to(self.sum.device), self.name)
        )

    def of_kronecker(self, block: KroneckerBlock) -> Block:
        rows = block.G.diagonal(dim1=-2, dim2=-1)
        matrices = einsum(rows, block.A, "... o, ... i j -> ... o i j")
        return UnitWiseBlock(self.layout, matrices, self.name)


class TraceRestrictedCollector(Collector):
    """'tkfac': R = sum V V^T and C = sum V^T V, both exact; R (x) C / tr has their traces, and F's.

    Source: Gao et al. 2020 (arXiv:2011.10741), with an example's positions summed before anything is squared.
    """

    R: Tensor | None = None
    C: Tensor | None = None

    def add(self, a: Tensor, g: Tensor, weight: float) -> None:
        self.R = added(self.R, input_moment(g, a), weight)
        self.C = added(self.C, input_moment(a, g), weight)

    def block(self, factors: KroneckerBlock | None, divisor: Tensor) -> Block | None:
        if self.R is None or self.C is None:
            return None
        total = trace(self.C)[..., None, None]
        A = self.C / torch.where(total > 0, total, 1)
        return KroneckerBlock(self.layout, A, self.R / divisor.to(self.R.device), self.name)


class KeepingCollector(Collector):
    """The pairs themselves, which what comes after the pass goes through again: the same data and draws, no forward.

    Memory: N positions (d_in + d_out) numbers a draw, where a is shared by the draws of a batch.
    """

    def __init__(self, layout: WeightLayout, name: str) -> None:
        super().__init__(layout, name)
        self.kept: list[tuple[Tensor, Tensor, float]] = []

    def add(self, a: Tensor, g: Tensor, weight: float) -> None:
        self.kept.append((a, g, weight))

    def total(self, summand: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The sum of a function of the pairs."""
        sums: Tensor | None = None
        for a, g, weight in self.kept:
            sums = added(sums, summand(a, g), weight)
        assert sums is not None
        return sums


class EigenCollector(KeepingCollector):
    """'ekfac': the Kronecker eigenbasis, with eigenvalues (1/M) sum E[(U_G^T V_n U_A)^2] of the same data and draws.

    Once it has the basis, in a second pass, it keeps no pairs.

    Source: George et al. 2018 (arXiv:1806.03884), section 3.
    """

    moments = True
    basis: EigenBlock | None = None
    sum: Tensor | None = None

    def look_again(self, factors: KroneckerBlock) -> None:
        """Take the eigenbasis that the eigenvalues are estimated in."""
        self.basis = factors.eigen()

    def add(self, a: Tensor, g: Tensor, weight: float) -> None:
        if self.basis is None:
            super().add(a, g, weight)
            return
        # U_G^T V U_A is the weight gradient of the rotated pairs.
        rotated = [
            einsum(x, basis, "... n s d, ... d e -> ... n s e")
            for x, basis in ((a, self.basis.basis_A), (g, self.basis.basis_G))
        ]
        self.sum = added(self.sum, squared_gradients(*rotated), weight)

    def block(self, factors: KroneckerBlock | None, divisor: Tensor) -> Block | None:
        if factors is None:
            return None
        if self.basis is None:
            self.look_again(factors)
            for a, g, weight in self.kept:
                self.add(a, g, weight)
        if self.sum is None or self.basis is None:
            return None
        return self.basis.with_values(self.sum / divisor.to(self.sum.device))

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

    def block(self, factors: KroneckerBlock | None, divisor: Tensor) -> Block | None:
        if not self.kept:
            return None
        # The first half step, from G = I, gives the trace-restricted A; the scale is in G alone, by the last half step.
        A = before = _unit(self.total(input_moment))
        round_off = self.tolerance * torch.finfo(A.dtype).eps
        for _ in range(self.iterations):
            G = _unit(self._output_moment(A))
            before, A = A, _unit(self.total(partial(input_moment, weight=G)))
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
        return KroneckerBlock(self.layout, A, self._output_moment(A) / divisor, self.name)

    def _output_moment(self, A: Tensor) -> Tensor:
        """The sum of V A V^T: the best G for an A of norm one."""
        return self.total(lambda a, g: input_moment(g, a, A))


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


class LayerByLayer:
    """One estimate with a collector for each layer.

    Args:
        layouts: the layers' matrices by name, in order.
        structures: the layers' structures by name.
        twice: whether the data come a second time, so that 'ekfac' need not keep pairs.
    """

    def __init__(
        self, layouts: Mapping[str, WeightLayout], structures: Mapping[str, str], *, twice: bool = False
    ) -> None:
        self.collectors = {name: COLLECTORS[structures[name]](layout, name) for name, layout in layouts.items()}
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

    def take(self, pairs: Pairs, weight: float) -> None:
        """Take in the pairs of one batch and draw, of layers in ``pairs`` alone."""
        for name, pair in pairs.items():
            self.collectors[name].add(*pair, weight)

    def blocks(self, factors: Mapping[str, KroneckerBlock], divisor: Tensor) -> dict[str, Block]:
        """The blocks of the layers that took part, from G (x) A where they are made of them, and M."""
        found = {name: one.block(factors.get(name), divisor) for name, one in self.collectors.items()}
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
        self.sum: Tensor | None = None
        require_dense(self.layout.numel, f"structure='dense' over {len(layouts)} layers")

    def look_again(self, factors: Mapping[str, KroneckerBlock]) -> None:
        """Take nothing in the second pass."""
        self.pairs = frozenset()

    def take(self, pairs: Pairs, weight: float) -> None:
        """Take in the pairs of one batch and draw; a layer that no gradient reached has zeros."""
        some, _ = next(iter(pairs.values()))
        rows = [
            example_rows(*pairs[name]) if name in pairs else some.new_zeros(some.shape[-3], layout.numel)
            for name, layout in self.layouts.items()
        ]
        joined = torch.cat(rows, dim=-1)
        self.sum = added(self.sum, joined.mT @ joined, weight)

    def blocks(self, factors: Mapping[str, KroneckerBlock], divisor: Tensor) -> dict[str, Block]:
        """The one block, from M."""
        return {} if self.sum is None else {"*": DenseBlock(self.layout, self.sum / divisor.to(self.sum.device), "*")}

    def of_kronecker(self, factors: Mapping[str, KroneckerBlock]) -> dict[str, Block]:
        """Kronecker products along the diagonal of the one block."""
        layout = JointLayout(parts=tuple(block.layout for block in factors.values()))
        return {"*": DenseBlock(layout, block_diagonal([block.to_dense() for block in factors.values()]), "*")}


def added(sums: Tensor | None, summand: Tensor, weight: float) -> Tensor:
    """sums + weight summand, in place where there are sums."""
    return summand * weight if sums is None else sums.add_(summand, alpha=weight)


def _unit(matrix: Tensor) -> Tensor:
    """Each matrix divided by its Frobenius norm; one that is zero stays so."""
    norm = torch.linalg.matrix_norm(matrix, keepdim=True)
    return matrix / torch.where(norm > 0, norm, 1)
