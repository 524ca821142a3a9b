"""The command ``kfac-cond compare A B``: two saved Fishers beside each other."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .commands import add_common, damping, one_line, positive
from .inspection import compare
from .inspection.overlap import TOP
from .structures import Fisher


def add_compare(commands: Any) -> None:
    """Add ``compare`` to the commands."""
    parser = commands.add_parser(
        "compare",
        help="two saved Fishers beside each other, layer by layer",
        description="Compare two Fishers that Fisher.save wrote: by layer the ratio of traces, the change of the "
        "effective dimension, the overlap of the top subspaces, the cosine and the Bures distance of the blocks. Exit "
        "status: 0 done, 1 it could not be done, 2 wrong arguments or a missing package.",
    )
    parser.add_argument("first", type=Path, metavar="A", help="file of the first Fisher (.safetensors)")
    parser.add_argument("second", type=Path, metavar="B", help="file of the second")
    parser.add_argument("--damping", type=damping, metavar="LAMBDA", help="of d_eff (default: keeps 90 %% of A's)")
    parser.add_argument("--top", type=positive, default=TOP, metavar="K", help=f"of each subspace (default: {TOP})")
    parser.add_argument("--html", type=Path, metavar="OUT.html", help="write a page to look at in a browser")
    add_common(parser)
    parser.set_defaults(command=one_line(_compare))


def _compare(arguments: argparse.Namespace) -> int:
    first, second = Fisher.load(arguments.first), Fisher.load(arguments.second)
    comparison = compare(first, second, damping=arguments.damping, top=arguments.top)
    print(comparison.to_json() if arguments.json else comparison)
    if arguments.html is not None:
        comparison.save(arguments.html)
        print(f"the page is in {arguments.html}", file=sys.stderr)
    return 0
