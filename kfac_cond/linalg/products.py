"""Products of matrices that are symmetric, to the last bit."""

from __future__ import annotations

from torch import Tensor


def symmetrise(matrix: Tensor) -> Tensor:
    """The symmetric part (M + M^T) / 2, symmetric to the last bit, as a tensor of its own.

    Args:
        matrix: [..., d, d].
    """
    return (matrix + matrix.mT).mul_(0.5)


def gram(x: Tensor) -> Tensor:
    """x^T x, symmetric to the last bit.

    Args:
        x: [..., n, d]; n may be 0.
    """
    return symmetrise(x.mT @ x)
