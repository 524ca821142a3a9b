"""Contenders of ``speed.py`` in turn, after a check: seconds as ratios to the first, and memory in fresh processes."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from speed_checks import CHECKS
from speed_jobs import FACTORS, INVERSES, Contender, Run
from speed_models import Setting, Task
from speed_peers import CONTENDERS

WARM = 2
"""Rounds that are not counted, but in training, whose first step is one of its steps."""
SHARES = {"between": 0.9, "capture": 0.09, "refresh": 0.01}
"""Of 100 steps of training; that with a refresh has a capture as well."""


@dataclass(frozen=True)
class Cell:
    """One contender at one job on one model.

    Args:
        said: what it agrees with, or why it has no numbers: 'not installed', or the first line of its error.
        ratio: to the first contender; the median over rounds, in training of each kind of step by its share.
        low: the first quartile likewise.
        high: the third.
        median: milliseconds; in the job 'memory' MiB above the start.
        mean: milliseconds over all rounds.
        rounds: that were counted.
    """

    job: str
    model: str
    contender: str
    said: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    median: float | None = None
    mean: float | None = None
    rounds: int = 0


def first_line(error: BaseException) -> str:
    """Of an error, with its kind."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def kind(step: int) -> str:
    """What is done at a step of training."""
    return "between" if step % FACTORS else "capture" if step % INVERSES else "refresh"


def timed(
    runs: Mapping[str, Run], rounds: int, *, warm: int, budget: float, least: int = 1
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each run in each round, the runs taking turns; and the error of those that failed.

    With one thread it is the process's own time, so that what else the machine does is not in it.

    Args:
        warm: rounds before those.
        budget: seconds after which no further round is begun.
        least: rounds that there are whatever they take.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    failed: dict[str, str] = {}
    began = time.monotonic()
    for index in range(warm + rounds):
        for name, run in runs.items():
            if name in failed:
                continue
            start = clock()
            try:
                run.go()
            except Exception as error:  # whatever another library says
                failed[name] = first_line(error)
                del seconds[name]
                continue
            if index >= warm:
                seconds[name].append(clock() - start)
        if index + 1 >= warm + least and time.monotonic() - began > budget:
            break
    return seconds, failed


def quantile(values: Sequence[float], at: float) -> float:
    """One of them, or between two."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(at))


def of_kinds(values: Sequence[float], kinds: Sequence[str], at: float) -> float:
    """The quantile of each kind of step, by its share."""
    found = {one: quantile([v for v, k in zip(values, kinds, strict=True) if k == one], at) for one in set(kinds)}
    share = sum(SHARES[one] for one in found)
    return sum(SHARES[one] * value for one, value in found.items()) / share


@cache
def task_of(setting: Setting) -> Task:
    """The same for all jobs, so that what it is compared with is computed once."""
    return setting.task()


def cells(job: str, name: str, setting: Setting, *, rounds: int, budget: float) -> list[Cell]:
    """All contenders at a job on a model: checked one after another, then timed in turn."""
    task, runs, found = task_of(setting), {}, {}
    drawn = torch.distributions.Categorical(logits=task.model(task.inputs).detach()).sample()
    chosen = {who: one for who, one in CONTENDERS.items() if job in one.builders}
    for who, one in chosen.items():
        found[who] = ready(job, task, one, drawn)
        if isinstance(found[who], tuple):
            runs[who] = found[who][0]
    # Training needs a step of each kind.
    warm, least = (0, FACTORS + 1) if job == "training" else (WARM, 1)
    seconds, failed = timed(runs, rounds, warm=warm, budget=budget, least=least)
    base = next(iter(runs))
    kinds = [kind(step) if job == "training" else "between" for step in range(rounds)]
    return [
        cell(job, name, who, found[who][1], seconds[who], seconds[base], kinds)
        if who in seconds
        else Cell(job, name, who, failed.get(who) or found[who])
        for who in chosen
    ]


def ready(job: str, task: Task, one: Contender, drawn: torch.Tensor) -> tuple[Run, str] | str:
    """What is to be timed, and what it agrees with; or why it is not."""
    if not one.installed:
        return "not installed"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = CHECKS[job](task, one.builders[job](task, drawn)) if one.checked else ""
            return one.builders[job](task, None), said
    except Exception as error:  # whatever another library says of what it does not take
        return first_line(error)


def cell(job: str, model: str, who: str, said: str, seconds: list[float], base: list[float], kinds: list[str]) -> Cell:
    """The numbers of one contender."""
    kinds = kinds[: len(seconds)]
    ratios = [one / other for one, other in zip(seconds, base, strict=True)]
    low, ratio, high = (of_kinds(ratios, kinds, at) for at in (0.25, 0.5, 0.75))
    median, mean = 1e3 * of_kinds(seconds, kinds, 0.5), 1e3 * sum(seconds) / len(seconds)
    return Cell(job, model, who, said, ratio, low, high, median, mean, len(seconds))


# -- memory ------------------------------------------------------------------------------------------------------------


def resident(name: str, arguments: Sequence[str]) -> list[Cell]:
    """Peak resident memory of training above its start, each contender in a fresh process."""
    found = []
    for who, one in CONTENDERS.items():
        if "training" not in one.builders:
            continue
        if not one.installed:
            found.append(Cell("memory", name, who, "not installed"))
            continue
        command = [sys.executable, str(Path(__file__).with_name("speed.py")), *arguments, "--models", name]
        done = subprocess.run([*command, "--resident", who], capture_output=True, text=True, check=False)
        if done.returncode:
            found.append(Cell("memory", name, who, (done.stderr.strip().splitlines() or ["no error line"])[-1]))
        else:
            mebibytes = json.loads(done.stdout.splitlines()[-1]) / 2**20
            found.append(Cell("memory", name, who, "", median=mebibytes, rounds=1))
    return found


def peak(setting: Setting, who: str) -> int:
    """Bytes above the start at the most, in some steps of training with two captures and a refresh, in this process."""
    task = setting.task()
    run = CONTENDERS[who].builders["training"](task, None)
    start = begin_peak()
    for _ in range(FACTORS + 2):
        run.go()
    return peak_bytes() - start


def begin_peak() -> int:
    """Bytes that are resident now; where the system allows it the peak is counted anew."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return status("VmRSS")
    except OSError:
        return peak_bytes()


def peak_bytes() -> int:
    """The most that has been resident; of this process alone where the system says it, not of the one it came from."""
    try:
        return status("VmHWM")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def status(word: str) -> int:
    """A line of what Linux says of this process, in bytes."""
    (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(word)]
    return int(line.split()[1]) * 1024
