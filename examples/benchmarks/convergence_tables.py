"""The tables of ``convergence.py``: losses on the way and at the end, and who is as good as whom after how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import stdev

from convergence_contenders import Contender
from convergence_problems import Problem
from convergence_runs import Ledger, Trial, at_step, reached, said
from example_results import final
from example_tasks import Task

from kfac_cond.tables import fitted, table


def printed(name: str, problem: Problem, task: Task, contenders: Mapping[str, Contender], ledger: Ledger) -> str:
    """Both tables of a problem."""
    runs = {who: ledger.of(name, who) for who in contenders}
    seeds = {trial.seed for _, reported in runs.values() for trial in reported}
    head = f"{task.title}: {problem.steps} steps of {task.batch}, {len(seeds)} seed(s), rates {problem.schedule}"
    return "\n".join(
        [
            fitted(head),
            losses(problem, contenders, runs),
            "",
            fitted(f"Steps, and seconds of training, until {problem.quantity.replace('_', ' ')} is as good as that of"),
            targets(problem, contenders, runs),
        ]
    )


Runs = Mapping[str, tuple[list[Trial], list[Trial]]]


def marks(problem: Problem) -> list[int]:
    """A fifth of the steps and two fifths, where there are evaluations."""
    return [step for step in (problem.steps // 5, 2 * problem.steps // 5) if step and step % problem.every == 0]


def losses(problem: Problem, contenders: Mapping[str, Contender], runs: Runs) -> str:
    """A row for each contender: train / held out at some steps and at the end, the seconds, what was chosen."""
    head = ("", *(f"step {step}" for step in marks(problem)), "final", "spread", "accuracy", "ms a step")
    rows, notes = [], []
    for who, contender in contenders.items():
        grid, reported = runs[who]
        if not contender.installed:
            rows.append((contender.title, "not installed", *[""] * (len(head) - 2)))
            notes.append("")
            continue
        whole = [one for one in reported if not one.said]
        cells = [pair(whole, step) for step in marks(problem)]
        rows.append((contender.title, *cells, pair(whole, None), *rest(whole)))
        notes.append(note(grid, reported))
    return table(head, rows, notes, right=range(1, len(head)))


def pair(trials: Sequence[Trial], step: int | None) -> str:
    """Train / held out."""
    found = [at_step(trials, quantity, step) for quantity in ("train_loss", "held_out_loss")]
    return " / ".join("-" if one is None else f"{one:.4g}" for one in found)


def rest(trials: Sequence[Trial]) -> tuple[str, str, str]:
    """The standard deviation of the final losses over seeds, the accuracy, milliseconds a step."""
    if not trials:
        return "", "", ""
    spread = ""
    if len(trials) > 1:
        both = (stdev(final(getattr(one.curve, f"{split}_loss")) for one in trials) for split in ("train", "held_out"))
        spread = " / ".join(f"{one:.2g}" for one in both)
    accuracy = at_step(trials, "held_out_accuracy", None)
    seconds = sum(one.curve.seconds[-1] for one in trials) / sum(one.curve.steps[-1] for one in trials)
    return spread, "" if accuracy is None else f"{100 * accuracy:.2f} %", f"{1000 * seconds:.0f}"


def note(grid: Sequence[Trial], reported: Sequence[Trial]) -> str:
    """The settings, and what failed with them."""
    if not reported:
        return "; ".join(f"{said(one.settings)}: {one.said}" for one in grid)
    failed = [f"seed {one.seed}: {one.said}" for one in reported if one.said]
    tried = f", best of {len(grid)}" if grid else ""
    return "; ".join([f"{said(reported[0].settings)}{tried}", *failed])


def targets(problem: Problem, contenders: Mapping[str, Contender], runs: Runs) -> str:
    """A row for each contender, a column for each reference that there is."""
    goals = []
    for who, step in problem.references:
        if who not in runs:
            continue
        whole = [one for one in runs[who][1] if not one.said]
        value = at_step(whole, problem.quantity, step)
        if value is not None:
            number = f"{100 * value:.2f} %" if problem.quantity.endswith("accuracy") else f"{value:.4g}"
            title = f"{contenders[who].title} {'at the end' if step is None else f'at {step}'}, {number}"
            goals.append((title, value))
    rows = []
    for who, contender in contenders.items():
        if runs[who][1]:
            rows.append((contender.title, *(cell(runs[who][1], problem, value) for _, value in goals)))
    if not goals:
        return "  none of the references was run to its end"
    return table(("", *(title for title, _ in goals)), rows, [""] * len(rows), right=range(1, len(goals) + 1))


def cell(trials: Sequence[Trial], problem: Problem, value: float) -> str:
    """Steps, their share of a whole run, seconds; and how many seeds got there where not all did."""
    found = reached(trials, problem.quantity, value)
    if found is None:
        return "never"
    some = "" if found.seeds == len(trials) else f", {found.seeds} of {len(trials)} seeds"
    return f"{found.steps:.0f} ({100 * found.steps / problem.steps:.0f} %), {found.seconds:.1f} s{some}"
