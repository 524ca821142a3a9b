"""How long a step takes with refreshes all at once and staggered: the median, the 99th percentile, and their ratio.

    python examples/benchmarks/step_times.py [--steps N] [--width W] [--depth L] [--device cuda]

One perceptron in three copies, plain SGD and two K-FACs, that take their steps in turn in one process, so that whatever
else the machine does slows all three; on the CPU it is the process's own time that is counted, so that what others do
is not in it. The first period is left out.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import nn

import kfac_cond as kc

FACTORS, INVERSES = 10, 50


def network(width: int, depth: int) -> nn.Module:
    """Layers of one width, as in a transformer, between an input and an output."""
    inner = [module for _ in range(depth) for module in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), *inner, nn.Linear(width, 10))


def stepper(model: nn.Module, schedule: kc.Schedule | None, device: str) -> Callable[[], float]:
    """A function that takes one step and gives its seconds."""
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.01)
    if schedule is not None:
        kc.KFAC(model, criterion, damping=0.1, schedule=schedule, data=kc.Data(seed=0)).attach(optimizer)
    clock = time.process_time if device == "cpu" else time.perf_counter
    inputs = torch.randn(128, 64, device=device)
    labels = torch.randint(10, (128,), device=device)

    def step() -> float:
        start = clock()
        optimizer.zero_grad()
        criterion(model(inputs), labels).backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    return step


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = network(given.width, given.depth).to(given.device)
    schedules = {
        "plain SGD": None,
        "all at once": kc.Schedule(factors=FACTORS, inverses=INVERSES),
        "staggered": kc.Schedule(factors=FACTORS, inverses=INVERSES, stagger=True),
    }
    steppers = {name: stepper(copy.deepcopy(model), one, given.device) for name, one in schedules.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for index in range(INVERSES + given.steps):
        for name, step in steppers.items():
            taken = step()
            if index >= INVERSES:
                seconds[name].append(taken)
    print(f"{given.depth + 2} layers, {given.width} wide; factors every {FACTORS} steps, inverses every {INVERSES}")
    print(f"{'':12} {'mean ms':>8} {'median':>8} {'p99':>8} {'p99/median':>11}")
    for name, taken in seconds.items():
        ms = 1e3 * torch.tensor(taken, dtype=torch.float64)
        median, p99 = ms.quantile(0.5), ms.quantile(0.99)
        print(f"{name:12} {ms.mean():8.2f} {median:8.2f} {p99:8.2f} {p99 / median:11.2f}")


if __name__ == "__main__":
    main()
