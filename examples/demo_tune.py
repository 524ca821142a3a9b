"""How the demo's settings were found: the lowest held-out loss of the grid, test images left alone.

Takes some minutes. A fifth of the training images is held out, and the seeds are none of the demo's own.
"""

from __future__ import annotations

import math
from statistics import mean

from demo_tasks import GRID, TASKS, Settings, Task, split
from demo_training import Run, train

SEEDS = (100, 101)


def main() -> None:
    """Print final train and held-out loss for each setting, the lowest held-out loss first."""
    for task in TASKS.values():
        for optimizer, grid in GRID.items():
            print(f"\n{task.name}, {optimizer}: final loss, mean of {len(SEEDS)} seeds")
            print(f"{'train':>12} {'held out':>12} {'seconds':>8}")
            rows = [(*_losses(task, optimizer, settings), settings) for settings in grid]
            for train_loss, held_out, seconds, settings in sorted(rows, key=lambda row: row[1]):
                print(f"{train_loss:12.6f} {held_out:12.6f} {seconds:8.2f}  {settings}", flush=True)


def _losses(task: Task, optimizer: str, settings: Settings) -> tuple[float, float, float]:
    data = split(reconstruct=task.reconstruct, tuning=True)
    runs = [train(task, optimizer, settings, data=data, seed=seed, steps=task.steps) for seed in SEEDS]
    return _mean(runs, "train_loss"), _mean(runs, "test_loss"), _mean(runs, "seconds")


def _mean(runs: list[Run], name: str) -> float:
    """The mean of the last values; infinite where a run diverged."""
    value = mean(getattr(run, name)[-1] for run in runs)
    return value if math.isfinite(value) else math.inf


if __name__ == "__main__":
    main()
