"""How much of a batch's gradient is signal and how much the luck of the batch, by layer, and what batch that needs."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from math import ceil, inf, isfinite, sqrt

import torch
from torch import Tensor, nn

from ..data import Data
from ..errors import ArgumentError
from ..heads import Distribution
from ..options import Batches
from ..structures import Block, Fisher
from .gradients import Piece, metric_of, of_layer, pieces

GROUPS = 8
"""Groups of pieces whose sums are kept apart: standard errors are those of leaving one of them out."""

PASSES = 1.0
"""A forward and a backward of the data."""


@dataclass(frozen=True)
class NoiseScale:
    """The mean gradient and the noise of examples around it, lengths in one metric P: |x|^2 = x^T P x.

    With g_b the gradient of piece b of n_b examples, n = sum n_b, g = sum n_b g_b / n and B pieces:
    t = sum_b n_b |g_b - g|^2 / (B - 1) and s = |g|^2 - t / n, unbiased both.

    Args:
        signal: |E g|^2, estimated by s; it may come out negative where it is small beside its error. In the squared
            units of the gradient of the mean loss; of a loss that is a sum, of its part for one example.
        signal_error: standard error of the signal, by leaving out one group of pieces at a time; infinite where there
            are too few. It is too large, by up to a root of two, where there is no signal.
        noise: tr(P Cov) of one example's gradient, estimated by t.
        noise_error: standard error of the noise.
        scale: noise / signal, in examples: the batch at which the two are as large, so that a step of half the length
            makes half the progress of a step without noise; infinite where no signal is found.
        scale_error: standard error of the scale; infinite where the signal is not twice its error.
        scale_least: noise / (signal + 2 signal_error): about a lower bound of the scale.

    Source: McCandlish et al. 2018 (arXiv:1812.06162), section 2.2 and appendix A.
    """

    signal: float
    signal_error: float
    noise: float
    noise_error: float
    scale: float
    scale_error: float
    scale_least: float


@dataclass(frozen=True)
class Signal:
    """The gradient noise of a layer, or of all, at the data labels.

    Args:
        plain: lengths in the Euclidean metric: for plain SGD.
        metric: in P = (F + lambda I)^-1, for steps along P g: tr(P Cov) / g^T P g is McCandlish et al.'s
            tr(H Cov) / d^T H d for the direction d = P g, with H = F + lambda I.
        ratio: |E g|^2 over the squared noise of a batch, plain.
        ratio_metric: the same in the metric.
        batch: mean number of examples of the batches (or of the parts they were cut into), to which the ratios belong.
        examples: n.
        pieces: B.
        damping: lambda, in the units of F; of the whole the largest of the layers'.
        suggested_batch: ``metric.scale`` as a whole number of examples; None where no signal is found, so that
            ``metric.scale_least`` is all that can be said.

    Cost: one forward and backward of the data, and a solve for each batch; memory for ``GROUPS`` gradients.
    Source: McCandlish et al. 2018 (arXiv:1812.06162).
    """

    plain: NoiseScale
    metric: NoiseScale
    ratio: float
    ratio_metric: float
    batch: float
    examples: int
    pieces: int
    damping: float
    suggested_batch: int | None


def measure(
    model: nn.Module,
    data: Batches,
    likelihood: Distribution | str | nn.Module,
    fisher: Fisher,
    *,
    damping: float | None = None,
    picks: Data | None = None,
) -> tuple[Signal, dict[str, Signal]]:
    """The gradient noise of all layers together, and layer by layer.

    Pieces are the batches; where there are fewer than ``GROUPS``, parts of them. Examples are taken to be independent.

    Args:
        model: in the mode it is in; with batch norm in training a batch has another gradient than its parts have.
        data: batches with labels, gone through once.
        likelihood: of the loss, or the criterion.
        fisher: whose layers are measured, and whose metric is taken.
        damping: lambda of the metric; None for a thousandth of each block's mean eigenvalue.
        picks: where to find masks, outputs and labels in a batch.

    Raises:
        LikelihoodError: a batch without labels.
        ArgumentError: data of a single example.
        NumericalError: a block without an inverse.
    """
    metrics = {name: metric_of(block, damping) for name, block in fisher.items()}
    sums = {name: _Sums(block, metrics[name][0]) for name, block in fisher.items()}
    sizes: list[int] = []
    with closing(pieces(model, data, likelihood, picks=picks, least=GROUPS)) as found:
        for piece in found:
            for one in sums.values():
                one.add(piece, len(sizes) % GROUPS)
            sizes.append(piece.examples)
    if len(sizes) < 2:
        raise ArgumentError("the data have one example: expected two at least, since noise is what differs among them")
    counts = _Counts.of(sizes)
    moments = {name: one.moments() for name, one in sums.items()}
    layers = {name: _signal(counts, *of, metrics[name][1]) for name, of in moments.items()}
    plain, metric = (_total([of[index] for of in moments.values()]) for index in range(2))
    return _signal(counts, plain, metric, max(used for _, used in metrics.values())), layers


@dataclass(frozen=True)
class _Counts:
    """Of each group the number of examples and of pieces, [groups]."""

    examples: Tensor
    pieces: Tensor

    @classmethod
    def of(cls, sizes: list[int]) -> _Counts:
        groups = min(GROUPS, len(sizes))
        examples = [float(sum(sizes[group::GROUPS])) for group in range(groups)]
        numbers = [float(len(sizes[group::GROUPS])) for group in range(groups)]
        return cls(torch.tensor(examples, dtype=torch.float64), torch.tensor(numbers, dtype=torch.float64))


@dataclass(frozen=True)
class _Moments:
    """What all estimates are made of, in one metric.

    Args:
        squares: sum over the pieces of each group of n_b |g_b|^2, [groups].
        gram: inner products of the groups' sums of n_b g_b, [groups, groups].
    """

    squares: Tensor
    gram: Tensor

    def signal_and_noise(self, counts: _Counts, kept: Tensor) -> tuple[float, float]:
        """(s, t) of the groups kept, bool [groups]; t is not a number where there is one piece alone."""
        n, number = float(counts.examples[kept].sum()), float(counts.pieces[kept].sum())
        length = float(self.gram[kept][:, kept].sum())
        noise = (float(self.squares[kept].sum()) - length / n) / (number - 1) if number > 1 else float("nan")
        noise = max(noise, 0.0) if isfinite(noise) else noise
        return length / n**2 - noise / n, noise


class _Sums:
    """One layer's sums over pieces, group by group, in the plain metric and in that of the Fisher."""

    def __init__(self, block: Block, metric: Block) -> None:
        self._block, self._metric = block, metric
        self._sums: dict[int, Tensor] = {}
        self._squares = torch.zeros(2, GROUPS, dtype=torch.float64)

    def add(self, piece: Piece, group: int) -> None:
        g = of_layer(self._block, piece.per_example)
        lengths = torch.stack([g.square().sum(), (g * self._metric.matvec(g)).sum()])
        self._squares[:, group] += piece.examples * lengths.to(self._squares)
        part = g * piece.examples
        self._sums[group] = self._sums[group].add_(part) if group in self._sums else part

    def moments(self) -> tuple[_Moments, _Moments]:
        groups = len(self._sums)
        sums = [self._sums[group] for group in range(groups)]
        found = []
        for squares, images in zip(self._squares, (sums, [self._metric.matvec(one) for one in sums]), strict=True):
            products = [[(one * image).sum() for image in images] for one in sums]
            gram = torch.stack([torch.stack(row) for row in products]).to(self._squares)
            found.append(_Moments(squares[:groups], gram))
        return found[0], found[1]


def _total(parts: list[_Moments]) -> _Moments:
    return _Moments(torch.stack([one.squares for one in parts]).sum(0), torch.stack([one.gram for one in parts]).sum(0))


def _signal(counts: _Counts, plain: _Moments, metric: _Moments, damping: float) -> Signal:
    examples, number = int(counts.examples.sum()), int(counts.pieces.sum())
    batch = examples / number
    of_plain, of_metric = _noise_scale(counts, plain), _noise_scale(counts, metric)
    suggested = max(1, ceil(of_metric.scale)) if isfinite(of_metric.scale_error) else None
    return Signal(
        plain=of_plain,
        metric=of_metric,
        ratio=_ratio(of_plain, batch),
        ratio_metric=_ratio(of_metric, batch),
        batch=batch,
        examples=examples,
        pieces=number,
        damping=damping,
        suggested_batch=suggested,
    )


def _noise_scale(counts: _Counts, moments: _Moments) -> NoiseScale:
    groups = len(counts.examples)
    everything = torch.ones(groups, dtype=torch.bool)
    signal, noise = moments.signal_and_noise(counts, everything)
    without = [moments.signal_and_noise(counts, everything ^ one) for one in torch.eye(groups, dtype=torch.bool)]
    signal_error, noise_error = (_error([pair[index] for pair in without]) for index in range(2))
    scale = noise / signal if signal > 0 else inf
    clear = signal > 2 * signal_error
    scale_error = _error([t / s if s > 0 else inf for s, t in without]) if clear else inf
    most = signal + 2 * signal_error
    least = noise / most if most > 0 and isfinite(most) else 0.0
    return NoiseScale(signal, signal_error, noise, noise_error, scale, scale_error, least)


def _error(values: list[float]) -> float:
    """The standard error of an estimate, from its values with one group left out each; infinite where there are none.

    Source: Efron & Stein 1981 (The jackknife estimate of variance).
    """
    if not all(map(isfinite, values)):
        return inf
    mean = sum(values) / len(values)
    return sqrt((len(values) - 1) / len(values) * sum((value - mean) ** 2 for value in values))


def _ratio(of: NoiseScale, batch: float) -> float:
    """Signal over the noise of a batch."""
    if of.noise > 0:
        return of.signal * batch / of.noise
    return inf if of.signal > 0 else 0.0
