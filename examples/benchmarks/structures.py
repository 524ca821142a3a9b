"""What each structure costs: time of an estimate beside that of plain forwards and backwards, and what is stored.

    python examples/benchmarks/structures.py [--examples N] [--device cuda]

A perceptron on vectors and a small convolutional network, float32, one label draw. The time is the best of three. The
baseline is a forward and a backward with weight gradients over the same batches.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_cond as kc

STRUCTURES = ("kfac", "ekfac", "ekfac, second pass", "tkfac", "kpsvd", "diagonal")


def perceptron() -> tuple[nn.Module, tuple[int, ...]]:
    """784-256-256-10."""
    layers = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers), (784,)


def convolutions() -> tuple[nn.Module, tuple[int, ...]]:
    """Three convolutions on 3 x 16 x 16, pooled."""
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(32, 32, 3, padding=1), nn.Flatten(), nn.Linear(2048, 10)), (3, 16, 16)


def seconds(run: Callable[[], object], device: str) -> float:
    """The best of three, after one to warm up."""
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def stored(fisher: kc.Fisher) -> int:
    """Numbers held by the blocks."""
    return sum(x.numel() for block in fisher.values() for x in vars(block).values() if isinstance(x, Tensor))


def plain(model: nn.Module, batches: list[Tensor]) -> None:
    """A forward and a backward over the batches."""
    for batch in batches:
        outputs = model(batch)
        F.cross_entropy(outputs, outputs.argmax(-1)).backward()


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    for make in (perceptron, convolutions):
        torch.manual_seed(0)
        model, shape = make()
        model = model.to(given.device)
        batches = list(torch.randn(given.examples, *shape, device=given.device).split(128))
        base = seconds(lambda model=model, batches=batches: plain(model, batches), given.device)
        print(f"\n{make.__name__}: {given.examples} examples, forward and backward {base * 1e3:.0f} ms")
        print(f"{'structure':20} {'ms':>8} {'x plain':>8} {'numbers stored':>15}")
        for word in STRUCTURES:
            structure = kc.Structure(word.split(",")[0], second_pass="second" in word)

            def run(
                structure: kc.Structure = structure, model: nn.Module = model, data: list[Tensor] = batches
            ) -> kc.Fisher:
                return kc.estimate(model, data, "categorical", structure=structure, options=kc.Options(progress=False))

            took = seconds(run, given.device)
            print(f"{word:20} {took * 1e3:8.0f} {took / base:8.1f} {stored(run()):15,}")


if __name__ == "__main__":
    main()
