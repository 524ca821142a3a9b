"""Models that ``parallelize_module`` cuts, how, and their training on one process or on several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import kfac_cond as kc

from . import cases

CLASSES, LENGTH, WIDTH = 6, 4, 4


class Perceptron(nn.Module):
    """One layer cut by columns, one by rows, one that is whole."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(6, hidden), nn.Linear(hidden, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.down(self.up(x).tanh()).tanh())


class Frozen(Perceptron):
    """What is cut does not train, or in part."""

    def __init__(self) -> None:
        super().__init__()
        self.up.requires_grad_(False)
        self.down.bias.requires_grad_(False)


class Repeated(nn.Module):
    """A layer that is used twice, and two that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.back = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.out = nn.Linear(6, 3)

    def tie(self) -> None:
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = self.back(layer(x).tanh())
        return self.out(x)


class Language(nn.Module):
    """A block of a language model: tokens, norm, attention with heads, perceptron, and a head."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(CLASSES, WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH, bias=False)
        self.last, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES, bias=False)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        x = (x.abs() * 10).long()[:, :LENGTH] % CLASSES
        h = self.tokens(x)
        z = self.norm(h)
        q, k, v = (one(z).unflatten(-1, (-1, WIDTH // self.heads)).transpose(1, 2) for one in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        h = h + self.o((weights @ v).transpose(1, 2).flatten(2))
        h = h + self.down(functional.relu(self.up(h)))
        return self.head(self.last(h)).transpose(1, 2)


class Tied(Language):
    """Its head is its table of tokens: one weight in two roles, known by its gradient alone."""

    def __init__(self) -> None:
        super().__init__()
        self.tie()

    def tie(self) -> None:
        self.head.weight = self.tokens.weight


def by_columns_and_rows(**rows: Any) -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return {"up": ColwiseParallel(), "down": RowwiseParallel(**rows)}


def uneven() -> dict[str, Any]:
    """All of it on DTensors, whose parts differ in size."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return {
        "up": ColwiseParallel(use_local_output=False),
        "down": RowwiseParallel(output_layouts=Replicate(), use_local_output=False),
        "out": ColwiseParallel(use_local_output=False),
    }


def repeated() -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return {"first": ColwiseParallel(), "second": ColwiseParallel(), "back": RowwiseParallel()}


def language(*, tokens_by_rows: bool = True, whole_logits: bool = True) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    table = RowwiseParallel if tokens_by_rows else ColwiseParallel
    head = {"output_layouts": Replicate()} if whole_logits else {"use_local_output": False}
    return {
        "tokens": table(input_layouts=Replicate(), output_layouts=Replicate()),
        **{name: ColwiseParallel() for name in "qkv"},
        "o": RowwiseParallel(),
        **by_columns_and_rows(),
        "head": ColwiseParallel(**head),
    }


def along_the_sequence(**options: Any) -> dict[str, Any]:
    """Between its layers each rank has a part of the positions."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
    )

    prepared = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
    return {
        "tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False),
        "norm": SequenceParallel(),
        **{name: ColwiseParallel(input_layouts=Shard(1)) for name in "qkv"},
        "o": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "last": SequenceParallel(),
        "head": [prepared, ColwiseParallel(output_layouts=Replicate())],
    }
