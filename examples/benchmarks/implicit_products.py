"""What a product with the exact Fisher costs: `kc.implicit` against a gradient of the same loss on the same batch.

    python examples/benchmarks/implicit_products.py [--repeats N]

One line a model: milliseconds of each, the median over repeats, and their ratio. ``docs/algebra.md`` quotes it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

import kfac_cond as kc


def mlp() -> tuple[nn.Module, Tensor]:
    """Three layers, 512 wide, on 256 examples."""
    layers = [nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers), torch.randn(256, 512)


def convolutional() -> tuple[nn.Module, Tensor]:
    """Two convolutions on 64 images of 28 x 28."""
    first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
    layers = [first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32 * 49, 10)), torch.randn(64, 1, 28, 28)


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """The median time of one call, after one that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        start = perf_counter()
        function()
        times.append(perf_counter() - start)
    return 1e3 * median(times)


def main() -> None:
    """Time both models and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    for make in (mlp, convolutional):
        model, inputs = make()
        labels = torch.randint(10, (len(inputs),))
        parameters = list(model.parameters())
        fisher = kc.implicit(model, [inputs], "categorical")
        v = torch.randn(fisher.shape[0])

        def gradient(model=model, inputs=inputs, labels=labels, parameters=parameters) -> object:
            return torch.autograd.grad(nn.functional.cross_entropy(model(inputs), labels), parameters)

        plain = milliseconds(gradient, repeats)
        product = milliseconds(lambda fisher=fisher, v=v: fisher @ v, repeats)
        print(f"{make.__name__:<14} gradient {plain:7.2f} ms   product {product:7.2f} ms   ratio {product / plain:.2f}")


if __name__ == "__main__":
    main()
