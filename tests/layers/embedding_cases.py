"""Embeddings and bags in float64, and what follows them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..helpers import Apply

TOKENS, FEATURES = 7, 3

EMBEDDINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding_idx": 2},
    "padding from the end": {"padding_idx": -1},
    "max norm": {"max_norm": 0.5},
    "max norm of another order": {"max_norm": 0.5, "norm_type": 1.0, "padding_idx": 0},
}


def embedding(arguments: dict[str, Any]) -> nn.Embedding:
    module = nn.Embedding(TOKENS, FEATURES, **arguments)
    nn.init.normal_(module.weight)
    return module


def bag(mode: str, arguments: dict[str, Any]) -> nn.EmbeddingBag:
    module = nn.EmbeddingBag(TOKENS, FEATURES, mode=mode, **arguments)
    nn.init.normal_(module.weight)
    return module


def head(positions: int, *, pooled: bool = False) -> nn.Sequential:
    """A classifier of all positions together."""
    pool = Apply(lambda h: h.mean(1)) if pooled else nn.Flatten()
    return nn.Sequential(nn.Tanh(), pool, nn.Linear(FEATURES * (1 if pooled else positions), 4))


def parameters_in_order(module: nn.Module) -> Tensor:
    """Where the entries of the matrix (features x tokens) are in the weight."""
    return torch.arange(TOKENS * FEATURES).reshape(TOKENS, FEATURES).T.flatten()
