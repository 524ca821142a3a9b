"""The exact Fisher of a whole model as products alone: no storage, a pass over the data for each use."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..layers.layout import JointLayout
from .iterative import Iteration, IterativeBlock


class Products(Protocol):
    """What an ``ImplicitBlock`` stands on: a model over data, somewhere above."""

    @property
    def dtype(self) -> torch.dtype:
        """Of every result."""

    @property
    def device(self) -> torch.device:
        """Of every result."""

    def fisher_rows(self, rows: Tensor) -> Tensor:
        """F times each flat row [k, P]."""

    def sample_rows(self, n: int, generator: torch.Generator | None) -> Tensor:
        """n Gaussian rows [n, P] of covariance F."""


@dataclass(frozen=True, eq=False, repr=False)
class ImplicitBlock(IterativeBlock):
    """F = (1/M) sum_n J_n^T H_n J_n, exactly: over all parameters together and all data, with nothing stored.

    A product is u = H J v and J^T u / M, batch by batch. It follows the model: after a change of the parameters the
    same object is the Fisher there. ``sample`` is exact as well, (1 / sqrt M) J^T S z with normal z, one backward a
    draw; the other verbs are those of ``IterativeBlock``.

    H is that of the outputs in closed form where the kind is 'exact'; otherwise the mean of s s^T over labels, with s
    the score of a whole example, the same labels in every product.

    Args:
        layout: of the parameters.
        products: what does the products.
        iteration: how far iterative verbs go.
        factor: what F is multiplied by.
        name: for messages.

    Source: Pearlmutter 1994 and Schraudolph 2002 (Neural Computation 14(7)) for the products.
    """

    layout: JointLayout
    products: Products
    iteration: Iteration = field(default_factory=Iteration)
    factor: float = 1.0
    name: str = ""

    @property
    def dtype(self) -> torch.dtype:
        return self.products.dtype

    @property
    def device(self) -> torch.device:
        return self.products.device

    @property
    def label(self) -> str:
        return "the implicit Fisher"

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self.products.sample_rows(n, generator) * sqrt(self.factor)

    def with_iteration(self, iteration: Iteration) -> ImplicitBlock:
        return replace(self, iteration=iteration)

    def to(self, target: torch.device | torch.dtype | str) -> ImplicitBlock:
        there = torch.empty(0, dtype=self.dtype, device=self.device).to(target)
        if (there.dtype, there.device) != (self.dtype, self.device):
            raise ArgumentError(
                f"{self.label} lives where its model does, in {self.dtype} on {self.device}: move the model"
            )
        return self

    def _product(self, matrix: Tensor) -> Tensor:
        rows = self.products.fisher_rows(matrix.reshape(-1, self.layout.numel))
        product: Tensor = (rows * self.factor).reshape(matrix.shape)
        return product

    def _scaled(self, factor: float) -> ImplicitBlock:
        return replace(self, factor=self.factor * factor)
