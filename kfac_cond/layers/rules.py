"""Settings of layers by pattern of their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch

from ..checks import is_damping, is_number, is_size
from ..errors import ArgumentError

Sharing = Literal["expand", "reduce"]


@dataclass(frozen=True)
class LayerRule:
    """What may be said of the layers that a pattern names; None leaves the default.

    Args:
        structure: name of the block's storage; training takes 'kfac', 'ekfac', 'tkfac' and 'diagonal', ``estimate``
            others as well.
        sharing: 'expand' or 'reduce', how positions enter the factors (Eschenhagen et al. 2023, arXiv:2311.00636).
        damping: this layer's damping in place of the preconditioner's.
        exclude: leave the layer's gradient as it is.
        max_factor_dim: size of the largest side that is kept whole; a larger one is kept as its diagonal.
        fraction: share of the positions that factors are made of in training, drawn anew for each call of the layer.
        storage: dtype that training keeps the moving averages of A and G in, ``torch.bfloat16``; None for that of the
            statistics.
    """

    structure: str | None = None
    sharing: Sharing | None = None
    damping: float | None = None
    exclude: bool = False
    max_factor_dim: int | None = None
    fraction: float | None = None
    storage: torch.dtype | None = None


#: Where nothing is said.
PLAIN = LayerRule()


def settings_of_rules(
    rules: Mapping[str, Mapping[str, Any]], names: Mapping[str, tuple[str, ...]]
) -> dict[str, LayerRule]:
    """What is said of each layer; the later of two matching patterns wins, key by key.

    Args:
        rules: settings by pattern (``fnmatch``); a leading ``*.`` stands for the model itself too.
        names: by layer the names that a pattern may match.

    Raises:
        ArgumentError: a pattern that matches nothing, an unknown setting, or a value it cannot have.
    """
    known = {field.name for field in fields(LayerRule)}
    settings = dict.fromkeys(names, PLAIN)
    for pattern, rule in rules.items():
        matched = [name for name, by in names.items() if any(matches(one, pattern) for one in by)]
        if not matched:
            raise ArgumentError(
                f"rules: the pattern '{pattern}' matches no module with parameters. The modules are: "
                f"{', '.join(sorted(settings)[:20])}{' ...' if len(settings) > 20 else ''}"
            )
        unknown = sorted(set(rule) - known)
        if unknown:
            raise ArgumentError(f"rules['{pattern}']: unknown setting {unknown}; known are {sorted(known)}")
        _check_values(pattern, rule)
        settings.update({name: replace(settings[name], **rule) for name in matched})
    return settings


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern reaches a name: '*.head' the one of the model itself as well as those further inside."""
    return fnmatchcase(name, pattern) or (pattern.startswith("*.") and fnmatchcase(f".{name}", pattern))


def _check_values(pattern: str, rule: Mapping[str, Any]) -> None:
    """Refuse a value that a setting of a rule cannot have."""
    fits: dict[str, tuple[Callable[[Any], bool], str]] = {
        "sharing": (lambda value: value in (None, "expand", "reduce"), "'expand' or 'reduce'"),
        "damping": (lambda value: value is None or is_damping(value), "a finite number >= 0"),
        "structure": (lambda value: value is None or isinstance(value, str), "the name of a structure"),
        "exclude": (lambda value: isinstance(value, bool), "True or False"),
        "max_factor_dim": (lambda value: value is None or is_size(value), "a whole number >= 1"),
        "fraction": (lambda value: value is None or (is_number(value) and 0 < value <= 1), "a number in (0, 1]"),
        "storage": (lambda value: value in (None, torch.bfloat16), "torch.bfloat16 or None"),
    }
    for key, value in rule.items():
        allowed, expected = fits[key]
        if not allowed(value):
            raise ArgumentError(f"rules['{pattern}']: {key}={value!r}, expected {expected}")
