"""Sums of blocks and of Fishers against sums of dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfac_cond.errors import ArgumentError
from kfac_cond.layers.layout import WeightLayout
from kfac_cond.structures import Block, Fisher, Iteration, SumBlock

from ..reference import assert_same

DAMPING = 0.3


@pytest.fixture
def pair(block: Block, partner) -> tuple[SumBlock, Tensor]:
    """(a sum of three, its dense matrix)."""
    other, third = partner(block.layout), partner(block.layout)
    found = (block + other * 2.0) + third
    assert isinstance(found, SumBlock)
    assert len(found.terms) == 3
    return found, block.to_dense() + 2.0 * other.to_dense() + third.to_dense()


class TestBlocks:
    def test_products_and_quadratic(self, pair, vector: Tensor):
        found, dense = pair
        assert_same(found @ vector, dense @ vector)
        assert_same(found.quadratic(vector), vector @ dense @ vector)
        assert_same((3 * found).to_dense(), 3 * dense)

    @pytest.mark.parametrize("verb", ["solve", "inverse", "inverse_sqrt"])
    def test_functions(self, pair, vector: Tensor, verb: str):
        found, dense = pair
        damped = dense + DAMPING * torch.eye(len(dense))
        if verb == "solve":
            assert_same(found.solve(vector, damping=DAMPING), torch.linalg.solve(damped, vector), tolerance=1e-9)
            return
        values, basis = torch.linalg.eigh(damped)
        function = values.reciprocal() if verb == "inverse" else values.rsqrt()
        assert_same(getattr(found, verb)(damping=DAMPING) @ vector, (basis * function) @ basis.T @ vector)

    def test_sqrt_twice(self, pair, vector: Tensor):
        found, dense = pair
        assert_same(found.sqrt() @ (found.sqrt() @ vector), dense @ vector, tolerance=1e-8)

    @pytest.mark.parametrize(
        ("verb", "of_dense"),
        [
            ("trace", torch.trace),
            ("frobenius_norm", torch.linalg.matrix_norm),
            ("diagonal", lambda d: d.diagonal()),
            ("logdet", torch.logdet),
        ],
    )
    def test_scalars(self, pair, verb: str, of_dense):
        found, dense = pair
        exact = SumBlock(found.layout, found.terms, Iteration(probes=len(dense)))
        assert_same(getattr(exact, verb)().flatten(), of_dense(dense).flatten())

    def test_top_eigenpairs(self, pair):
        found, dense = pair
        k = min(3, len(dense))
        values, vectors = found.top_eigenpairs(k)
        assert_same(values, torch.linalg.eigvalsh(dense).flip(0)[:k])
        rows = vectors.reshape(k, -1)
        assert_same(rows @ dense @ rows.T, torch.diag(values))

    def test_samples_have_the_covariance(self, pair):
        found, dense = pair
        n = 4000
        draws = found.sample(n, torch.Generator().manual_seed(3)).reshape(n, -1)
        spread = ((dense.square() + torch.outer(dense.diagonal(), dense.diagonal())) / n).sqrt()
        assert ((draws.T @ draws / n - dense).abs() <= 5 * spread).all()

    def test_what_does_not_fit_is_refused(self, block: Block, kronecker):
        with pytest.raises(ArgumentError, match="same parameters"):
            block + kronecker(WeightLayout("other.weight", None, (5, 5)), "other")
        with pytest.raises(ArgumentError, match=r"\.to\(\)"):
            block + block.to(torch.float32)
        with pytest.raises(TypeError):
            block + 1.0


class TestFishers:
    def test_add(self, fisher: Fisher):
        v = torch.randn(fisher.shape[0], dtype=torch.float64)
        found = fisher + 2.0 * fisher
        assert_same(found @ v, 3.0 * (fisher @ v))
        assert found.meta["derived"] == ("+ another Fisher",)
        assert "counts" not in found.meta

    def test_other_layers_are_refused(self, fisher: Fisher):
        with pytest.raises(ArgumentError, match="conv"):
            fisher + Fisher({"fc": fisher["fc"]}, meta={})
