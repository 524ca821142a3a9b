"""What the demo trains: two tasks on scikit-learn's digits, three optimizers, and their tuned settings in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import kfac_cond as kc

Loss = Callable[[Tensor, Tensor], Tensor]

# -- data --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Inputs and targets to train on, and others to test on.

    Args:
        train: inputs (N, 64), pixels scaled to [0, 1], and targets: the inputs themselves, or labels (N,) from 0 to 9.
        test: likewise.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits() -> tuple[Tensor, Tensor]:
    """1797 handwritten digits of 8x8 pixels that scikit-learn ships, in an order fixed once: (images, labels)."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(2026))
    pixels = torch.tensor(images / 16.0, dtype=torch.get_default_dtype())
    return pixels[order], torch.tensor(labels, dtype=torch.int64)[order]


def split(*, reconstruct: bool, tuning: bool = False) -> Split:
    """Four fifths of the digits to train on and one fifth to test on, the same for every seed.

    Args:
        reconstruct: targets are the images themselves, not the labels.
        tuning: split the training images once more and leave the test images alone.
    """
    images, labels = digits()
    targets = images if reconstruct else labels
    end = 4 * len(images) // 5 if tuning else len(images)
    cut = 4 * end // 5
    return Split((images[:cut], targets[:cut]), (images[cut:end], targets[cut:end]))


def batches(examples: int, size: int, *, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices of ``steps`` batches: epochs in an order that depends on the seed alone, the ragged last batch left out.

    Args:
        examples: how many there are to draw from.
        size: of a batch.
        steps: how many batches.
        seed: of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    given = 0
    while True:
        for indices in torch.randperm(examples, generator=generator).split(size):
            if given == steps:
                return
            if len(indices) == min(size, examples):
                given += 1
                yield indices


# -- tasks -------------------------------------------------------------------------------------------------------------


def reconstruction_loss(logits: Tensor, images: Tensor) -> Tensor:
    """-log p(images | logits) in nats: cross-entropy summed over the pixels of an image, averaged over images."""
    return F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)


def autoencoder() -> nn.Module:
    """64-128-64-32-8-32-64-128-64 with tanh, linear at the code and at the output, Glorot initialisation."""
    widths = (64, 128, 64, 32, 8, 32, 64, 128, 64)
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(inputs, outputs))
        if i not in (len(widths) // 2 - 1, len(widths) - 2):
            layers.append(nn.Tanh())
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def classifier() -> nn.Module:
    """A small convolutional network: two convolutions of 16 and 32 channels, one hidden layer of 64."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


@dataclass(frozen=True)
class Problem:
    """What one run needs: a fresh model, its loss, and the likelihood that says so to K-FAC.

    ``likelihood`` is what a user would pass to ``kc.KFAC``: the criterion module itself where the loop calls one, a
    likelihood where the loss is a function.
    """

    model: nn.Module
    loss: Loss
    likelihood: kc.Likelihood | nn.Module


def autoencoder_problem() -> Problem:
    """Autoencoder, a functional loss, and the likelihood to match: the 64 pixels of an image are one term."""
    return Problem(autoencoder(), reconstruction_loss, kc.Bernoulli())


def classifier_problem() -> Problem:
    """Classifier and the criterion that the training loop calls."""
    criterion = nn.CrossEntropyLoss()
    return Problem(classifier(), criterion, criterion)


# -- optimizers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum."""

    lr: float
    momentum: float = 0.9

    def build(self, problem: Problem) -> Optimizer:
        """The optimizer of a problem's model."""
        return torch.optim.SGD(problem.model.parameters(), lr=self.lr, momentum=self.momentum)


@dataclass(frozen=True)
class Adam:
    """Adam."""

    lr: float
    beta2: float = 0.999

    def build(self, problem: Problem) -> Optimizer:
        """The optimizer of a problem's model."""
        return torch.optim.Adam(problem.model.parameters(), lr=self.lr, betas=(0.9, self.beta2))


@dataclass(frozen=True)
class SGDWithKFAC:
    """The same SGD with momentum, on gradients that K-FAC preconditions."""

    lr: float
    damping: float
    momentum: float = 0.9
    max_kl: float = 0.003
    factors: int = 2
    inverses: int = 20
    decay: float = 0.95

    def build(self, problem: Problem) -> Optimizer:
        """The optimizer of a problem's model, with K-FAC attached."""
        optimizer = torch.optim.SGD(problem.model.parameters(), lr=self.lr, momentum=self.momentum)
        schedule = kc.Schedule(factors=self.factors, inverses=self.inverses, decay=self.decay, warmup=20)
        kfac = kc.KFAC(
            problem.model,
            problem.likelihood,
            damping=self.damping,
            schedule=schedule,
            trust_region=kc.KLClip(self.max_kl),
        )
        kfac.attach(optimizer)
        return optimizer


Settings = SGD | Adam | SGDWithKFAC

# -- tuned settings: the one place -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A task with the settings of each optimizer.

    Args:
        name: on the command line.
        title: for people.
        problem: builds a fresh model with its loss.
        reconstruct: the targets are the inputs.
        batch_size: examples a step.
        steps: of a run, by default.
        evaluate_every: steps between two evaluations on the full training and test sets.
        settings: by optimizer, tuned for ``steps``.
    """

    name: str
    title: str
    problem: Callable[[], Problem]
    reconstruct: bool
    batch_size: int
    steps: int
    evaluate_every: int
    settings: Mapping[str, Settings]


OPTIMIZERS = ("SGD", "Adam", "SGD + K-FAC")

#: Tried for each task by ``python examples/demo_tune.py``, twelve settings each; what is not named has its default. The
#: best of them is in TASKS. K-FAC's rate ends at 1, the whole step of the damped quadratic model.
GRID: dict[str, tuple[Settings, ...]] = {
    "SGD": tuple(SGD(lr, momentum) for lr in (0.02, 0.03, 0.05, 0.1, 0.2, 0.3) for momentum in (0.9, 0.95)),
    "Adam": tuple(Adam(lr, beta2) for lr in (0.001, 0.003, 0.005, 0.01, 0.02, 0.03) for beta2 in (0.99, 0.999)),
    "SGD + K-FAC": tuple(SGDWithKFAC(lr, damping) for lr in (0.03, 0.1, 0.3, 1.0) for damping in (0.1, 0.3, 1.0)),
}

TASKS = {
    task.name: task
    for task in (
        Task(
            name="autoencoder",
            title="Deep autoencoder, Bernoulli likelihood",
            problem=autoencoder_problem,
            reconstruct=True,
            batch_size=256,
            steps=800,
            evaluate_every=10,
            settings={"SGD": SGD(0.03), "Adam": Adam(0.005, beta2=0.99), "SGD + K-FAC": SGDWithKFAC(0.1, 0.3)},
        ),
        Task(
            name="classifier",
            title="Convolutional classifier, categorical likelihood",
            problem=classifier_problem,
            reconstruct=False,
            batch_size=128,
            steps=300,
            evaluate_every=5,
            settings={"SGD": SGD(0.2), "Adam": Adam(0.02), "SGD + K-FAC": SGDWithKFAC(1.0, 1.0)},
        ),
    )
}
