"""The three tasks of the examples: an autoencoder, a classifier of images, a language model on bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from einops import rearrange
from example_data import Data, Examples, Text, images, library
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_cond as kc

BYTES = 256


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and by which loss.

    Args:
        name: a word, for files.
        title: for people.
        model: a fresh one, its weights from torch's generator.
        loss: of outputs and targets, averaged over terms.
        likelihood: that says so.
        data: to train on and to hold out.
        batch: examples of a step.
        l2: eta of the penalty eta / 2 |theta|^2 that is trained on with the loss; reported losses are without it.
        classes: targets are classes of an example, so that there is an accuracy.
    """

    name: str
    title: str
    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    likelihood: kc.Likelihood
    data: Data
    batch: int
    l2: float = 0.0
    classes: bool = False

    @torch.no_grad()
    def measured(self, model: nn.Module, split: str, device: torch.device) -> dict[str, float]:
        """The loss, and the accuracy of a classifier, over what a split is evaluated on."""
        sums, training = torch.zeros(3, dtype=torch.float64), model.training
        model.eval()
        for inputs, targets in self.data.parts(split):
            outputs, targets = model(inputs.to(device)), targets.to(device)
            right = (outputs.argmax(-1) == targets).sum().item() if self.classes else 0
            sums += torch.tensor([self.loss(outputs, targets).item() * len(inputs), right, len(inputs)])
        model.train(training)
        loss, right, count = sums.tolist()
        return {"loss": loss / count, **({"accuracy": right / count} if self.classes else {})}


# -- autoencoder -------------------------------------------------------------------------------------------------------

WIDTHS = (784, 1000, 500, 250, 30)
"""Of the encoder; the decoder has them the other way round."""


def autoencoder(source: str, *, widths: Sequence[int] = WIDTHS, batch: int = 500, most: int = 10_000) -> Task:
    """The deep autoencoder on images: 'curves', 'digits' or 'mnist:PATH'."""
    found = {name: inputs.flatten(1) for name, (inputs, _) in images(source).items()}
    return Task(
        name="autoencoder",
        title=f"Autoencoder {'-'.join(map(str, (*widths, *widths[-2::-1])))} on {source.partition(':')[0]}",
        model=lambda: encoder_and_decoder(widths),
        loss=reconstruction_loss,
        likelihood=kc.Bernoulli(),
        data=Examples({name: (one, one) for name, one in found.items()}, most),
        batch=batch,
        l2=1e-5,
    )


def encoder_and_decoder(widths: Sequence[int]) -> nn.Module:
    """Layers with tanh between, linear at the code and at the end; weights N(0, 1 / inputs), biases zero.

    Source: Hinton & Salakhutdinov 2006; Martens & Grosse 2015, section 13, for tanh.
    """
    sizes, layers = (*widths, *widths[-2::-1]), list[nn.Module]()
    for place, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
        layers.append(nn.Linear(inputs, outputs))
        nn.init.normal_(layers[-1].weight, std=inputs**-0.5)
        nn.init.zeros_(layers[-1].bias)
        if place not in (len(widths) - 1, len(sizes) - 1):
            layers.append(nn.Tanh())
    return nn.Sequential(*layers)


def reconstruction_loss(logits: Tensor, pixels: Tensor) -> Tensor:
    """-log p(pixels | logits): cross-entropy summed over the pixels of an image, averaged over images."""
    return F.binary_cross_entropy_with_logits(logits, pixels, reduction="sum") / len(pixels)


# -- classifier --------------------------------------------------------------------------------------------------------


def classifier(source: str, *, width: int = 32, batch: int = 128, most: int = 10_000) -> Task:
    """A convolutional network on digits padded to 32 x 32: 'digits' or 'mnist:PATH'."""
    if source == "curves":
        raise SystemExit("--data curves has no classes: --data digits, or mnist:PATH")
    padded = {name: (F.pad(inputs, (2, 2, 2, 2))[:, None], labels) for name, (inputs, labels) in images(source).items()}
    return Task(
        name="classifier",
        title=f"Convolutional network, {width} channels and more, on {source.partition(':')[0]}",
        model=lambda: convolutional(width),
        loss=nn.functional.cross_entropy,
        likelihood=kc.Categorical(),
        data=Examples(padded, most),
        batch=batch,
        classes=True,
    )


def convolutional(width: int = 32, channels: int = 1) -> nn.Module:
    """Five 3 x 3 convolutions, two of them with stride 2, and a linear layer over the mean of the pixels."""
    layers, last = list[nn.Module](), channels
    for times, stride in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2)):
        layers += [nn.Conv2d(last, times * width, 3, stride=stride, padding=1), nn.ReLU()]
        last = times * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10))


# -- language model ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Of a language model and its batches.

    Args:
        context: bytes that a prediction may look back on.
        width: of the residual stream.
        heads: of each attention.
        blocks: of the transformer.
        batch: windows of one step, over all ranks.
    """

    context: int = 64
    width: int = 64
    heads: int = 4
    blocks: int = 2
    batch: int = 32


def language_model(size: Size | None = None, *, text: int = 8_000_000, most: int = 256) -> Task:
    """A transformer on the first so many bytes of the sources of Python's standard library."""
    size = size or Size()
    return Task(
        name="language_model",
        title=f"Transformer of {size.blocks} layers, {size.width} wide, on Python's standard library",
        model=lambda: ByteModel(size),
        loss=token_loss,
        likelihood=kc.Categorical(),
        data=Text(library(text), size.context, most),
        batch=size.batch,
    )


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over all positions; in float32 also under autocast."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Block(nn.Module):
    """Causal attention and a perceptron, each normalised before and added."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.norm_attention, self.norm_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm_attention(x)), "n t (three h d) -> three n h t d", three=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(rearrange(mixed, "n h t d -> n t (h d)"))
        return x + self.down(F.gelu(self.up(self.norm_perceptron(x))))


class ByteModel(nn.Module):
    """Logits of the next byte at each position, (batch, context, 256)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.byte, self.position = nn.Embedding(BYTES, size.width), nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.blocks)))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, BYTES)
        nn.init.normal_(self.byte.weight, std=0.1)
        nn.init.normal_(self.position.weight, std=0.1)

    def forward(self, text: Tensor) -> Tensor:
        places = torch.arange(text.shape[1], device=text.device).expand_as(text)
        return self.head(self.norm(self.blocks(self.byte(text) + self.position(places))))


def cosine(steps: int) -> Callable[[int], float]:
    """The factor on the learning rate at each step, from 1 to 0: the same schedule for every optimizer."""
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))
