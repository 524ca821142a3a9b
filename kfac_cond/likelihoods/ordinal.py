"""The ordinal likelihood: ordered classes by cumulative logits, outputs are positions on one scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import LikelihoodError
from .base import uniforms
from .elementwise import Elementwise


class Ordinal(Elementwise):
    """Ordered classes 0 .. K - 1 with P(y <= k) = sigmoid(thresholds[k] - output): proportional odds.

    Args:
        thresholds: K - 1 ascending numbers, fixed. Where they are learned, ``FromDistribution`` takes them as outputs.
        event_dims: as of ``Elementwise``.
        reduction: likewise.
        divisor: likewise.

    Raises:
        LikelihoodError: no thresholds, or some that do not ascend.

    Source: McCullagh 1980, Regression models for ordinal data, section 2.
    """

    def __init__(
        self,
        thresholds: Sequence[float],
        *,
        event_dims: tuple[int, ...] | None = None,
        reduction: str = "mean",
        divisor: float | None = None,
    ) -> None:
        super().__init__(event_dims=event_dims, reduction=reduction, divisor=divisor)
        cuts = tuple(map(float, thresholds))
        if not cuts or not all(a < b for a, b in zip((-float("inf"), *cuts), (*cuts, float("inf")), strict=True)):
            raise LikelihoodError(f"Ordinal(thresholds={thresholds!r}): expected finite numbers that ascend.")
        self.thresholds = cuts

    def _log_probabilities(self, f: Tensor) -> Tensor:
        """log p of every class, [..., K]."""
        cuts = self._cuts(f)
        above, below = F.logsigmoid(f.unsqueeze(-1) - cuts), F.logsigmoid(cuts - f.unsqueeze(-1))
        # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - e^(a - b)): no cancellation far out.
        gaps = torch.log(-torch.expm1(cuts[:-1] - cuts[1:]))
        return torch.cat([below[..., :1], below[..., 1:] + above[..., :-1] + gaps, above[..., -1:]], -1)

    def _scores(self, f: Tensor) -> Tensor:
        """d(-log p) / df of every class, [..., K]: sigmoid(f - upper) - sigmoid(lower - f)."""
        from_cut = self._cuts(f) - f.unsqueeze(-1)
        zeros = torch.zeros_like(f).unsqueeze(-1)
        return torch.cat([(-from_cut).sigmoid(), zeros], -1) - torch.cat([zeros, from_cut.sigmoid()], -1)

    def _cuts(self, f: Tensor) -> Tensor:
        return torch.tensor(self.thresholds, dtype=f.dtype, device=f.device)

    def _class(self, y: Tensor) -> Tensor:
        return y.nan_to_num().clamp(0, len(self.thresholds)).long().unsqueeze(-1)

    def _draw(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        u = uniforms(tuple(f.shape), f, generator).unsqueeze(-1)
        return (u >= (self._cuts(f) - f.unsqueeze(-1)).sigmoid()).sum(-1).to(f.dtype)

    def _score(self, f: Tensor, y: Tensor) -> Tensor:
        return self._scores(f).gather(-1, self._class(y)).squeeze(-1)

    def _log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        return self._log_probabilities(f).gather(-1, self._class(y)).squeeze(-1)

    def _information(self, f: Tensor) -> Tensor:
        return (self._log_probabilities(f).exp() * self._scores(f).square()).sum(-1)

    def _kl(self, f: Tensor, g: Tensor) -> Tensor:
        ours = self._log_probabilities(f)
        return (ours.exp() * (ours - self._log_probabilities(g))).sum(-1)

    def _unsupported(self, y: Tensor) -> Tensor:
        return ~((y >= 0) & (y <= len(self.thresholds)) & (y == y.floor()))

    def _settings(self) -> dict[str, Any]:
        return {"thresholds": self.thresholds, **super()._settings()}
