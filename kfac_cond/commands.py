"""The commands that look at a model or at saved factors: ``kfac-cond inspect`` and ``kfac-cond coverage``."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from .checks import described
from .coverage import coverage
from .errors import KFACError
from .inspection import inspect
from .inspection.sections import LEVELS
from .options import Options

FAILED, WRONG = 1, 2
NAMED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
"""package.module:object."""


class CommandError(Exception):
    """Something that a command was given cannot be used."""


class UsageError(CommandError):
    """Arguments that do not go together."""


def one_line(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """A command whose errors are one line on standard error and a status: 1 failed, 2 wrong arguments or a package.

    With ``--traceback`` they are raised.
    """

    def run(arguments: argparse.Namespace) -> int:
        try:
            return command(arguments)
        except Exception as error:
            if arguments.traceback:
                raise
            # Whatever the model of a user raises has a word of its kind; what is raised on purpose says it all.
            ours = isinstance(error, KFACError | CommandError | ImportError | OSError)
            said = " ".join(f"{'' if ours else f'{type(error).__name__}: '}{error}".split())
            print(f"kfac-cond: {said}", file=sys.stderr)
            return WRONG if isinstance(error, UsageError | ImportError) else FAILED

    return run


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add what every command has."""
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    parser.add_argument("--traceback", action="store_true", help="of an error show where it came from")


# -- inspect -----------------------------------------------------------------------------------------------------------


def add_inspect(commands: Any) -> None:
    """Add ``inspect`` to the commands."""
    parser = commands.add_parser(
        "inspect",
        help="what the conditional Fisher says about each layer, of saved factors or of a model over data",
        description="Print what the conditional Fisher says about each layer: of a file that Fisher.save wrote, or of "
        "a model over data. Exit status: 0 done, 1 it could not be done, 2 wrong arguments or a missing package.",
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="FACTORS.safetensors, or package.module:build_model, a module or what makes it"
    )
    parser.add_argument("--data", metavar="package.module:data", help="batches of the model, or a function of them")
    parser.add_argument("--held-out", metavar="package.module:data", help="other batches to measure divergences on")
    parser.add_argument("--likelihood", metavar="NAME", help="of the model: categorical, bernoulli, gaussian ...")
    parser.add_argument("--level", choices=LEVELS, default="standard", help="how much to look at (default: standard)")
    parser.add_argument(
        "--layer", action="append", metavar="PATTERN", help="only layers that match, as 'blocks.*.mlp'; may be repeated"
    )
    parser.add_argument("--samples", type=positive, default=4, metavar="N", help="label draws a term (default: 4)")
    parser.add_argument("--damping", type=damping, metavar="LAMBDA", help="damping that the report is read at")
    parser.add_argument("--html", type=Path, metavar="OUT.html", help="write a page to look at in a browser")
    add_common(parser)
    parser.set_defaults(command=one_line(_inspect))


def _inspect(arguments: argparse.Namespace) -> int:
    source, options = _source(arguments)
    report = inspect(
        *source,
        level=arguments.level,
        layers=arguments.layer or "*",
        samples=arguments.samples,
        damping=arguments.damping,
        options=options,
    )
    print(report.to_json() if arguments.json else report)
    if arguments.html is not None:
        report.save(arguments.html)
        print(f"the page is in {arguments.html}", file=sys.stderr)
    return 0


def _source(arguments: argparse.Namespace) -> tuple[tuple[Any, ...], Options]:
    """What ``kc.inspect`` is to look at."""
    source = arguments.source
    if Path(source).exists() or not NAMED.fullmatch(source):
        if arguments.data or arguments.likelihood or arguments.held_out:
            raise UsageError(f"--data and --likelihood are for package.module:build_model, and {source} is a file")
        return (source,), Options()
    if not (arguments.data and arguments.likelihood):
        raise UsageError(f"{source} is a model: give --data package.module:data and --likelihood NAME as well")
    options = Options(held_out=named(arguments.held_out) if arguments.held_out else None)
    return (model_of(source), named(arguments.data), arguments.likelihood), options


# -- coverage ----------------------------------------------------------------------------------------------------------


def add_coverage(commands: Any) -> None:
    """Add ``coverage`` to the commands."""
    parser = commands.add_parser(
        "coverage",
        help="what covers each parameter of a model, and at what cost",
        description="Print what covers each trainable parameter of a model, and at what cost. Exit status: 0 done, 1 "
        "it could not be done, or --strict and not all are covered by a form of their own, 2 wrong arguments.",
    )
    parser.add_argument("model", metavar="package.module:build_model", help="a module, or what makes it")
    parser.add_argument("--data", metavar="package.module:data", help="batches, to count what one forward uses")
    parser.add_argument("--strict", action="store_true", help="fail where anything has no form of its own")
    add_common(parser)
    parser.set_defaults(command=one_line(_coverage))


def _coverage(arguments: argparse.Namespace) -> int:
    if not NAMED.fullmatch(arguments.model):
        raise UsageError(f"'{arguments.model}': expected package.module:build_model")
    table = coverage(model_of(arguments.model), _first_batch(arguments.data), strict=arguments.strict)
    print(json.dumps(table.to_dict(), indent=1) if arguments.json else table)
    return 0


def _first_batch(spec: str | None) -> Any:
    if spec is None:
        return None
    data = named(spec)
    batches = iter(data() if callable(data) else data)
    try:
        return next(batches)
    except StopIteration:
        raise CommandError(f"{spec} yielded no batch: expected at least one") from None


# -- what is named on a command line -----------------------------------------------------------------------------------


def model_of(spec: str) -> nn.Module:
    """The model that ``package.module:object`` is, or makes.

    Raises:
        CommandError: it cannot be imported, is none, or what makes it failed.
    """
    found = named(spec)
    if not isinstance(found, nn.Module) and callable(found):
        try:
            with _working_folder():
                found = found()
        except Exception as error:
            raise CommandError(f"{spec}() failed: {type(error).__name__}: {error}") from error
    if not isinstance(found, nn.Module):
        raise CommandError(f"{spec} is {described(found)}: expected a torch.nn.Module, or a function that returns one")
    return found


def named(spec: str) -> Any:
    """The object that ``package.module:object`` names; modules are looked for in the working folder as well.

    Raises:
        CommandError: no such module or object, or a module that fails when it is imported.
    """
    if not NAMED.fullmatch(spec):
        raise UsageError(f"'{spec}': expected package.module:object")
    module, _, path = spec.partition(":")
    try:
        with _working_folder():
            found: Any = importlib.import_module(module)
    except Exception as error:
        raise CommandError(f"{spec}: {module} cannot be imported: {type(error).__name__}: {error}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise CommandError(f"{spec}: {module} has no '{path}'")
        found = getattr(found, part)
    return found


@contextmanager
def _working_folder() -> Iterator[None]:
    """The working folder is looked in first, as it is by ``python -m``."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")


def positive(text: str) -> int:
    """A whole number >= 1, as an argument."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number >= 1")
    return number


def damping(text: str) -> float:
    """A finite number >= 0, as an argument."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a finite number >= 0, as 1e-3")
    return number
