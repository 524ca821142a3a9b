"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write that takes the place of ``path`` in one step at the end, and is gone after an exception.

    It lies in the same folder, and has the mode of any other file that is made there.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.{uuid4().hex}.partial")
    try:
        with open(partial, "xb") as made:
            mode = os.fstat(made.fileno()).st_mode
        yield partial
        os.chmod(partial, mode)
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
