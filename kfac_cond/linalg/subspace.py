"""Eigenbases that follow a matrix which changes slowly: one step of subspace iteration from the basis before."""

from __future__ import annotations

import torch
from torch import Tensor

OFF_DIAGONAL = 0.1
"""Share of U^T M U off its diagonal (Frobenius) up to which one step from U is enough; beyond it M is decomposed."""


def off_diagonal_share(matrix: Tensor, basis: Tensor) -> Tensor:
    """How far a basis is from diagonalising a matrix: the share of U^T M U that is off the diagonal, 0-d.

    Args:
        matrix: symmetric, [..., d, d].
        basis: orthonormal columns, [..., d, d].

    Returns:
        The largest over all leading dimensions, from 0 to 1; 0 of a matrix that is zero.
    """
    rotated = basis.mT @ matrix @ basis
    whole = rotated.square().sum(dim=(-2, -1))
    rest = (whole - rotated.diagonal(dim1=-2, dim2=-1).square().sum(dim=-1)).clamp(min=0)
    return (rest / torch.where(whole > 0, whole, 1)).max().sqrt()


def followed(matrix: Tensor, basis: Tensor) -> Tensor:
    """The basis after one step of subspace iteration, the orthonormal columns of M U; nothing is read.

    A step multiplies what is off the diagonal between two eigenvectors by the quotient of their eigenvalues.

    Args:
        matrix: symmetric positive semi-definite, [..., d, d].
        basis: orthonormal columns, [..., d, d].

    Source: Golub & Van Loan (Matrix Computations, section 8.2.4), orthogonal iteration.
    """
    # In the order of the eigenvalues, so that no column of a small one stands before that of a large one.
    rayleigh = (basis * (matrix @ basis)).sum(dim=-2)
    order = rayleigh.argsort(dim=-1, descending=True)
    sorted_basis = basis.gather(-1, order.unsqueeze(-2).expand(basis.shape))
    step, _ = torch.linalg.qr(matrix @ sorted_basis)
    return torch.where(torch.isfinite(step).all(), step, basis)
