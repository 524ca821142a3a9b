"""Kronecker products against torch.kron."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfac_cond.linalg.kronecker import block_diagonal, kron, kronecker_matmul, kronecker_solve
from kfac_cond.linalg.sides import Diagonal, Side

from ..passes import Passes


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


def upper(matrix: Tensor) -> Tensor:
    """R of R^T R."""
    return torch.linalg.cholesky(matrix).mT.contiguous()


@pytest.mark.parametrize("groups", [(), (3,)], ids=["one", "groups"])
@pytest.mark.parametrize(("o", "i"), [(5, 5), (2, 7), (7, 2), (1, 4)])
@pytest.mark.parametrize("diagonal", ["", "left", "right", "both"])
def test_solve_is_the_product_with_the_inverses(spd, diagonal: str, o: int, i: int, groups: tuple[int, ...]) -> None:
    G, A, v = spd(*groups, o, o), spd(*groups, i, i), torch.randn(*groups, o, i, dtype=torch.float64)
    sides: dict[str, tuple[Side, Tensor]] = {}
    for name, matrix in (("left", G), ("right", A)):
        inverse = torch.linalg.inv(matrix)
        if diagonal in (name, "both"):
            values = matrix.diagonal(dim1=-2, dim2=-1)
            sides[name] = Diagonal(values.reciprocal()), torch.diag_embed(values.reciprocal())
        else:
            sides[name] = upper(matrix), inverse
    before = v.clone()
    found = kronecker_solve(sides["left"][0], v, sides["right"][0])
    torch.testing.assert_close(found, sides["left"][1] @ v @ sides["right"][1], rtol=0, atol=1e-10)
    assert torch.equal(v, before)


def test_solve_takes_a_batch_and_a_transposed_one(spd) -> None:
    G, A, v = spd(3), spd(4), torch.randn(5, 4, 3, dtype=torch.float64).mT
    expected = torch.linalg.inv(G) @ v @ torch.linalg.inv(A)
    torch.testing.assert_close(kronecker_solve(upper(G), v, upper(A)), expected, rtol=0, atol=1e-10)


def test_solve_of_ill_conditioned_sides_is_as_near_as_products_with_inverses() -> None:
    """In float32, condition 10^5 each, against float64."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64))
    matrix = ((q * torch.logspace(0, -5, 60, dtype=torch.float64)) @ q.mT).float()
    v = torch.randn(60, 60, generator=generator, dtype=torch.float32)
    exact = torch.linalg.inv(matrix.double())
    expected = exact @ v.double() @ exact
    R = upper(matrix)
    inverse = torch.cholesky_inverse(R, upper=True)

    def error(found: Tensor) -> float:
        return float(torch.linalg.norm(found.double() - expected) / torch.linalg.norm(expected))

    assert error(kronecker_solve(R, v, R)) < 2 * error(kronecker_matmul(inverse, v, inverse)) < 0.1


def test_solve_writes_one_tensor_of_the_size_of_the_vector(spd) -> None:
    G, A, v = upper(spd(30)), upper(spd(40)), torch.randn(30, 40, dtype=torch.float64)
    with Passes(least=v.numel()) as passes:
        kronecker_solve(G, v, A)
    # Of the copy, which is solved in place four times.
    assert passes.written == v.numel()
    assert passes.products == []
    assert passes.solves == [(30, 40)] * 4
