"""Kronecker products against torch.kron."""

from __future__ import annotations

import torch

from kfac_cond.linalg.kronecker import block_diagonal, kron, kronecker_matmul


def test_kron_is_taken_of_each_pair(spd) -> None:
    left, right = spd(2, 3, 3), spd(2, 4, 4)
    expected = torch.stack([torch.kron(g, a) for g, a in zip(left, right, strict=True)])
    torch.testing.assert_close(kron(left, right), expected, rtol=0, atol=1e-10)


def test_kron_of_rectangles() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 3, generator=generator), torch.randn(4, 5, generator=generator)
    torch.testing.assert_close(kron(left, right), torch.kron(left, right))


def test_matmul_is_the_dense_product_for_row_major_vec(spd) -> None:
    G, A, v = spd(3), spd(4), torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
    expected = (torch.kron(G, A) @ v.flatten()).reshape(3, 4)
    torch.testing.assert_close(kronecker_matmul(G, v, A), expected, rtol=0, atol=1e-10)


def test_matmul_takes_a_batch(spd) -> None:
    G, A, v = spd(2, 3, 3), spd(2, 4, 4), torch.randn(5, 2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(kronecker_matmul(G, v, A)[3, 1], G[1] @ v[3, 1] @ A[1], rtol=0, atol=1e-10)


def test_block_diagonal_is_torch_s(spd) -> None:
    blocks = [spd(2), spd(1), spd(3)]
    assert torch.equal(block_diagonal(blocks), torch.block_diag(*blocks))
