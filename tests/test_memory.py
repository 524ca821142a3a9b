"""What a training step takes beside a plain one: factors, their inverses, and the work of a single layer."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond import costs
from kfac_cond.layers import sharing
from kfac_cond.linalg import inverse, patches

from .memory import Allocated

FACTORS, INVERSES = 2, 4
"""Steps between two captures, and between two refreshes: of steps 0 to 4 each kind is there, and a second refresh."""


class Block(nn.Module):
    """Attention by four linear layers, then two."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x)))
        return x + self.down(F.gelu(self.up(x)))


def perceptron() -> tuple[nn.Module, Tensor]:
    sizes = [100, 200, 200, 200, 200, 10]
    layers = [one for i, o in pairwise(sizes) for one in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), torch.randn(100, 100)


def convolutional() -> tuple[nn.Module, Tensor]:
    layers: list[nn.Module] = []
    for i, o, stride in ((3, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 1)):
        layers += [nn.Conv2d(i, o, 3, stride, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)), torch.randn(16, 3, 16, 16)


def transformer() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(20, 48), *(Block(48) for _ in range(4)), nn.Linear(48, 10)), torch.randn(4, 16, 20)


MODELS = {"mlp": perceptron, "cnn": convolutional, "transformer": transformer}


def peaks(model: nn.Module, x: Tensor, *, wrapped: bool) -> tuple[list[int], kc.KFAC | None]:
    """The most bytes that each of five steps had at a time, made in it or before."""
    criterion = nn.CrossEntropyLoss()
    y = torch.randint(10, x.shape[: x.dim() - 1 if x.dim() == 3 else 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    kfac, found = None, []
    if wrapped:
        kfac = kc.KFAC(model, criterion, damping=0.1, schedule=kc.Schedule(factors=FACTORS, inverses=INVERSES))
        kfac.attach(optimizer)
    with Allocated() as memory:
        for _ in range(5):
            memory.begin()
            optimizer.zero_grad()
            criterion(model(x).flatten(0, -2), y.flatten()).backward()
            optimizer.step()
            found.append(memory.most)
    return found, kfac


def sides(kfac: kc.KFAC) -> list[int]:
    """Bytes of all matrices A and G."""
    return [prod(shape) * layer.like.itemsize for layer in kfac.layers.values() for shape in layer.layout.side_shapes()]


@pytest.fixture(autouse=True)
def _one_layer_at_a_time(monkeypatch):
    """What is worked at together whatever its size is more than these small models have."""
    monkeypatch.setattr(costs, "AT_ONCE", {"cpu": 1})
    monkeypatch.setattr(sharing, "COPIED", {"cpu": 2**12})
    monkeypatch.setattr(patches, "MIN_ELEMENTS", 2**12)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_takes_factors_and_inverses_beside_a_plain_one_and_the_work_of_one_layer(name):
    model, x = MODELS[name]()
    plain, _ = peaks(model, x, wrapped=False)
    found, kfac = peaks(model, x, wrapped=True)
    assert kfac is not None
    matrices = sides(kfac)
    # The largest is worked at with one copy more.
    assert max(found) <= max(plain) + 2 * sum(matrices) + 2 * max(matrices)


def test_solving_at_every_step_takes_no_more_than_inverting(monkeypatch):
    monkeypatch.setattr(f"{__name__}.FACTORS", 1)
    monkeypatch.setattr(f"{__name__}.INVERSES", 1)
    solving, _ = peaks(*perceptron(), wrapped=True)
    monkeypatch.setattr(inverse, "SOLVES", {})
    inverting, _ = peaks(*perceptron(), wrapped=True)
    assert max(solving) <= max(inverting)


def test_of_what_is_symmetric_one_triangle_is_kept_between_steps():
    model, x = perceptron()
    _, kfac = peaks(model, x, wrapped=True)
    assert kfac is not None
    numbers = [prod(shape) for layer in kfac.layers.values() for shape in layer.layout.side_shapes()]
    d = [round(number**0.5) for number in numbers]
    average = kfac._shared.factors.average
    kept = sum(one.numel() for store in (average.A, average.G) for one in store.values())
    assert kept == sum(size * (size + 1) // 2 for size in d)
