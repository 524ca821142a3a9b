"""Damped inverses by Cholesky, or entry by entry, batched over equal sizes, with a ladder for those that fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from .ladder import Rung, has_float64, read_status, size_groups
from .moments import trace
from .products import symmetrise
from .sides import Diagonal, Side, identity_like

__all__ = ["Rung", "attempted_inverses", "damped_inverses"]

MORE_DAMPING = (10.0, 100.0)
"""Multiples of max(damping, eps tr / d) that the second rung tries."""

CROWDED = {"cpu": 128}
"""Sizes whose multiples make a factorisation slow, by type of device: the numbers of a column fall into few places of a
cache that goes by address, and push each other out."""


def damped_inverses(
    matrices: Sequence[Side], dampings: Sequence[Tensor], previous: Sequence[Side | None]
) -> tuple[list[Side], list[Rung]]:
    """(M + damping I)^-1 of each matrix, and how far up the ladder each had to go.

    Matrices of one size, dtype and device go through one factorisation. The host reads one status for the whole call,
    and one more for each rung that is climbed at all. A matrix that fails is tried again with 10 and 100 times
    max(damping, eps tr / d), then in float64 with its own damping (not on devices without float64, nor where it is
    float64 already); then its previous inverse stands in, then the identity. One with leading dimensions climbs as a
    whole.

    Args:
        matrices: symmetric, [..., d, d] each, any d, float32 or float64; whole or ``Diagonal``.
        dampings: for each matrix what is added to its diagonal; a tensor that broadcasts to its leading dimensions.
        previous: for each matrix its last inverse, or None.

    Returns:
        (inverses, rungs): exactly symmetric, of the shape, dtype, device and storage of the matrices; ``Rung`` per
        matrix.

    Raises:
        ValueError: where the three sequences differ in length.
    """
    if not len(matrices) == len(dampings) == len(previous):
        raise ValueError(f"{len(matrices)} matrices, {len(dampings)} dampings and {len(previous)} previous inverses")
    inverses: dict[int, Side] = {}
    rungs: dict[int, Rung] = {}

    def climb(rung: Rung, indices: Sequence[int], dampings: Sequence[Tensor], *, double: bool = False) -> None:
        """Try the indices together; keep what succeeded."""
        for index, inverse in _try(matrices, dampings, indices, double=double).items():
            inverses[index], rungs[index] = inverse, rung

    climb(Rung.FIRST, range(len(matrices)), dampings)
    for factor in MORE_DAMPING:
        failed = [index for index in range(len(matrices)) if index not in rungs]
        # The others' dampings are never read: only those that failed are computed.
        more = [_raised(matrices[i], damping, factor) if i in failed else damping for i, damping in enumerate(dampings)]
        climb(Rung.MORE_DAMPING, failed, more)
    failed = [index for index in range(len(matrices)) if index not in rungs]
    climb(Rung.DOUBLE, [index for index in failed if _widens(matrices[index])], dampings, double=True)
    for index in failed:
        if index not in rungs:
            inverses[index], rungs[index] = _stand_in(matrices[index], previous[index])
    return [inverses[i] for i in range(len(matrices))], [rungs[i] for i in range(len(matrices))]


def attempted_inverses(matrices: Sequence[Side], dampings: Sequence[Tensor]) -> tuple[list[Side], list[Tensor]]:
    """(M + damping I)^-1 of each matrix as far as it goes, and whether it does; nothing is read on the host.

    Arguments as for ``damped_inverses``.

    Returns:
        (inverses, flags): a 0-d bool for each, False where its inverse is not to be used.
    """
    inverses: dict[int, Side] = {}
    flags: dict[int, Tensor] = {}
    for group in size_groups(matrices, range(len(matrices))):
        batch, succeeded = _inverses([matrices[i] for i in group], [dampings[i] for i in group], dtype=None)
        inverses.update(zip(group, batch, strict=True))
        flags.update(zip(group, succeeded.unbind(), strict=True))
    return [inverses[i] for i in range(len(matrices))], [flags[i] for i in range(len(matrices))]


def _try(
    matrices: Sequence[Side], dampings: Sequence[Tensor], indices: Sequence[int], *, double: bool
) -> dict[int, Side]:
    """The inverses of those indices that factorised, after one read of all their statuses."""
    results: dict[int, Side] = {}
    flags: list[Tensor] = []
    for group in size_groups(matrices, indices):
        batch, succeeded = _inverses(
            [matrices[i] for i in group], [dampings[i] for i in group], dtype=torch.float64 if double else None
        )
        results.update(zip(group, batch, strict=True))
        flags.append(succeeded)
    # Results are in the order of their groups, as the flags are.
    status = read_status(flags)
    return {index: inverse for (index, inverse), ok in zip(results.items(), status, strict=True) if ok}


def _inverses(
    matrices: Sequence[Side], dampings: Sequence[Tensor], *, dtype: torch.dtype | None
) -> tuple[Sequence[Side], Tensor]:
    """Inverses of matrices of one size and storage, and a flag for each: positive definite, and finite."""
    if isinstance(matrices[0], Diagonal):
        return _reciprocals(cast("Sequence[Diagonal]", matrices), dampings, dtype=dtype)
    return _cholesky_inverses(cast("Sequence[Tensor]", matrices), dampings, dtype=dtype)


def _reciprocals(
    matrices: Sequence[Diagonal], dampings: Sequence[Tensor], *, dtype: torch.dtype | None
) -> tuple[list[Diagonal], Tensor]:
    """``_inverses`` of diagonal matrices."""
    inverses, flags = [], []
    for matrix, damping in zip(matrices, dampings, strict=True):
        values = matrix.values.to(dtype)
        damped = values + damping.to(values).unsqueeze(-1)
        inverse = damped.reciprocal().to(matrix.dtype)
        inverses.append(Diagonal(inverse))
        flags.append((torch.isfinite(damped) & (damped > 0) & torch.isfinite(inverse)).all())
    return inverses, torch.stack(flags)


def _cholesky_inverses(
    matrices: Sequence[Tensor], dampings: Sequence[Tensor], *, dtype: torch.dtype | None
) -> tuple[list[Tensor], Tensor]:
    """Inverses of matrices of one size, and a flag for each: factorised, and finite.

    Factor and inverses take the place of the copy of the matrices that they are made of.
    """
    counts = [matrix.shape[:-2].numel() for matrix in matrices]
    added = [damping.expand(matrix.shape[:-2]).reshape(-1) for matrix, damping in zip(matrices, dampings, strict=True)]
    d = matrices[0].shape[-1]
    batch = _bordered(matrices, dtype or matrices[0].dtype)
    batch[:, :d, :d].diagonal(dim1=-2, dim2=-1).add_(torch.cat(added).to(batch).unsqueeze(-1))
    # Transposed, since LAPACK's order of entries spares a temporary.
    factor, info = batch.mT, torch.empty(len(batch), dtype=torch.int32, device=batch.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    # A zero pivot would make the inversion raise for the whole batch; what failed is discarded below.
    factor.diagonal(dim1=-2, dim2=-1).masked_fill_((info != 0).unsqueeze(-1), 1.0)
    torch.cholesky_inverse(factor, out=factor)
    inverses = [
        _own(part, batch).reshape(matrix.shape).to(matrix.dtype)
        for matrix, part in zip(matrices, torch.split(batch[:, :d, :d], counts), strict=True)
    ]
    # Entries are sums of products of a triangle's columns, and those on the diagonal of their squares: none of the
    # others is larger, or NaN alone.
    finite = [torch.isfinite(inverse.diagonal(dim1=-2, dim2=-1)).all() for inverse in inverses]
    positive = [(part == 0).all() for part in torch.split(info, counts)]
    return inverses, torch.stack(finite) & torch.stack(positive)


def _own(part: Tensor, batch: Tensor) -> Tensor:
    """Inverses out of a batch, symmetric to the last bit, as a tensor that does not keep the rest alive."""
    if batch.device.type != "cpu":
        return symmetrise(part)
    # LAPACK computes one triangle, of which torch makes the other.
    return part if part.numel() == batch.numel() else part.clone(memory_format=torch.contiguous_format)


def _bordered(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Copies of matrices [..., d, d] one after another, each with the identity's row and column where d is crowded."""
    first = matrices[0]
    d = first.shape[-1]
    size = d + (d % CROWDED.get(first.device.type, d + 1) == 0)
    counts = [matrix.shape[:-2].numel() for matrix in matrices]
    batch = torch.empty(sum(counts), size, size, dtype=dtype, device=first.device)
    for part, matrix in zip(torch.split(batch[:, :d, :d], counts), matrices, strict=True):
        part.copy_(matrix.reshape(part.shape))
    if size > d:
        batch[:, d], batch[:, :, d] = 0.0, 0.0
        batch[:, d, d] = 1.0
    return batch


def _raised(matrix: Side, damping: Tensor, factor: float) -> Tensor:
    """``factor`` times the damping, or times the matrix's own round-off where that is more."""
    round_off = trace(matrix) * (torch.finfo(matrix.dtype).eps / matrix.shape[-1])
    return torch.maximum(damping.to(round_off), round_off) * factor


def _widens(matrix: Side) -> bool:
    """Whether float64 is wider than what the matrix has, and there."""
    return matrix.dtype != torch.float64 and has_float64(matrix.device)


def _stand_in(matrix: Side, previous: Side | None) -> tuple[Side, Rung]:
    """The previous inverse, or the identity."""
    if previous is not None:
        return previous, Rung.PREVIOUS
    return identity_like(matrix), Rung.IDENTITY
