"""How the cost of factors and of inversion grows with size, with fitted exponents; and whole networks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from speed_checks import compare, doubled
from speed_jobs import NEVER, Run, estimated, plain, preconditioned, sgd
from speed_models import NETWORKS, SMALL_NETWORKS, Gpt, Setting, convolutional, moments, perceptron
from speed_times import SHARES, quantile, timed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kfac_cond.tables import fitted, in_bytes

ROUNDS = 5
SLACK = 0.25
"""That a fitted exponent may be above what it should be."""
LARGEST_SIDE = 8192
"""Sides of blocks above it are kept as diagonals in whole networks, so that a head over a vocabulary has no square."""


@dataclass(frozen=True)
class Sweep:
    """One quantity along one size.

    Args:
        size: what it is called.
        quantity: 'factors', or 'inversion', of which the same step without it is subtracted.
        at: the sizes.
        setting: for a size.
        most: the exponent that it should not be above.
    """

    size: str
    quantity: str
    at: tuple[int, ...]
    setting: Callable[[int], Setting]
    most: float


@dataclass(frozen=True)
class Swept:
    """A sweep's numbers: milliseconds at each size that was within the budget, and the exponent fitted to them.

    ``plain`` is the exponent of a forward and backward in the same rounds, of what the machine itself does with size.
    """

    size: str
    quantity: str
    sizes: list[int]
    milliseconds: list[float]
    exponent: float
    plain: float
    most: float
    left_out: list[int]


def _perceptron(width: int, depth: int, batch: int) -> Setting:
    return Setting(partial(perceptron, width, depth), (batch, 784))


WIDTHS, BATCHES, DEPTHS = (256, 512, 1024, 2048, 4096), (64, 256, 1024, 4096, 16384), (2, 4, 8, 16, 32)
SIDES, WORDS = (8, 16, 32, 64, 128), (2048, 8192, 32768, 131072)


def planned(*, small: bool) -> list[Sweep]:
    """All sweeps; small ones of three sizes, for a quick look."""

    def at(sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(one // 4 or 1 for one in sizes[:3]) if small else sizes

    width, batch = partial(_perceptron, depth=2, batch=128), partial(_perceptron, 256, 2)
    return [
        Sweep("width", "factors", at(WIDTHS), width, 2.0),
        Sweep("width", "inversion", at(WIDTHS), width, 3.0),
        Sweep("batch", "factors", at(BATCHES), batch, 1.0),
        Sweep("depth", "factors", DEPTHS[:3] if small else DEPTHS, partial(_perceptron, 256, batch=128), 1.0),
        # In pixels it is linear, so that in the side it is quadratic.
        Sweep("image side", "factors", SIDES[:3] if small else SIDES, images, 2.0),
        Sweep("vocabulary", "factors", at(WORDS), words, 1.0),
    ]


def images(side: int) -> Setting:
    """Convolutions over images of a side."""
    return Setting(partial(convolutional, 16), (16, 3, side, side))


def words(vocabulary: int) -> Setting:
    """A language model of one layer."""
    return Setting(partial(Gpt, 64, 1, vocabulary, 32), (4, 32), vocabulary)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log seconds over log size by least squares, over the larger half of the sizes.

    At small sizes what costs the same at every size hides how the rest grows.
    """
    some = min(len(sizes), max(2, math.ceil(len(sizes) / 2)))
    if some < 2:
        return math.nan
    x, y = (torch.tensor(one[-some:], dtype=torch.float64).log() for one in (sizes, seconds))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / x.square().sum())


def swept(one: Sweep, *, budget: float) -> Swept:
    """A sweep's numbers; what a size would take is judged from the one before by the exponent it should have."""
    sizes: list[int] = []
    found: list[float] = []
    plainly: list[float] = []
    began, left_out = time.monotonic(), list(one.at)
    for size in one.at:
        once = (found[-1] + plainly[-1]) * (size / sizes[-1]) ** one.most if sizes else 0.0
        if time.monotonic() - began + (1 + ROUNDS) * once > budget:
            break
        seconds, beside = seconds_of(one.quantity, one.setting(size))
        found.append(seconds)
        plainly.append(beside)
        sizes.append(left_out.pop(0))
    slopes = exponent(sizes, found), exponent(sizes, plainly)
    return Swept(one.size, one.quantity, sizes, [1e3 * seconds for seconds in found], *slopes, one.most, left_out)


def seconds_of(quantity: str, setting: Setting) -> tuple[float, float]:
    """The medians of one quantity, and of a forward and backward."""
    task = setting.task()
    rules = sides(setting)
    runs = {"plain": plain(task, None)}
    if quantity == "factors":
        runs |= {"with": estimated(task, None, rules)}
    else:
        often = {"with": (1, 1), "without": (1, NEVER)}
        runs |= {name: preconditioned(*one, task, None, rules) for name, one in often.items()}
    seconds, _ = timed(runs, ROUNDS, warm=1, budget=math.inf)
    without = seconds.get("without", [0.0] * ROUNDS)
    difference = [one - other for one, other in zip(seconds["with"], without, strict=True)]
    return max(quantile(difference, 0.5), 1e-9), quantile(seconds["plain"], 0.5)


def sides(setting: Setting) -> Any:
    """The rule by which large sides are diagonals; of a vocabulary all that it spans, whatever its size."""
    if setting.vocabulary:
        return {"*": {"max_factor_dim": min(LARGEST_SIDE, setting.vocabulary - 1)}}
    return None


def sweeps(*, small: bool, budget: float) -> list[Swept]:
    """All of them, printed one by one."""
    found = []
    print("\nhow cost grows: milliseconds at each size, and the exponent fitted to the larger half of the sizes")
    for one in planned(small=small):
        found.append(swept(one, budget=budget))
        print(fitted(said(found[-1])), flush=True)
    return found


def said(one: Swept) -> str:
    """A line."""
    numbers = ", ".join(f"{size}: {ms:.3g}" for size, ms in zip(one.sizes, one.milliseconds, strict=True))
    verdict = " ABOVE IT" if one.exponent > max(one.most, one.plain) + SLACK else ""
    left = f"; left out to stay within the budget: {', '.join(map(str, one.left_out))}" if one.left_out else ""
    expected = f"at most {one.most:g} or that of a forward and backward, {one.plain:.2f}"
    return f"{one.quantity} by {one.size}: exponent {one.exponent:.2f}, {expected}{verdict} ({numbers}{left})"


# -- whole networks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A network with this library alone.

    Args:
        plain: milliseconds of a forward and backward.
        factors: of one batch, as a ratio to that.
        training: a step on average, with factors and inverses at their periods, as a ratio to one of SGD.
        largest: bytes of the largest tensor that factors or a refresh make.
        square: bytes of a square over the vocabulary; 0 without one.
        rounds: that were within the budget.
    """

    name: str
    parameters: int
    plain: float
    factors: float
    training: float
    largest: int
    square: int
    rounds: int


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [one.untyped_storage().nbytes() for one in tree_leaves(made) if isinstance(one, Tensor)]
        self.bytes = max(self.bytes, *sizes, 0)
        return made


def line(name: str, setting: Setting, *, repeats: int, budget: float) -> Line:
    """A network's numbers, after its factors are compared with the plain formula in float64."""
    task, rules = setting.task(), sides(setting)
    with torch.no_grad():
        drawn = torch.distributions.Categorical(logits=task.model(task.inputs)).sample()
    agree(task, drawn, rules)
    often = {"between": (NEVER, NEVER), "capture": (1, NEVER), "refresh": (1, 1)}
    runs: dict[str, Run] = {"plain": plain(task, None), "factors": estimated(task, None, rules), "SGD": sgd(task, None)}
    runs |= {kind: preconditioned(*one, task, None, rules) for kind, one in often.items()}
    with Largest() as largest:
        runs["factors"].go()
        runs["refresh"].go()
    seconds, failed = timed(runs, repeats, warm=1, budget=budget)
    if failed:
        raise RuntimeError(f"{name}: {failed}")
    middle = {word: quantile(values, 0.5) for word, values in seconds.items()}
    return Line(
        name,
        sum(p.numel() for p in task.model.parameters()),
        1e3 * middle["plain"],
        middle["factors"] / middle["plain"],
        sum(share * middle[kind] for kind, share in SHARES.items()) / middle["SGD"],
        largest.bytes,
        4 * setting.vocabulary**2,
        len(seconds["plain"]),
    )


def agree(task: Any, drawn: Tensor, rules: Any) -> None:
    """Compare all layers whose blocks are two dense factors with the plain formula for the same labels."""
    run = estimated(task, drawn, rules)
    run.go()
    found = run.factors() if run.factors else {}
    reference = doubled(task)
    without = [] if rules is None else ["head"]
    expected = moments(reference.model, reference.inputs, drawn, without=without)
    compare({name: found[name] for name in expected}, expected)


def lines(*, small: bool, repeats: int, budget: float) -> list[Line]:
    """All networks, printed one by one."""
    print("\nwhole networks: factors as a ratio to a forward and backward, training at its periods as a ratio to SGD")
    found = []
    for name, setting in (SMALL_NETWORKS if small else NETWORKS).items():
        one = line(name, setting, repeats=repeats, budget=budget)
        found.append(one)
        parts = (
            f"{name}: {one.parameters:,} parameters, forward and backward {one.plain:.0f} ms",
            f"factors {one.factors:.2f}, training {one.training:.2f} ({one.rounds} of {repeats} rounds)",
            f"largest tensor {in_bytes(one.largest)}",
            *([f"a square over the vocabulary would be {in_bytes(one.square)}"] if one.square else []),
        )
        text = "; ".join(parts)
        print(fitted(text), flush=True)
    return found
