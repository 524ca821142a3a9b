"""The contest: first-order methods, other second-order ones and this library on three problems, tuned alike.

    python examples/benchmarks/convergence.py [--problems ...] [--contenders ...] [--data digits|mnist:PATH]
        [--seeds N] [--budget N] [--steps N] [--threads N] [--small] [--out FILE.json] [--resume] [--picture FILE.png]

A deep autoencoder of images, a transformer on bytes of Python's standard library, a convolutional classifier of digits.
Of each optimizer as many settings are tried (six, or ``--budget``), at a seed that is not reported and over whole runs;
that with the best final value runs at the seeds that are. Grid, choices and all curves are in the JSON file, which is
written after every run and gone on from with ``--resume``. Weights and batches of a seed are the same for all. Seconds
are those of training, evaluations left out; with one thread the process's own. An optimizer whose library is absent is
a row that says so; ``pip install --no-deps -r examples/benchmarks/speed.txt`` installs them. Full sizes take hours on a
core; ``--small`` a minute.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from convergence_contenders import BUDGET, CONTENDERS
from convergence_problems import PROBLEMS, SMALL, Problem
from convergence_runs import Ledger, compete
from convergence_tables import printed
from example_results import save_picture
from example_run import SCHEDULES
from installed import versions

from kfac_cond.tables import fitted

PACKAGES = ("torch", "kfac-pytorch", "pytorch_optimizer", "singd")
"""Whose versions are written down."""


def options(given: Sequence[str] | None) -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--data", default="digits", help="images: digits, or mnist:PATH, a folder of idx files")
    parser.add_argument("--seeds", type=int, default=3, help="that are reported")
    parser.add_argument("--budget", type=int, default=BUDGET, help="settings that are tried of each optimizer")
    parser.add_argument("--steps", type=int, help="of a run, in place of each problem's own")
    parser.add_argument("--schedule", choices=SCHEDULES, help="of the rates, in place of each problem's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="small models and few steps, for a quick look")
    parser.add_argument("--out", type=Path, help="a JSON file for the grid, the choices and all curves")
    parser.add_argument("--resume", action="store_true", help="take over the runs that --out holds")
    parser.add_argument("--picture", type=Path, help="loss against steps and seconds; it needs matplotlib")
    return parser.parse_args(given)


def problems(asked: argparse.Namespace) -> dict[str, Problem]:
    """By name, with what is asked of them."""
    found = {name: (SMALL if asked.small else PROBLEMS)[name] for name in asked.problems}
    changed = {name: getattr(asked, name) for name in ("steps", "schedule") if getattr(asked, name) is not None}
    return {name: replace(one, **changed) for name, one in found.items()}


def main(given: Sequence[str] | None = None) -> int:
    """Run, print the tables, and write everything where asked to."""
    asked = options(given)
    torch.set_num_threads(asked.threads)
    contenders = {name: CONTENDERS[name] for name in asked.contenders}
    grids = {who: {name: one.grids[name][: asked.budget] for name in asked.problems} for who, one in contenders.items()}
    told = {
        "versions": versions(PACKAGES),
        "data": asked.data,
        "small": asked.small,
        "budget": asked.budget,
        "grids": grids,
    }
    ledger = Ledger(asked.out, told, again=asked.resume)
    print(fitted(", ".join(f"{name} {one}" for name, one in versions(PACKAGES).items())))
    panels = {}
    for name, problem in problems(asked).items():
        task = problem.make(asked.data)
        seeds = range(asked.seeds)
        compete(
            name,
            problem,
            task,
            contenders,
            ledger,
            budget=asked.budget,
            seeds=seeds,
            told=lambda text: print(text, flush=True),
        )
        print(f"\n{printed(name, problem, task, contenders, ledger)}\n", flush=True)
        reported = {one.title: ledger.of(name, who)[1] for who, one in contenders.items()}
        drawn = {title: [one.curve for one in trials if not one.said] for title, trials in reported.items()}
        panels[task.title] = {title: curves for title, curves in drawn.items() if curves}
    if asked.picture and not save_picture(asked.picture, panels):
        print("no picture: it needs matplotlib")
    return 0


if __name__ == "__main__":
    sys.exit(main())
