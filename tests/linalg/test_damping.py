"""The pi rule, and damping relative to the block."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_cond.linalg.damping import factored_damping, mean_eigenvalue, relative_damping
from kfac_cond.linalg.inverse import damped_inverses
from kfac_cond.linalg.kronecker import kron


def test_is_the_formula(spd) -> None:
    A, G, damping = spd(5), spd(3), 0.3
    pi = math.sqrt((A.trace().item() / 5) / (G.trace().item() / 3))
    damping_A, damping_G = factored_damping(A, G, damping)
    assert damping_A.item() == pytest.approx(pi * math.sqrt(damping), rel=1e-12)
    assert damping_G.item() == pytest.approx(math.sqrt(damping) / pi, rel=1e-12)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(exponent=st.floats(-8, 8), damping=st.floats(1e-6, 10))
def test_inverse_is_invariant_to_where_the_scale_is(exponent: float, damping: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(9, d, generator=generator, dtype=torch.float64) for d in (4, 3))
    A, G, c = x.mT @ x, y.mT @ y, 10.0**exponent

    def inverse(A: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
        (A_inverse, G_inverse), _ = damped_inverses([A, G], factored_damping(A, G, damping), [None, None])
        return kron(G_inverse, A_inverse)

    torch.testing.assert_close(inverse(A * c, G / c), inverse(A, G), rtol=1e-10, atol=0)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("which", ["A", "G"])
def test_pi_is_one_without_a_usable_trace(spd, bad: float, which: str) -> None:
    factors = {"A": spd(4), "G": spd(3)}
    factors[which] = torch.eye(4 if which == "A" else 3, dtype=torch.float64) * bad
    added = factored_damping(factors["A"], factors["G"], 0.25)
    assert [value.item() for value in added] == [0.5, 0.5]


def test_each_group_has_its_own_pi(spd) -> None:
    A, G = spd(2, 4, 4), spd(2, 3, 3)
    A[1] *= 9
    damping_A, damping_G = factored_damping(A, G, 0.1)
    for group in range(2):
        alone = factored_damping(A[group], G[group], 0.1)
        torch.testing.assert_close((damping_A[group], damping_G[group]), alone, rtol=1e-12, atol=0)


def test_a_float32_ratio_out_of_range_keeps_its_root() -> None:
    identity = torch.eye(2, dtype=torch.float32)
    damping_A, _ = factored_damping(identity * 1e30, identity * 1e-30, 1.0)
    assert damping_A.item() == pytest.approx(1e30, rel=1e-5)


def test_takes_a_tensor(spd) -> None:
    A, G = spd(4), spd(3)
    as_number, as_tensor = factored_damping(A, G, 0.3), factored_damping(A, G, torch.tensor(0.3, dtype=torch.float64))
    torch.testing.assert_close(as_tensor, as_number, rtol=1e-12, atol=0)


def test_mean_eigenvalue_is_that_of_the_block(spd) -> None:
    A, G = spd(5), spd(3)
    expected = torch.linalg.eigvalsh(torch.kron(G, A)).mean()
    torch.testing.assert_close(mean_eigenvalue(A, G), expected, rtol=1e-10, atol=0)


def test_relative_damping_is_a_fraction_of_the_mean_eigenvalue(spd) -> None:
    A, G = spd(5), spd(3)
    expected = 0.01 * torch.kron(G, A).trace() / 15
    torch.testing.assert_close(relative_damping(A, G, 0.01, 1e-8), expected, rtol=1e-10, atol=0)


def test_relative_damping_has_a_floor(spd) -> None:
    assert relative_damping(torch.zeros(3, 3), torch.eye(2), 0.01, 1e-4).item() == pytest.approx(1e-4)


def test_reads_nothing(spd, reads) -> None:
    A, G = spd(4), spd(3)
    with reads:
        factored_damping(A, G, torch.tensor(0.1))
        relative_damping(A, G, 0.1, 1e-8)
    assert reads.names == []


def test_runs_on_the_meta_device() -> None:
    A, G = torch.ones(4, 4, device="meta"), torch.ones(3, 3, device="meta")
    assert factored_damping(A, G, 0.1)[0].is_meta
