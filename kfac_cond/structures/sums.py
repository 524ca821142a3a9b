"""Sums of blocks: what adds stays in closed form, the rest is iterative."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..layers.layout import WeightLayout
from ..linalg.sides import inner
from .base import Block
from .iterative import Iteration, IterativeBlock
from .kronecker import KroneckerBlock


@dataclass(frozen=True, eq=False, repr=False)
class SumBlock(IterativeBlock):
    """F = F_1 + F_2 + ..., each kept as it is stored.

    Products, ``trace``, ``diagonal``, ``sample``, ``quadratic`` and ``to_dense`` are the sums of the terms' own, and so
    is ``frobenius_norm`` of Kronecker blocks; these are exact where the terms' are. The inverse of a sum is no sum:
    ``solve`` and the other verbs are those of ``IterativeBlock``.

    Args:
        layout: that of every term.
        terms: at least two blocks of one dtype, device and layout.
        iteration: how far iterative verbs go.
        name: the layer's name, for messages.
    """

    layout: WeightLayout
    terms: tuple[Block, ...]
    iteration: Iteration = field(default_factory=Iteration)
    name: str = ""

    @property
    def dtype(self) -> torch.dtype:
        return self.terms[0].dtype

    @property
    def device(self) -> torch.device:
        return self.terms[0].device

    def trace(self) -> Tensor:
        return torch.stack([term.trace() for term in self.terms]).sum()

    def diagonal(self) -> Tensor:
        return reduce(torch.add, [term.diagonal() for term in self.terms])

    def frobenius_norm(self) -> Tensor:
        blocks = [term for term in self.terms if isinstance(term, KroneckerBlock)]
        if len(blocks) < len(self.terms):
            return super().frobenius_norm()
        return torch.stack([_inner(a, b) for a in blocks for b in blocks]).sum().clamp(min=0).sqrt()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return reduce(torch.add, [term.sample(n, generator) for term in self.terms])

    def with_iteration(self, iteration: Iteration) -> SumBlock:
        return replace(self, terms=tuple(term.with_iteration(iteration) for term in self.terms), iteration=iteration)

    def to(self, target: torch.device | torch.dtype | str) -> SumBlock:
        return replace(self, terms=tuple(term.to(target) for term in self.terms))

    def _product(self, matrix: Tensor) -> Tensor:
        return reduce(torch.add, [term._product(matrix) for term in self.terms])

    def _scaled(self, factor: float) -> SumBlock:
        return replace(self, terms=tuple(term * factor for term in self.terms))

    def _dense(self) -> Tensor:
        return reduce(torch.add, [term.to_dense() for term in self.terms])


def sum_of(mine: Block, theirs: Block) -> Block:
    """The sum of two blocks of one layer.

    Raises:
        ArgumentError: blocks of different parameters, dtypes or devices.
    """
    if mine.layout != theirs.layout:
        raise ArgumentError(
            f"{mine.label} and {theirs.label} are added: they act on {_described(mine)} and {_described(theirs)}, "
            "expected the same parameters"
        )
    if (mine.dtype, mine.device) != (theirs.dtype, theirs.device):
        raise ArgumentError(
            f"{mine.label}: a block in {mine.dtype} on {mine.device} is added to one in {theirs.dtype} on "
            f"{theirs.device}: move one with .to()"
        )
    terms = (*_terms(mine), *_terms(theirs))
    iteration = next((block.iteration for block in terms if isinstance(block, IterativeBlock)), Iteration())
    return SumBlock(mine.layout, terms, iteration, mine.name)


def _terms(block: Block) -> tuple[Block, ...]:
    return block.terms if isinstance(block, SumBlock) else (block,)


def _inner(mine: KroneckerBlock, theirs: KroneckerBlock) -> Tensor:
    """<F_1, F_2> = <G_1, G_2> <A_1, A_2>, summed over groups."""
    of_A, of_G = map(inner, mine.sides, theirs.sides)
    return (of_G * of_A).sum()


def _described(block: Block) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in list(block.layout.shapes.items())[:4])
