"""How far an inspection got, in passes over the data, and the time left; where somebody can see it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

from ..errors import ArgumentError
from ..options import Batches
from ..passes import checked_batches


class Watched:
    """Data that tell a meter of each batch, and keep the first one.

    Args:
        data: batches, or a function that yields them.
    """

    def __init__(self, data: Batches) -> None:
        if not callable(data):
            checked_batches(data)
        self._data = data
        #: The first batch, once there was one.
        self.first: Any = None
        #: How many batches the last whole time through had; None before that, where the data do not say.
        self.number: int | None = None
        self.meter: Meter | None = None

    @property
    def once(self) -> bool:
        """Whether they can be gone through only once."""
        return not callable(self._data) and iter(self._data) is self._data

    def __len__(self) -> int:
        if self.number is not None:
            return self.number
        return len(self._data)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        number = 0
        for batch in self._data() if callable(self._data) else self._data:
            number += 1
            if self.first is None:
                self.first = batch
            yield batch
            if self.meter is not None:
                self.meter.batch(self)
        if not number:
            raise ArgumentError("the data yielded no batch, so there are 0 examples: expected at least one batch")
        self.number = number


class Meter:
    """A bar where ``rich`` is installed, a line for each stage elsewhere.

    Args:
        total: passes over the data that are to come.
        show: whether to show anything; None on a terminal only.
    """

    def __init__(self, total: float, *, show: bool | None) -> None:
        self.shown = sys.stderr.isatty() if show is None else show
        self.total, self.done = total, 0.0
        self._start, self._end = monotonic(), 0.0
        self._bar: Any = None
        self._task: Any = None

    def say(self, text: str) -> None:
        """A line for whoever watches."""
        if self.shown:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it stages are shown."""
        bar = _bar() if self.shown else None
        if bar is None:
            yield
            return
        with bar:
            self._bar, self._task = bar, bar.add_task("", total=self.total)
            try:
                yield
            finally:
                self._bar = None

    @contextmanager
    def stage(self, name: str, passes: float) -> Iterator[None]:
        """What is done next, and how many passes it takes."""
        self._end = self.done + passes
        self.note(name)
        if self._bar is None:
            self.say(f"{name}: {self.done:.3g} of {self.total:.3g} passes done{self._left()}")
        yield
        self._to(self._end)

    def each(self, names: Iterable[str], what: str) -> Iterator[str]:
        """Iterate over layers within a stage, and say how far that is."""
        every = list(names)
        for number, name in enumerate(every, start=1):
            self.note(f"{what} {number}/{len(every)}")
            yield name

    def note(self, what: str) -> None:
        """What is done at this moment of a stage."""
        if self._bar is not None:
            self._bar.update(self._task, description=what)

    def batch(self, data: Watched) -> None:
        """One batch more was gone through, in a stage that may go through them several times."""
        try:
            self._to(min(self._end, self.done + 1.0 / len(data)))
        except TypeError:  # data that do not say how many they are: the stage moves on at its end
            return

    def _to(self, done: float) -> None:
        self.done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def _left(self) -> str:
        if not self.done:
            return ""
        left = (monotonic() - self._start) / self.done * (self.total - self.done)
        return f", about {left:.0f} s left"


def _bar() -> Any:
    """A bar on standard error, or None without ``rich``."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    console = Console(stderr=True)
    passes = TextColumn("{task.completed:.1f} of {task.total:.1f} passes")
    columns = (TextColumn("{task.description}"), BarColumn(), passes, TimeRemainingColumn())
    return Progress(*columns, console=console, transient=console.is_terminal)
