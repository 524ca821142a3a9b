"""The command ``kfac-cond compare A B``: two saved Fishers beside each other."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .errors import KFACError
from .inspection import compare
from .inspection.overlap import TOP
from .structures import Fisher

FAILED = 2


def add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "compare",
        help="two saved Fishers beside each other, layer by layer",
        description="Compare two Fishers that Fisher.save wrote: by layer the ratio of traces, the change of the "
        "effective dimension, the overlap of the top subspaces, the cosine and the Bures distance of the blocks. "
        "Exit status: 0 done, 2 where a file cannot be read or written, or the two do not fit together.",
    )
    parser.add_argument("first", type=Path, metavar="A", help="file of the first Fisher (.safetensors)")
    parser.add_argument("second", type=Path, metavar="B", help="file of the second")
    parser.add_argument("--damping", type=float, metavar="λ", help="of d_eff (default: keeps 90 %% of A's)")
    parser.add_argument("--top", type=int, default=TOP, metavar="K", help=f"of each subspace (default: {TOP})")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page to look at as well")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.set_defaults(command=run_compare)


def run_compare(arguments: argparse.Namespace) -> int:
    """Compare, print, and write what was asked for."""
    try:
        first, second = Fisher.load(arguments.first), Fisher.load(arguments.second)
        comparison = compare(first, second, damping=arguments.damping, top=arguments.top)
        if arguments.html is not None:
            comparison.save(arguments.html)
    except OSError as error:
        print(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), file=sys.stderr)
        return FAILED
    except (KFACError, ImportError) as error:
        print(error, file=sys.stderr)
        return FAILED
    print(comparison.to_json() if arguments.json else comparison)
    return 0
