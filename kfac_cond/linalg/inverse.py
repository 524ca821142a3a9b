"""Damped inverses by Cholesky, or entry by entry, batched over equal sizes, with a ladder for those that fail.

Where an inverse serves for a few products only, its Cholesky factor serves as well, by triangular solves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from .ladder import Rung, has_float64, read_status, size_groups
from .moments import trace
from .products import symmetrise
from .sides import Diagonal, Side, identity_like

__all__ = ["Rung", "attempted_factors", "attempted_inverses", "damped_inverses", "inverted", "solves"]

MORE_DAMPING = (10.0, 100.0)
"""Multiples of max(damping, eps tr / d) that the second rung tries."""

CROWDED = {"cpu": 128}
"""Sizes whose multiples make a factorisation slow, by type of device: the numbers of a column fall into few places of a
cache that goes by address, and push each other out."""

SOLVES = {"cpu": 2}
"""For so many products at most a factor is solved with in place of an inverse, by type of device; for none elsewhere,
where a triangle is solved with row by row. For squares of 1,024 on one thread five products take what was saved, for
smaller sides and few columns more; a whole step gains too little from four on."""

Made = tuple[Sequence[Side], Tensor]
"""What was made of matrices of one size and storage, and a flag for each."""


def solves(device: torch.device, uses: int | None) -> bool:
    """Whether factors are solved with on a device, in place of products with inverses.

    Args:
        device: of the matrices.
        uses: products that each serves for; None where it is not known.
    """
    return uses is not None and uses <= SOLVES.get(device.type, 0)


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
    return _attempted(partial(_inverses, dtype=None), matrices, dampings)


def attempted_factors(matrices: Sequence[Side], dampings: Sequence[Tensor]) -> tuple[list[Side], list[Tensor]]:
    """The upper triangular R of M + damping I = R^T R, of a diagonal M the inverse; nothing is read on the host.

    Arguments as for ``damped_inverses``.

    Returns:
        (factors, flags): a 0-d bool for each, False where its factor is not to be used.
    """
    return _attempted(_factors, matrices, dampings)


def inverted(factor: Side) -> Side:
    """(R^T R)^-1 of an upper triangular R [..., d, d]; of a diagonal, which is one already, itself."""
    return factor if isinstance(factor, Diagonal) else torch.cholesky_inverse(factor, upper=True)


def _attempted(
    make: Callable[[Sequence[Side], Sequence[Tensor]], Made], matrices: Sequence[Side], dampings: Sequence[Tensor]
) -> tuple[list[Side], list[Tensor]]:
    """What is made of each matrix, those of one size together, and its flag."""
    found: dict[int, Side] = {}
    flags: dict[int, Tensor] = {}
    for group in size_groups(matrices, range(len(matrices))):
        batch, succeeded = make([matrices[i] for i in group], [dampings[i] for i in group])
        found.update(zip(group, batch, strict=True))
        flags.update(zip(group, succeeded.unbind(), strict=True))
    return [found[i] for i in range(len(matrices))], [flags[i] for i in range(len(matrices))]


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


def _inverses(matrices: Sequence[Side], dampings: Sequence[Tensor], *, dtype: torch.dtype | None) -> Made:
    """Inverses of matrices of one size and storage, and a flag for each: positive definite, and finite."""
    if isinstance(matrices[0], Diagonal):
        return _reciprocals(cast("Sequence[Diagonal]", matrices), dampings, dtype=dtype)
    return _cholesky_inverses(cast("Sequence[Tensor]", matrices), dampings, dtype=dtype)


def _factors(matrices: Sequence[Side], dampings: Sequence[Tensor]) -> Made:
    """``attempted_factors`` of matrices of one size and storage."""
    if isinstance(matrices[0], Diagonal):
        return _reciprocals(cast("Sequence[Diagonal]", matrices), dampings, dtype=None)
    tensors = cast("Sequence[Tensor]", matrices)
    batch, positive = _factorised(tensors, dampings, dtype=tensors[0].dtype)
    factors = [_own(part, like) for part, like in zip(_parts(batch, tensors), tensors, strict=True)]
    # The diagonal of the inverse is no smaller than these.
    squares = [factor.diagonal(dim1=-2, dim2=-1).square() for factor in factors]
    finite = [torch.isfinite(one.reciprocal()).all() for one in squares]
    return factors, torch.stack(finite) & positive


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

    The inverses take the place of the factors.
    """
    batch, positive = _factorised(matrices, dampings, dtype=dtype or matrices[0].dtype)
    torch.cholesky_inverse(batch.mT, out=batch.mT)
    # LAPACK computes one triangle, of which torch makes the other; elsewhere they differ in the last bits.
    parts = [part if batch.device.type == "cpu" else symmetrise(part) for part in _parts(batch, matrices)]
    inverses = [_own(part, like).to(like.dtype) for part, like in zip(parts, matrices, strict=True)]
    # Entries are sums of products of a triangle's columns, and those on the diagonal of their squares: none of the
    # others is larger, or NaN alone.
    finite = [torch.isfinite(inverse.diagonal(dim1=-2, dim2=-1)).all() for inverse in inverses]
    return inverses, torch.stack(finite) & positive


def _factorised(matrices: Sequence[Tensor], dampings: Sequence[Tensor], *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Upper triangular R with R^T R = M + damping I, one after another in a batch, and whether each M is positive.

    They take the place of the copy of the matrices that they are made of.
    """
    counts = _counts(matrices)
    added = [damping.expand(matrix.shape[:-2]).reshape(-1) for matrix, damping in zip(matrices, dampings, strict=True)]
    d = matrices[0].shape[-1]
    batch = _bordered(matrices, dtype)
    batch[:, :d, :d].diagonal(dim1=-2, dim2=-1).add_(torch.cat(added).to(batch).unsqueeze(-1))
    # Transposed, since LAPACK's order of entries spares a temporary.
    factor, info = batch.mT, torch.empty(len(batch), dtype=torch.int32, device=batch.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    # A zero pivot would make an inversion raise for the whole batch; what failed is not used.
    factor.diagonal(dim1=-2, dim2=-1).masked_fill_((info != 0).unsqueeze(-1), 1.0)
    return batch, torch.stack([(part == 0).all() for part in torch.split(info, counts)])


def _counts(matrices: Sequence[Tensor]) -> list[int]:
    """How many matrices [d, d] each tensor has."""
    return [matrix.shape[:-2].numel() for matrix in matrices]


def _parts(batch: Tensor, matrices: Sequence[Tensor]) -> Sequence[Tensor]:
    """What a batch has for each of the matrices, [k, d, d] each."""
    d = matrices[0].shape[-1]
    return torch.split(batch[:, :d, :d], _counts(matrices))


def _own(part: Tensor, like: Tensor) -> Tensor:
    """A part of a batch in the shape of another tensor, which does not keep the rest alive."""
    alone = part.untyped_storage().nbytes() == part.nbytes
    return (part if alone else part.clone(memory_format=torch.contiguous_format)).reshape(like.shape)


def _bordered(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Copies of matrices [..., d, d] one after another, each with the identity's row and column where d is crowded."""
    first = matrices[0]
    d = first.shape[-1]
    size = d + (d % CROWDED.get(first.device.type, d + 1) == 0)
    counts = _counts(matrices)
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
