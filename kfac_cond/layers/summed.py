"""What is summed of a layer's weight gradients V_n, each of one example with its positions added up first.

It stands in one tensor a slot, in the place of G; nothing is summed for A.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from ..linalg.kronecker import kronecker_matmul
from ..linalg.moments import of_unit_trace, second_moment, second_moment_diagonal
from ..linalg.pairs import (
    input_moment,
    input_moment_diagonal,
    output_moment,
    output_moment_diagonal,
    squared_gradients,
    squared_gradients_in_bases,
)
from ..linalg.sides import Side, identity
from .layout import WeightLayout
from .rules import Sharing

Bases = tuple[Tensor | None, Tensor | None]
"""Orthonormal columns for the sides A and G, [*groups, d, d] each; None for the identity."""

IDENTITIES: Bases = (None, None)


class GradientSums(ABC):
    """A sum over examples of a function of V_n."""

    #: Whether the outer products of inputs are summed beside it.
    sums_inputs: ClassVar[bool] = False

    @abstractmethod
    def shape(self, layout: WeightLayout, max_factor_dim: int) -> tuple[int, ...]:
        """The shape of the sum."""

    @abstractmethod
    def of_pairs(
        self, a: Tensor, g: Tensor, layout: WeightLayout, max_factor_dim: int, bases: Bases = IDENTITIES
    ) -> Tensor:
        """The sum from pairs in the form of ``linalg.pairs``; ``bases`` are those in use."""

    @abstractmethod
    def of_gradients(self, V: Tensor, layout: WeightLayout, max_factor_dim: int, bases: Bases = IDENTITIES) -> Tensor:
        """The sum from the gradients themselves, [n, *matrix_shape]."""


class GradientMoments(GradientSums):
    """C = sum V_n^T V_n and R = sum V_n V_n^T, one after the other and flat: R (x) C / t, with t = tr R = tr C = tr F.

    Of a matrix of one row, or one column, that is the sum of vec V_n vec V_n^T itself.

    Source: Gao et al. 2020 (arXiv:2011.10741), with an example's positions summed before anything is squared.
    """

    def shape(self, layout: WeightLayout, max_factor_dim: int) -> tuple[int, ...]:
        """(entries of both,)."""
        return (sum(map(prod, layout.side_shapes(max_factor_dim))),)

    def of_pairs(
        self, a: Tensor, g: Tensor, layout: WeightLayout, max_factor_dim: int, bases: Bases = IDENTITIES
    ) -> Tensor:
        """Both from pairs, a side that is too large as its diagonal."""
        diagonal = layout.diagonal_sides(max_factor_dim)
        C = input_moment_diagonal(a, g) if "A" in diagonal else input_moment(a, g)
        R = output_moment_diagonal(a, g) if "G" in diagonal else output_moment(a, g)
        return torch.cat([C.flatten(), R.flatten()])

    def of_gradients(self, V: Tensor, layout: WeightLayout, max_factor_dim: int, bases: Bases = IDENTITIES) -> Tensor:
        """Both from gradients."""
        diagonal = layout.diagonal_sides(max_factor_dim)
        C, R = (
            (second_moment_diagonal if side in diagonal else second_moment)(rows)
            for side, rows in (
                ("A", rearrange(V, "n ... o i -> ... (n o) i")),
                ("G", rearrange(V, "n ... o i -> ... (n i) o")),
            )
        )
        return torch.cat([C.flatten(), R.flatten()])

    def factors(self, sums: Tensor, layout: WeightLayout, max_factor_dim: int) -> tuple[Tensor, Tensor]:
        """(C / t, R) from both, each a part of F."""
        shapes = layout.side_shapes(max_factor_dim)
        parts = torch.split(sums, [*map(prod, shapes)])
        C, R = (part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
        return of_unit_trace(C, leading=len(layout.matrix_shape) - 2), R


class GradientSquares(GradientSums):
    """The sum of V_n squared entry by entry: the diagonal of F."""

    def shape(self, layout: WeightLayout, max_factor_dim: int) -> tuple[int, ...]:
        """That of the layer's matrix."""
        return layout.matrix_shape

    def of_pairs(
        self, a: Tensor, g: Tensor, layout: WeightLayout, max_factor_dim: int, bases: Bases = IDENTITIES
    ) -> Tensor:
        """It from pairs."""
        return squared_gradients(a, g)

    def of_gradients(self, V: Tensor, layout: WeightLayout, max_factor_dim: int, bases: Bases = IDENTITIES) -> Tensor:
        """It from gradients."""
        return V.square().sum(dim=0)


@dataclass(frozen=True)
class OutputMoment(GradientSums):
    """The sum of g g^T, flat: what G is made of in 'kfac', from pairs.

    Args:
        sharing: 'expand' for a g of each position, 'reduce' for one of each example, their sum.
    """

    sums_inputs: ClassVar[bool] = True
    sharing: Sharing

    def shape(self, layout: WeightLayout, max_factor_dim: int) -> tuple[int, ...]:
        """(entries,)."""
        return (prod(layout.side_shapes(max_factor_dim)[1]),)

    def of_pairs(
        self, a: Tensor, g: Tensor, layout: WeightLayout, max_factor_dim: int, bases: Bases = IDENTITIES
    ) -> Tensor:
        """It from pairs, of which g alone is looked at."""
        moment = second_moment_diagonal if "G" in layout.diagonal_sides(max_factor_dim) else second_moment
        rows = g.sum(dim=-2) if self.sharing == "reduce" else rearrange(g, "... n s o -> ... (n s) o")
        return moment(rows).flatten()

    def of_gradients(self, V: Tensor, layout: WeightLayout, max_factor_dim: int, bases: Bases = IDENTITIES) -> Tensor:
        """Weight gradients do not tell it."""
        raise NotImplementedError("g g^T of positions is not a function of V")


@dataclass(frozen=True)
class EigenSquares(GradientSums):
    """The sum of (U_G^T V_n U_A)^2 in the bases U in use, and before it what the next bases are made of; flat.

    Args:
        moments: what the bases are eigenvectors of.

    Source: George et al. 2018 (arXiv:1806.03884), section 3.
    """

    moments: GradientMoments | OutputMoment

    @property
    def sums_inputs(self) -> bool:  # type: ignore[override]
        """Whether A is that of the inputs."""
        return self.moments.sums_inputs

    def shape(self, layout: WeightLayout, max_factor_dim: int) -> tuple[int, ...]:
        """(entries of both,)."""
        return (prod(self.moments.shape(layout, max_factor_dim)) + prod(layout.matrix_shape),)

    def of_pairs(
        self, a: Tensor, g: Tensor, layout: WeightLayout, max_factor_dim: int, bases: Bases = IDENTITIES
    ) -> Tensor:
        """Both from pairs."""
        of_A, of_G = (None if basis is None else basis.to(g) for basis in bases)
        squares = squared_gradients_in_bases(a, g, of_A, of_G)
        return torch.cat([self.moments.of_pairs(a, g, layout, max_factor_dim), squares.flatten()])

    def of_gradients(self, V: Tensor, layout: WeightLayout, max_factor_dim: int, bases: Bases = IDENTITIES) -> Tensor:
        """Both from gradients."""
        of_A, of_G = _whole(bases, layout, V)
        squares = kronecker_matmul(of_G.mT, V, of_A).square().sum(dim=0)
        return torch.cat([self.moments.of_gradients(V, layout, max_factor_dim), squares.flatten()])

    def parts(self, sums: Tensor, layout: WeightLayout) -> tuple[Tensor, Tensor]:
        """What the bases are made of, [..., entries], and the squares, [..., *matrix_shape]."""
        squares = layout.numel
        first, last = torch.split(sums, [sums.shape[-1] - squares, squares], dim=-1)
        return first, last.reshape(*sums.shape[:-1], *layout.matrix_shape)

    def started(self, sums: Tensor, values: tuple[Tensor, Tensor], layout: WeightLayout) -> Tensor:
        """The sums [..., entries] in the first bases, whose squares are not known yet.

        They take the form of the product of the sides' eigenvalues, and keep their trace, which no basis changes.
        """
        first, squares = self.parts(sums, layout)
        of_A, of_G = values
        product = of_G.unsqueeze(-1) * of_A.unsqueeze(-2)
        total = product.sum(dim=(-2, -1), keepdim=True)
        form = torch.where(total > 0, product / torch.where(total > 0, total, 1), 1 / prod(product.shape[-2:]))
        squares = squares.sum(dim=(-2, -1), keepdim=True) * form
        return torch.cat([first, squares.flatten(-len(layout.matrix_shape))], dim=-1)

    def turned(self, sums: Tensor, old: Bases, new: Bases, layout: WeightLayout) -> Tensor:
        """The sums [..., entries] in other bases: of U diag(squares) U^T the diagonal in the new ones.

        It is linear in the squares, so that weights, heads and the correction of their bias stay as they are, and it
        keeps the trace: each square is dealt out in shares that add up to one.
        """
        first, squares = self.parts(sums, layout)
        shares = [
            None if now is None or before is None else (before.to(now).mT @ now).square()
            for before, now in zip(old, new, strict=True)
        ]
        of_A, of_G = _whole((shares[0], shares[1]), layout, squares)
        squares = kronecker_matmul(of_G.mT, squares, of_A)
        return torch.cat([first, squares.flatten(-len(layout.matrix_shape))], dim=-1)


def _whole(bases: Bases, layout: WeightLayout, like: Tensor) -> tuple[Side, Side]:
    """The bases as matrices."""
    *groups, d_out, d_in = layout.matrix_shape
    of_A, of_G = (
        identity(torch.Size((*groups, d, d)), like) if basis is None else basis.to(like)
        for basis, d in zip(bases, (d_in, d_out), strict=True)
    )
    return of_A, of_G


MOMENTS = GradientMoments()
SQUARES = GradientSquares()

#: The structures that training keeps layers in, and what is summed for each in place of what the layer's kind says.
TRAINED: dict[str, GradientSums | None] = {"kfac": None, "tkfac": MOMENTS, "diagonal": SQUARES, "ekfac": None}


def trained_sums(structure: str, own: GradientSums | None, sharing: Sharing) -> GradientSums | None:
    """What training sums of a layer.

    Args:
        structure: one of ``TRAINED``.
        own: what its kind says.
        sharing: how positions enter its factors.
    """
    if structure == "ekfac":
        return EigenSquares(own if isinstance(own, GradientMoments) else OutputMoment(sharing))
    return TRAINED[structure] or own
