"""The Bernoulli likelihood: independent binary labels, outputs are logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import LikelihoodError
from .base import uniforms
from .elementwise import Elementwise


class Bernoulli(Elementwise):
    """Binary labels with probabilities sigmoid(outputs).

    Args:
        event_dims: the dimensions whose elements make one term, never 0; () makes every element a term. None: (N,) is
            N terms, of (N, C) the vector of C is one term (summed over pixels, averaged over examples), and more
            dimensions are refused.
        pos_weight: weight of label 1, broadcast to the outputs as nn.BCEWithLogitsLoss does: kappa = pw y + 1 - y.
            Needs data labels, and event_dims=().
        weight: weight of each element, broadcast to the outputs. Needs event_dims=(). Neither enters M.
        reduction: 'mean' over terms or 'sum'.
        divisor: M, where it is neither.

    Data labels may be any in [0, 1].

    Raises:
        LikelihoodError: an argument of the wrong kind.

    Source: Martens 2020 (arXiv:1412.1193), section 9: for logits the Fisher is the Hessian p (1 - p) of -log p.
    """

    def __init__(
        self,
        *,
        event_dims: tuple[int, ...] | None = None,
        pos_weight: Tensor | None = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
        divisor: float | None = None,
    ) -> None:
        super().__init__(event_dims=event_dims, reduction=reduction, divisor=divisor)
        for name, value in (("pos_weight", pos_weight), ("weight", weight)):
            if value is not None and not (isinstance(value, Tensor) and value.is_floating_point()):
                raise LikelihoodError(f"Bernoulli({name}={value!r}): expected a floating tensor.")
        self.pos_weight = None if pos_weight is None else pos_weight.detach()
        self.element_weight = None if weight is None else weight.detach()
        # Shared by bound copies: one move to each device, not one a batch.
        self._moved: dict[tuple[str, torch.device], Tensor] = {}

    @property
    def needs_targets(self) -> bool:
        """Whether pos_weight was given and no data labels are bound."""
        return self.targets is None and self.pos_weight is not None

    def check(self, outputs: Tensor) -> None:
        """Refuse outputs without a stated event, and labels or weights that do not fit the outputs."""
        super().check(outputs)
        shape, axes = tuple(outputs.shape), self.event_axes(outputs)
        for name, value in (("pos_weight", self.pos_weight), ("weight", self.element_weight)):
            if value is None:
                continue
            if axes:
                raise LikelihoodError(
                    f"{self!r}: a {name} gives elements of one event different weights (outputs of shape {shape}, "
                    f"event dimensions {axes}): pass event_dims=(), with divisor=M where the loss does not divide by "
                    f"elements."
                )
            if not _broadcasts(tuple(value.shape), shape):
                raise LikelihoodError(
                    f"{self!r}: the {name} has shape {tuple(value.shape)}, expected one that broadcasts to that of the "
                    f"outputs, {shape}."
                )

    def term_weight(self, outputs: Tensor) -> Tensor | None:
        """weight (pw y + 1 - y) of each element, times bound weights; None where all are 1."""
        kappa = super().term_weight(outputs)
        weight = self._on("element_weight", self.element_weight, outputs)
        if weight is not None:
            kappa = weight.expand(outputs.shape) if kappa is None else kappa * weight
        pos_weight = self._on("pos_weight", self.pos_weight, outputs)
        if pos_weight is not None:
            if self.targets is None:
                raise LikelihoodError(
                    f"{self!r}: pos_weight needs the data labels, and none are bound: call kfac.update(outputs, "
                    f"targets=labels), or bind(targets=labels)."
                )
            y = self.targets.to(pos_weight.dtype)
            positive = pos_weight * y + 1 - y
            kappa = positive if kappa is None else kappa * positive
        return kappa

    def _on(self, name: str, value: Tensor | None, outputs: Tensor) -> Tensor | None:
        if value is None:
            return None
        if value.device != outputs.device:
            key = (name, outputs.device)
            if key not in self._moved:
                self._moved[key] = value.to(outputs.device)
            value = self._moved[key]
        return value.to(torch.promote_types(outputs.dtype, torch.float32))

    def _draw(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        return (uniforms(tuple(f.shape), f, generator) < f.sigmoid()).to(f.dtype)

    def _score(self, f: Tensor, y: Tensor) -> Tensor:
        return f.sigmoid() - y

    def _log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        return y * F.logsigmoid(f) + (1 - y) * F.logsigmoid(-f)

    def _information(self, f: Tensor) -> Tensor:
        return f.sigmoid() * (-f).sigmoid()

    def _kl(self, f: Tensor, g: Tensor) -> Tensor:
        one = f.sigmoid() * (F.logsigmoid(f) - F.logsigmoid(g))
        return one + (-f).sigmoid() * (F.logsigmoid(-f) - F.logsigmoid(-g))

    def _unsupported(self, y: Tensor) -> Tensor:
        return (y != 0) & (y != 1)

    def _impossible(self, y: Tensor) -> Tensor:
        return ~((y >= 0) & (y <= 1))

    def _settings(self) -> dict[str, Any]:
        given = {"pos_weight": self.pos_weight, "weight": self.element_weight}
        shapes = {name: f"shape {tuple(value.shape)}" for name, value in given.items() if value is not None}
        return {**super()._settings(), **shapes}


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether one shape broadcasts to another without enlarging it."""
    trailing = to[len(to) - len(shape) :]
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape, trailing, strict=True))
