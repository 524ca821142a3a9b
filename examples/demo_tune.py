"""How the demo's settings were found: the lowest held-out loss over the whole run, test images left alone.

Its mean over the evaluations rewards speed and punishes overfitting. A fifth of the training images is held out, the
seeds are none of the demo's own, and it takes some minutes.
"""

from __future__ import annotations

import math
from statistics import mean

from demo_tasks import GRID, TASKS, Settings, Task, split
from demo_training import train

SEEDS = (100, 101)


def main() -> None:
    """Print the numbers of every setting, the best first."""
    for task in TASKS.values():
        for optimizer, grid in GRID.items():
            print(f"\n{task.name}, {optimizer}: mean of {len(SEEDS)} seeds")
            print(f"{'held out, mean':>16}{'held out, final':>16}{'train, final':>16}")
            rows = [(*_losses(task, optimizer, settings), settings) for settings in grid]
            for *losses, settings in sorted(rows, key=lambda row: row[0]):
                print(*(f"{loss:16.6f}" for loss in losses), "  ", settings, sep="", flush=True)


def _losses(task: Task, optimizer: str, settings: Settings) -> list[float]:
    """Held-out loss over the run, held-out loss and training loss at its end; infinite where a run diverged."""
    data = split(reconstruct=task.reconstruct, tuning=True)
    runs = [train(task, optimizer, settings, data=data, seed=seed, steps=task.steps) for seed in SEEDS]
    losses = (
        mean(mean(run.test_loss) for run in runs),
        mean(run.test_loss[-1] for run in runs),
        mean(run.train_loss[-1] for run in runs),
    )
    return [loss if math.isfinite(loss) else math.inf for loss in losses]


if __name__ == "__main__":
    main()
