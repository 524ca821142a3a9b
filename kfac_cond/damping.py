"""How much is added to a block before it is inverted, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .checks import is_damping, is_number
from .errors import ArgumentError
from .linalg.damping import relative_damping
from .linalg.sides import Side

Rule = Literal["factored", "exact"]


@dataclass(frozen=True)
class Damping:
    """The lambda of F + lambda I, in the units of the mean loss's Fisher: scale the loss, and lambda scales with it.

    Args:
        value: lambda >= 0, or a callable of the step.
        rule: 'factored' inverts (G + sqrt(lambda)/pi I) (x) (A + pi sqrt(lambda) I) by Cholesky; 'exact' inverts
            G (x) A + lambda I in the eigenbasis of A and G.
        relative: lambda is ``value`` times the block's mean eigenvalue, so that it follows the scale of each layer.
        floor: the smallest lambda a relative damping gives.

    Source: Martens & Grosse 2015 (arXiv:1503.05671), sections 6.2 and 6.3.
    """

    value: float | Callable[[int], float] = 1e-2
    rule: Rule = "factored"
    relative: bool = False
    floor: float = 1e-10

    def __post_init__(self) -> None:
        if not callable(self.value):
            _checked(self.value, "damping")
        if self.rule not in ("factored", "exact"):
            raise ArgumentError(f"Damping(rule={self.rule!r}): expected 'factored' or 'exact'")
        if not isinstance(self.relative, bool):
            raise ArgumentError(f"Damping(relative={self.relative!r}): expected True or False")
        if not (is_number(self.floor) and self.floor > 0):
            raise ArgumentError(f"Damping(floor={self.floor!r}): expected a positive number")

    def at(self, step: int) -> float:
        """The number at ``step``."""
        return _checked(self.value(step), f"damping at step {step}") if callable(self.value) else self.value

    def described(self, step: int) -> str:
        """The number at ``step`` and how it is added, in words."""
        return f"{self.at(step):g} ({self.rule}{', relative' if self.relative else ''})"

    def of(self, A: Side, G: Side, *, step: int, override: float | None = None) -> Tensor:
        """lambda of one block as a tensor of its leading shape; ``override`` is the layer's own number."""
        value = self.at(step) if override is None else override
        if self.relative:
            return relative_damping(A, G, value, self.floor)
        return torch.full(A.shape[:-2], value, dtype=A.dtype, device=A.device)


@dataclass(frozen=True)
class DampingNow:
    """The damping of a step: the layer's own where a rule gives it one, else its parameter group's, else that of all.

    Args:
        damping: of all layers.
        step: the count of steps.
        groups: what parameter groups say, by layer name.
    """

    damping: Damping
    step: int
    groups: Mapping[str, float] = field(default_factory=dict)

    @property
    def rule(self) -> Rule:
        """How it is added."""
        return self.damping.rule

    def of(self, name: str, A: Side, G: Side, *, own: float | None) -> Tensor:
        """lambda of a layer's block as a tensor of its leading shape; ``own`` is what its rule says."""
        override = self.groups.get(name) if own is None else own
        return self.damping.of(A, G, step=self.step, override=override)


def as_damping(damping: Damping | float | Callable[[int], float]) -> Damping:
    """A Damping from what a user passes for it."""
    return damping if isinstance(damping, Damping) else Damping(damping)


def _checked(value: object, what: str) -> float:
    if is_damping(value):
        return float(value)
    raise ArgumentError(
        f"{what} = {value!r}: expected a finite number >= 0, a callable of the step, or kc.Damping(...)"
    )
