"""Dataclasses as what JSON and tables hold."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from ..files import replaced


def plain(value: Any) -> Any:
    """A value as JSON holds it: dataclasses and mappings as dicts, sequences as lists, what is neither as text."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of dicts as one, keys joined by dots; of lists only those of the shape are kept, as text."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif key == "shape":
            found[f"{prefix}{key}"] = " x ".join(map(str, value))
        elif not isinstance(value, list):
            found[f"{prefix}{key}"] = value
    return found


def finite(value: Any) -> Any:
    """The same tree with None for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def written(tree: Any, path: str | os.PathLike[str] | None = None) -> str:
    """A tree as JSON, numbers that are not finite as null; into a file as well where there is a path."""
    text = json.dumps(finite(tree), allow_nan=False, indent=1)
    if path is not None:
        with replaced(path) as file:
            file.write_text(text + "\n", encoding="utf-8")
    return text
