"""A matrix for each unit: what is refused, files, merging, and rules that ask for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.layers import WeightLayout
from kfac_cond.structures import unit_wise as unit_wise_module

from ..fisher_cases import Normalised, case
from ..reference import assert_same


@pytest.fixture
def fisher() -> kc.Fisher:
    """Of norms with and without bias, of one and of two dimensions, and of a linear layer."""
    return case("normalised", "categorical").estimate("unit_wise", "exact")


def test_a_norm_has_a_small_matrix_for_each_unit(fisher):
    shapes = {name: tuple(block.matrices.shape) for name, block in fisher.items()}
    assert shapes == {
        "group": (4, 1, 2, 2),
        "instance": (4, 1, 2, 2),
        "layer": (12, 1, 2, 2),
        "rms": (4, 1, 1, 1),
        "head": (3, 5, 5),
    }


@pytest.mark.parametrize("shape", [(3, 5, 4), (15, 5, 5), (3, 4, 4)])
def test_matrices_of_another_shape_are_refused(shape):
    with pytest.raises(kc.ArgumentError, match=r"'fc'.*matrices has shape .* expected \(3, 5, 5\)"):
        kc.UnitWiseBlock(WeightLayout("w", "b", (3, 4)), torch.zeros(shape), "fc")


def test_more_than_is_meant_is_refused_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(unit_wise_module, "MAX_DENSE", 8)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    kc.estimate(model[0], [torch.randn(2, 3)], "categorical", structure="unit_wise")
    with pytest.raises(kc.ArgumentError, match=r"layer '1': .* 3 matrices of 5 x 5, 75 numbers, the most is 64.*rule"):
        kc.estimate(model, [torch.randn(2, 3)], "categorical", structure="unit_wise")


def test_a_file_gives_the_same_block(fisher, tmp_path):
    fisher.save(tmp_path / "f")
    found = kc.Fisher.load(tmp_path / "f", Normalised())
    for name, block in fisher.items():
        assert type(found[name]) is kc.UnitWiseBlock
        assert (found[name].layout, found[name].name) == (block.layout, name)
        assert torch.equal(found[name].matrices, block.matrices)


def flat_of(fisher: kc.Fisher, v: dict[str, Tensor]) -> Tensor:
    return torch.cat([v[name].flatten() for name in fisher.parameter_names])


def test_every_form_of_a_vector_gives_the_dense_product(fisher):
    model = Normalised()
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    expected = fisher.to_dense() @ flat_of(fisher, v)
    assert_same(flat_of(fisher, fisher @ v), expected)
    assert_same(fisher @ flat_of(fisher, v), expected)
    assert_same(torch.cat([x.flatten() for x in fisher @ [v[name] for name in fisher.parameter_names]]), expected)


def test_scipy_finds_its_largest_eigenvalue(fisher):
    values = eigsh(fisher.to_scipy(), k=1, return_eigenvectors=False)
    np.testing.assert_allclose(values[0], float(fisher.eigenvalues()[0]), rtol=1e-10)


def test_sums_and_multiples_are_those_of_the_dense_matrix(fisher):
    dense = fisher.to_dense()
    assert_same((fisher + 2.0 * fisher).to_dense(), 3.0 * dense)
    v = torch.randn(len(dense))
    assert_same(
        (fisher + fisher).solve(v, damping=0.1),
        torch.linalg.solve(2 * dense + 0.1 * torch.eye(len(v)), v),
        tolerance=1e-6,
    )


def test_two_estimates_merge_to_that_over_all_data():
    model, x = Normalised(), torch.randn(7, 4, 3)
    whole, *parts = (
        kc.estimate(model, [data], "categorical", structure="unit_wise", kind="exact") for data in (x, *x.split([3, 4]))
    )
    assert_same(parts[0].merge(parts[1]).to_dense(), whole.to_dense())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


def test_a_rule_gives_it_to_norms_alone():
    model, x = nn.Sequential(Residual(), Residual()), torch.randn(5, 4)
    rules = {"*.norm": {"structure": "unit_wise"}}
    mixed, whole = kc.estimate(model, [x], "categorical", structure=["mixed", "unit_wise"], kind="exact", rules=rules)
    assert {name: type(block) for name, block in mixed.items()} == {
        "0.norm": kc.UnitWiseBlock,
        "0.linear": kc.KroneckerBlock,
        "1.norm": kc.UnitWiseBlock,
        "1.linear": kc.KroneckerBlock,
    }
    assert torch.equal(mixed["1.norm"].matrices, whole["1.norm"].matrices)


def test_one_unit_that_is_singular_is_named():
    matrices = torch.eye(2).repeat(3, 1, 1, 1)
    matrices[1, 0, 0, 0] = 0.0
    block = kc.UnitWiseBlock(WeightLayout("w", "b", (3,), groups=3), matrices, "norm")
    with pytest.raises(kc.NumericalError, match=r"layer 'norm' is singular.*damping"):
        block.inverse()
