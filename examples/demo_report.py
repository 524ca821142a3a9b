"""What the demo leaves: a table, one picture, and everything as JSON."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from demo_display import COLOURS
from demo_tasks import GRID, OPTIMIZERS, Settings, Task
from demo_training import Run
from example_results import final, means, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

import kfac_cond as kc

Runs = Mapping[str, Mapping[str, list[Run]]]

# -- numbers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """An optimizer on a task, as means over seeds.

    Args:
        steps: to the first evaluation at or below Adam's final train loss of the same seed; None where none was.
        seconds: of training until then.
        reached: how many seeds got there.
        seeds: how many seeds there were.
        milliseconds_per_step: of training.
        train_loss: mean over the last evaluations, see ``final``.
        test_loss: likewise.
        train_accuracy: likewise, of a classifier.
        test_accuracy: likewise, of a classifier.
    """

    steps: float | None
    seconds: float | None
    reached: int
    seeds: int
    milliseconds_per_step: float
    train_loss: float
    test_loss: float
    train_accuracy: float | None
    test_accuracy: float | None


def summaries(runs: Mapping[str, list[Run]]) -> dict[str, Summary]:
    """One summary for each optimizer, over the seeds that every one of them has finished.

    Args:
        runs: of one task, by optimizer.
    """
    seeds = set.intersection(*({run.seed for run in runs.get(name, [])} for name in OPTIMIZERS))
    if not seeds:
        return {}
    targets = {run.seed: final(run.train_loss) for run in runs["Adam"]}
    return {name: _summary([run for run in runs[name] if run.seed in seeds], targets) for name in OPTIMIZERS}


def _summary(runs: list[Run], targets: Mapping[int, float]) -> Summary:
    reached = [(run, mark) for run in runs if (mark := _reaching(run, targets[run.seed])) is not None]
    classes = bool(runs[0].test_accuracy)
    return Summary(
        steps=mean(run.steps[mark] for run, mark in reached) if reached else None,
        seconds=mean(run.seconds[mark] for run, mark in reached) if reached else None,
        reached=len(reached),
        seeds=len(runs),
        milliseconds_per_step=1000 * mean(run.seconds[-1] / run.steps[-1] for run in runs),
        train_loss=mean(final(run.train_loss) for run in runs),
        test_loss=mean(final(run.test_loss) for run in runs),
        train_accuracy=mean(final(run.train_accuracy) for run in runs) if classes else None,
        test_accuracy=mean(final(run.test_accuracy) for run in runs) if classes else None,
    )


def _reaching(run: Run, target: float) -> int | None:
    """The first evaluation at or below the target."""
    return next((mark for mark, loss in enumerate(run.train_loss) if loss <= target), None)


# -- text --------------------------------------------------------------------------------------------------------------


def heading(task: Task, found: Mapping[str, Summary], *, steps: int) -> str:
    """What a table is about."""
    seeds = found["Adam"].seeds
    return f"{task.title}: {steps} steps of {task.batch_size}, mean of {seeds} seed{'s' if seeds > 1 else ''}"


def table(found: Mapping[str, Summary]) -> Table:
    """The comparison on one task."""
    columns = ["optimizer", "steps to\nAdam's final", "seconds to\nAdam's final", "ms per\nstep"]
    columns += ["train\nloss", "test\nloss"]
    classes = found["Adam"].test_accuracy is not None
    out = Table()
    for name in columns + (["train\naccuracy", "test\naccuracy"] if classes else []):
        out.add_column(name, justify="left" if name == "optimizer" else "right")
    for name, one in found.items():
        cells = [_to_target(one, one.steps, ".0f"), _to_target(one, one.seconds, ".2f")]
        cells += [f"{one.milliseconds_per_step:.2f}", f"{one.train_loss:.4g}", f"{one.test_loss:.4g}"]
        cells += [f"{100 * value:.2f} %" for value in (one.train_accuracy, one.test_accuracy) if value is not None]
        out.add_row(f"[{COLOURS[name]}]{name}[/]", *cells)
    return out


def _to_target(one: Summary, value: float | None, form: str) -> str:
    if value is None:
        return "- (never)"
    return f"{value:{form}}" + ("" if one.reached == one.seeds else f" ({one.reached} of {one.seeds})")


def verdict(found: Mapping[str, Summary]) -> str:
    """The comparison of K-FAC with Adam in a sentence."""
    ours, adam = found["SGD + K-FAC"], found["Adam"]
    if ours.steps is None or ours.seconds is None or adam.steps is None or adam.seconds is None:
        return "SGD + K-FAC did not reach Adam's final training loss within these steps."
    seeds = "" if ours.reached == ours.seeds else f" for {ours.reached} of {ours.seeds} seeds"
    share = f"{100 * ours.steps / adam.steps:.0f} % of Adam's steps" if adam.steps else "no step"
    time = "more" if ours.seconds > adam.seconds else "less"
    return (
        f"SGD + K-FAC reached Adam's final training loss{seeds} after {ours.steps:.0f} steps, {share}, and in "
        f"{ours.seconds:.2f} s, {time} than Adam's {adam.seconds:.2f} s."
    )


# -- JSON --------------------------------------------------------------------------------------------------------------


def results(tasks: list[Task], runs: Runs, *, seeds: int, steps: Mapping[str, int], complete: bool) -> dict[str, Any]:
    """Everything there is to know about the runs, as plain numbers and strings.

    Args:
        tasks: that were asked for.
        runs: finished ones, by task and optimizer.
        seeds: how many were asked for.
        steps: of a run, by task.
        complete: nothing was interrupted.
    """
    packages = ("torch", "numpy", "scikit-learn", "matplotlib")
    return {
        "format": 1,
        "complete": complete,
        "versions": {
            "kfac-cond": kc.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "device": str(torch.get_default_device()),
        },
        "seeds": list(range(seeds)),
        "learning_rate_schedule": "cosine from the tuned rate to 0, for every optimizer",
        "final_loss": "mean over the last twentieth of the evaluations on the full set",
        "tasks": {task.name: _task(task, runs.get(task.name, {}), steps=steps[task.name]) for task in tasks},
    }


def _task(task: Task, runs: Mapping[str, list[Run]], *, steps: int) -> dict[str, Any]:
    return {
        "title": task.title,
        "steps": steps,
        "batch_size": task.batch_size,
        "evaluate_every": task.evaluate_every,
        "settings": {name: _settings(settings) for name, settings in task.settings.items()},
        "grid": {name: [_settings(settings) for settings in grid] for name, grid in GRID.items()},
        "summary": {name: asdict(one) for name, one in summaries(runs).items()},
        "runs": [asdict(run) for several in runs.values() for run in several],
    }


def _settings(settings: Settings) -> dict[str, Any]:
    return {"kind": type(settings).__name__, **asdict(settings)}


# -- picture -----------------------------------------------------------------------------------------------------------


def save_picture(path: Path, tasks: list[Task], runs: Runs) -> None:
    """Training loss against steps and against seconds, one row of panels for each task.

    Args:
        path: of the PNG.
        tasks: those to draw; each needs at least one finished run.
        runs: by task and optimizer.
    """
    # A Figure of its own, not pyplot: no display is needed and nothing global changes.
    figure = Figure(figsize=(11, 0.6 + 3.7 * len(tasks)), dpi=130, layout="constrained")
    rows = figure.subplots(len(tasks), 2, squeeze=False, sharey="row")
    for (by_steps, by_seconds), task in zip(rows, tasks, strict=True):
        _draw(by_steps, runs[task.name], against="steps")
        _draw(by_seconds, runs[task.name], against="seconds")
        by_steps.set_title(task.title, loc="left", fontsize=11, fontweight="bold")
        by_steps.set_ylabel("loss, nats per image")
        by_steps.set_xlabel("steps")
        by_seconds.set_xlabel("seconds of training, evaluation excluded")
    handles, labels = rows[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)
    figure.savefig(path)


def _draw(axes: Axes, runs: Mapping[str, list[Run]], *, against: str) -> None:
    for name, several in runs.items():
        x = means([getattr(run, against) for run in several])
        train = [run.train_loss for run in several]
        axes.plot(x, means(train), color=COLOURS[name], linewidth=1.8, label=f"{name}, train", zorder=3)
        low, high = [min(v) for v in zip(*train, strict=True)], [max(v) for v in zip(*train, strict=True)]
        axes.fill_between(x, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
        test = means([run.test_loss for run in several])
        axes.plot(x, test, color=COLOURS[name], linewidth=1.1, linestyle=(0, (1.5, 1.5)), label=f"{name}, test")
    if runs.get("Adam"):
        target = mean(final(run.train_loss) for run in runs["Adam"])
        axes.axhline(target, color="#555555", linewidth=0.8, linestyle="--", label="Adam's final train loss")
    style(axes, top=_top(runs))


def _top(runs: Mapping[str, list[Run]]) -> float | None:
    """Where the axis ends: the fall of the very first steps, alike for all, would take most of the room."""
    curves = (run.train_loss for several in runs.values() for run in several)
    late = [loss for curve in curves for loss in curve[max(1, len(curve) // 40) :] if math.isfinite(loss)]
    return 1.05 * max(late) if late else None
