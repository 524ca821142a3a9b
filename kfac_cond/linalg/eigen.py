"""Eigenbases of symmetric positive semi-definite matrices, batched over equal sizes, with a ladder for what fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import overload

import torch
from torch import Tensor

from .ladder import Rung, has_float64, read_status, size_groups, stack_flat
from .moments import trace
from .products import symmetrise
from .sides import Diagonal, Side, identity_like

__all__ = ["Eigenbasis", "Rung", "attempted_eigenbases", "eigenbases", "from_eigenbasis"]

Eigenbasis = tuple[Tensor, Tensor | None]
"""(eigenvalues [..., d], not negative; basis [..., d, d], the eigenvectors in its columns).

The eigenvalues ascend; those of a diagonal matrix are in its own order, and its basis, the identity, is None.
"""

JITTER = 10.0
"""What the rung with more on the diagonal adds, in multiples of eps tr / d: little beside eigh's own round-off."""


def eigenbases(
    matrices: Sequence[Side], previous: Sequence[Eigenbasis | None] | None = None
) -> tuple[list[Eigenbasis], list[Rung]]:
    """Eigenvalues and eigenvectors of each matrix, and how far up the ladder each had to go.

    Synchronises with the device: eigh reports a failure by raising, which takes its status to the host once for each
    size, dtype and device. Call it at a refresh, not in between. Eigenvalues are clamped at 0 from below: a Gram matrix
    has no negative ones, its round-off has. A matrix that fails is tried again in float64 (not on devices without it,
    nor where it is float64 already), then with a jitter on the diagonal; then its previous eigenbasis stands in, then
    that of the identity.

    Args:
        matrices: symmetric, [..., d, d] each, any d, float32 or float64; whole or ``Diagonal``.
        previous: for each matrix its last eigenbasis, or None.

    Returns:
        (bases, rungs): an eigenbasis of the dtype and device of the matrix, and a ``Rung``, for each.

    Raises:
        ValueError: where the two sequences differ in length.
    """
    stand_ins = [None] * len(matrices) if previous is None else previous
    if len(stand_ins) != len(matrices):
        raise ValueError(f"{len(matrices)} matrices and {len(stand_ins)} previous eigenbases")
    bases: dict[int, Eigenbasis] = {}
    rungs: dict[int, Rung] = {}
    for rung in (Rung.FIRST, Rung.DOUBLE, Rung.MORE_DAMPING):
        pending = {index: _prepared(m, rung) for index, m in enumerate(matrices) if index not in rungs}
        found = _decompose({index: m for index, m in pending.items() if m is not None})
        bases.update(found)
        rungs.update(dict.fromkeys(found, rung))
    for index, matrix in enumerate(matrices):
        if index not in rungs:
            bases[index], rungs[index] = _stand_in(matrix, stand_ins[index])
    ordered = [_cast(bases[index], matrix.dtype) for index, matrix in enumerate(matrices)]
    return ordered, [rungs[i] for i in range(len(matrices))]


def attempted_eigenbases(matrices: Sequence[Side]) -> tuple[list[Eigenbasis], list[Tensor]]:
    """The eigenbasis of each matrix, and whether it is to be used, 0-d bool; nothing is read beside eigh's own status.

    Where eigh does not converge the basis is that of the identity, and not to be used.
    """
    found = _attempted(dict(enumerate(matrices)))
    bases = [found.get(i) or _stand_in(matrix, None)[0] for i, matrix in enumerate(matrices)]
    failed = [torch.zeros((), dtype=torch.bool, device=matrix.device) for matrix in matrices]
    return bases, [_is_finite(found[i]) if i in found else failed[i] for i in range(len(matrices))]


@overload
def from_eigenbasis(eigenvalues: Tensor, basis: Tensor) -> Tensor: ...


@overload
def from_eigenbasis(eigenvalues: Tensor, basis: Tensor | None) -> Side: ...


def from_eigenbasis(eigenvalues: Tensor, basis: Tensor | None) -> Side:
    """The symmetric matrix U diag(values) U^T.

    Args:
        eigenvalues: [..., d], or any function of them.
        basis: [..., d, d], orthonormal columns; None for the identity.

    Returns:
        [..., d, d], exactly symmetric; a ``Diagonal`` where there is no basis.
    """
    if basis is None:
        return Diagonal(eigenvalues)
    return symmetrise((basis * eigenvalues.unsqueeze(-2)) @ basis.mT)


def _cast(basis: Eigenbasis, dtype: torch.dtype) -> Eigenbasis:
    values, vectors = basis
    return values.to(dtype), None if vectors is None else vectors.to(dtype)


def _prepared(matrix: Side, rung: Rung) -> Side | None:
    """What a rung tries to decompose, or None where the rung has nothing new to offer."""
    if isinstance(matrix, Diagonal):
        return matrix if rung is Rung.FIRST else None
    if rung is Rung.DOUBLE:
        return matrix.double() if matrix.dtype != torch.float64 and has_float64(matrix.device) else None
    if rung is Rung.MORE_DAMPING:
        jitter = trace(matrix).abs() * (JITTER * torch.finfo(matrix.dtype).eps / matrix.shape[-1])
        return matrix + torch.diag_embed(jitter.unsqueeze(-1).expand(matrix.shape[:-1]))
    return matrix


def _decompose(matrices: Mapping[int, Side]) -> dict[int, Eigenbasis]:
    """The eigenbases of those that eigh decomposed, after one read of whether they are finite."""
    found = _attempted(matrices)
    status = read_status([_is_finite(basis).reshape(1) for basis in found.values()])
    return {index: basis for (index, basis), ok in zip(found.items(), status, strict=True) if ok}


def _attempted(matrices: Mapping[int, Side]) -> dict[int, Eigenbasis]:
    """The eigenbases of those that eigh decomposed, finite or not."""
    found: dict[int, Eigenbasis] = {
        index: (matrix.values.clamp(min=0), None) for index, matrix in matrices.items() if isinstance(matrix, Diagonal)
    }
    keys = [index for index in matrices if index not in found]
    values = [matrix for matrix in matrices.values() if not isinstance(matrix, Diagonal)]
    for group in size_groups(values, range(len(values))):
        found.update(_decompose_group({keys[i]: values[i] for i in group}))
    return found


def _is_finite(basis: Eigenbasis) -> Tensor:
    values, vectors = basis
    return torch.isfinite(values.sum() if vectors is None else torch.linalg.vector_norm(vectors) + values.sum())


def _decompose_group(group: Mapping[int, Tensor]) -> dict[int, Eigenbasis]:
    """The eigenbases of matrices of one size; where the batch fails, of those that succeed alone."""
    try:
        eigenvalues, basis = torch.linalg.eigh(stack_flat(list(group.values())))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if len(group) == 1:
            return {}
        alone: dict[int, Eigenbasis] = {}
        for index, matrix in group.items():
            alone.update(_decompose_group({index: matrix}))
        return alone
    counts = [matrix.shape[:-2].numel() for matrix in group.values()]
    parts = zip(group.items(), torch.split(eigenvalues.clamp_(min=0), counts), torch.split(basis, counts), strict=True)
    # A tensor of its own for each: a view would keep the whole batch alive.
    return {
        index: (
            values.reshape(matrix.shape[:-1]).clone(),
            vectors.reshape(matrix.shape).clone(memory_format=torch.contiguous_format),
        )
        for (index, matrix), values, vectors in parts
    }


def _stand_in(matrix: Side, previous: Eigenbasis | None) -> tuple[Eigenbasis, Rung]:
    """The previous eigenbasis, or the identity's."""
    if previous is not None:
        return previous, Rung.PREVIOUS
    identity = identity_like(matrix)
    return (
        identity.diagonal(dim1=-2, dim2=-1).clone(),
        None if isinstance(identity, Diagonal) else identity,
    ), Rung.IDENTITY
