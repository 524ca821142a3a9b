"""How far an estimate from drawn labels is from what infinitely many draws would give: standard errors, by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf, isnan

import torch
from scipy import stats
from torch import Tensor

from ..errors import ArgumentError
from .base import Block

Groups = Sequence[tuple[float, Mapping[str, Block]]]
"""Estimates from some of the draws each: (their share of all draws, blocks by layer)."""


@dataclass(frozen=True)
class Estimated:
    """A number that was estimated from drawn labels.

    Args:
        value: in the estimate from all draws.
        error: its standard error, that of the draws alone: the inputs are taken as given.
        draws: how many draws a term had.
        degrees: degrees of freedom of the error, one less than the groups it is made of.
    """

    value: float
    error: float
    draws: int
    degrees: int

    @property
    def relative(self) -> float:
        """The standard error over the value."""
        return self.error / self.value if self.value else (0.0 if self.error == 0.0 else inf)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The confidence interval of Student's t at a level."""
        if not 0.0 < level < 1.0:
            raise ArgumentError(f"interval(level={level!r}): expected a number between 0 and 1")
        half = float(stats.t.ppf((1 + level) / 2, self.degrees)) * self.error
        return self.value - half, self.value + half

    def draws_needed(self, relative: float) -> int:
        """The draws at which the standard error is ``relative`` times the value, as it falls with their root.

        Raises:
            ArgumentError: not a positive number, or an estimate whose error is not known to be finite.
        """
        if not relative > 0.0:
            raise ArgumentError(f"draws_needed(relative={relative!r}): expected a positive number, say 0.01")
        if self.relative == inf or isnan(self.relative):
            raise ArgumentError(f"draws_needed: the value is {self.value:g} with an error of {self.error:g}")
        return max(1, ceil(self.draws * (self.relative / relative) ** 2 * (1 - 1e-12)))


@dataclass(frozen=True)
class LayerError:
    """What drawing labels leaves open of one block.

    Args:
        trace: of the block.
        top_eigenvalue: of the block; its error is to first order that of u^T F u, u the eigenvector. A largest
            eigenvalue of a noisy matrix is also too large on average, by an amount of the order of the square of the
            matrix's relative error, which is not in it.
    """

    trace: Estimated
    top_eigenvalue: Estimated


class SamplingError(Mapping[str, LayerError]):
    """Standard errors of an estimate from drawn labels, by layer; ``trace`` is that of the whole Fisher.

    Args:
        layers: by layer name.
        trace: of the whole.
    """

    def __init__(self, layers: Mapping[str, LayerError], trace: Estimated) -> None:
        self._layers = dict(layers)
        self.trace = trace

    @property
    def top_eigenvalue(self) -> Estimated:
        """The largest eigenvalue of the whole Fisher: that of the layer that has the largest."""
        return max((layer.top_eigenvalue for layer in self.values()), key=lambda one: one.value)

    def draws_needed(self, relative: float) -> dict[str, int]:
        """For each layer the draws at which both errors are about ``relative`` times their values."""
        return {
            name: max(layer.trace.draws_needed(relative), layer.top_eigenvalue.draws_needed(relative))
            for name, layer in self.items()
        }

    def __getitem__(self, layer: str) -> LayerError:
        return self._layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        rows = [("layer", "trace", "+-", "top eigenvalue", "+-")]
        rows += [(name, *_row(of.trace), *_row(of.top_eigenvalue)) for name, of in self.items()]
        rows += [("all", *_row(self.trace), *_row(self.top_eigenvalue))]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        facts = f"Sampling error: {self.trace.draws} draws a term, {self.trace.degrees} degrees of freedom"
        return "\n".join([facts, *lines])


def sampling_error(blocks: Mapping[str, Block], groups: Groups, draws: int) -> SamplingError:
    """The standard errors from the spread of groups of draws.

    Draws are independent given the inputs, so with t_k a number that is linear in F, estimated from group k alone,
    and w_k that group's share of the draws, sum_k w_k (t_k - t)^2 / (K - 1) is an unbiased estimate of the variance of
    t = sum_k w_k t_k.

    Args:
        blocks: from all draws.
        groups: K >= 2 of them.
        draws: label draws a term.
    """
    traces = {name: _of_groups(name, groups, lambda block: block.trace()) for name in blocks}
    layers = {}
    for name, block in blocks.items():
        (value,), vectors = block.top_eigenpairs(1)
        vector = vectors[0]
        along = _of_groups(name, groups, lambda of_group, u=vector: of_group.quadratic(u))  # type: ignore[misc]
        layers[name] = LayerError(
            _estimated(block.trace(), traces[name], groups, draws), _estimated(value, along, groups, draws)
        )
    total = torch.stack([trace.to(next(iter(traces.values())).device) for trace in traces.values()]).sum(0)
    whole = torch.stack([block.trace().to(total) for block in blocks.values()]).sum()
    return SamplingError(layers, _estimated(whole, total, groups, draws))


def _of_groups(name: str, groups: Groups, number: Callable[[Block], Tensor]) -> Tensor:
    return torch.stack([number(blocks[name]) for _, blocks in groups]).double()


def _estimated(value: Tensor, of_groups: Tensor, groups: Groups, draws: int) -> Estimated:
    shares = of_groups.new_tensor([share for share, _ in groups])
    mean = (shares * of_groups).sum()
    degrees = len(groups) - 1
    variance = (shares * (of_groups - mean).square()).sum() / degrees
    return Estimated(float(value), float(variance.sqrt()), draws, degrees)


def _row(number: Estimated) -> tuple[str, str]:
    return f"{number.value:.3g}", f"{number.error:.2g}"
