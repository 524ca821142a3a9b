"""Numerical health and cost of blocks, against what was planted and what is held."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.inspection.numerics import cost_of, inverted, numerics_of, with_predictions
from kfac_cond.inspection.report import Cost, Numerics
from kfac_cond.inspection.spectra import spectrum_of
from kfac_cond.layers.layout import WeightLayout
from kfac_cond.layers.survey import survey

WORDS = ("kfac", "ekfac", "diagonal", "unit_wise", "block")


def block_of(A: Tensor, G: Tensor) -> kc.KroneckerBlock:
    return kc.KroneckerBlock(WeightLayout("w", None, (len(G), len(A))), A, G, "up")


def spread(d: int, smallest: float) -> Tensor:
    basis = torch.linalg.qr(torch.randn(d, d))[0]
    return basis @ torch.diag(torch.logspace(0, torch.log10(torch.tensor(smallest)), d)) @ basis.T


def health(block: kc.Block) -> Numerics:
    return numerics_of(block, spectrum_of(block))


def test_asymmetry_is_that_of_the_worse_side() -> None:
    A, G = spread(5, 0.1), spread(4, 0.1)
    assert health(block_of((A + A.T) / 2, (G + G.T) / 2)).asymmetry == 0.0
    planted = torch.zeros(4, 4)
    planted[0, 3] = 1e-3
    off = torch.sqrt(torch.tensor(2.0)) * 1e-3 / torch.linalg.matrix_norm(G + planted)
    assert health(block_of(A, G + planted)).asymmetry == pytest.approx(float(off), rel=1e-6)


def test_negative_mass_is_that_of_the_worse_side() -> None:
    A, G = torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([7.0, 2.0, -1.0]))
    assert health(block_of(A, G)).negative_mass == pytest.approx(0.1)


@pytest.mark.parametrize("word", WORDS)
def test_a_healthy_block(word: str) -> None:
    model, data = nn.Linear(5, 3), [torch.randn(32, 5)]
    options = kc.Options(dtype=torch.float64)
    block = kc.estimate(model, data, "categorical", structure=word, kind="exact", options=options)[""]
    found, cost = inverted(block, 1e-2, health(block), cost_of(block, None), seed=0)
    assert found.asymmetry < 1e-12 and found.negative_mass < 1e-12
    assert found.residual is not None and found.residual < 1e-11
    assert found.damping == 1e-2
    assert cost.milliseconds is not None and cost.milliseconds > 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_residual_is_that_of_the_definition(dtype: torch.dtype) -> None:
    """What either dtype makes of an ill-conditioned block; round-off itself depends on the order of the products."""
    block = block_of(spread(6, 1e-4).to(dtype), spread(5, 1e-4).to(dtype))
    damping = 1e-7
    found, _ = inverted(block, damping, health(block), Cost(0), seed=3)
    generator = torch.Generator().manual_seed(3)
    v = torch.randn(3, 5, 6, generator=generator, dtype=torch.float64).to(dtype)
    inverse = block.inverse(damping=damping)
    again = torch.stack([inverse.matvec(block.matvec(one) + damping * one) for one in v])
    off = max(float((b - one).norm() / one.norm()) for b, one in zip(again, v, strict=True))
    assert off / 3 < found.residual < 3 * off
    assert (found.residual > 1e-3) is (dtype == torch.float32)


def test_a_wrong_inverse_has_a_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    block = block_of(spread(4, 0.1), spread(3, 0.1))
    right = kc.KroneckerBlock.inverse
    monkeypatch.setattr(kc.KroneckerBlock, "inverse", lambda self, damping: right(self, damping=damping) * 2.0)
    found, _ = inverted(block, 0.1, health(block), Cost(0), seed=0)
    assert found.residual == pytest.approx(1.0)


def test_bytes_predicted_are_those_held() -> None:
    model, data = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).float(), [torch.randn(9, 5).float()]
    fisher = kc.estimate(model, data, "categorical")
    layers = survey(model, training="kfac").layers
    for name, block in fisher.items():
        cost = cost_of(block, layers[name])
        d_out, d_in = block.layout.matrix_shape
        assert cost.held == 4 * (d_in**2 + d_out**2)
        # Training keeps triangles, and the two weights that they are divided by.
        assert cost.factor_bytes == 2 * (d_in * (d_in + 1) + d_out * (d_out + 1)) + 16
        _, after = inverted(block, 0.1, health(block), cost, seed=0)
        # Bases and eigenvalues; measured with the eigenvalues of the sides that they came from.
        assert after.held_by_inverse == cost.inverse_bytes == 4 * (d_in**2 + d_out**2 + d_in * d_out)
        assert cost.refresh_flops == 9 * (d_in**3 + d_out**3)


def test_bytes_of_sums_are_those_of_their_terms() -> None:
    block = block_of(spread(4, 0.1), spread(3, 0.1))
    assert cost_of(block + block, None).held == 2 * cost_of(block, None).held == 2 * 8 * 25


def test_predicted_milliseconds_are_the_operations_at_the_common_rate() -> None:
    costs = {
        "a": Cost(0, refresh_flops=100, milliseconds=3.0),
        "b": Cost(0, refresh_flops=300, milliseconds=3.0),
        "stalled": Cost(0, refresh_flops=150, milliseconds=900.0),
        "untimed": Cost(0, refresh_flops=50),
        "unknown": Cost(0, milliseconds=9.0),
    }
    found = with_predictions(costs)
    assert [one.predicted_milliseconds for one in found.values()] == pytest.approx([1.0, 3.0, 1.5, 0.5, None])
    assert with_predictions({"unknown": costs["unknown"]}) == {"unknown": costs["unknown"]}


def test_failures_of_training_are_told() -> None:
    block = block_of(spread(4, 0.1), spread(3, 0.1))
    assert numerics_of(block, spectrum_of(block), failures=2).failures == 2


def test_a_residual_that_is_not_finite_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    block = block_of(spread(4, 0.1), spread(3, 0.1))
    right = kc.KroneckerBlock.inverse
    monkeypatch.setattr(
        kc.KroneckerBlock,
        "inverse",
        lambda self, damping: kc.EigenBlock(
            self.layout, None, None, right(self, damping=damping).values * torch.inf, self.name
        ),
    )
    with pytest.raises(kc.NumericalError, match=r"layer 'up': .* is not finite: pass more damping"):
        inverted(block, 0.1, health(block), Cost(0), seed=0)
