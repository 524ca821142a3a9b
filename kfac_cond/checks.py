"""What an argument must be: the checks that several constructors share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard, TypeVar

from torch import Tensor, nn

from .errors import ArgumentError

Settings = TypeVar("Settings")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether ``value`` is a whole number; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a real number that is not NaN; True and False are none, nor is a tensor."""
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def is_size(value: object) -> TypeGuard[int]:
    """Whether ``value`` is a whole number >= 1."""
    return is_whole(value) and value >= 1


def is_damping(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a finite number that is not negative."""
    return is_number(value) and 0 <= value < math.inf


def are_tensors(value: object) -> TypeGuard[Sequence[Tensor]]:
    """Whether ``value`` is a sequence of at least one tensor."""
    return isinstance(value, Sequence) and len(value) > 0 and all(isinstance(one, Tensor) for one in value)


def settings_of(value: Settings | None, kind: Callable[[], Settings], name: str) -> Settings:
    """``value`` where it is a ``kind``, the ``kind``'s defaults where it is None.

    Args:
        value: what was passed.
        kind: a class of settings, all with a default.
        name: of the argument.

    Raises:
        ArgumentError: something else was passed.
    """
    if value is None:
        return kind()
    assert isinstance(kind, type)
    if isinstance(value, kind):
        return value
    raise ArgumentError(f"{name} is {described(value)}: expected kc.{kind.__name__}(...), or None for its defaults")


def check_module(model: object) -> None:
    """Refuse a ``model`` that is no module."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is {described(model)}: expected a torch.nn.Module")


def check_seed(seed: object, where: str) -> None:
    """Refuse a ``seed`` that is neither a whole number nor None; ``where`` is whose it is."""
    if seed is not None and not is_whole(seed):
        raise ArgumentError(f"{where}(seed={seed!r}): expected a whole number, or None for torch.initial_seed()")


def checked_rules(rules: object) -> dict[str, Mapping[str, Any]]:
    """``rules`` as a dictionary of its own, seen to be a mapping from patterns to mappings; None makes an empty one."""
    if rules is None:
        return {}
    if not isinstance(rules, Mapping):
        raise ArgumentError(f"rules is {described(rules)}: expected {{pattern: dict(sharing=, damping=, ...)}}")
    for pattern, rule in rules.items():
        if not isinstance(pattern, str):
            raise ArgumentError(f"rules: the pattern {pattern!r} is {described(pattern)}: expected a str")
        if not isinstance(rule, Mapping):
            raise ArgumentError(f"rules['{pattern}'] is {described(rule)}: expected dict(sharing=, damping=, ...)")
    return dict(rules)


def check_update(outputs: object, targets: object, draws: object) -> None:
    """Refuse arguments of ``KFAC.update`` that are no tensors, or no sequence of them."""
    if not isinstance(outputs, Tensor):
        raise ArgumentError(
            f"kfac.update(outputs) got {described(outputs)}: expected the tensor that parametrises p, say output.logits"
        )
    if targets is not None and not isinstance(targets, Tensor):
        raise ArgumentError(f"kfac.update(targets=...) got {described(targets)}: expected a tensor of labels, or None")
    if not (draws is None or isinstance(draws, Tensor) or are_tensors(draws)):
        raise ArgumentError(
            f"kfac.update(draws=...) got {described(draws)}: expected a tensor of labels, or a list of at least one"
        )


def described(value: Any) -> str:
    """A value in few words: its type, and what it is where that is short."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, bool | int | float | str):
        return f"{value!r}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {[type(item).__name__ for item in value][:8]}"
    return type(value).__name__
