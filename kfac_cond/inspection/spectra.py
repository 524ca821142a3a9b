"""The spectrum of a layer's block, and the numbers that are read off it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from scipy.optimize import brentq

from ..checks import is_damping, is_number, is_size
from ..errors import ArgumentError
from ..linalg.sides import Diagonal
from ..structures import Block, EigenBlock, KroneckerBlock
from ..structures.stacked import StackedBlock
from . import eigenvalues
from .eigenvalues import LARGEST, Floats, cleared, descending, eigenvalues_of, gathered, host, products, round_off

SPAN = 1e-16
"""The smallest eigenvalue that a histogram tells apart, over the largest."""


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum:
    """The eigenvalues of one layer's block F, P of them, and what follows from them; in float64 on the host.

    Units: eigenvalues, trace and damping are those of F, so per loss term, in the scale of the user's loss. Cost: an
    eigendecomposition of each side without its vectors, (4/3) d^3 operations; nothing of the size of a block squared.

    Args:
        name: the layer's, for messages.
        values: distinct eigenvalues, descending, none negative.
        counts: how many eigenvalues each of them stands for; their sum is P.
        smallest: the smallest eigenvalue.
        round_off: eigenvalues at or below this share of the largest count as zero in ``rank``: the largest side's size
            times the eps of the dtype that the block is stored in.
        A: eigenvalues of the side of the inputs, descending, groups one after another in one; None where the block has
            no sides.
        G: those of the side of the output gradients.
        dead_inputs: columns of the layer's matrix (of all groups, one after another) whose diagonal entries of F are
            all zero to the precision of what is stored.
        dead_outputs: rows likewise.
    """

    name: str
    values: Floats
    counts: Floats
    smallest: float
    round_off: float
    negative: float = 0.0
    A: Floats | None = None
    G: Floats | None = None
    dead_inputs: tuple[int, ...] = ()
    dead_outputs: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """P, the number of eigenvalues, which is that of the layer's parameters."""
        return round(float(self.counts.sum()))

    @property
    def trace(self) -> float:
        """tr F = sum_i lambda_i, per loss term: (1/M) sum_n E |V_n|^2, the expected squares of examples' gradients."""
        return float(self.values @ self.counts)

    @property
    def per_parameter(self) -> float:
        """tr F / P, the mean eigenvalue: the scale that a relative damping is in."""
        return self.trace / self.size

    @property
    def largest(self) -> float:
        """The largest eigenvalue."""
        return float(self.values[0])

    @property
    def stable_rank(self) -> float:
        """|F|_F^2 / lambda_1^2, from 1 to P: how many directions share the largest curvature; 0 where F is zero.

        Source: Rudelson & Vershynin 2007 (JACM 54(4)), section 1.
        """
        return _over(self._squares(), self.largest**2)

    @property
    def participation(self) -> float:
        """(tr F)^2 / |F|_F^2, from 1 to P: how many equal eigenvalues would have this trace and norm; 0 for zero F."""
        return _over(self.trace**2, self._squares())

    @property
    def rank(self) -> int:
        """The number of eigenvalues above round-off."""
        return round(float(self.counts[self.values > 0.0].sum()))

    @property
    def blame(self) -> str | None:
        """'A' or 'G', the side whose condition number is the larger and so makes the block's; None without sides.

        A condition number of the block is the product of those of its sides; each eigenvalue is taken as no smaller
        than round-off. None as well where they are equal, as of two identities.
        """
        if self.A is None or self.G is None:
            return None
        of_A, of_G = self._condition_of(self.A), self._condition_of(self.G)
        if abs(of_A - of_G) <= 1e-6 * max(of_A, of_G):
            return None
        return "A" if of_A > of_G else "G"

    def effective_dimension(self, damping: float) -> float:
        """d_eff(lambda) = tr F (F + lambda)^-1 = sum_i lambda_i / (lambda_i + lambda).

        The number of directions that the Fisher, not the damping, decides; it falls from ``rank`` to 0. At damping 0 it
        is the rank.

        Source: Zhang 2005 (Neural Computation 17(9)); MacKay 1992 (Neural Computation 4(3)), the number of well
        determined parameters.
        """
        added = self._checked(damping)
        if added == 0.0:
            return float(self.rank)
        return float((self.values / (self.values + added)) @ self.counts)

    def damping_for(self, share: float) -> float:
        """The damping at which a share of the effective dimension is kept, d_eff(lambda) = share rank.

        Infinite where F is zero, since any damping keeps all of nothing.

        Raises:
            ArgumentError: a share that is not between 0 and 1.
        """
        return damping_for([self], share)

    def trace_kept(self, damping: float) -> float:
        """sum_i lambda_i^2 / (lambda_i + lambda) / tr F, from 1 to 0: the effective dimension weighted by curvature.

        The share of the trace in directions that the Fisher decides; the many eigenvalues that are nearly nothing do
        not count. 0 where F is zero.
        """
        added = self._checked(damping)
        kept = self.values * (self.values / (self.values + added) if added else 1.0)
        return _over(float(kept @ self.counts), self.trace)

    def damping_for_trace(self, share: float) -> float:
        """The damping at which the Fisher decides directions of a share of its trace, ``trace_kept`` = share.

        Larger than ``damping_for`` where eigenvalues span many orders, as those of trained networks do: most of the
        rank is then in eigenvalues that no step has a use for. Infinite where F is zero.

        Raises:
            ArgumentError: a share that is not between 0 and 1.
        """
        return damping_for_trace([self], share)

    def share_below(self, damping: float) -> float:
        """The share of the P eigenvalues that are smaller than the damping, from 0 to 1.

        In these directions the preconditioner multiplies by about 1 / damping whatever F says, as SGD does.
        """
        added = self._checked(damping)
        return float(self.counts[self.values < added].sum()) / self.size

    def amplification(self, damping: float) -> float:
        """1 / (lambda_P + damping): the most that (F + damping)^-1 stretches a gradient; infinite for a singular F."""
        return _over(1.0, self.smallest + self._checked(damping), zero=inf)

    def condition(self, damping: float = 0.0) -> float:
        """(lambda_1 + damping) / (lambda_P + damping); infinite for a singular F without damping."""
        added = self._checked(damping)
        return _over(self.largest + added, self.smallest + added, zero=inf)

    def top(self, k: int) -> Floats:
        """The k largest eigenvalues, descending, or all where there are fewer.

        Raises:
            ArgumentError: not a whole number from 1 to 64 (``LARGEST``).
        """
        if not is_size(k) or k > LARGEST:
            raise ArgumentError(f"layer '{self.name}': top({k!r}), expected a whole number from 1 to {LARGEST}")
        head = self.counts[:k].astype(int)
        found: Floats = np.repeat(self.values[:k], np.minimum(head, k))[:k]
        return found

    def histogram(self, bins: int = 40) -> tuple[Floats, Floats]:
        """How many eigenvalues are in each of ``bins`` bins of their logarithm.

        Returns:
            (edges, counts): ``bins`` + 1 logarithms to base 10, up to that of the largest eigenvalue; of the counts the
            first has every eigenvalue below the bin as well, zeros and round-off.
        """
        return log_histogram(self.values, self.counts, bins)

    def __repr__(self) -> str:
        return f"Spectrum(size={self.size:,}, trace={self.trace:.4g}, largest={self.largest:.4g}, rank={self.rank:,})"

    def _squares(self) -> float:
        return float(self.values**2 @ self.counts)

    def _condition_of(self, side: Floats) -> float:
        largest, smallest = float(side[0]), float(side[-1])
        return _over(largest, smallest or self.round_off * largest, zero=1.0)

    def _checked(self, damping: float) -> float:
        if not is_damping(damping):
            raise ArgumentError(f"layer '{self.name}': damping {damping!r}, expected a finite number >= 0")
        return float(damping)


def damping_for(spectra: Sequence[Spectrum], share: float) -> float:
    """The one damping that keeps a share of the effective dimension of all these layers together."""
    return _damping_at(spectra, share, lambda one, damping: one.effective_dimension(damping))


def damping_for_trace(spectra: Sequence[Spectrum], share: float) -> float:
    """The one damping that keeps a share of the trace of all these layers together; see ``Spectrum``."""
    return _damping_at(spectra, share, lambda one, damping: one.trace_kept(damping) * one.trace)


def _damping_at(spectra: Sequence[Spectrum], share: float, kept: Callable[[Spectrum, float], float]) -> float:
    """The damping at which a share is kept of what is kept at none."""
    if not (is_number(share) and 0.0 < share < 1.0):
        raise ArgumentError(f"damping_for(share={share!r}): expected a number between 0 and 1, say 0.9")
    aim = share * sum(kept(one, 0.0) for one in spectra)
    if aim == 0.0:
        return inf
    largest = max(one.largest for one in spectra)

    def above(logarithm: float) -> float:
        return sum(kept(one, largest * 10.0**logarithm) for one in spectra) - aim

    # It falls with the damping: at one this small it is all there is, at one this large nearly nothing.
    low, high = -1.0, 1.0
    while above(low) < 0.0 and low > -290.0:
        low *= 2.0
    low = max(low, -290.0)
    if above(low) < 0.0:
        # Eigenvalues span more than numbers do, as where gradients vanish over hundreds of layers.
        return float(largest * 10.0**low)
    while above(high) > 0.0:
        high += 2.0
    return float(largest * 10.0 ** brentq(above, low, high, xtol=1e-10))


def log_histogram(values: Floats, counts: Floats | None = None, bins: int = 40) -> tuple[Floats, Floats]:
    """Counts of numbers >= 0 in bins of their logarithm to base 10; see ``Spectrum.histogram``."""
    if not is_size(bins):
        raise ArgumentError(f"histogram(bins={bins!r}): expected a whole number >= 1")
    weights = np.ones_like(values) if counts is None else counts
    largest = float(values.max())
    if largest == 0.0:
        return np.linspace(-1.0, 0.0, bins + 1), np.concatenate([[weights.sum()], np.zeros(bins - 1)])
    bottom = max(float(values.min()), SPAN * largest)
    top = np.log10(largest)
    edges = np.linspace(min(np.log10(bottom), top - 1e-3), top, bins + 1)
    logs = np.log10(np.maximum(values, 10.0 ** edges[0]))
    index = np.clip(np.searchsorted(edges, logs, side="right") - 1, 0, bins - 1)
    return edges, np.bincount(index, weights=weights, minlength=bins).astype(np.float64)


def spectrum_of(block: Block) -> Spectrum:
    """The spectrum of a block, whatever it is stored as.

    Args:
        block: of one layer, finite.

    Raises:
        NumericalError: a block that is not finite, by layer and with the number of such values.
        ArgumentError: a block on the meta device, or one known by its products alone, whose eigenvalues need the dense
            matrix.
    """
    eigenvalues.require_finite(block)
    of_A = of_G = None
    share = round_off(max(block.layout.matrix_shape[-2:]), block.dtype)
    if isinstance(block, KroneckerBlock):
        raw = [eigenvalues_of(side) for side in block.sides]
        shares = [0.0 if isinstance(side, Diagonal) else round_off(side.shape[-1], block.dtype) for side in block.sides]
        of_A, of_G = map(cleared, raw, shares)
        chunks, largest, size = products(of_A, of_G), float((of_A.max(-1) * of_G.max(-1)).max()), block.layout.numel
    else:
        if isinstance(block, EigenBlock) and block.values_A is not None and block.values_G is not None:
            of_A, of_G = (cleared(host(one), share) for one in (block.values_A, block.values_G))
        stacked = isinstance(block, StackedBlock)
        raw = [eigenvalues_of(block._stack) if isinstance(block, StackedBlock) else host(block.eigenvalues())]
        # Squares in a basis have the square of its round-off; it is off by more than the matrix that it came from.
        every = cleared(raw[0], round_off(raw[0].shape[-1], block.dtype) if stacked else (2 * share) ** 2).ravel()
        chunks, largest, size = iter([every]), float(every.max()), every.size
    values, counts, smallest = gathered(chunks, largest, one_by_one=size <= eigenvalues.EXACT)
    inputs, outputs = eigenvalues.dead(block)
    return Spectrum(
        block.name,
        values,
        counts,
        smallest,
        share,
        max(_over(float(np.maximum(-one, 0.0).sum()), float(np.abs(one).sum())) for one in raw),
        None if of_A is None else descending(of_A),
        None if of_G is None else descending(of_G),
        inputs,
        outputs,
    )


def _over(numerator: float, denominator: float, *, zero: float = 0.0) -> float:
    """A quotient, and what stands for it where the denominator is zero."""
    return numerator / denominator if denominator > 0.0 else zero
