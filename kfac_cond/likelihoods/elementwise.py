"""What likelihoods of independent elements share: an event is some elements together, its Fisher is diagonal."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import LikelihoodError
from . import events
from .base import Likelihood


class Elementwise(Likelihood):
    """Labels shaped as the outputs, whose elements are independent given the outputs.

    A subclass says, for each element, how to draw, the score, log p, the Fisher information and the KL.

    Args:
        event_dims: the dimensions whose elements make one term, never 0; () makes every element a term. None: (N,) is
            N terms, of (N, C) the vector of C is one term, and more dimensions are refused.
        reduction: 'mean' over terms or 'sum'.
        divisor: M, where it is neither.

    Raises:
        LikelihoodError: event_dims that are no tuple of dimensions, or contain 0.
    """

    def __init__(
        self, *, event_dims: tuple[int, ...] | None = None, reduction: str = "mean", divisor: float | None = None
    ) -> None:
        super().__init__(reduction=reduction, divisor=divisor)
        if event_dims is not None:
            dims = tuple(event_dims) if isinstance(event_dims, tuple | list) else None
            if dims is None or any(not isinstance(dim, int) or isinstance(dim, bool) for dim in dims):
                raise LikelihoodError(f"{self._name}(event_dims={event_dims!r}): expected a tuple of integers.")
            if 0 in dims or len(set(dims)) < len(dims):
                raise LikelihoodError(
                    f"{self._name}(event_dims={event_dims!r}): expected different dimensions, none of them 0, which "
                    f"counts examples."
                )
            event_dims = dims
        self.event_dims = event_dims

    @abstractmethod
    def _draw(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        """Labels shaped as ``f``, which is in float32 at least; drawn in the order of the elements."""

    @abstractmethod
    def _score(self, f: Tensor, y: Tensor) -> Tensor:
        """d(-log p(y | f)) / df of each element."""

    @abstractmethod
    def _log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        """log p(y | f) of each element."""

    @abstractmethod
    def _information(self, f: Tensor) -> Tensor:
        """E_y[score^2] of each element."""

    @abstractmethod
    def _kl(self, f: Tensor, g: Tensor) -> Tensor:
        """KL(p(. | f) || p(. | g)) of each element."""

    @abstractmethod
    def _unsupported(self, y: Tensor) -> Tensor:
        """Where a drawn label lies outside the support, as bool."""

    def _impossible(self, y: Tensor) -> Tensor:
        """Where a data label cannot be one, as bool; data labels may be softer than draws."""
        return self._unsupported(y)

    def check(self, outputs: Tensor) -> None:
        """Refuse outputs without a stated event, and data labels that are not shaped as the outputs."""
        super().check(outputs)
        if self.targets is not None:
            self._check_same("targets", self.targets, tuple(outputs.shape))

    @torch.no_grad()
    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Labels shaped as the outputs, one an element."""
        self.check(outputs)
        return self._draw(events.widened(outputs), generator)

    @torch.no_grad()
    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The gradient of -log p at each element, zero at invalid terms; shape and dtype of the outputs."""
        f = self._check_labels(outputs, labels)
        score = self._score(f, labels.to(f.dtype)).to(outputs.dtype)
        valid = self.valid(outputs)
        return score if valid is None else score.masked_fill(~self.spread(valid, outputs), 0.0)

    def log_prob(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """log p of each term, summed over its event, zero at invalid terms; differentiable in the outputs."""
        f = self._check_labels(outputs, labels)
        y = events.to_events(labels.to(f.dtype), self.event_axes(outputs))
        return self._zero_invalid(self._log_prob(self._events(outputs), y).sum(-1), outputs)

    def fisher(self, outputs: Tensor) -> Tensor:
        """The diagonal matrix of the elements' information, of each term: [*terms, E, E]."""
        self.check(outputs)
        return self._zero_invalid(torch.diag_embed(self._information(self._events(outputs))), outputs)

    def fisher_sqrt(self, outputs: Tensor) -> Tensor:
        """The diagonal matrix of its square roots: [*terms, E, E]."""
        self.check(outputs)
        return self._zero_invalid(torch.diag_embed(self._information(self._events(outputs)).sqrt()), outputs)

    def _term_columns(self, outputs: Tensor) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
        roots = self._information(self._events(outputs)).sqrt()
        for at in self._term_indices(outputs):
            root = roots[at]
            for k in range(root.shape[-1]):
                column = torch.zeros_like(root)
                column[:, k] = root[:, k]
                yield at, column

    def kl_terms(self, outputs: Tensor, other: Tensor) -> Tensor:
        """The KL divergence of each term, summed over its event, zero at invalid terms."""
        self.check(outputs)
        self._check_same("other outputs", other, tuple(outputs.shape))
        return self._zero_invalid(self._kl(self._events(outputs), self._events(other)).sum(-1), outputs)

    def invalid_labels(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Whether some valid term's label lies outside the support."""
        self._check_labels(outputs, labels)
        return self._any_valid(self._in_event(self._unsupported(labels), outputs), outputs)

    def invalid_targets(self, outputs: Tensor) -> Tensor:
        """Whether some valid term's bound data label cannot be one."""
        if self.targets is None:
            return super().invalid_targets(outputs)
        self.check(outputs)
        return self._any_valid(self._in_event(self._impossible(self.targets), outputs), outputs)

    def _in_event(self, flags: Tensor, outputs: Tensor) -> Tensor:
        return events.to_events(flags, self.event_axes(outputs)).any(-1)

    def _check_labels(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the outputs in float32 at least."""
        self.check(outputs)
        self._check_same("labels", labels, tuple(outputs.shape))
        return events.widened(outputs)

    def _settings(self) -> dict[str, Any]:
        return {} if self.event_dims is None else {"event_dims": self.event_dims}
