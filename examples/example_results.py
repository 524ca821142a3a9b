"""What runs leave: curves, a JSON file, and a picture of loss against steps and against seconds."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch

import kfac_cond as kc

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass
class Curve:
    """Losses against steps, and against seconds of training: evaluations and checkpoints are not counted.

    Args:
        steps: at which they were measured.
        seconds: of training until then.
        train_loss: over what the training set is evaluated on.
        held_out_loss: likewise of what is held out.
        train_accuracy: of a classifier.
        held_out_accuracy: of a classifier.
    """

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    held_out_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    held_out_accuracy: list[float] = field(default_factory=list)

    def record(self, step: int, seconds: float, found: Mapping[str, Mapping[str, float]]) -> None:
        """Add what was measured, by split and quantity."""
        self.steps.append(step)
        self.seconds.append(seconds)
        for split, numbers in found.items():
            for name, value in numbers.items():
                getattr(self, f"{split}_{name}").append(value)

    def first(self, quantity: str, target: float) -> int | None:
        """Where it first was as good as the target: a loss at or below it, an accuracy at or above."""
        sign = -1 if quantity.endswith("accuracy") else 1
        return next((at for at, value in enumerate(getattr(self, quantity)) if sign * value <= sign * target), None)

    def within(self, seconds: float) -> float | None:
        """The last held-out loss that was measured within so many seconds."""
        found = zip(self.seconds, self.held_out_loss, strict=True)
        return next((loss for at, loss in reversed(list(found)) if at <= seconds), None)


def final(values: Sequence[float]) -> float:
    """The mean over the last twentieth of the evaluations, at least the last one."""
    return mean(values[-max(1, len(values) // 20) :])


# -- JSON --------------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "versions": {"kfac-cond": kc.__version__, "python": platform.python_version(), "torch": torch.__version__},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write whole or not at all; what is not finite becomes null, for JSON has no word for it."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def finite(value: Any) -> Any:
    """The same with None in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- picture -----------------------------------------------------------------------------------------------------------


def save_picture(path: Path, panels: Mapping[str, Mapping[str, Sequence[Curve]]]) -> bool:
    """Loss against steps and against seconds, a row for each title, a line for each name; False without matplotlib.

    Args:
        path: of the PNG.
        panels: by title and name the curves of one or more seeds.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    # A Figure of its own, not pyplot: no display is needed and nothing global changes.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.8 + 3.7 * len(panels)), dpi=130, layout="constrained")
    rows = figure.subplots(len(panels), 2, squeeze=False, sharey="row")
    names = list(dict.fromkeys(name for by_name in panels.values() for name in by_name))
    colours = {name: f"C{place % 10}" for place, name in enumerate(names)}
    for axes, (title, by_name) in zip(rows, panels.items(), strict=True):
        for one, against in zip(axes, ("steps", "seconds"), strict=True):
            for name, curves in by_name.items():
                _draw(one, curves, against, name, colours[name])
            style(one, top=_top(by_name))
            one.set_xlabel("steps" if against == "steps" else "seconds of training, evaluation excluded")
        axes[0].set_title(title, loc="left", fontsize=10, fontweight="bold")
        axes[0].set_ylabel("loss: train, held out dotted", fontsize=9)
    handles = {text: line for one in rows[:, 0] for line, text in zip(*one.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=6, frameon=False, fontsize=8)
    figure.savefig(path)
    return True


def _draw(axes: Axes, curves: Sequence[Curve], against: str, name: str, colour: str) -> None:
    """The mean over seeds, the range of the training loss around it."""
    x = means([getattr(one, against) for one in curves])
    train = [one.train_loss for one in curves]
    axes.plot(x, means(train), color=colour, linewidth=1.6, label=name)
    low, high = [min(some) for some in zip(*train, strict=False)], [max(some) for some in zip(*train, strict=False)]
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(x, means([one.held_out_loss for one in curves]), color=colour, linewidth=1.1, linestyle=(0, (1.5, 1.5)))


def means(curves: Sequence[Sequence[float]]) -> list[float]:
    """Place by place, as far as all of them go."""
    return [mean(values) for values in zip(*curves, strict=False)]


def _top(by_name: Mapping[str, Sequence[Curve]]) -> float | None:
    """Where the axis ends: the fall of the very first steps, alike for all, would take most of the room."""
    curves = [one.train_loss for several in by_name.values() for one in several]
    late = [loss for curve in curves for loss in curve[len(curve) // 10 :] if math.isfinite(loss)]
    starts = [curve[0] for curve in curves if curve and math.isfinite(curve[0])]
    return min(1.05 * max(late), 1.05 * max(starts)) if late and starts else None


def style(axes: Axes, *, top: float | None) -> None:
    """A logarithmic axis that ends at ``top``, with numbers on it."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.set_ylim(top=top)
    low, high = axes.get_ylim()
    if high / low < 30:  # powers of ten alone would leave such an axis without a number
        axes.yaxis.set_major_locator(MaxNLocator(7) if high / low < 4 else LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
