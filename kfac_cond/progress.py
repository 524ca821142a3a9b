"""A progress line for long loops, where somebody can see it."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable
from typing import TypeVar

T = TypeVar("T")


def tracked(items: Iterable[T], *, description: str, show: bool | None) -> Generator[T, None, None]:
    """Iterate with a bar, rate and time left on standard error.

    Args:
        items: what to iterate over; its ``len`` is shown where it has one.
        description: what is being done.
        show: True or False; None shows it on a terminal where ``rich`` is installed.
    """
    if show is None and not sys.stderr.isatty():
        show = False
    if show is False:
        yield from items
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError as error:
        if show is None:
            yield from items
            return
        raise ImportError("a progress bar needs rich: pip install rich, or pass progress=False") from error
    console, rate = Console(stderr=True), TextColumn("{task.fields[rate]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    # On a terminal it goes away; in a log file one line stays.
    with Progress(*columns, console=console, transient=console.is_terminal) as progress:
        task = progress.add_task(description, total=_length(items), rate="")
        for item in items:
            yield item
            speed = progress.tasks[0].speed
            progress.update(task, advance=1, rate="" if speed is None else f"{speed:.3g}/s")


def _length(items: object) -> int | None:
    try:
        return len(items)  # type: ignore[arg-type]
    except TypeError:
        return None
