"""The problems of ``convergence.py``: what is trained, how long, and by which number optimizers are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import convergence_contenders  # noqa: F401  # it finds the examples
from example_tasks import Size, Task, autoencoder, classifier, language_model


@dataclass(frozen=True)
class Problem:
    """A task with the length of its runs.

    Args:
        make: of where images come from the task.
        quantity: of a curve, by whose final value settings are chosen and which is compared.
        steps: of a run.
        every: steps between two evaluations.
        references: whose value, at which step (None for the last), the others are to reach.
        schedule: of the learning rates, for all optimizers that have one.
    """

    make: Callable[[str], Task]
    quantity: str
    steps: int
    every: int
    references: tuple[tuple[str, int | None], ...]
    schedule: str = "constant"


PROBLEMS = {
    "autoencoder": Problem(
        autoencoder,
        "train_loss",
        500,
        10,
        (("adam", None), ("kfac-pytorch", None), ("soap", None), ("muon", 200), ("muon", 425)),
    ),
    "language_model": Problem(
        lambda source: language_model(Size(context=128, width=128, heads=4, blocks=4, batch=32)),
        "held_out_loss",
        600,
        15,
        (("adamw", None),),
        schedule="cosine",
    ),
    "classifier": Problem(
        lambda source: classifier(source, most=2000),
        "held_out_accuracy",
        300,
        10,
        (("adamw", None),),
        schedule="cosine",
    ),
}

SMALL = {
    "autoencoder": replace(
        PROBLEMS["autoencoder"],
        make=lambda source: autoencoder(source, widths=(784, 64, 16), most=500),
        steps=20,
        every=5,
    ),
    "language_model": replace(
        PROBLEMS["language_model"],
        make=lambda source: language_model(Size(16, 32, 2, 1, 8), text=300_000, most=32),
        steps=20,
        every=5,
    ),
    "classifier": replace(
        PROBLEMS["classifier"], make=lambda source: classifier(source, width=4, batch=32, most=200), steps=20, every=5
    ),
}
