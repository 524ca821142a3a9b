"""The work of a computation as counts that hold on any machine: numbers written, and products of matrices."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.linalg_cholesky_ex, aten.cholesky_inverse}
NOTHING_WRITTEN = {aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided, aten.new_empty_strided, aten.detach}


class Passes(TorchDispatchMode):
    """Counts what is written beside products of matrices: numbers, in tensors of ``least`` numbers or more.

    Attributes:
        written: numbers written by all other operations; a copy of d x d numbers counts d * d.
        products: of what was multiplied [rows, inner, columns], in order; a batch has its size in front.
        solves: shapes of what triangular matrices were solved for, in order.
        largest: numbers of the largest tensor that any operation gave.
    """

    def __init__(self, least: int = 0) -> None:
        super().__init__()
        self.least = least
        self.written = 0
        self.largest = 0
        self.products: list[tuple[int, ...]] = []
        self.solves: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        sizes = [prod(one.shape) for one in tree_leaves(found) if isinstance(one, Tensor)]
        self.largest = max([self.largest, *sizes])
        if func.overloadpacket is aten.linalg_solve_triangular:
            self.solves.append(tuple(found.shape))
        elif func.overloadpacket in PRODUCTS:
            if func.overloadpacket not in (aten.linalg_cholesky_ex, aten.cholesky_inverse):
                left, right = args[-2:]
                self.products.append((*left.shape, right.shape[-1]))
        elif not (func.is_view or func.overloadpacket in NOTHING_WRITTEN):
            # An output may be one that was handed in, changed in place.
            self.written += sum(size for size in sizes if size >= self.least)
        return found
