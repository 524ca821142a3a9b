"""SGD, Adam and SGD + K-FAC on scikit-learn's digits: ``python examples/demo.py``, or ``kfac-cond demo``."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from demo_display import Display, console, display
from demo_report import Runs, heading, results, save_picture, summaries, table, verdict
from demo_tasks import OPTIMIZERS, TASKS, Task, split
from demo_training import Run, train
from example_results import save_json

INTERRUPTED = 130


def run(*, task: str = "all", steps: int | None = None, seeds: int = 3, out: Path = Path("demo-results")) -> int:
    """Train everything, print the tables, save ``demo.png`` and ``demo.json``.

    Args:
        task: 'autoencoder', 'classifier' or 'all'.
        steps: of each run; None for the task's own, which the settings are tuned for.
        seeds: how many runs of each optimizer.
        out: the folder to save in; made where it is missing.

    Returns:
        The exit status: 0, 2 where nothing can be saved in ``out``, 130 after Ctrl-C.
    """
    tasks = list(TASKS.values()) if task == "all" else [TASKS[task]]
    lengths = {one.name: steps or one.steps for one in tasks}
    runs: dict[str, dict[str, list[Run]]] = {one.name: {} for one in tasks}
    page, complete = console(), True
    try:
        _check_writable(out)
        try:
            with one_thread(), display(page, tasks, seeds=seeds, steps=lengths) as shown:
                for finished in _train_all(tasks, lengths, seeds, shown):
                    runs[finished.task].setdefault(finished.optimizer, []).append(finished)
        except KeyboardInterrupt:
            complete = False
        for one in tasks:
            if found := summaries(runs[one.name]):
                page.print(f"\n[bold]{heading(one, found, steps=lengths[one.name])}[/]", soft_wrap=True)
                page.print(table(found))
                page.print(verdict(found), soft_wrap=True)
        saved = _save(out, tasks, runs, seeds=seeds, steps=lengths, complete=complete)
    except OSError as error:
        reason = error.strerror or error
        print(f"cannot save in '{out}': {reason}. Choose another folder with --out DIR.", file=sys.stderr)
        return 2
    done = sum(len(several) for by_name in runs.values() for several in by_name.values())
    if not complete:
        page.print(f"interrupted after {done} of {len(tasks) * seeds * len(OPTIMIZERS)} runs", soft_wrap=True)
    page.print(
        f"saved: {', '.join(map(str, saved))}" if saved else "nothing saved: no run was finished", soft_wrap=True
    )
    return 0 if complete else INTERRUPTED


@contextmanager
def one_thread() -> Iterator[None]:
    """The networks are small: more threads would wait for each other, and far longer beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train_all(tasks: list[Task], steps: dict[str, int], seeds: int, shown: Display) -> Iterator[Run]:
    """Every run, optimizers side by side for each seed, so that whatever else the machine does meets all alike."""
    done, total = 0, len(tasks) * seeds * len(OPTIMIZERS)
    for task in tasks:
        data = split(reconstruct=task.reconstruct)
        for name in OPTIMIZERS:  # torch sets itself up at first use: nobody's clock should pay for that
            train(task, name, task.settings[name], data=data, seed=0, steps=2)
        for seed in range(seeds):
            for name in OPTIMIZERS:
                settings = task.settings[name]
                run = train(task, name, settings, data=data, seed=seed, steps=steps[task.name], told=shown.going)
                done += 1
                shown.finished(run, done=done, total=total)
                yield run


def _check_writable(out: Path) -> None:
    """Find out before the training, not after."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass


def _save(out: Path, tasks: list[Task], runs: Runs, *, seeds: int, steps: dict[str, int], complete: bool) -> list[Path]:
    """Save what was finished; nothing where nothing was."""
    drawable = [task for task in tasks if runs[task.name]]
    if not drawable:
        return []
    save_json(out / "demo.json", results(tasks, runs, seeds=seeds, steps=steps, complete=complete))
    save_picture(out / "demo.png", drawable, runs)
    return [out / "demo.png", out / "demo.json"]


if __name__ == "__main__":
    from kfac_cond.cli import main

    sys.exit(main(["demo", *sys.argv[1:]]))
