"""Where to start: a grid of learning rates and dampings on four small tasks, and the part of it that works.

    python examples/benchmarks/starting_values.py [--steps N]

SGD with momentum 0.9 under K-FAC with ``Schedule(warmup=100)`` and ``KLClip(1e-2)``. A cell is the last training loss
(mean over the last batches), a star marks what ends within a tenth of the best of its task's way down.
``docs/training.md`` quotes the tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_cond as kc

sys.path.insert(0, str(Path(__file__).parent.parent))
from demo_tasks import autoencoder, classifier, digits, reconstruction_loss

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class Task:
    """A model, its loss, the likelihood that says so, and what to train on."""

    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    likelihood: kc.Likelihood
    inputs: Tensor
    targets: Tensor
    batch: int


class CharacterModel(nn.Module):
    """A one-layer causal transformer on bytes, built of linear layers."""

    def __init__(self, width: int = 64, context: int = 32) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(128, width), nn.Embedding(context, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T) to logits (N, T, 128)."""
        h = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        q, k, v = self.qkv(F.layer_norm(h, h.shape[-1:])).unflatten(-1, (3, 4, -1)).movedim(-3, 0).transpose(-3, -2)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-3, -2).flatten(-2))
        h = h + self.down(F.gelu(self.up(F.layer_norm(h, h.shape[-1:]))))
        logits: Tensor = self.head(F.layer_norm(h, h.shape[-1:]))
        return logits


def tasks() -> Iterator[Task]:
    """The four of them, smallest data first."""
    images, labels = digits()
    yield Task("autoencoder, summed over pixels", autoencoder, reconstruction_loss, kc.Bernoulli(), images, images, 256)
    yield Task("classifier", classifier, F.cross_entropy, kc.Categorical(), images, labels, 128)
    x, y = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True, scaled=True))
    x, y = x / x.std(0), ((y - y.mean()) / y.std())[:, None]
    squared = kc.Gaussian(0.5, event_dims=())
    yield Task("regression, mean squared error", regressor, F.mse_loss, squared, x, y, 128)
    text = Path(argparse.__file__).read_bytes()
    windows = torch.tensor([byte if byte < 128 else 0 for byte in text]).unfold(0, 33, 17)
    yield Task("language model", CharacterModel, token_loss, kc.Categorical(), windows[:, :-1], windows[:, 1:], 64)


def regressor() -> nn.Module:
    """Ten features to one number."""
    return nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy over all positions."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def final_loss(task: Task, *, rate: float, damping: float, steps: int) -> tuple[float, float]:
    """(first, last) training loss of one run; the last is a mean over the last eighth."""
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    kfac = kc.KFAC(
        model,
        task.likelihood,
        damping=damping,
        schedule=kc.Schedule(warmup=100),
        trust_region=kc.KLClip(1e-2),
        data=kc.Data(seed=0),
    )
    kfac.attach(optimizer)
    losses = []
    for _step in range(steps):
        rows = torch.randint(len(task.inputs), (task.batch,))
        optimizer.zero_grad()
        loss = task.loss(model(task.inputs[rows]), task.targets[rows])
        loss.backward()
        try:
            optimizer.step()
        except kc.NumericalError:
            return losses[0] if losses else loss.item(), float("nan")
        losses.append(loss.item())
    return losses[0], sum(losses[-steps // 8 :]) / len(losses[-steps // 8 :])


def main() -> None:
    """Print a table a task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="steps of each run")
    steps = parser.parse_args().steps
    for task in tasks():
        found = {(r, d): final_loss(task, rate=r, damping=d, steps=steps) for d in DAMPINGS for r in RATES}
        first = next(iter(found.values()))[0]
        best = min(last for _, last in found.values() if last == last)
        print(f"\n{task.name}: from {first:.4g}, best {best:.4g} after {steps} steps")
        print("damping \\ rate" + "".join(f"{rate:>11g}" for rate in RATES))
        for damping in DAMPINGS:
            cells = [found[rate, damping][1] for rate in RATES]
            marks = ["*" if last <= best + 0.1 * (first - best) else " " for last in cells]
            print(f"{damping:>14g}" + "".join(f"{last:>10.4g}{mark}" for last, mark in zip(cells, marks, strict=True)))


if __name__ == "__main__":
    main()
