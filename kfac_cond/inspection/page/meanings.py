"""What the numbers of a page are: the docstrings of the classes that they come from."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from ..spectra import Spectrum

Meanings = list[tuple[str, str]]
"""(names, what they are), in order."""

ARGUMENTS = re.compile(r"^Args:\n((?:[ ]{4}.*\n|\n)*)", re.MULTILINE)
ARGUMENT = re.compile(r"^[ ]{4}(\w[\w, ]*): ((?:.*\n)(?:[ ]{8}.*\n)*)", re.MULTILINE)


def of_report(report: Any) -> dict[str, Meanings]:
    """By section, of the first layer that has it; those of the whole begin with 'whole'."""
    found: dict[str, Meanings] = {}
    for layer in report.values() if hasattr(report, "values") else ():
        for section in fields(layer):
            value = getattr(layer, section.name)
            if is_dataclass(value) and section.name not in found:
                found[section.name] = of_section(value)
    whole = getattr(report, "whole", None)
    if is_dataclass(whole):
        inner = {one.name for one in fields(whole) if is_dataclass(getattr(whole, one.name))}
        found["whole"] = [
            (names, text) for names, text in described(type(whole)) if names.replace(" ", "_") not in inner
        ]
        found |= {f"whole {name}": of_section(getattr(whole, name)) for name in inner}
    return found


def of_comparison(comparison: Any) -> dict[str, Meanings]:
    """Of a layer, of all of them, and of what moved."""
    layer = next(iter(comparison.values()))
    found = {"layer": described(type(layer)), "whole": described(type(comparison.whole))}
    return found if layer.weights is None else {**found, "weights": described(type(layer.weights))}


def of_section(section: Any) -> Meanings:
    """What the fields of a dataclass are, those of dataclasses inside it after them."""
    if isinstance(section, Spectrum):
        return of_properties(Spectrum)
    found = described(type(section))
    inner: dict[type, list[str]] = {}
    for one in fields(section):
        value = getattr(section, one.name)
        if is_dataclass(value):
            inner.setdefault(type(value), []).append(one.name.replace("_", " "))
    for of, where in inner.items():
        found += [(f"{' and '.join(where)}: {names}", text) for names, text in described(of)]
    return found


def described(of: type) -> Meanings:
    """The arguments that a docstring lists, with underscores as spaces."""
    text = f"{inspect.getdoc(of) or ''}\n"
    listed = ARGUMENTS.search(text)
    every: Iterable[tuple[str, str]] = ARGUMENT.findall(listed[1]) if listed else ()
    return [(names.replace("_", " "), _in_line(said)) for names, said in every]


def of_properties(of: type) -> Meanings:
    """The first paragraph of what each property of a class says of itself."""
    every = ((name, value) for name, value in vars(of).items() if isinstance(value, property))
    return [
        (name.replace("_", " "), _in_line((inspect.getdoc(value) or "").split("\n\n")[0]))
        for name, value in every
        if not name.startswith("_")
    ]


def _in_line(text: str) -> str:
    """Text in one line, without the marks of code."""
    return " ".join(text.split()).replace("``", "")
