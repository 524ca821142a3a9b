"""The length of a layer's step from one method, its direction from another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .checks import is_number
from .errors import ArgumentError, StateError
from .statistics import count_dtype
from .trust_region import LayerUpdate

Magnitude = Literal["sgd", "adam", "adagrad"]
_MAGNITUDES = ("sgd", "adam", "adagrad")


class Graft:
    """Give each layer's update the norm that another method's update would have: u |m| / |u|.

    Learning rates of that method, and schedules found for it, then carry over. The damping no longer sets the length of
    a step. Momentum and weight decay stay the optimizer's, which should be SGD: it is handed the grafted update.

    Args:
        magnitude: whose norm. 'sgd': m = g, the gradient itself. 'adam': m = g / (sqrt(v) + eps), with v the
            bias-corrected moving average of g squared, entry by entry. 'adagrad': the same with v the sum of them.
        beta: of the moving average, in [0, 1).
        eps: what is added to the root, in the units of the gradient.

    Raises:
        ArgumentError: another magnitude, or a number out of range.

    Source: Agarwal et al. 2020 (arXiv:2002.11803), layer-wise grafting; Anil et al. 2020 (arXiv:2002.09018), where it
    sets the step size of a Kronecker-factored method.
    """

    needs_rate: ClassVar[bool] = False

    def __init__(self, magnitude: Magnitude = "sgd", *, beta: float = 0.999, eps: float = 1e-8) -> None:
        if magnitude not in _MAGNITUDES:
            raise ArgumentError(f"Graft({magnitude!r}): expected one of {', '.join(_MAGNITUDES)}")
        if not (is_number(beta) and 0 <= beta < 1):
            raise ArgumentError(f"Graft(beta={beta!r}): expected a number in [0, 1)")
        if not (is_number(eps) and eps > 0):
            raise ArgumentError(f"Graft(eps={eps!r}): expected a positive number")
        self.magnitude, self.beta, self.eps = magnitude, beta, eps
        #: By layer the average or sum of squares, and the weight of that average.
        self._squares: dict[str, tuple[Tensor, Tensor]] = {}

    def __repr__(self) -> str:
        return f"Graft({self.magnitude!r})"

    def scale(self, updates: Sequence[LayerUpdate]) -> list[Tensor]:
        """|m| / |u| of each layer; 1 where its update is zero."""
        return self.factors([self.measure(one) for one in updates])

    @property
    def by_layer(self) -> bool:
        """Whether a layer's factor is made where its update is; averages of entries are kept on every rank."""
        return self.magnitude == "sgd"

    def factors(self, numbers: Sequence[Tensor]) -> list[Tensor]:
        """What was measured of each layer is its factor."""
        return list(numbers)

    def state_dict(self) -> dict[str, Any]:
        """The averages by layer."""
        layers = {name: {"squares": v, "weight": weight} for name, (v, weight) in self._squares.items()}
        return {"magnitude": self.magnitude, "layers": layers}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave.

        Raises:
            StateError: it is of another magnitude.
        """
        if not isinstance(saved, Mapping) or saved.get("magnitude") != self.magnitude:
            found = saved.get("magnitude") if isinstance(saved, Mapping) else type(saved).__name__
            raise StateError(f"the state has a Graft of {found!r}, this one is of {self.magnitude!r}: pass the same")
        self._squares = {
            str(name): (entry["squares"].clone(), entry["weight"].clone()) for name, entry in saved["layers"].items()
        }

    def measure(self, one: LayerUpdate) -> Tensor:
        """|m| / |u| of a layer, 0-d; 1 where its update is zero."""
        wanted = torch.linalg.vector_norm(self._magnitude(one))
        has = torch.linalg.vector_norm(one.update)
        return torch.where(has > 0, wanted / torch.where(has > 0, has, 1), 1)

    def _magnitude(self, one: LayerUpdate) -> Tensor:
        """The update of the other method."""
        g = one.gradient
        if self.magnitude == "sgd":
            return g
        new = g.square()
        # A gradient that overflowed is not stepped with, and must not stay in the average.
        usable = torch.isfinite(new.sum())
        v, weight = self._squares.get(one.name) or (torch.zeros_like(new), _zero(new))
        v, weight = v.to(new), weight.to(new.device)
        keep, add = (self.beta, 1 - self.beta) if self.magnitude == "adam" else (1.0, 1.0)
        v = torch.where(usable, keep * v + add * new, v)
        weight = torch.where(usable, keep * weight + add, weight)
        self._squares[one.name] = v, weight
        corrected = v / torch.where(weight > 0, weight, 1).to(v) if self.magnitude == "adam" else v
        return g / (corrected.sqrt() + self.eps)


def _zero(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=count_dtype(like.device), device=like.device)
