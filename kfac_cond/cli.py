"""The command line: a demonstration, and looks inside a model or saved factors."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from . import __version__
from .commands import add_coverage, add_inspect, positive
from .compare_command import add_compare

#: What the demo imports besides the library, and the name each is installed by.
DEMO_REQUIRES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}
DEMO_FILES = (
    "demo.py",
    "demo_tasks.py",
    "demo_training.py",
    "demo_display.py",
    "demo_report.py",
    "example_results.py",
)
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after the program's name; by default those it was called with.

    Returns:
        The exit status: 0 done, 1 where what was asked for could not be done, 2 where something the command needs is
        missing (for ``demo`` also where its folder cannot be written), 130 interrupted.

    Raises:
        SystemExit: from argparse, after ``--help``, ``--version`` (0) or wrong arguments (2).
    """
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kfac-cond", description="K-FAC of the conditional Fisher, for PyTorch.")
    parser.add_argument("--version", action="version", version=f"kfac-cond {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    add_inspect(commands)
    add_coverage(commands)
    add_compare(commands)
    return parser


# -- demo --------------------------------------------------------------------------------------------------------------


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="train on scikit-learn's digits: SGD, Adam and SGD + K-FAC side by side",
        description="Train a deep autoencoder and a classifier on scikit-learn's digits with SGD, Adam and SGD + "
        "K-FAC, over the same batches and seeds; print a table, save a picture and the numbers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--task", choices=("autoencoder", "classifier", "all"), default="all", help="what to train")
    parser.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        default=argparse.SUPPRESS,
        help="optimizer steps a run (default: the task's own)",
    )
    parser.add_argument("--seeds", type=positive, metavar="N", default=3, help="runs of each optimizer")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("demo-results"), help="where results are saved")
    parser.set_defaults(command=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    missing = [name for module, name in DEMO_REQUIRES.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"the demo needs {', '.join(missing)}: pip install 'kfac-cond[demo]'", file=sys.stderr)
        return 2
    folder = _examples()
    if folder is None:
        print(
            "the demo's files are not beside this installation: reinstall kfac-cond, or run it from a source tree",
            file=sys.stderr,
        )
        return 2
    demo = _load(folder / "demo.py")
    status: int = demo.run(
        task=arguments.task, steps=getattr(arguments, "steps", None), seeds=arguments.seeds, out=arguments.out
    )
    return status


def _examples() -> Path | None:
    """The examples: inside an installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parent
    folders = (package / "_examples", package.parent / "examples")
    # Beside an installed package lie other people's: a folder called examples is not enough.
    return next((folder for folder in folders if all((folder / name).is_file() for name in DEMO_FILES)), None)


def _load(path: Path) -> ModuleType:
    """Import a script by its path; its own siblings are importable meanwhile, as they are when it is run."""
    spec = importlib.util.spec_from_file_location(f"kfac_cond_examples_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _importable(path.parent):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


if __name__ == "__main__":
    sys.exit(main())
