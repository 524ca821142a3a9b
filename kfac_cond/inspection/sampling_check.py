"""Whether labels are drawn from p(y | outputs), and scored by it: drawn scores against what is known of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import copysign, exp, inf, log1p, prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..heads import Distribution, Head
from ..kinds import Expectation
from ..likelihoods import (
    Bernoulli,
    Binomial,
    Categorical,
    Likelihood,
    Multinomial,
    NegativeBinomial,
    Ordinal,
    Poisson,
    Tempered,
    events,
)
from ..linearised import Linearised
from ..options import Batches, Options
from ..output_fisher import fisher_diagonal, fisher_times
from ..structures import Fisher
from .requests import request_of

PASSES = 1 / 3
"""Forward-backwards over the data: one forward."""
DIRECTIONS = 8
"""Random directions in the outputs of a term, along which the second moment of the score is looked at."""
SHOWN = 256
"""Outputs of a term whose scores are written out one by one, at most."""
COUNTED = (Bernoulli, Binomial, Categorical, Multinomial, NegativeBinomial, Ordinal, Poisson)
"""Likelihoods whose labels are counts or classes."""
ALARM = 1e-4
"""Of the probability below which draws are taken for wrong: one healthy run in ten thousand has one."""


@dataclass(frozen=True)
class SamplingCheck:
    """Drawn scores s = d(-log p(y | f)) / df against their known moments, E[s] = 0 and E[s s^T] = H.

    Sums over terms and draws, each over its standard deviation: a z is of order one where labels are drawn from p. Of
    several heads that with the smallest probability. Cost: one forward over the data and products with H.

    Args:
        probability: of deviations as large as these or larger under right draws, at most; Bennett's inequality for each
            sum, Bonferroni's for all together. A sum of rare events, which is far from normal, is no alarm by it.
        z_output: the largest of all z of sum s_k in size, k an output of a term: a shifted mean shows there.
        output: which k.
        z_outputs: of every k; empty where there are more than ``SHOWN``.
        z_scale: of sum s^T f, with variance sum f^T H f: the score along the scaling of the outputs, where a wrong
            temperature or variance shows whatever its outputs average to.
        z_fisher: the largest in size of all z of sum (u^T s)^2 - u^T H u over random directions u; its variance from
            the draws.
        fisher_ratio: sum (u^T s)^2 over sum u^T H u, over all u: the output Fisher from draws over its closed form.
        terms: valid loss terms.
        draws: of each term.
        head: whose numbers these are; empty where there is one.

    Source: Bennett 1962 (Journal of the American Statistical Association 57) for the tail of each sum.
    """

    probability: float
    z_output: float
    output: int
    z_outputs: tuple[float, ...]
    z_scale: float
    z_fisher: float
    fisher_ratio: float
    terms: int
    draws: int
    head: str = ""

    @property
    def passed(self) -> bool:
        """Whether the draws look like draws from p."""
        return self.probability >= ALARM


def measure(
    model: nn.Module,
    data: Batches,
    likelihood: Distribution | str | nn.Module,
    fisher: Fisher | None = None,
    *,
    samples: int | None = None,
    options: Options | None = None,
) -> SamplingCheck:
    """Check the very labels that an estimate with the same seed and samples draws; nothing of the model changes.

    Args:
        model, data, likelihood, options: as for ``kc.estimate``; labels in ``Options(draws=)`` are what is checked.
        fisher: the estimate, which says how many draws there were.
        samples: how many, where there is none; None takes 4.

    Raises:
        LikelihoodError: a likelihood whose Fisher has no closed form.
        ArgumentError: data that can be gone through only once.
    """
    drawn = int(fisher.meta.get("samples", 4)) if samples is None and fisher is not None else samples or 4
    linear = Linearised(request_of(model, data, likelihood, options))
    expectation = Expectation(request_of(model, data, likelihood, options, kind="sampled", samples=drawn))
    sums: dict[str, _Sums] = {}

    def visitor(batch: Any) -> Tensor:
        point = linear.at(batch)
        heads = [replace(head, outputs=head.outputs.detach()) for head in point.heads]
        known = {head.name: _Known.of(head) for head in heads}
        for head in heads:
            sums.setdefault(head.name, _Sums(known[head.name])).begin(known[head.name])
        sent, _ = expectation.scores(heads, batch, None)
        for one in sent:
            name = heads[expectation.slots.head(one.slot)].name
            sums[name].add(known[name], one.score)
        return point.divisor

    linear.visit(visitor)
    expectation.finish()
    checks = [one.check(name) for name, one in sums.items()]
    worst = min(checks, key=lambda one: one.probability)
    return replace(worst, probability=min(1.0, worst.probability * len(checks)))


@dataclass(frozen=True)
class _Known:
    """What is known of the scores of one head on one batch before labels are drawn; rows are terms.

    Args:
        axes: of an event.
        f: the outputs, [rows, E], 0 where a term does not count.
        variances: the sums over rows of H_kk for each k, and of f^T H f, [E + 1].
        directions: u, [k, E].
        squares: u^T H u, [rows, k].
        terms: those that count.
        jump: the least that a score changes by from one label to another; 0 where labels are continuous.
        eps: of the outputs' dtype.
    """

    axes: tuple[int, ...]
    f: Tensor
    variances: Tensor
    directions: Tensor
    squares: Tensor
    terms: int
    jump: float
    eps: float

    @classmethod
    def of(cls, head: Head) -> _Known:
        likelihood, outputs = head.likelihood, head.outputs
        axes, shape, terms = (
            part(outputs) for part in (likelihood.event_axes, likelihood.event_shape, likelihood.term_shape)
        )
        valid = likelihood.valid(outputs)
        # What does not count may be anything, NaN as well.
        still = outputs if valid is None else outputs.masked_fill(~likelihood.spread(valid, outputs), 0.0)
        f = rows_of(still, axes)
        wide = events.count_dtype(outputs.device)
        along_f = (f * rows_of(fisher_times(likelihood, outputs, still), axes)).sum(dtype=wide)
        diagonal = fisher_diagonal(likelihood, outputs).reshape(f.shape).sum(0, dtype=wide)
        directions = _signs(f.shape[-1], f)
        squares = []
        for u in directions:
            tangents = events.from_events(u.expand(*terms, -1), axes, shape).to(outputs)
            squares.append((rows_of(fisher_times(likelihood, outputs, tangents), axes) * u).sum(-1))
        return cls(
            axes,
            f,
            torch.cat([diagonal, along_f.reshape(1)]),
            directions,
            torch.stack(squares, -1),
            prod(terms) if valid is None else int(valid.sum()),
            jump_of(likelihood),
            torch.finfo(outputs.dtype).eps,
        )


class _Sums:
    """The sums of one head over terms and draws: [3, tests] each, of the summands, of their variances, and the largest.

    Args:
        known: of the first batch, which is of the shapes of all.
    """

    def __init__(self, known: _Known) -> None:
        self.jump, self.eps = known.jump, known.eps
        zeros = known.variances.new_zeros
        #: Of s_k for each k, and of s^T f.
        self.first = zeros(3, known.f.shape[-1] + 1)
        #: Of (u^T s)^2 - u^T H u for each u.
        self.second = zeros(3, DIRECTIONS)
        self.squares = zeros(DIRECTIONS)
        self.largest_f = zeros(())
        self.terms, self.batches, self.draws = 0, 0, 0

    def begin(self, known: _Known) -> None:
        """Take in one more batch."""
        self.terms, self.batches = self.terms + known.terms, self.batches + 1
        if known.f.numel():
            self.largest_f = torch.maximum(self.largest_f, known.f.abs().amax().to(self.largest_f))

    def add(self, known: _Known, score: Tensor) -> None:
        """Take in the scores of one draw."""
        s = rows_of(score, known.axes)
        size = s.shape[-1]
        _grow(self.first[:, :size], s, known.variances[:size])
        _grow(self.first[:, size:], (s * known.f).sum(-1, keepdim=True), known.variances[size:])
        deviations = (s @ known.directions.mT).square() - known.squares
        _grow(self.second, deviations, deviations.square().sum(0, dtype=self.second.dtype))
        self.squares += known.squares.sum(0, dtype=self.squares.dtype)
        self.draws += 1

    def check(self, name: str) -> SamplingCheck:
        """What the sums say."""
        first, second, squares = (sums.cpu().double() for sums in (self.first, self.second, self.squares))
        # What one label may add, where the draws do not show it: it may be too rare to be among them.
        jumps = torch.full_like(first[2], self.jump)
        jumps[-1] *= 2 * float(self.largest_f)
        first[2] = torch.maximum(first[2, :-1].amax(), first[2]).maximum(jumps)
        second[1] = torch.maximum(second[1], self.jump**2 * squares)
        second[2] = second[2].clamp(min=self.jump**2)
        # What rounding leaves of a moment that is the same at every label is no deviation.
        second[0] = second[0].masked_fill(second[0].abs() <= 4 * self.eps * squares, 0.0)
        tests = torch.cat([first, second], -1)
        z = [_over_root(total, variance) for total, variance, _ in tests.T.tolist()]
        odds = [tail(*one) for one in tests.T.tolist()]
        size = first.shape[-1] - 1
        output = max(range(size), key=lambda k: abs(z[k]))
        total = float(squares.sum())
        return SamplingCheck(
            probability=min(1.0, min(odds) * len(odds)),
            z_output=z[output],
            output=output,
            z_outputs=tuple(z[:size]) if size <= SHOWN else (),
            z_scale=z[size],
            z_fisher=max(z[size + 1 :], key=abs),
            fisher_ratio=1 + float(second[0].sum()) / total if total else 1.0,
            terms=self.terms,
            draws=self.draws // self.batches,
            head=name,
        )


def rows_of(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    """A row for each term, [rows, E], in float32 at least."""
    rows = events.to_events(events.widened(values), axes)
    return rows.reshape(-1, rows.shape[-1])


def jump_of(likelihood: Likelihood) -> float:
    """The least that a score changes by from one label to another: 1 of counts and classes, 0 of what is continuous."""
    if isinstance(likelihood, Tempered):
        return jump_of(likelihood.likelihood) / likelihood.temperature
    return float(isinstance(likelihood, COUNTED))


def tail(total: float, variance: float, largest: float) -> float:
    """P(|sum| >= |total|) at most, of independent summands of mean 0: Bennett's inequality, both sides.

    Args:
        total: the sum.
        variance: of it.
        largest: size of a summand, at most.
    """
    size = abs(total)
    if size == 0.0:
        return 1.0
    if variance <= 0.0 or largest <= 0.0:
        return 0.0
    u = largest * size / variance
    return min(1.0, 2 * exp(-variance / largest**2 * ((1 + u) * log1p(u) - u)))


def _signs(size: int, like: Tensor) -> Tensor:
    """Random directions of signs, [k, E], the same in every batch."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(2, (DIRECTIONS, size), generator=generator) * 2 - 1).to(like)


def _grow(sums: Tensor, summands: Tensor, variances: Tensor) -> None:
    """Add rows of summands [rows, tests] to the sums."""
    sums[0] += summands.sum(0, dtype=sums.dtype)
    sums[1] += variances
    if len(summands):
        sums[2] = torch.maximum(sums[2], summands.abs().amax(0).to(sums))


def _over_root(total: float, variance: float) -> float:
    """z; 0 of nothing, infinite of something that has no variance."""
    if variance > 0.0:
        return total / sqrt(variance)
    return 0.0 if total == 0.0 else copysign(inf, total)
