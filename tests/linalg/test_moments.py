"""Second moments against the sum of outer products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_cond.linalg.moments import second_moment, trace
from kfac_cond.linalg.products import symmetrise


@pytest.mark.parametrize("shape", [(7, 3), (4, 7, 3), (2, 3, 5, 4), (1, 1), (0, 3)])
@pytest.mark.parametrize("ones", [False, True])
def test_is_the_sum_of_outer_products(shape: tuple[int, ...], ones: bool) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    features = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) if ones else x
    expected = (features.unsqueeze(-1) * features.unsqueeze(-2)).sum(dim=-3)
    torch.testing.assert_close(second_moment(x, ones=ones), expected, rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(n=st.integers(1, 40), d=st.integers(1, 33), ones=st.booleans(), seed=st.integers(0, 999))
def test_is_symmetric_to_the_last_bit(n: int, d: int, ones: bool, seed: int) -> None:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    moment = second_moment(x, ones=ones)
    assert torch.equal(moment, moment.mT)


def test_takes_features_that_are_not_contiguous() -> None:
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(second_moment(x.mT), x @ x.mT, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_the_dtype(dtype: torch.dtype) -> None:
    assert second_moment(torch.ones(2, 3, dtype=dtype), ones=True).dtype == dtype


def test_reads_nothing(reads) -> None:
    with reads:
        second_moment(torch.ones(4, 3), ones=True)
    assert reads.names == []


def test_runs_on_the_meta_device() -> None:
    assert second_moment(torch.ones(2, 4, 3, device="meta"), ones=True).shape == (2, 4, 4)


def test_symmetrise_is_the_symmetric_part() -> None:
    matrix = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    assert torch.equal(symmetrise(matrix), torch.tensor([[1.0, 3.0], [3.0, 3.0]]))


def test_trace_is_taken_of_each_matrix() -> None:
    matrices = torch.arange(8.0).reshape(2, 2, 2)
    assert torch.equal(trace(matrices), torch.tensor([3.0, 11.0]))
