"""What likelihoods share whose event is a vector along one dimension, with labels along the same dimension."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..errors import LikelihoodError
from . import events
from .base import Likelihood


class Vectorwise(Likelihood):
    """One term is a vector of outputs along ``dim``; its label is a vector along the same dimension.

    A subclass says, for outputs [*terms, E] and labels [*terms, L], how to draw, the score, log p, the square root of
    the Fisher and the KL.

    Args:
        dim: the dimension of the vector, never 0.
        reduction: 'mean' over terms or 'sum'.
        divisor: M, where it is neither.

    Raises:
        LikelihoodError: a dim that is no integer, or 0.
    """

    def __init__(self, *, dim: int = -1, reduction: str = "mean", divisor: float | None = None) -> None:
        super().__init__(reduction=reduction, divisor=divisor)
        if not isinstance(dim, int) or isinstance(dim, bool) or dim == 0:
            raise LikelihoodError(
                f"{self._name}(dim={dim!r}): expected the dimension of the outputs that makes one term, not 0, which "
                f"counts examples."
            )
        self.dim = dim
        self.event_dims = (dim,)

    @abstractmethod
    def _draw(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        """Labels [*terms, L]; ``f`` in float32 at least."""

    @abstractmethod
    def _score(self, f: Tensor, y: Tensor) -> Tensor:
        """d(-log p(y | f)) / df, [*terms, E]."""

    @abstractmethod
    def _log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        """log p(y | f), [*terms]."""

    def _root(self, f: Tensor) -> Tensor:
        """S with S S^T the Fisher, [*terms, E, K]."""
        raise self._missing("fisher_sqrt", "[*terms, E, K] whose product with its transpose is the Fisher of each term")

    def _kl(self, f: Tensor, g: Tensor) -> Tensor:
        """KL(p(. | f) || p(. | g)), [*terms]."""
        raise self._missing("kl_terms", "the KL divergence of each term, shaped as the terms")

    def _unsupported(self, y: Tensor) -> Tensor:
        """Where a label [*terms, L] lies outside the support, [*terms]."""
        return ~y.isfinite().all(-1)

    def _label_size(self, size: int) -> int:
        """L, given E."""
        return size

    @torch.no_grad()
    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Labels along ``dim``, one vector a term."""
        self.check(outputs)
        axes = self.event_axes(outputs)
        labels = self._draw(events.to_events(events.widened(outputs), axes).contiguous(), generator)
        return events.from_events(labels, axes, tuple(labels.shape[-1:]))

    @torch.no_grad()
    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The gradient of -log p of each term, zero at invalid terms; shape and dtype of the outputs."""
        y = self._labels(outputs, labels)
        score = self._zero_invalid(self._score(self._events(outputs), y), outputs).to(outputs.dtype)
        return events.from_events(score, self.event_axes(outputs), self._event_sizes(outputs))

    def log_prob(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """log p of each term, zero at invalid terms; differentiable in the outputs."""
        y = self._labels(outputs, labels)
        return self._zero_invalid(self._log_prob(self._events(outputs), y), outputs)

    def fisher_sqrt(self, outputs: Tensor) -> Tensor:
        """S with S S^T = fisher of each term, [*terms, E, K], zero at invalid terms."""
        self.check(outputs)
        return self._zero_invalid(self._root(self._events(outputs)), outputs)

    def kl_terms(self, outputs: Tensor, other: Tensor) -> Tensor:
        """The KL divergence of each term, zero at invalid terms."""
        self.check(outputs)
        self._check_same("other outputs", other, tuple(outputs.shape))
        return self._zero_invalid(self._kl(self._events(outputs), self._events(other)), outputs)

    def invalid_labels(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Whether some valid term's label lies outside the support."""
        return self._any_valid(self._unsupported(self._labels(outputs, labels)), outputs)

    def _labels(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Labels as [*terms, L], in the outputs' dtype."""
        self.check(outputs)
        (axis,) = self.event_axes(outputs)
        shape = list(outputs.shape)
        shape[axis] = self._label_size(shape[axis])
        self._check_same("labels", labels, tuple(shape))
        return events.to_events(labels.to(events.widened(outputs).dtype), (axis,))

    def _settings(self) -> dict[str, Any]:
        return {"dim": self.dim}
