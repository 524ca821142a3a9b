"""Bilinear layers, y = x1^T W x2 + b for each output: linear in the products of an entry of x1 and one of x2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from .linear import LinearKind


class BilinearKind(LinearKind):
    """``nn.Bilinear`` on (batch, ..., d1) and (batch, ..., d2): a linear layer on their d1 * d2 products."""

    name: ClassVar[str] = "bilinear"
    modules: ClassVar[tuple[type[nn.Module], ...]] = (nn.Bilinear,)

    def of_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dtype: torch.dtype
    ) -> Tensor | None:
        """The products of one call's (input1, input2)."""
        given = {**dict(zip(("input1", "input2"), args, strict=False)), **kwargs}
        x1, x2 = given.get("input1"), given.get("input2")
        if not (isinstance(x1, Tensor) and isinstance(x2, Tensor)):
            return None
        products = einsum(x1.detach().to(dtype), x2.detach().to(dtype), "... i, ... j -> ... i j")
        return self.activations(module, rearrange(products, "... i j -> ... (i j)"))
