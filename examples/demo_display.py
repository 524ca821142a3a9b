"""What the demo shows while it trains: live bars on a terminal, one plain line a run elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from demo_tasks import OPTIMIZERS, Task
from demo_training import Run
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

COLOURS = {"SGD": "#9a6a00", "Adam": "#2563ad", "SGD + K-FAC": "#c2352b"}


class Display(Protocol):
    """Is told how the training goes."""

    def going(self, run: Run) -> None:
        """After each evaluation."""

    def finished(self, run: Run, *, done: int, total: int) -> None:
        """After each run."""


def console() -> Console:
    """Standard output; control characters only where it is a terminal, whatever CI systems set in the environment."""
    terminal = sys.stdout.isatty()
    return Console(force_terminal=terminal, width=None if terminal else 110, highlight=False)


@contextmanager
def display(out: Console, tasks: list[Task], *, seeds: int, steps: dict[str, int]) -> Iterator[Display]:
    """The display that fits where the output goes."""
    if not out.is_interactive:
        yield Lines(out)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("steps  {task.fields[losses]}"),
    )
    # Few refreshes: they run in a thread beside the training whose seconds are reported.
    with Progress(*columns, console=out, transient=True, refresh_per_second=3) as progress:
        yield Bars(progress, tasks, seeds=seeds, steps=steps)


class Bars:
    """One bar for each task and optimizer, over all its seeds, with the losses as they fall."""

    def __init__(self, progress: Progress, tasks: list[Task], *, seeds: int, steps: dict[str, int]) -> None:
        self._progress = progress
        self._steps = steps
        self._bars: dict[tuple[str, str], TaskID] = {}
        self._done: dict[tuple[str, str], int] = {}
        for task in tasks:
            for name in OPTIMIZERS:
                text = f"{task.name:<12} [{COLOURS[name]}]{name:<12}[/]"
                total = seeds * steps[task.name]
                self._bars[task.name, name] = progress.add_task(text, total=total, losses="")
                self._done[task.name, name] = 0

    def going(self, run: Run) -> None:
        """Move the bar."""
        key = (run.task, run.optimizer)
        completed = self._done[key] * self._steps[run.task] + run.steps[-1]
        losses = f"train {run.train_loss[-1]:<9.4g} test {run.test_loss[-1]:<9.4g} {run.seconds[-1]:5.1f} s"
        self._progress.update(self._bars[key], completed=completed, losses=losses)

    def finished(self, run: Run, *, done: int, total: int) -> None:
        """Count a seed."""
        self._done[run.task, run.optimizer] += 1


class Lines:
    """A plain line for each finished run."""

    def __init__(self, out: Console) -> None:
        self._out = out

    def going(self, run: Run) -> None:
        """Nothing: a log needs no pulse."""

    def finished(self, run: Run, *, done: int, total: int) -> None:
        """Print the run's final numbers."""
        accuracy = f", test accuracy {100 * run.test_accuracy[-1]:.1f} %" if run.test_accuracy else ""
        losses = f"train loss {run.train_loss[-1]:.4g}, test loss {run.test_loss[-1]:.4g}"
        self._out.print(
            f"{done}/{total} {run.task}, {run.optimizer}, seed {run.seed}: {run.steps[-1]} steps in "
            f"{run.seconds[-1]:.1f} s, {losses}{accuracy}",
            markup=False,
            soft_wrap=True,
        )
