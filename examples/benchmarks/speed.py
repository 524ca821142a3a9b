"""How fast factors, steps and training are, and how much memory they take, beside other libraries that are installed.

    python examples/benchmarks/speed.py [--jobs ...] [--models ...] [--threads N] [--repeats N] [--steps N]
        [--budget SECONDS] [--small] [--sweeps] [--networks] [--out FILE.json] [--picture FILE.png]

Four jobs: factors of one batch with one draw of labels; a full step with factors, inversion and preconditioning;
training with factors every 10 steps and inverses every 100; and the peak of resident memory in training. Contenders
take turns in one process, so that whatever else the machine does slows all of them, and each is first compared with a
float64 reference. A library that is absent is a row that says so, one that fails a row with its error;
``pip install --no-deps -r examples/benchmarks/speed.txt`` installs them. ``--sweeps`` fits how cost grows with size,
``--networks`` times whole networks with this library alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from installed import versions
from speed_jobs import FACTORS, INVERSES
from speed_models import MODELS, SMALL
from speed_peers import PACKAGES
from speed_picture import draw
from speed_sweeps import lines, sweeps
from speed_times import SHARES, Cell, cells, peak, resident

from kfac_cond.tables import fitted, table

JOBS = {
    "factors": "factors of one batch, one draw of labels; ratio to a forward and backward",
    "step": "factors, inversion and preconditioning in every step; ratio to a forward and backward",
    "training": f"training, factors every {FACTORS} steps and inverses every {INVERSES}; ratio to a step of SGD",
    "memory": "peak resident memory of training above the start, MiB, each in a fresh process",
}


def options(given: Sequence[str] | None) -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", nargs="*", choices=JOBS, default=list(JOBS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15, help="rounds of 'factors' and 'step'")
    parser.add_argument("--steps", type=int, default=200, help="steps of 'training'")
    parser.add_argument(
        "--budget", type=float, default=120.0, help="seconds for a job on a model, a sweep or a network"
    )
    parser.add_argument("--small", action="store_true", help="small models and sizes, for a quick look")
    parser.add_argument("--sweeps", action="store_true", help="how cost grows with size")
    parser.add_argument("--networks", action="store_true", help="whole networks")
    parser.add_argument("--out", type=Path, help="a JSON file for all numbers")
    parser.add_argument("--picture", type=Path, help="a picture of the tables; it needs matplotlib")
    parser.add_argument("--resident", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def job_cells(job: str, asked: argparse.Namespace) -> list[Cell]:
    """A job on all models."""
    settings, found = SMALL if asked.small else MODELS, []
    again = ["--threads", str(asked.threads), *(["--small"] if asked.small else [])]
    rounds = asked.steps if job == "training" else asked.repeats
    for name in asked.models:
        if job == "memory":
            found += resident(name, again)
        else:
            found += cells(job, name, settings[name], rounds=rounds, budget=asked.budget)
    return found


def printed(job: str, found: Sequence[Cell], rounds: int) -> str:
    """A table: a row for each contender, a column for each model; below it what failed and what was compared."""
    models = list(dict.fromkeys(one.model for one in found))
    of = {(one.contender, one.model): one for one in found}
    contenders = list(dict.fromkeys(one.contender for one in found))
    rows = [(who, *(in_cell(of[who, model]) for model in models)) for who in contenders]
    notes = [note(job, [of[who, model] for model in models]) for who in contenders]
    head = JOBS[job]
    if job != "memory":
        done = {model: max(one.rounds for one in found if one.model == model) for model in models}
        # Fewer where the budget was spent before.
        head += f" ({', '.join(f'{model}: {number} of {rounds} rounds' for model, number in done.items())})"
    return f"\n{fitted(head)}\n{table(('', *models), rows, notes, right=range(1, len(models) + 1))}"


def in_cell(one: Cell) -> str:
    """The ratio with its quartiles, or why there is none."""
    if one.median is None:
        return one.said if one.said == "not installed" else "failed"
    if one.ratio is None:
        return f"{one.median:.0f}"
    return f"{one.ratio:.2f} ({one.low:.2f}-{one.high:.2f})"


def note(job: str, row: Sequence[Cell]) -> str:
    """What was compared in a row, and how it failed."""
    compared = {one.said for one in row if one.median is not None and one.said}
    failed = [f"{one.model}: {one.said}" for one in row if one.median is None and one.said != "not installed"]
    return "; ".join([*(f"agrees: {one}" for one in sorted(compared)), *failed])


def told(asked: argparse.Namespace) -> str:
    """How the numbers are to be read."""
    clock = "the process's own time" if asked.threads == 1 else "the clock on the wall"
    kinds = ", ".join(f"{share:.0%} {one}" for one, share in SHARES.items())
    text = (
        f"{asked.threads} thread(s), float32, {clock}, load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores. "
        f"Medians of the ratios in each round, with their quartiles; of training that of each kind of step, {kinds}."
    )
    return fitted(text)


def main(given: Sequence[str] | None = None) -> int:
    """Print the tables, and write them where asked to."""
    asked = options(given)
    torch.set_num_threads(asked.threads)
    if asked.resident:
        print(json.dumps(peak((SMALL if asked.small else MODELS)[asked.models[0]], asked.resident)))
        return 0
    everything: dict[str, Any] = {"versions": versions(PACKAGES), "threads": asked.threads, "small": asked.small}
    print(told(asked), fitted(", ".join(f"{name} {one}" for name, one in everything["versions"].items())), sep="\n")
    found: list[Cell] = []
    for job in asked.jobs:
        of_job = job_cells(job, asked)
        print(printed(job, of_job, asked.steps if job == "training" else asked.repeats), flush=True)
        found += of_job
    everything["cells"] = [asdict(one) for one in found]
    if asked.sweeps:
        everything["sweeps"] = [asdict(one) for one in sweeps(small=asked.small, budget=asked.budget)]
    if asked.networks:
        everything["networks"] = [
            asdict(one) for one in lines(small=asked.small, repeats=asked.repeats, budget=asked.budget)
        ]
    if asked.out:
        asked.out.write_text(json.dumps(everything, indent=1))
    if asked.picture:
        draw(found, JOBS, asked.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
