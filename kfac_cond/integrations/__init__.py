"""Thin: each hands a KFAC the model, the optimizers and the checkpoints of a loop that is somebody else's.

Nothing here is imported unless it is asked for by name, ``from kfac_cond.integrations.lightning import KFACCallback``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any


def library(extra: str, *names: str) -> Any:
    """The first of these modules that is installed; one that is imported already goes before the others.

    Args:
        extra: what installs it.
        names: of modules that are the same to us.

    Raises:
        ImportError: none is installed.
    """
    for name in sorted(names, key=lambda name: name not in sys.modules):
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            return importlib.import_module(name)
    raise ImportError(
        f"kfac_cond.integrations.{extra} needs {' or '.join(names)}, not installed here: "
        f"pip install 'kfac-cond[{extra}]'"
    )
