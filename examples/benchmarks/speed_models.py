"""The models that ``speed.py`` times, their data, and Kronecker factors by the plain formula."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

Pair = tuple[Tensor, Tensor]
"""A [d_in, d_in], or with the bias as one more, and G [d_out, d_out]; or a and g, [batch, positions, features]."""


def perceptron(width: int = 1024, depth: int = 2) -> nn.Module:
    """784 - width (so often) - width / 2 - 10."""
    sizes = [784, *[width] * depth, width // 2]
    inner = [module for i, o in pairwise(sizes) for module in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*inner, nn.Linear(sizes[-1], 10))


def convolutional(width: int = 32) -> nn.Module:
    """Five 3 x 3 convolutions, two of them with stride 2, and a linear layer over the mean of the pixels."""
    inner, last = [], 3
    for channels, stride in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2)):
        inner += [nn.Conv2d(last, channels * width, 3, stride=stride, padding=1), nn.ReLU()]
        last = channels * width
    return nn.Sequential(*inner, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10))


class Block(nn.Module):
    """Attention by four linear layers, then two; norms first."""

    def __init__(self, width: int, heads: int, *, affine: bool, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=affine) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        projected = (layer(h) for layer in (self.query, self.key, self.value))
        q, k, v = (rearrange(one, "n t (h d) -> n h t d", h=self.heads) for one in projected)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(rearrange(attended, "n h t d -> n t (h d)"))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Tokens of features to ten classes, norms without parameters, the mean of the tokens at the end."""

    def __init__(self, width: int = 256, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(48, width)
        self.blocks = nn.Sequential(*(Block(width, heads, affine=False, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.first(x))).mean(1))


class Gpt(nn.Module):
    """A causal language model; embedding and head are not tied."""

    def __init__(self, width: int, depth: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        heads = width // 64 or 1
        self.blocks = nn.Sequential(*(Block(width, heads, affine=True, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.places(places))))


class VisionTransformer(nn.Module):
    """Patches of an image to ten classes by the mean of the tokens."""

    def __init__(self, width: int, depth: int, patch: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.blocks = nn.Sequential(*(Block(width, width // 64 or 1, affine=True, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.patches(x), "n c h w -> n (h w) c")
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class Residual(nn.Module):
    """Two 3 x 3 convolutions with batch norms, and what goes past them."""

    def __init__(self, last: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(last, channels, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2, self.past = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels), nn.Sequential()
        if stride > 1 or last != channels:
            self.past = nn.Sequential(nn.Conv2d(last, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + self.past(x))


def resnet_18(width: int = 64) -> nn.Module:
    """He et al. 2016 (arXiv:1512.03385), table 1, with ten classes."""
    first = (nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    inner, last = [], width
    for channels, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        inner += [Residual(last, channels, stride), Residual(channels, channels, 1)]
        last = channels
    return nn.Sequential(
        *first, nn.MaxPool2d(3, 2, 1), *inner, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10)
    )


@dataclass(frozen=True)
class Setting:
    """A model and the shape of its batch.

    Args:
        make: the model, with random weights.
        shape: of the inputs, the batch first; with a vocabulary that of the tokens.
        vocabulary: inputs are tokens below it, and so are the labels; 0 where inputs are numbers and classes are ten.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    vocabulary: int = 0

    def task(self) -> Task:
        """Model and batch, the same each time."""
        torch.manual_seed(0)
        model = self.make()
        if self.vocabulary:
            return Task(model, *torch.randint(self.vocabulary, (2, *self.shape)).unbind())
        return Task(model, torch.randn(self.shape), torch.randint(10, self.shape[:1]))


@dataclass(frozen=True, eq=False)
class Task:
    """A model with a batch of inputs and labels."""

    model: nn.Module
    inputs: Tensor
    labels: Tensor

    def loss(self, model: nn.Module) -> Tensor:
        """The mean cross entropy, with the graph."""
        return F.cross_entropy(model(self.inputs).flatten(0, -2), self.labels.flatten())


MODELS = {
    "mlp": Setting(perceptron, (512, 784)),
    "cnn": Setting(convolutional, (64, 3, 32, 32)),
    "transformer": Setting(Transformer, (16, 64, 48)),
}
SMALL = {
    "mlp": Setting(partial(perceptron, 32), (64, 784)),
    "cnn": Setting(partial(convolutional, 4), (16, 3, 8, 8)),
    "transformer": Setting(partial(Transformer, 16, 2, 2), (16, 8, 48)),
}
NETWORKS = {
    "resnet-18": Setting(resnet_18, (16, 3, 64, 64)),
    "gpt": Setting(partial(Gpt, 384, 6, 32768, 128), (4, 128), 32768),
    "vit-tiny": Setting(partial(VisionTransformer, 192, 12, 8), (16, 3, 64, 64)),
}
SMALL_NETWORKS = {
    "resnet-18": Setting(partial(resnet_18, 4), (4, 3, 32, 32)),
    "gpt": Setting(partial(Gpt, 16, 2, 512, 8), (2, 8), 512),
    "vit-tiny": Setting(partial(VisionTransformer, 16, 2, 8), (4, 3, 16, 16)),
}


def pairs(
    model: nn.Module, inputs: Tensor, labels: Tensor, *, without: Collection[str] = ()
) -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Of each linear layer and convolution the module, a without the bias, and g, [batch, positions, features].

    g is the gradient of the sum over terms of -log p(label).

    Args:
        without: names of layers that are left out.
    """
    seen: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = module, args[0].detach(), output

        return hook

    layers = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear | nn.Conv2d)}
    handles = [one.register_forward_hook(keep(name)) for name, one in layers.items() if name not in without]
    try:
        outputs = model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    loss = F.cross_entropy(outputs.flatten(0, -2), labels.flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, [output for _, _, output in seen.values()])
    found = zip(seen.items(), gradients, strict=True)
    return {name: (module, _inputs(module, a), _outputs(module, g)) for (name, (module, a, _)), g in found}


def _inputs(module: nn.Module, a: Tensor) -> Tensor:
    if isinstance(module, nn.Conv2d):
        patches = F.unfold(a, module.kernel_size, module.dilation, module.padding, module.stride)
        return rearrange(patches, "n d s -> n s d")
    return a.unsqueeze(1) if a.ndim == 2 else a


def _outputs(module: nn.Module, g: Tensor) -> Tensor:
    if isinstance(module, nn.Conv2d):
        return rearrange(g, "n d h w -> n (h w) d")
    return g.unsqueeze(1) if g.ndim == 2 else g


def square(rows: Tensor) -> Tensor:
    """The sum over batch and positions of the outer products, [features, features]."""
    flat = rows.flatten(0, 1)
    return flat.T @ flat


def limit(task: Task) -> list[Pair]:
    """A forward, a backward to all layers' outputs, and the plain products: what no plain library is faster than."""
    return [(square(a), square(g)) for _, a, g in pairs(task.model, task.inputs, task.labels).values()]


def with_bias(module: nn.Module, a: Tensor) -> Tensor:
    """One more feature, 1, where the layer has a bias."""
    return a if module.bias is None else torch.cat([a, torch.ones_like(a[..., :1])], -1)


def moments(model: nn.Module, inputs: Tensor, labels: Tensor, *, without: Collection[str] = ()) -> Mapping[str, Pair]:
    """A and G of each layer for these labels: A = mean of a a^T, G = (1/M) sum of g g^T, M their number."""
    found = pairs(model, inputs, labels, without=without)
    return {
        name: (square(with_bias(module, a)) / a[..., 0].numel(), square(g) / labels.numel())
        for name, (module, a, g) in found.items()
    }


def factored(A: Tensor, G: Tensor, gradient: Tensor, damping: float) -> Tensor:
    """(G + sqrt(damping) / pi I)^-1 V (A + pi sqrt(damping) I)^-1, pi^2 the ratio of the mean eigenvalues.

    A bias that is not in A has the left factor alone.
    """
    pi = (A.diagonal().mean() / G.diagonal().mean()).sqrt()
    root = damping**0.5
    A = A + pi * root * torch.eye(len(A), dtype=A.dtype)
    G = G + root / pi * torch.eye(len(G), dtype=G.dtype)
    A = torch.block_diag(A, torch.eye(gradient.shape[1] - len(A), dtype=A.dtype))
    return torch.linalg.solve(A, torch.linalg.solve(G, gradient).mT).mT
