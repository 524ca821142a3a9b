"""A likelihood at a temperature: the outputs are divided by it before they parametrise p."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import LikelihoodError
from .base import Likelihood, is_positive


class Tempered(Likelihood):
    """p(y | outputs / temperature) of another likelihood, whose terms, weights and divisor it keeps.

    Args:
        likelihood: what the divided outputs parametrise.
        temperature: T > 0. Scores are divided by T and the Fisher by T^2.

    Raises:
        LikelihoodError: no likelihood, or a temperature that is not a positive number.

    Source: Guo et al. 2017 (arXiv:1706.04599), section 4.2.
    """

    def __init__(self, likelihood: Likelihood, temperature: float) -> None:
        if not isinstance(likelihood, Likelihood):
            raise LikelihoodError(f"Tempered({likelihood!r}): expected a likelihood, such as kc.Categorical().")
        if not is_positive(temperature):
            raise LikelihoodError(f"Tempered(temperature={temperature!r}): expected a positive number.")
        super().__init__(reduction=likelihood.reduction, divisor=likelihood.divisor)
        self.likelihood = likelihood
        self.temperature = float(temperature)

    def bind(self, targets: Tensor | None = None, mask: Tensor | None = None, weight: Tensor | None = None) -> Tempered:
        """A copy whose inner likelihood knows the batch."""
        bound = copy.copy(self)
        bound.likelihood = self.likelihood.bind(targets, mask, weight)
        bound.targets = bound.likelihood.targets
        return bound

    @property
    def needs_targets(self) -> bool:
        """Whether the inner likelihood needs data labels."""
        return self.likelihood.needs_targets

    def check(self, outputs: Tensor) -> None:
        """Refuse what the inner likelihood refuses."""
        self.likelihood.check(outputs)

    def event_axes(self, outputs: Tensor) -> tuple[int, ...]:
        """Those of the inner likelihood."""
        return self.likelihood.event_axes(outputs)

    def terms(self, outputs: Tensor) -> Tensor:
        """M of the inner likelihood."""
        return self.likelihood.terms(outputs)

    def valid(self, outputs: Tensor) -> Tensor | None:
        """Valid terms of the inner likelihood."""
        return self.likelihood.valid(outputs)

    def term_weight(self, outputs: Tensor) -> Tensor | None:
        """kappa of the inner likelihood."""
        return self.likelihood.term_weight(outputs)

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Labels drawn at the temperature."""
        return self.likelihood.sample(outputs / self.temperature, generator)

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The inner score at the temperature, divided by it."""
        return self.likelihood.score(outputs / self.temperature, labels) / self.temperature

    def log_prob(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """log p at the temperature."""
        return self.likelihood.log_prob(outputs / self.temperature, labels)

    def fisher_sqrt(self, outputs: Tensor) -> Tensor:
        """The inner square root at the temperature, divided by it."""
        return self.likelihood.fisher_sqrt(outputs / self.temperature) / self.temperature

    def _columns(self, outputs: Tensor) -> Iterator[Tensor]:
        columns = self.likelihood.fisher_columns(outputs / self.temperature)
        return (column / self.temperature for column in columns)

    def kl_terms(self, outputs: Tensor, other: Tensor) -> Tensor:
        """The KL divergence at the temperature."""
        return self.likelihood.kl_terms(outputs / self.temperature, other / self.temperature)

    def invalid_labels(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Those of the inner likelihood."""
        return self.likelihood.invalid_labels(outputs, labels)

    def invalid_targets(self, outputs: Tensor) -> Tensor:
        """Those of the inner likelihood."""
        return self.likelihood.invalid_targets(outputs)

    def _settings(self) -> dict[str, Any]:
        return {"likelihood": self.likelihood, "temperature": self.temperature}
