"""The eigenvalues of blocks, as many as there are parameters, and as few numbers as say what they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from math import ceil, inf, log, sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ArgumentError, NumericalError
from ..linalg.ladder import has_float64
from ..linalg.sides import Diagonal, Side, as_tensor
from ..structures import Block, EigenBlock, KroneckerBlock

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


def round_off(size: int, dtype: torch.dtype) -> float:
    """The share of the largest eigenvalue that is round-off; see ``Spectrum``."""
    return 2 * sqrt(size) * torch.finfo(dtype).eps


def cleared(values: Floats, share: float) -> Floats:
    """The eigenvalues of each matrix with zeros for those that are negative, or a share of the largest or less."""
    found: Floats = np.where(values > share * values.max(-1, keepdims=True), values, 0.0)
    return np.maximum(found, 0.0)


def products(of_A: Floats, of_G: Floats) -> Iterator[Floats]:
    """The eigenvalues of G (x) A, of all groups, some rows at a time."""
    A, G = of_A.reshape(-1, of_A.shape[-1]), of_G.reshape(-1, of_G.shape[-1])
    group = np.repeat(np.arange(len(G)), G.shape[-1])
    rows = max(1, AT_ONCE // A.shape[-1])
    for start in range(0, G.size, rows):
        yield (G.ravel()[start : start + rows, None] * A[group[start : start + rows]]).ravel()


def gathered(chunks: Iterable[Floats], largest: float, *, one_by_one: bool) -> tuple[Floats, Floats, float]:
    """(values descending, counts, smallest) of eigenvalues as they come, neighbours taken together where they are many.

    Those that are taken together are in one step of a relative ``WIDTH`` from the largest; the ``LARGEST`` of all stay
    by themselves.
    """
    if one_by_one or largest == 0.0:
        every = descending(np.concatenate(list(chunks)))
        return every, np.ones_like(every), float(every[-1])
    counts, sums, head, smallest = np.zeros(STEPS + 1), np.zeros(STEPS + 1), np.empty(0), inf
    for chunk in chunks:
        index = _step(chunk, largest)
        counts += np.bincount(index, minlength=STEPS + 1)
        sums += np.bincount(index, weights=chunk, minlength=STEPS + 1)
        head = descending(np.concatenate([head, np.partition(chunk, -LARGEST)[-LARGEST:]]))[:LARGEST]
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


def require_finite(block: Block) -> None:
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


def dead(block: Block) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The columns and the rows of a layer's matrix of which F says nothing."""
    if len(block.layout.matrix_shape) < 2:
        return (), ()
    if isinstance(block, KroneckerBlock):
        inputs, outputs = (host(side.diagonal(dim1=-2, dim2=-1)) for side in block.sides)
    else:
        diagonal = host(block.diagonal())
        inputs, outputs = diagonal.sum(-2), diagonal.sum(-1)
    # A root mean square below the round-off of the largest one is zero; what went through a rotation has the round-off
    # of that, which is of the squares themselves.
    eps = torch.finfo(block.dtype).eps
    share = eps * max(block.layout.matrix_shape[-2:]) if isinstance(block, EigenBlock) else eps**2
    of_inputs, of_outputs = (
        tuple(int(index) for index in np.flatnonzero(side <= share * side.max())) for side in (inputs, outputs)
    )
    return of_inputs, of_outputs


def eigenvalues_of(side: Side) -> Floats:
    """The eigenvalues of each matrix, [..., d], in float64, where the matrix is if that can be."""
    tensor = as_tensor(side)
    there = (tensor if has_float64(tensor.device) else tensor.to("cpu")).to(torch.float64)
    return host(there if isinstance(side, Diagonal) else torch.linalg.eigvalsh(there))


def host(values: Tensor) -> Floats:
    """Numbers in float64 on the host."""
    found: Floats = values.detach().cpu().to(torch.float64).numpy()
    return found


def descending(values: Floats) -> Floats:
    """All of them, the largest first."""
    found: Floats = np.sort(values, axis=None)[::-1].copy()
    return found
