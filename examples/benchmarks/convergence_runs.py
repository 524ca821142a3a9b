"""The runs of ``convergence.py``: a grid at a seed of its own, then the best of it at the seeds that are reported."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from convergence_contenders import Contender
from convergence_problems import Problem
from example_optimizers import Settings
from example_results import Curve, final, finite, machine, save_json
from example_run import Options, Run
from example_tasks import Task

GRID_SEED = 100
"""None of those that are reported."""


@dataclass
class Trial:
    """One run.

    Args:
        problem: by name.
        contender: by name.
        settings: of the optimizer.
        seed: of weights, batches and draws.
        steps: that were asked for.
        said: why it has no numbers to its end: the first line of an error, or that it diverged.
        curve: as far as it got.
    """

    problem: str
    contender: str
    settings: dict[str, float]
    seed: int
    steps: int
    said: str = ""
    curve: Curve = field(default_factory=Curve)

    def worth(self, quantity: str) -> float:
        """The final value, the less the better; infinite where there is none."""
        values = getattr(self.curve, quantity)
        if self.said or not values:
            return math.inf
        found = final(values)
        return -found if quantity.endswith("accuracy") else found


class Ledger:
    """All runs so far, written down after each.

    Args:
        path: of the JSON file; None to keep nothing.
        said: what else goes into it.
        again: take over the runs that it holds already.
    """

    def __init__(self, path: Path | None, said: Mapping[str, Any], *, again: bool = False) -> None:
        self.path, self.said, self.trials = path, dict(said), list[Trial]()
        if again and path is not None and path.is_file():
            for one in json.loads(path.read_text())["trials"]:
                self.trials.append(Trial(**{**one, "curve": Curve(**one["curve"])}))

    def known(self, like: Trial) -> Trial | None:
        """The run of the same problem, contender, settings, seed and length."""
        return next((one for one in self.trials if _key(one) == _key(like)), None)

    def add(self, trial: Trial) -> None:
        """Write it down."""
        self.trials.append(trial)
        if self.path is not None:
            save_json(self.path, {**self.said, "machine": machine(), "trials": [asdict(one) for one in self.trials]})

    def of(self, problem: str, contender: str) -> tuple[list[Trial], list[Trial]]:
        """Those of the grid, and those that are reported."""
        found = [one for one in self.trials if (one.problem, one.contender) == (problem, contender)]
        grid = [one for one in found if one.seed == GRID_SEED]
        return grid, [one for one in found if one.seed != GRID_SEED]


def _key(trial: Trial) -> tuple[Any, ...]:
    return trial.problem, trial.contender, sorted(trial.settings.items()), trial.seed, trial.steps


def first_line(error: BaseException) -> str:
    """Of an error, with its kind."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def run(task: Task, trial: Trial, contender: Contender, problem: Problem, every: int) -> Trial:
    """Train; what fails is said in place of numbers."""
    options = Options(trial.steps, every, trial.seed, problem.schedule)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one = Run(task, trial.contender, trial.settings, options, entry=contender.entry)
            trial.curve = one.curve
            one.measure()
            one.train(trial.steps)
    except Exception as error:  # whatever another library says
        trial.said = first_line(error)
    trial.curve = Curve(**finite(asdict(trial.curve)))
    if not trial.said and None in trial.curve.train_loss:
        trial.said = f"diverged before step {trial.curve.steps[-1]}"
    return trial


def compete(
    name: str,
    problem: Problem,
    task: Task,
    contenders: Mapping[str, Contender],
    ledger: Ledger,
    *,
    budget: int,
    seeds: Sequence[int],
    told: Callable[[str], object],
) -> None:
    """Every contender's grid, and the best setting of each at the seeds.

    Args:
        budget: settings that are tried of each; a grid of one needs no choice, and none is tried.
        told: how it goes.
    """
    for who, contender in contenders.items():
        if not contender.installed:
            told(f"{name}, {contender.title}: not installed")
            continue

        def go(settings: Settings, seed: int, every: int, who: str = who, contender: Contender = contender) -> Trial:
            trial = Trial(name, who, dict(settings), seed, problem.steps)
            found = ledger.known(trial)
            if found is None:
                found = run(task, trial, contender, problem, every)
                ledger.add(found)
                told(f"{name}, {contender.title}, {said(settings)}, seed {seed}: {outcome(found)}")
            return found

        grid = contender.grids[name][:budget]
        best: Settings | None = grid[0]
        if len(grid) > 1:
            tried = [go(settings, GRID_SEED, max(problem.every, problem.steps // 10)) for settings in grid]
            best = chosen(tried, problem.quantity)
        for seed in seeds if best is not None else ():
            go(best, seed, problem.every)  # type: ignore[arg-type]


def chosen(tried: Sequence[Trial], quantity: str) -> Settings | None:
    """The settings with the best final value; None where none got to its end."""
    best = min(tried, key=lambda one: one.worth(quantity))
    return best.settings if best.worth(quantity) < math.inf else None


def said(settings: Settings) -> str:
    """Settings in words."""
    return ", ".join(f"{name} {value:g}" for name, value in settings.items()) or "defaults"


def outcome(trial: Trial) -> str:
    """The last numbers of a run, or why there are none."""
    if trial.said:
        return trial.said
    curve = trial.curve
    accuracy = f", accuracy {100 * curve.held_out_accuracy[-1]:.2f} %" if curve.held_out_accuracy else ""
    losses = f"train {curve.train_loss[-1]:.4g}, held out {curve.held_out_loss[-1]:.4g}{accuracy}"
    return f"{losses}, {curve.seconds[-1]:.1f} s"


# -- what they come to -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reached:
    """When a contender was as good as a reference, means over the seeds that were.

    Args:
        steps: until then.
        seconds: of training until then.
        seeds: how many got there.
    """

    steps: float
    seconds: float
    seeds: int


def at_step(trials: Sequence[Trial], quantity: str, step: int | None) -> float | None:
    """The mean over seeds at a step, the final value for None; None where a run did not get there."""
    values = []
    for one in trials:
        found = getattr(one.curve, quantity)
        if one.said or not found or (step is not None and step not in one.curve.steps):
            return None
        values.append(final(found) if step is None else found[one.curve.steps.index(step)])
    return mean(values) if values else None


def reached(trials: Sequence[Trial], quantity: str, target: float) -> Reached | None:
    """The first evaluation as good as the target."""
    found = [(one, mark) for one in trials if not one.said and (mark := one.curve.first(quantity, target)) is not None]
    if not found:
        return None
    return Reached(
        mean(one.curve.steps[mark] for one, mark in found),
        mean(one.curve.seconds[mark] for one, mark in found),
        len(found),
    )
