"""Two Fishers beside each other: every number against dense matrices, known answers, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.inspection.compare import compare

from ..helpers import classifier
from .made_up import real_report


def network() -> nn.Module:
    """A grouped convolution, a norm and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5), nn.LayerNorm(5), nn.Linear(5, 3)
    )


def two_fishers(structure: Any = "kfac", options: kc.Options | None = None) -> tuple[kc.Fisher, kc.Fisher]:
    models = [network() for _ in range(2)]
    data = torch.randn(40, 2, 4, 4)
    first, second = (
        kc.estimate(model, [data], "categorical", structure=structure, kind="exact", options=options)
        for model in models
    )
    return first, second


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


def dense_overlap(one: Tensor, other: Tensor, k: int) -> float:
    left, right = (torch.linalg.eigh(matrix)[1][:, -k:] for matrix in (one, other))
    return float((left.mT @ right).square().sum() / k)


def dense_bures(one: Tensor, other: Tensor) -> float:
    fidelity = torch.linalg.svdvals(root(one) @ root(other)).sum()
    return float((one.trace() + other.trace() - 2 * fidelity).sqrt())


structures = pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal", "unit_wise", "block"])


@structures
def test_traces_dimensions_and_cosines_are_those_of_the_dense_matrices(structure: str) -> None:
    first, second = two_fishers(structure)
    comparison = compare(first, second, damping=1e-3)
    for name, layer in comparison.items():
        A, B = first[name].to_dense(), second[name].to_dense()
        assert layer.trace_ratio == pytest.approx(float(B.trace() / A.trace()))
        dimensions = [float((v / (v + 1e-3)).sum()) for v in map(torch.linalg.eigvalsh, (A, B))]
        assert (layer.dimension_a, layer.dimension_b) == pytest.approx(dimensions)
        assert layer.dimension_change == pytest.approx(dimensions[1] - dimensions[0], abs=1e-10)
        assert layer.fisher_overlap == pytest.approx(float((A * B).sum() / (A.norm() * B.norm())), rel=1e-10)


@pytest.mark.parametrize("structure", ["kfac", "diagonal", "unit_wise", "block"])
def test_the_bures_distance_is_that_of_the_dense_matrices(structure: str) -> None:
    first, second = two_fishers(structure)
    distances = []
    for name, layer in compare(first, second).items():
        A, B = first[name].to_dense(), second[name].to_dense()
        distances.append(dense_bures(A, B))
        assert layer.bures == pytest.approx(distances[-1], rel=1e-6)
        assert layer.bures_relative == pytest.approx(distances[-1] ** 2 / float(A.trace() + B.trace()), rel=1e-6)
    whole = compare(first, second).whole
    assert whole.bures == pytest.approx(sum(one**2 for one in distances) ** 0.5)


@structures
def test_subspaces_are_those_of_the_dense_matrices(structure: str) -> None:
    first, second = two_fishers(structure)
    for name, layer in compare(first, second, top=3).items():
        A, B = first[name].to_dense(), second[name].to_dense()
        assert layer.directions == 3
        assert layer.overlap == pytest.approx(dense_overlap(A, B, 3), abs=1e-7)
        assert layer.chance == 3 / layer.parameters


def test_sides_that_are_diagonals_are_compared_as_whole_ones_are() -> None:
    # The linear layer's input side is kept as a diagonal in the second alone.
    first, _ = two_fishers("kfac")
    _, second = two_fishers("kfac", kc.Options(max_factor_dim=10))
    assert first["3"].diagonal_sides == ()
    assert second["3"].diagonal_sides == ("A",)
    for one, other in ((first, second), (second, first), (second, second)):
        layer = compare(one, other)["3"]
        A, B = one["3"].to_dense(), other["3"].to_dense()
        assert layer.fisher_overlap == pytest.approx(float((A * B).sum() / (A.norm() * B.norm())))
        assert layer.bures == pytest.approx(dense_bures(A, B), rel=1e-6, abs=1e-6)


def test_an_eigen_corrected_block_has_no_bures_distance_and_says_so() -> None:
    comparison = compare(*two_fishers("ekfac"))
    assert comparison["3"].bures is None
    assert comparison.whole.bures is None
    assert comparison["3"].remark.startswith("no Bures distance of EigenBlock")
    assert "no Bures distance of EigenBlock" in repr(comparison)


def test_the_same_fisher_is_no_way_from_itself() -> None:
    first, _ = two_fishers()
    layer = compare(first, first)["3"]
    assert layer.trace_ratio == layer.fisher_overlap == 1.0
    assert layer.overlap == pytest.approx(1.0)
    assert layer.overlap_A == pytest.approx(1.0)
    assert layer.dimension_change == 0.0
    assert layer.bures_relative == pytest.approx(0.0, abs=1e-12)


def test_blocks_of_different_directions_have_nothing_in_common() -> None:
    layout = kc.estimate(nn.Linear(3, 2, bias=False), [torch.randn(4, 3)], "categorical")[""].layout
    A, G = torch.diag(torch.tensor([1.0, 0.0, 0.0])), torch.eye(2)
    other = torch.diag(torch.tensor([0.0, 2.0, 0.0]))
    first, second = (kc.Fisher({"": kc.KroneckerBlock(layout, side, G)}, meta={}) for side in (A, other))
    layer = compare(first, second)[""]
    assert layer.overlap == layer.overlap_A == layer.fisher_overlap == 0.0
    assert layer.overlap_G == pytest.approx(1.0)
    assert layer.bures == pytest.approx((2.0 + 4.0) ** 0.5)
    assert layer.bures_relative == pytest.approx(1.0)


def test_what_moved_in_the_metric_of_the_fisher() -> None:
    model = classifier()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved[2].weight.add_(0.1 * torch.randn_like(moved[2].weight))
    first, second = (kc.estimate(one, [torch.randn(20, 3)], "categorical", kind="exact") for one in (model, moved))
    comparison = compare(first, second, models=(model, moved.state_dict()))
    layer = comparison["2"].weights
    start, end = (torch.cat([one[2].weight, one[2].bias[:, None]], 1).detach() for one in (model, moved))
    change = (end - start).flatten()
    assert layer.norm == pytest.approx(float(change.norm()))
    assert layer.relative == pytest.approx(float(change.norm() / start.norm()))
    assert layer.forgetting == pytest.approx(float(change @ first["2"].to_dense() @ change) / 2)
    assert layer.back == pytest.approx(float(change @ second["2"].to_dense() @ change) / 2)
    assert comparison["0"].weights.norm == comparison["0"].weights.forgetting == 0.0
    whole = comparison.whole.weights
    assert whole.forgetting == pytest.approx(layer.forgetting)
    every = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    assert whole.relative == pytest.approx(float(change.norm() / every.norm()))


def test_the_forgetting_risk_is_the_divergence_of_the_predictions() -> None:
    model, data = nn.Linear(4, 3), torch.randn(64, 4)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(1e-4 * torch.randn_like(parameter))
    first, second = (kc.estimate(one, [data], "categorical", structure="block", kind="exact") for one in (model, moved))
    likelihood = kc.Categorical()
    measured = float(likelihood.kl(model(data), moved(data)).detach()) / len(data)
    assert compare(first, second, models=(model, moved)).whole.weights.forgetting == pytest.approx(measured, rel=1e-3)


def test_the_damping_keeps_nine_tenths_unless_one_is_given() -> None:
    first, second = two_fishers()
    comparison = compare(first, second)
    ranks = sum(int(torch.linalg.matrix_rank(block.to_dense(), hermitian=True)) for block in first.values())
    assert comparison.whole.dimension_a == pytest.approx(0.9 * ranks, rel=1e-3)
    report = real_report(damping=3e-3)
    assert compare(report, report).damping == 3e-3
    assert compare(report, report, damping=1.0).damping == 1.0


def test_layers_in_one_of_them_only_are_named() -> None:
    first, second = two_fishers()
    shorter = kc.Fisher({name: second[name] for name in ("3", "5")}, meta=second.meta)
    comparison = compare(first, shorter)
    assert list(comparison) == ["3", "5"]
    assert comparison.only_in_a == ("0", "4")
    assert "in the first only: 0, 4" in repr(comparison)
    assert compare(shorter, first).only_in_b == ("0", "4")


def test_what_else_differs_is_said() -> None:
    first, second = two_fishers()[0], two_fishers("ekfac")[1]
    assert "structure is kfac in the first and ekfac in the second" in compare(first, second).notes


def test_all_of_it_is_plain_numbers(tmp_path: Path) -> None:
    model = network()
    comparison = compare(*two_fishers(), models=(model, model))
    text = comparison.to_json(tmp_path / "comparison.json")
    assert json.loads(text) == json.loads((tmp_path / "comparison.json").read_text())
    assert json.loads(text)["layers"][1]["name"] == "3"
    assert json.loads(text)["layers"][1]["weights"]["norm"] == 0.0


def test_a_zero_fisher_is_compared_too() -> None:
    first, second = two_fishers()
    layer = compare(0.0 * first, second)["3"]
    assert layer.trace_ratio is layer.fisher_overlap is layer.overlap is None
    assert layer.bures_relative == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": -1.0}, r"compare\(damping=-1.0\): expected a finite number >= 0"),
        ({"top": 0}, r"compare\(top=0\): expected a whole number >= 1"),
        ({"models": (1, 2)}, "the first of models is 1: expected a torch.nn.Module or its state_dict"),
        ({"models": ({}, {})}, "layer '0': '0.weight' is not among the weights of the first model"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    first, second = two_fishers()
    with pytest.raises(kc.ArgumentError, match=message):
        compare(first, second, **arguments)


def test_weights_of_another_model_are_refused() -> None:
    first, second = two_fishers()
    other = network()
    other[3] = nn.Linear(17, 5)
    with pytest.raises(kc.ArgumentError, match=r"layer '3': of the second model '3.weight' has shape \(5, 17\)"):
        compare(first, second, models=(network(), other))


def test_other_layers_and_other_shapes_are_refused() -> None:
    first, _ = two_fishers()
    small = kc.estimate(nn.Linear(3, 2), [torch.randn(4, 3)], "categorical")
    with pytest.raises(kc.ArgumentError, match="no layer in common"):
        compare(first, small)
    other = kc.Fisher({"3": kc.KroneckerBlock(small[""].layout, torch.eye(4), torch.eye(2), "3")}, meta={})
    with pytest.raises(kc.ArgumentError, match=r"layer '3' is \(5, 17\) in the first and \(2, 4\) in the second"):
        compare(first, other)


def test_what_holds_no_fisher_is_refused() -> None:
    report = real_report()
    report.fisher = None
    with pytest.raises(kc.ArgumentError, match="the second report holds no Fisher"):
        compare(real_report(), report)
    with pytest.raises(kc.ArgumentError, match=r"the first is 'a\.safetensors'"):
        compare("a.safetensors", report)
