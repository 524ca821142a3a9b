"""The spectrum of a layer's block, and the numbers that are read off it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from math import ceil, inf, log, sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor

from ..checks import is_damping, is_number, is_size
from ..errors import ArgumentError, NumericalError
from ..linalg.ladder import has_float64
from ..linalg.sides import Diagonal, Side, as_tensor
from ..structures import Block, EigenBlock, KroneckerBlock
from ..structures.stacked import StackedBlock

Floats = NDArray[np.float64]

EXACT = 2**15
"""Eigenvalues of a block that are kept one by one; of more, neighbours are taken together."""
WIDTH = 1e-3
"""Relative distance of eigenvalues that are taken together, each by their mean: a smooth function of them is off by the
order of its square, below 1e-7; a count of those below a number is right but for those this near to it."""
STEPS = ceil(log(1e40) / WIDTH)
"""How far below the largest eigenvalue they are told apart, in such distances; all that are smaller are one."""
LARGEST = 64
"""The largest eigenvalues, which are kept one by one whatever their number."""
AT_ONCE = 2**22
"""Products of eigenvalues of the two sides that are formed at a time."""
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
    if not (is_number(share) and 0.0 < share < 1.0):
        raise ArgumentError(f"damping_for(share={share!r}): expected a number between 0 and 1, say 0.9")
    aim = share * sum(one.rank for one in spectra)
    if aim == 0.0:
        return inf
    largest = max(one.largest for one in spectra)

    def above(logarithm: float) -> float:
        return sum(one.effective_dimension(largest * 10.0**logarithm) for one in spectra) - aim

    # d_eff falls with the damping: at one this small it is all of the rank, at one this large nearly nothing.
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
    _require_finite(block)
    of_A = of_G = None
    share = _round_off(max(block.layout.matrix_shape[-2:]), block.dtype)
    if isinstance(block, KroneckerBlock):
        raw = [_eigenvalues_of(side) for side in block.sides]
        shares = [
            0.0 if isinstance(side, Diagonal) else _round_off(side.shape[-1], block.dtype) for side in block.sides
        ]
        of_A, of_G = map(_cleared, raw, shares)
        chunks, largest, size = _products(of_A, of_G), float((of_A.max(-1) * of_G.max(-1)).max()), block.layout.numel
    else:
        if isinstance(block, EigenBlock) and block.values_A is not None and block.values_G is not None:
            of_A, of_G = (_cleared(_host(one), share) for one in (block.values_A, block.values_G))
        stacked = isinstance(block, StackedBlock)
        raw = [_eigenvalues_of(block._stack) if isinstance(block, StackedBlock) else _host(block.eigenvalues())]
        # Squares in a basis have the square of its round-off; it is off by more than the matrix that it came from.
        every = _cleared(raw[0], _round_off(raw[0].shape[-1], block.dtype) if stacked else (2 * share) ** 2).ravel()
        chunks, largest, size = iter([every]), float(every.max()), every.size
    values, counts, smallest = _gathered(chunks, largest, one_by_one=size <= EXACT)
    inputs, outputs = _dead(block)
    return Spectrum(
        block.name,
        values,
        counts,
        smallest,
        share,
        max(_over(float(np.maximum(-one, 0.0).sum()), float(np.abs(one).sum())) for one in raw),
        None if of_A is None else _descending(of_A),
        None if of_G is None else _descending(of_G),
        inputs,
        outputs,
    )


def _round_off(size: int, dtype: torch.dtype) -> float:
    """The share of the largest eigenvalue that is round-off; see ``Spectrum``."""
    return 2 * sqrt(size) * torch.finfo(dtype).eps


def _cleared(values: Floats, share: float) -> Floats:
    """The eigenvalues of each matrix with zeros for those that are negative, or a share of the largest or less."""
    found: Floats = np.where(values > share * values.max(-1, keepdims=True), values, 0.0)
    return np.maximum(found, 0.0)


def _products(of_A: Floats, of_G: Floats) -> Iterator[Floats]:
    """The eigenvalues of G (x) A, of all groups, some rows at a time."""
    A, G = of_A.reshape(-1, of_A.shape[-1]), of_G.reshape(-1, of_G.shape[-1])
    group = np.repeat(np.arange(len(G)), G.shape[-1])
    rows = max(1, AT_ONCE // A.shape[-1])
    for start in range(0, G.size, rows):
        yield (G.ravel()[start : start + rows, None] * A[group[start : start + rows]]).ravel()


def _gathered(chunks: Iterable[Floats], largest: float, *, one_by_one: bool) -> tuple[Floats, Floats, float]:
    """(values descending, counts, smallest) of eigenvalues as they come, neighbours taken together where they are many.

    Those that are taken together are in one step of a relative ``WIDTH`` from the largest; the ``LARGEST`` of all stay
    by themselves.
    """
    if one_by_one or largest == 0.0:
        every = _descending(np.concatenate(list(chunks)))
        return every, np.ones_like(every), float(every[-1])
    counts, sums, head, smallest = np.zeros(STEPS + 1), np.zeros(STEPS + 1), np.empty(0), inf
    for chunk in chunks:
        index = _step(chunk, largest)
        counts += np.bincount(index, minlength=STEPS + 1)
        sums += np.bincount(index, weights=chunk, minlength=STEPS + 1)
        head = _descending(np.concatenate([head, np.partition(chunk, -LARGEST)[-LARGEST:]]))[:LARGEST]
        smallest = min(smallest, float(chunk.min()))
    np.subtract.at(counts, _step(head, largest), 1.0)
    np.subtract.at(sums, _step(head, largest), head)
    there = counts > 0
    means = np.maximum(sums[there], 0.0) / counts[there]
    return np.concatenate([head, means]), np.concatenate([np.ones_like(head), counts[there]]), smallest


def _step(values: Floats, largest: float) -> NDArray[np.int64]:
    """How many steps below the largest each value is; what is further than ``STEPS``, as zero is, in the last."""
    with np.errstate(divide="ignore", over="ignore"):
        steps = np.log(largest / values) / WIDTH
    return np.clip(steps, 0, STEPS).astype(np.int64)


def _require_finite(block: Block) -> None:
    """Refuse a block that holds values which are not finite, or none at all."""
    if block.device.type == "meta":
        raise ArgumentError(f"{block.label} is on the meta device, which holds no values to look at")
    if not is_dataclass(block):
        return
    for part in fields(block):
        held = getattr(block, part.name)
        if isinstance(held, Tensor) and (bad := int((~torch.isfinite(held)).sum())):
            raise NumericalError(
                f"{block.label}: {bad} of {held.numel()} numbers of its {part.name} are not finite: look for NaN or "
                "infinite weights or inputs"
            )


def _dead(block: Block) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The columns and the rows of a layer's matrix of which F says nothing."""
    if len(block.layout.matrix_shape) < 2:
        return (), ()
    if isinstance(block, KroneckerBlock):
        inputs, outputs = (_host(side.diagonal(dim1=-2, dim2=-1)) for side in block.sides)
    else:
        diagonal = _host(block.diagonal())
        inputs, outputs = diagonal.sum(-2), diagonal.sum(-1)
    # A root mean square below the round-off of the largest one is zero; what went through a rotation has the round-off
    # of that, which is of the squares themselves.
    eps = torch.finfo(block.dtype).eps
    share = eps * max(block.layout.matrix_shape[-2:]) if isinstance(block, EigenBlock) else eps**2
    of_inputs, of_outputs = (
        tuple(int(index) for index in np.flatnonzero(side <= share * side.max())) for side in (inputs, outputs)
    )
    return of_inputs, of_outputs


def _eigenvalues_of(side: Side) -> Floats:
    """The eigenvalues of each matrix, [..., d], in float64, where the matrix is if that can be."""
    tensor = as_tensor(side)
    there = (tensor if has_float64(tensor.device) else tensor.to("cpu")).to(torch.float64)
    return _host(there if isinstance(side, Diagonal) else torch.linalg.eigvalsh(there))


def _host(values: Tensor) -> Floats:
    """Numbers in float64 on the host."""
    found: Floats = values.detach().cpu().to(torch.float64).numpy()
    return found


def _descending(values: Floats) -> Floats:
    """All of them, the largest first."""
    found: Floats = np.sort(values, axis=None)[::-1].copy()
    return found


def _over(numerator: float, denominator: float, *, zero: float = 0.0) -> float:
    """A quotient, and what stands for it where the denominator is zero."""
    return numerator / denominator if denominator > 0.0 else zero
