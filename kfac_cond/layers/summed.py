"""What is summed of a layer's weight gradients V_n, each of one example with its positions added up first.

It stands in one tensor a slot, in the place of G; nothing is summed for A.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod

import torch
from einops import rearrange
from torch import Tensor

from ..linalg.moments import of_unit_trace, second_moment, second_moment_diagonal
from ..linalg.pairs import input_moment, input_moment_diagonal, squared_gradients
from .layout import WeightLayout


class GradientSums(ABC):
    """A sum over examples of a function of V_n."""

    @abstractmethod
    def shape(self, layout: WeightLayout, max_factor_dim: int) -> tuple[int, ...]:
        """The shape of the sum."""

    @abstractmethod
    def of_pairs(self, a: Tensor, g: Tensor, layout: WeightLayout, max_factor_dim: int) -> Tensor:
        """The sum from pairs in the form of ``linalg.pairs``."""

    @abstractmethod
    def of_gradients(self, V: Tensor, layout: WeightLayout, max_factor_dim: int) -> Tensor:
        """The sum from the gradients themselves, [n, *matrix_shape]."""


class GradientMoments(GradientSums):
    """C = sum V_n^T V_n and R = sum V_n V_n^T, one after the other and flat: R (x) C / t, with t = tr R = tr C = tr F.

    Of a matrix of one row, or one column, that is the sum of vec V_n vec V_n^T itself.

    Source: Gao et al. 2020 (arXiv:2011.10741), with an example's positions summed before anything is squared.
    """

    def shape(self, layout: WeightLayout, max_factor_dim: int) -> tuple[int, ...]:
        """(entries of both,)."""
        return (sum(map(prod, layout.side_shapes(max_factor_dim))),)

    def of_pairs(self, a: Tensor, g: Tensor, layout: WeightLayout, max_factor_dim: int) -> Tensor:
        """Both from pairs, a side that is too large as its diagonal."""
        C, R = (
            (input_moment_diagonal if size > max_factor_dim else input_moment)(*pair)
            for size, pair in ((layout.d_in, (a, g)), (layout.d_out, (g, a)))
        )
        return torch.cat([C.flatten(), R.flatten()])

    def of_gradients(self, V: Tensor, layout: WeightLayout, max_factor_dim: int) -> Tensor:
        """Both from gradients."""
        C, R = (
            (second_moment_diagonal if size > max_factor_dim else second_moment)(rows)
            for size, rows in (
                (layout.d_in, rearrange(V, "n ... o i -> ... (n o) i")),
                (layout.d_out, rearrange(V, "n ... o i -> ... (n i) o")),
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

    def of_pairs(self, a: Tensor, g: Tensor, layout: WeightLayout, max_factor_dim: int) -> Tensor:
        """It from pairs."""
        return squared_gradients(a, g)

    def of_gradients(self, V: Tensor, layout: WeightLayout, max_factor_dim: int) -> Tensor:
        """It from gradients."""
        return V.square().sum(dim=0)


MOMENTS = GradientMoments()
SQUARES = GradientSquares()

#: The structures that training keeps layers in, and what is summed for each; for 'kfac' what the layer's kind says.
TRAINED: dict[str, GradientSums | None] = {"kfac": None, "tkfac": MOMENTS, "diagonal": SQUARES}
