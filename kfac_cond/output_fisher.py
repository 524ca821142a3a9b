"""Products with the Fisher of the outputs and with its square root, without a matrix per term where there is a form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import singledispatch
from math import sqrt
from typing import Protocol

import torch
from einops import einsum, rearrange
from torch import Tensor

from .likelihoods import Categorical, Elementwise, Likelihood, Tempered, events


class OutputFisher(Protocol):
    """The Fisher H of one batch's outputs, times kappa, as products alone."""

    def times(self, tangents: Tensor) -> Tensor:
        """H t, shaped as the outputs."""

    def times_noise(self, generator: torch.Generator | None) -> Tensor:
        """A Gaussian draw of covariance H, shaped as the outputs."""


@dataclass(frozen=True)
class OfLikelihood:
    """In closed form: a block for each term.

    Args:
        likelihood: bound to the batch.
        outputs: what parametrises p, without its graph.
    """

    likelihood: Likelihood
    outputs: Tensor

    def times(self, tangents: Tensor) -> Tensor:
        return fisher_times(self.likelihood, self.outputs, tangents)

    def times_noise(self, generator: torch.Generator | None) -> Tensor:
        return root_times_noise(self.likelihood, self.outputs, generator)


class OfScores:
    """Of labels: the mean over draws of s s^T, a block for each example, whose terms' scores are one vector.

    Args:
        scores: (score shaped as the outputs, weight in the mean), one a draw.
    """

    def __init__(self, scores: Iterable[tuple[Tensor, float]]) -> None:
        self.roots = torch.stack([score * sqrt(weight) for score, weight in scores])

    def times(self, tangents: Tensor) -> Tensor:
        roots = rearrange(events.widened(self.roots), "k n ... -> k n (...)")
        rows = rearrange(events.widened(tangents), "n ... -> n (...)")
        along = einsum(roots, rows, "k n o, n o -> k n")
        return einsum(roots, along, "k n o, k n -> n o").reshape(tangents.shape).to(tangents.dtype)

    def times_noise(self, generator: torch.Generator | None) -> Tensor:
        noise = _noise(tuple(self.roots.shape[:2]), self.roots, generator)
        return einsum(self.roots, noise, "k n ..., k n -> n ...")


def fisher_times(likelihood: Likelihood, outputs: Tensor, tangents: Tensor) -> Tensor:
    """H t of each term times its weight kappa, zero at invalid terms.

    Args:
        likelihood: bound to the batch.
        outputs: what parametrises p, without its graph.
        tangents: shaped as the outputs.

    Returns:
        A tensor of the outputs' shape.
    """
    axes = likelihood.event_axes(outputs)
    product = _fisher_times(likelihood, outputs, events.to_events(events.widened(tangents), axes))
    product = events.from_events(product, axes, likelihood.event_shape(outputs)).to(outputs.dtype)
    # Twice: each multiplies by the root of kappa.
    return likelihood.weighted(likelihood.weighted(product, outputs), outputs)


def root_times_noise(likelihood: Likelihood, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
    """S z of each term times the root of kappa, with z standard normal and S S^T = H; shaped as the outputs."""
    axes = likelihood.event_axes(outputs)
    product = _root_times_noise(likelihood, outputs, generator)
    product = events.from_events(product, axes, likelihood.event_shape(outputs)).to(outputs.dtype)
    return likelihood.weighted(product, outputs)


def root_transposed_times(likelihood: Likelihood, outputs: Tensor, tangents: Tensor) -> Tensor:
    """S^T t of each term times the root of kappa, S S^T = H, zero at invalid terms: its square is t^T H t.

    Args:
        likelihood: bound to the batch.
        outputs: what parametrises p, without its graph.
        tangents: shaped as the outputs.

    Returns:
        [*terms, K], in float32 at least.
    """
    axes = likelihood.event_axes(outputs)
    # Weighted as outputs are: S works within an event, and kappa is one number for it.
    weighted = likelihood.weighted(events.widened(tangents), outputs)
    return _root_transposed_times(likelihood, outputs, events.to_events(weighted, axes))


def fisher_diagonal(likelihood: Likelihood, outputs: Tensor) -> Tensor:
    """The diagonal of H of each term times its weight kappa, zero at invalid terms.

    Args:
        likelihood: bound to the batch.
        outputs: what parametrises p, without its graph.

    Returns:
        [*terms, E], in float32 at least.
    """
    axes, wide = likelihood.event_axes(outputs), events.widened(outputs)
    diagonal = events.from_events(_fisher_diagonal(likelihood, wide), axes, likelihood.event_shape(outputs))
    # Twice: each multiplies by the root of kappa.
    return events.to_events(likelihood.weighted(likelihood.weighted(diagonal, wide), wide), axes)


@singledispatch
def _fisher_diagonal(likelihood: Likelihood, outputs: Tensor) -> Tensor:
    """[*terms, E]."""
    return likelihood.fisher_sqrt(outputs).square().sum(-1)


@_fisher_diagonal.register
def _(likelihood: Elementwise, outputs: Tensor) -> Tensor:
    return likelihood._information(likelihood._events(outputs))


@_fisher_diagonal.register
def _(likelihood: Categorical, outputs: Tensor) -> Tensor:
    p = likelihood._probabilities(outputs)
    return p * (1 - p)


@_fisher_diagonal.register
def _(likelihood: Tempered, outputs: Tensor) -> Tensor:
    return _fisher_diagonal(likelihood.likelihood, outputs / likelihood.temperature) / likelihood.temperature**2


@singledispatch
def _root_transposed_times(likelihood: Likelihood, outputs: Tensor, tangents: Tensor) -> Tensor:
    """[*terms, K] from [*terms, E]."""
    root = likelihood.fisher_sqrt(outputs).to(tangents.dtype)
    return (root.mT @ tangents.unsqueeze(-1)).squeeze(-1)


@_root_transposed_times.register
def _(likelihood: Elementwise, outputs: Tensor, tangents: Tensor) -> Tensor:
    return likelihood._information(likelihood._events(outputs)).sqrt() * tangents


@_root_transposed_times.register
def _(likelihood: Categorical, outputs: Tensor, tangents: Tensor) -> Tensor:
    p = likelihood._probabilities(outputs)
    return p.sqrt() * (tangents - (p * tangents).sum(-1, keepdim=True))


@singledispatch
def _fisher_times(likelihood: Likelihood, outputs: Tensor, tangents: Tensor) -> Tensor:
    """[*terms, E] from [*terms, E]."""
    fisher = likelihood.fisher(outputs).to(tangents.dtype)
    return (fisher @ tangents.unsqueeze(-1)).squeeze(-1)


@_fisher_times.register
def _(likelihood: Elementwise, outputs: Tensor, tangents: Tensor) -> Tensor:
    return likelihood._information(likelihood._events(outputs)) * tangents


@_fisher_times.register
def _(likelihood: Categorical, outputs: Tensor, tangents: Tensor) -> Tensor:
    p = likelihood._probabilities(outputs)
    return p * (tangents - (p * tangents).sum(-1, keepdim=True))


@singledispatch
def _root_times_noise(likelihood: Likelihood, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
    """[*terms, E]."""
    root = likelihood.fisher_sqrt(outputs)
    noise = _noise((*root.shape[:-2], root.shape[-1]), root, generator)
    return (root @ noise.unsqueeze(-1)).squeeze(-1)


@_root_times_noise.register
def _(likelihood: Elementwise, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
    root = likelihood._information(likelihood._events(outputs)).sqrt()
    return root * _noise(tuple(root.shape), root, generator)


@_root_times_noise.register
def _(likelihood: Categorical, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
    p = likelihood._probabilities(outputs)
    scaled = p.sqrt() * _noise(tuple(p.shape), p, generator)
    return scaled - p * scaled.sum(-1, keepdim=True)


def _noise(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
