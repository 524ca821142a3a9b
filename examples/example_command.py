"""The command line that the examples share: train with one optimizer or several, go on after a stop, compare."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from example_optimizers import OPTIMIZERS
from example_results import Curve, machine, save_json, save_picture
from example_run import SCHEDULES, Options, Ranks, Run
from example_tasks import Task


def parser(description: str | None, *, steps: int, out: str, beside: str) -> argparse.ArgumentParser:
    """The arguments that all examples take; by default AdamW is trained, and another optimizer beside it."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=["adamw", beside], help="one or several")
    made.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="OPTIMIZER.SETTING=NUMBER",
        help="settings of the optimizers, as kfac.damping=0.3",
    )
    made.add_argument("--steps", type=int, default=steps, help=f"of each optimizer (default {steps})")
    made.add_argument("--until", type=int, help="stop after this step, to go on with --resume")
    made.add_argument("--every", type=int, default=50, help="steps between two evaluations and checkpoints")
    made.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="of the learning rates")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--threads", type=int, default=1, help="of the CPU; a small network gains nothing by more")
    made.add_argument("--bf16", action="store_true", help="forwards under autocast in bfloat16")
    made.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    made.add_argument("--out", type=Path, default=Path(out), help="where checkpoints, picture and numbers are kept")
    return made


def changes(given: Sequence[str]) -> dict[str, dict[str, float]]:
    """By optimizer what ``--set`` says.

    Raises:
        SystemExit: one is not understood.
    """
    found: dict[str, dict[str, float]] = {}
    for text in given:
        place, _, number = text.partition("=")
        name, _, setting = place.partition(".")
        try:
            value = float(number)
        except ValueError:
            value = None
        if name not in OPTIMIZERS or not setting or value is None:
            raise SystemExit(f"--set {text}: expected OPTIMIZER.SETTING=NUMBER, as kfac.damping=0.3")
        found.setdefault(name, {})[setting] = value
    return found


def train(task: Task, asked: argparse.Namespace) -> None:
    """Train with each optimizer that is asked for; progress, checkpoints, a picture and the numbers as JSON."""
    torch.set_num_threads(asked.threads)
    changed = changes(asked.set)
    settings = {name: OPTIMIZERS[name].settings_for(task, changed.get(name, {})) for name in asked.optimizer}
    options = Options(asked.steps, asked.every, asked.seed, asked.schedule, asked.bf16)
    asked.out.mkdir(parents=True, exist_ok=True)
    ranks, curves = Ranks.of_torchrun(), dict[str, Curve]()
    ranks.say(f"{task.title}: batches of {task.batch}, {ranks.world} rank{'s' * (ranks.world != 1)}, {ranks.device}")
    for name, own in settings.items():
        run, path = Run(task, name, own, options, ranks=ranks), asked.out / f"{task.name}_{name}.pt"
        if asked.resume:
            run.resume(path)

        def told(run: Run, path: Path = path) -> None:
            ranks.say(line(run))
            run.save(path)

        run.train(min(asked.until or asked.steps, asked.steps), told)
        curves[name] = run.curve
    if ranks.rank == 0:
        _leave(task, asked, settings, curves)
    for text in verdict(curves):
        ranks.say(text)
    ranks.end()


def line(run: Run) -> str:
    """How a run goes."""
    curve = run.curve
    losses = f"train {curve.train_loss[-1]:9.4f}  held out {curve.held_out_loss[-1]:9.4f}"
    accuracy = f"  accuracy {100 * curve.held_out_accuracy[-1]:5.2f} %" if curve.held_out_accuracy else ""
    numbers = run.stepper.metrics()
    wanted = ("damping", "trust_region_scale", "rate", "momentum", "ratio", "rejected", "plain_layers")
    told = ", ".join(f"{name} {numbers[name]:.3g}" for name in wanted if name in numbers)
    return f"{run.name:8} step {run.step:5}  {losses}{accuracy}  {run.seconds:7.1f} s  {told}".rstrip()


def verdict(curves: dict[str, Curve]) -> list[str]:
    """All optimizers after equally many steps, and after equally many seconds."""
    there = {name: curve for name, curve in curves.items() if curve.steps}
    lines = [
        f"{name:8} held out {curve.held_out_loss[-1]:.4f} after {curve.steps[-1]} steps, {curve.seconds[-1]:.1f} s "
        f"({1000 * curve.seconds[-1] / max(curve.steps[-1], 1):.0f} ms a step)"
        for name, curve in there.items()
    ]
    if len(there) > 1:
        seconds = min(curve.seconds[-1] for curve in there.values())
        found = {name: curve.within(seconds) for name, curve in there.items()}
        told = ", ".join(f"{name} {'no loss yet' if loss is None else f'{loss:.4f}'}" for name, loss in found.items())
        lines.append(f"within {seconds:.1f} s each: {told}")
    return lines


def _leave(task: Task, asked: argparse.Namespace, settings: dict[str, Any], curves: dict[str, Curve]) -> None:
    content = {
        "task": task.title,
        "batch": task.batch,
        "l2": task.l2,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(asked).items()},
        "machine": machine(),
        "runs": {name: {"settings": settings[name], **vars(curve)} for name, curve in curves.items()},
    }
    save_json(asked.out / f"{task.name}.json", content)
    drawn = save_picture(asked.out / f"{task.name}.png", {task.title: {name: [one] for name, one in curves.items()}})
    print("saved: " + str(asked.out / f"{task.name}.json") + (f", {asked.out / f'{task.name}.png'}" if drawn else ""))
    if not drawn:
        print("no picture: it needs matplotlib, pip install 'kfac-cond[demo]'")
