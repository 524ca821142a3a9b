"""Spectra against dense matrices, and answers that are known."""

from __future__ import annotations

from math import inf, log10

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.inspection import eigenvalues
from kfac_cond.inspection.spectra import Spectrum, log_histogram, spectrum_of
from kfac_cond.layers.layout import WeightLayout
from kfac_cond.structures import LowRankBlock

from ..fisher_cases import case

WORDS = ("kfac", "ekfac", "tkfac", "kpsvd", "diagonal", "unit_wise", "block")
LAYOUT = WeightLayout("w", None, (3, 4))


def dense_eigenvalues(block: kc.Block) -> np.ndarray:
    """Descending, of the dense matrix, without the spectrum's own way."""
    return torch.linalg.eigvalsh(block.to_dense().double()).flip(0).clamp(min=0).numpy()


def moment(d: int, rows: int = 50) -> Tensor:
    x = torch.randn(rows, d)
    return x.T @ x / rows


def kronecker(A: Tensor, G: Tensor, **sizes: object) -> Spectrum:
    layout = WeightLayout("w", None, (G.shape[-1], A.shape[-1]))
    return spectrum_of(kc.KroneckerBlock(layout, A, G, "here"))


@pytest.fixture(params=[(name, word) for name in ("perceptron", "pixels", "normalised") for word in WORDS])
def blocks(request: pytest.FixtureRequest) -> list[kc.Block]:
    name, word = request.param
    if word == "kpsvd" and name == "normalised":
        pytest.skip("norms have no such pair")
    return list(case(name, "categorical").estimate(word, "exact").values())


def test_every_number_is_that_of_the_dense_matrix(blocks: list[kc.Block]) -> None:
    for block in blocks:
        found, e = spectrum_of(block), dense_eigenvalues(block)
        scale = e[0]
        assert np.repeat(found.values, found.counts.astype(int)) == pytest.approx(e, abs=1e-12 * scale)
        assert found.size == len(e) == block.layout.numel
        assert found.trace == pytest.approx(e.sum(), rel=1e-10)
        assert found.per_parameter == pytest.approx(e.mean(), rel=1e-10)
        assert (found.largest, found.smallest) == pytest.approx((e[0], e[-1]), abs=1e-12 * scale)
        for damping in (0.013 * scale, 0.7 * scale):
            dense = block.to_dense().double()
            resolvent = torch.linalg.inv(dense + damping * torch.eye(len(e)))
            assert found.effective_dimension(damping) == pytest.approx(float((dense @ resolvent).trace()), rel=1e-9)
            assert found.share_below(damping) == pytest.approx((e < damping).mean())
            assert found.amplification(damping) == pytest.approx(
                float(torch.linalg.matrix_norm(resolvent, 2)), rel=1e-9
            )
            assert found.condition(damping) == pytest.approx((e[0] + damping) / (e[-1] + damping), rel=1e-9)
        assert found.stable_rank == pytest.approx(float(dense.square().sum()) / scale**2, rel=1e-9)
        assert found.participation == pytest.approx(e.sum() ** 2 / float(dense.square().sum()), rel=1e-9)
        assert found.rank == int(torch.linalg.matrix_rank(dense, atol=1e-13 * scale, rtol=0.0))
        assert found.top(3) == pytest.approx(e[:3], rel=1e-10)


@pytest.mark.parametrize("word", ["kfac", "ekfac", "block"])
def test_every_number_is_that_of_the_definition(word: str) -> None:
    """On one example all three are the exact block, and that is the Fisher by enumeration."""
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(1, 3)
    fisher = kc.estimate(model, [x], "categorical", structure=word, kind="exact")
    parameters = list(model.parameters())
    for name, at in (("0", slice(0, 16)), ("2", slice(16, 31))):
        logits = model(x)[0]
        rows = []
        for label, p in enumerate(logits.softmax(-1)):
            of_label = torch.autograd.grad(logits.log_softmax(-1)[label], parameters, retain_graph=True)
            rows.append(p.sqrt() * torch.cat([g.flatten() for g in of_label]))
        dense = torch.stack(rows).T @ torch.stack(rows)
        e = torch.linalg.eigvalsh(dense[at, at].detach())
        found = spectrum_of(fisher[name])
        assert found.trace == pytest.approx(float(e.sum()), rel=1e-10)
        assert found.effective_dimension(1e-2) == pytest.approx(float((e / (e + 1e-2)).sum()), rel=1e-9)
        assert found.rank == 2


def test_sides_are_those_of_the_factors() -> None:
    block = case("perceptron", "categorical").estimate("kfac", "exact")["0"]
    found = spectrum_of(block)
    for side, matrix in (("A", block.A), ("G", block.G)):
        assert getattr(found, side) == pytest.approx(torch.linalg.eigvalsh(matrix).flip(0).numpy(), abs=1e-13)


def test_an_eigenblock_has_the_sides_that_its_basis_came_from() -> None:
    kfac, ekfac = case("perceptron", "categorical").estimate(["kfac", "ekfac"], "exact")
    of_kfac, of_ekfac = spectrum_of(kfac["0"]), spectrum_of(ekfac["0"])
    assert np.allclose(of_ekfac.A, of_kfac.A, atol=1e-13)
    assert spectrum_of(ekfac["0"].inverse(damping=1.0)).A is None


def test_diagonal_sides_are_their_own_eigenvalues() -> None:
    A, G = torch.rand(4), moment(3)
    found = kronecker(A, G)
    assert found.values == pytest.approx(spectrum_of(kc.KroneckerBlock(LAYOUT, torch.diag(A), G)).values)


def test_rare_tokens_of_a_diagonal_side_are_no_round_off() -> None:
    frequencies = torch.tensor([1.0, 1e-3, 1e-9, 0.0]).float()
    found = kronecker(frequencies, torch.eye(3).float())
    assert (found.rank, found.smallest) == (9, 0.0)
    assert found.dead_inputs == (3,)


def test_round_off_of_a_stored_side_is_zero() -> None:
    """Of a float32 matrix of rank one what else there is in it is the round-off of its entries."""
    a = torch.randn(50)
    found = kronecker(torch.outer(a, a).float(), torch.eye(3).float())
    assert found.rank == 3
    assert found.effective_dimension(1e-12) == pytest.approx(3.0)


def test_identity() -> None:
    found = kronecker(torch.eye(4), torch.eye(3))
    assert (found.trace, found.rank, found.condition(), found.blame) == (12.0, 12, 1.0, None)
    assert (found.stable_rank, found.participation) == pytest.approx((12.0, 12.0))
    assert found.effective_dimension(1.0) == pytest.approx(6.0)
    assert found.damping_for(0.25) == pytest.approx(3.0)
    assert (found.share_below(1.0), found.share_below(1.01), found.amplification(1.0)) == (0.0, 1.0, 0.5)


def test_rank_one() -> None:
    a, g = torch.randn(4), torch.randn(3)
    found = kronecker(torch.outer(a, a), torch.outer(g, g))
    size = float(a.square().sum() * g.square().sum())
    assert (found.rank, found.effective_dimension(0.0)) == (1, 1.0)
    assert (found.trace, found.stable_rank, found.participation) == pytest.approx((size, 1.0, 1.0))
    assert found.damping_for(0.9) == pytest.approx(size / 9)
    assert found.condition() > 1e12


def test_zero() -> None:
    found = kronecker(torch.eye(4), torch.zeros(3, 3))
    assert (found.trace, found.rank, found.stable_rank, found.participation) == (0.0, 0, 0.0, 0.0)
    assert (found.condition(), found.damping_for(0.5), found.effective_dimension(1e-3)) == (inf, inf, 0.0)
    assert found.dead_outputs == (0, 1, 2)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dead_units_are_named(word: str, dtype: torch.dtype) -> None:
    """A hidden unit with all its weights at zero is a dead output of one layer and a dead input of the next."""
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).to(dtype)
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0.0, -1.0
        # Alive, and small beside the others.
        model[0].weight[4] *= 1e-2
        model[0].bias[4] *= 1e-2
    data, options = [torch.randn(64, 5, dtype=dtype)], kc.Options(dtype=dtype)
    fisher = kc.estimate(model, data, "categorical", structure=word, samples=2, options=options)
    assert (spectrum_of(fisher["0"]).dead_inputs, spectrum_of(fisher["0"]).dead_outputs) == ((), (2,))
    assert (spectrum_of(fisher["2"]).dead_inputs, spectrum_of(fisher["2"]).dead_outputs) == ((2,), ())


def test_dead_channels_of_groups_are_counted_over_all_groups() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2, bias=False), nn.Flatten(), nn.Linear(8, 2))
    x = torch.randn(16, 4, 2)
    x[:, 3] = 0.0
    found = spectrum_of(kc.estimate(model, [x], "categorical", kind="exact")["0"])
    assert found.dead_inputs == (3,)


@pytest.mark.parametrize(("worse", "blamed"), [("A", "A"), ("G", "G")])
def test_the_worse_conditioned_side_is_blamed(worse: str, blamed: str) -> None:
    poor, fine = torch.diag(torch.tensor([1e6, 1.0, 1.0])), torch.diag(torch.tensor([2.0, 1.0, 1.0]))
    found = kronecker(poor, fine) if worse == "A" else kronecker(fine, poor)
    assert found.blame == blamed
    assert found.condition() == pytest.approx(2e6)


def test_of_two_singular_sides_the_one_that_spans_more_to_round_off_is_not_told_apart_by_noise() -> None:
    found = kronecker(torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([1.0, 0.0])))
    assert found.blame is None


def test_low_rank() -> None:
    values, vectors = torch.tensor([3.0, 2.0]), torch.linalg.qr(torch.randn(12, 2))[0].T.reshape(2, 3, 4)
    found = spectrum_of(LowRankBlock(LAYOUT, values, vectors))
    assert (found.trace, found.rank, found.size) == pytest.approx((5.0, 2, 12))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_damping_for_is_the_inverse_of_the_effective_dimension(share: float) -> None:
    found = kronecker(moment(6), moment(5))
    assert found.effective_dimension(found.damping_for(share)) == pytest.approx(share * 30, rel=1e-8)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_damping_for_trace_is_that_of_the_dense_matrix(share: float) -> None:
    A, G = moment(6), moment(5)
    found, F = kronecker(A, G), torch.kron(G, A)
    damping = found.damping_for_trace(share)
    kept = (F @ torch.linalg.solve(F + damping * torch.eye(30), F)).trace() / F.trace()
    assert float(kept) == pytest.approx(share, rel=1e-8)
    assert found.trace_kept(damping) == pytest.approx(share, rel=1e-8)
    assert (found.trace_kept(0.0), kronecker(torch.eye(2), torch.zeros(2, 2)).trace_kept(0.1)) == (1.0, 0.0)


def test_eigenvalues_that_are_nearly_nothing_do_not_count_for_the_trace() -> None:
    found = kronecker(torch.diag(torch.tensor([1.0, 1.0, 1e-10, 1e-10])), torch.eye(3))
    assert found.damping_for(0.9) < 1e-9
    assert found.damping_for_trace(0.9) == pytest.approx(1 / 9, rel=1e-6)


@pytest.mark.parametrize("shape", [(40, 30), (4, 20, 10)])
def test_many_eigenvalues_are_taken_together_to_the_stated_precision(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    *groups, d_out, d_in = shape
    A, G = (torch.stack([moment(d, d + 3) for _ in range(groups[0] if groups else 1)]) for d in (d_in, d_out))
    layout = WeightLayout("w", None, (d_out * len(A), d_in), groups=len(A))
    block = kc.KroneckerBlock(layout, A if groups else A[0], G if groups else G[0])
    exact = spectrum_of(block)
    monkeypatch.setattr(eigenvalues, "EXACT", 0)
    monkeypatch.setattr(eigenvalues, "AT_ONCE", 128)
    found = spectrum_of(block)
    assert len(found.values) < len(exact.values)
    assert (np.diff(found.values) <= 0).all()
    assert found.size == exact.size
    assert (found.smallest, found.rank) == (exact.smallest, exact.rank)
    assert found.top(64) == pytest.approx(exact.top(64), rel=1e-13)
    for damping in np.geomspace(1e-6, 1e2, 9):
        assert found.effective_dimension(damping) == pytest.approx(exact.effective_dimension(damping), rel=1e-7)
        assert exact.share_below(damping * 0.999) <= found.share_below(damping) <= exact.share_below(damping * 1.001)
    assert (found.trace, found.stable_rank) == pytest.approx((exact.trace, exact.stable_rank), rel=1e-6)


def test_zeros_are_counted_where_many_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eigenvalues, "EXACT", 0)
    found = kronecker(torch.diag((torch.arange(100) < 90) * 1.0), torch.eye(3))
    assert (found.rank, found.size, found.smallest, found.trace) == (270, 300, 0.0, 270.0)


def test_the_histogram_has_every_eigenvalue_once() -> None:
    values = np.array([1e-30, 0.0, 1e-3, 1e-2, 0.5, 1.0])
    edges, counts = log_histogram(values, bins=16)
    assert (len(edges), len(counts), counts.sum(), edges[-1]) == (17, 16, 6.0, 0.0)
    assert counts[0] == 2.0
    for value in (1e-3, 1e-2):
        index = np.searchsorted(edges, log10(value), side="right") - 1
        assert counts[index] == 1.0


@pytest.mark.parametrize("values", [[0.0, 0.0], [2.0, 2.0], [1e-300]])
def test_histograms_of_one_value(values: list[float]) -> None:
    edges, counts = log_histogram(np.array(values), bins=4)
    assert counts.sum() == len(values)
    assert np.isfinite(edges).all() and (np.diff(edges) > 0).all()


def test_negative_eigenvalues_count_as_zero_and_are_told() -> None:
    found = kronecker(torch.diag(torch.tensor([3.0, -1.0])), torch.eye(2))
    assert (found.smallest, found.trace, found.negative) == (0.0, 6.0, 0.25)


@pytest.mark.parametrize("side", ["A", "G"])
def test_a_block_that_is_not_finite_is_refused_by_name(side: str) -> None:
    sides = {"A": moment(4), "G": moment(3)}
    sides[side][1, 1] = torch.nan
    with pytest.raises(kc.NumericalError, match=rf"layer 'up': 1 of \d+ numbers of its {side} are not finite"):
        spectrum_of(kc.KroneckerBlock(LAYOUT, sides["A"], sides["G"], "up"))


def test_a_block_on_the_meta_device_is_refused() -> None:
    with pytest.raises(kc.ArgumentError, match="on the meta device"):
        spectrum_of(kc.KroneckerBlock(LAYOUT, moment(4).to("meta"), moment(3).to("meta"), "up"))


def test_a_block_known_by_its_products_alone_is_refused() -> None:
    block = kc.KroneckerBlock(LAYOUT, moment(4), moment(3), "up")
    with pytest.raises(kc.ArgumentError, match="layer 'up': all 12 eigenvalues need the dense matrix"):
        spectrum_of(block + block * 2.0)


@pytest.mark.parametrize("wrong", [-1.0, inf, float("nan"), "1"])
def test_dampings_that_are_none(wrong: float) -> None:
    with pytest.raises(kc.ArgumentError, match="layer 'here': damping"):
        kronecker(torch.eye(2), torch.eye(2)).effective_dimension(wrong)


@pytest.mark.parametrize("wrong", [0.0, 1.0, 1.5, "most"])
def test_shares_that_are_none(wrong: float) -> None:
    with pytest.raises(kc.ArgumentError, match="between 0 and 1"):
        kronecker(torch.eye(2), torch.eye(2)).damping_for(wrong)
    with pytest.raises(kc.ArgumentError, match="between 0 and 1"):
        kronecker(torch.eye(2), torch.eye(2)).damping_for_trace(wrong)
