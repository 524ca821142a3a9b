"""Large networks with their true shapes, in plain torch, for counting on the meta device; with each a rank's batch.

What has no parameters and moves no shape, the rotation of positions and dropout, is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional


def convolution(channels_in: int, channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution without a bias, and its norm."""
    conv = nn.Conv2d(channels_in, channels, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


class Bottleneck(nn.Module):
    """Three convolutions, the middle one narrow, beside the identity or a convolution where shapes differ."""

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.reduce = convolution(channels_in, width, 1)
        self.middle = convolution(width, width, 3, stride)
        self.expand = convolution(width, 4 * width, 1)
        same = stride == 1 and channels_in == 4 * width
        self.beside = nn.Identity() if same else convolution(channels_in, 4 * width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Images to images."""
        h = self.middle(self.reduce(x).relu()).relu()
        return (self.expand(h) + self.beside(x)).relu()


class ResNet50(nn.Module):
    """He et al. 2016 (arXiv:1512.03385), the stride in the 3 x 3 convolution as in torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))
        blocks, channels = [], 64
        for stage, number in enumerate((3, 4, 6, 3)):
            width = 64 * 2**stage
            for index in range(number):
                blocks.append(Bottleneck(channels, width, 2 if stage and not index else 1))
                channels = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Images to classes."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def attended(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Causal attention of [n, positions, width]."""
    q, k, v = (rearrange(one, "n s (h d) -> n h s d", h=heads) for one in (q, k, v))
    return rearrange(functional.scaled_dot_product_attention(q, k, v, is_causal=True), "n h s d -> n s (h d)")


class GPT2Block(nn.Module):
    """Queries, keys and values of one linear layer; a perceptron four times as wide; biases everywhere."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Positions to positions."""
        x = x + self.out(attended(*self.qkv(self.norm(x)).chunk(3, dim=-1), self.heads))
        return x + self.down(functional.gelu(self.up(self.inner(x))))


class GPT2XL(nn.Module):
    """Radford et al. 2019, the largest; its head is the table of tokens."""

    def __init__(self, vocabulary: int = 50257, context: int = 1024, width: int = 1600, depth: int = 48) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(GPT2Block(width, 25) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens."""
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.tokens(x) + self.positions(places))))


class LlamaBlock(nn.Module):
    """Attention and a gated perceptron, without biases."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.inner = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Positions to positions."""
        h = self.norm(x)
        x = x + self.out(attended(self.q(h), self.k(h), self.v(h), self.heads))
        h = self.inner(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


class Llama7B(nn.Module):
    """Touvron et al. 2023 (arXiv:2307.09288), the smallest; its head is a layer of its own."""

    def __init__(self, vocabulary: int = 32000, width: int = 4096, hidden: int = 11008, depth: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(LlamaBlock(width, hidden, 32) for _ in range(depth)))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens."""
        return self.head(self.norm(self.blocks(self.tokens(x))))


@dataclass(frozen=True)
class Case:
    """A network, and what one rank gives it in a step.

    Args:
        network: makes it, on the device there is.
        batch: likewise.
        said: of the batch, in words.
    """

    network: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    said: str


CASES = {
    "resnet-50": Case(ResNet50, lambda: torch.zeros(32, 3, 224, 224), "32 images of 224 x 224"),
    "gpt-2-xl": Case(GPT2XL, lambda: torch.zeros(1, 1024, dtype=torch.long), "1,024 tokens"),
    "llama-2-7b": Case(Llama7B, lambda: torch.zeros(1, 4096, dtype=torch.long), "4,096 tokens"),
}
