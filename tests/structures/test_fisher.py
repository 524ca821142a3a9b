"""The Fisher of several layers against its dense matrix, in the order of a flat parameter vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor, nn

from kfac_cond.errors import ArgumentError, NumericalError
from kfac_cond.layers.layout import WeightLayout
from kfac_cond.structures import Fisher, KroneckerBlock
from kfac_cond.structures import base as base_module

close = {"rtol": 0.0, "atol": 1e-10}


@pytest.fixture
def dense(fisher: Fisher) -> Tensor:
    """The matrix column by column, from products of each block's own dense matrix with named unit vectors."""
    size = fisher.shape[0]
    columns = []
    for column in torch.eye(size, dtype=torch.float64):
        named, at = {}, 0
        for block in fisher.values():
            for name, shape in block.layout.shapes.items():
                count = torch.Size(shape).numel()
                named[name], at = column[at : at + count].reshape(shape), at + count
        parts = {}
        for block in fisher.values():
            matrix = block.layout.to_matrix({name: named[name] for name in block.layout.names})
            product = (block.to_dense() @ matrix.flatten()).reshape(matrix.shape)
            parts.update(block.layout.from_matrix(product))
        columns.append(torch.cat([part.flatten() for part in parts.values()]))
    return torch.stack(columns, dim=1)


@pytest.fixture
def flat(fisher: Fisher) -> Tensor:
    return torch.randn(fisher.shape[0], generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.fixture
def named(fisher: Fisher, flat: Tensor) -> dict[str, Tensor]:
    """The flat vector as named tensors, out of order."""
    parameters = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes(fisher).items()}
    nn.utils.vector_to_parameters(flat, parameters.values())
    return dict(reversed(list(parameters.items())))


def shapes(fisher: Fisher) -> dict[str, tuple[int, ...]]:
    return {name: shape for block in fisher.values() for name, shape in block.layout.shapes.items()}


def eye(dense: Tensor) -> Tensor:
    return torch.eye(len(dense), dtype=dense.dtype)


SCALARS: dict[str, tuple[Callable[[Fisher], Tensor], Callable[[Tensor], Tensor]]] = {
    "trace": (lambda f: f.trace(), torch.trace),
    "logdet": (lambda f: f.logdet(), torch.logdet),
    "logdet damped": (lambda f: f.logdet(damping=0.3), lambda d: torch.logdet(d + 0.3 * eye(d))),
    "frobenius_norm": (lambda f: f.frobenius_norm(), torch.linalg.matrix_norm),
    "eigenvalues": (lambda f: f.eigenvalues(), lambda d: torch.linalg.eigvalsh(d).flip(0)),
    "diagonal": (lambda f: nn.utils.parameters_to_vector(f.diagonal().values()), torch.diagonal),
}
MATRICES: dict[str, tuple[Callable[[Fisher], Fisher], Callable[[Tensor], Tensor]]] = {
    "itself": (lambda f: f, lambda d: d),
    "sqrt squared": (lambda f: f.sqrt(), lambda d: d),
    "inverse damped": (lambda f: f.inverse(damping=0.3), lambda d: torch.linalg.inv(d + 0.3 * eye(d))),
    "inverse_sqrt squared": (lambda f: f.inverse_sqrt(damping=0.3), lambda d: torch.linalg.inv(d + 0.3 * eye(d))),
    "scaled": (lambda f: 2.5 * f, lambda d: 2.5 * d),
    "scaled by numpy": (lambda f: np.float64(2.5) * f, lambda d: 2.5 * d),
}


@pytest.mark.parametrize("name", SCALARS)
def test_scalars_and_spectra_are_those_of_the_dense_matrix(fisher: Fisher, dense: Tensor, name: str) -> None:
    verb, reference = SCALARS[name]
    torch.testing.assert_close(verb(fisher), reference(dense), **close)


@pytest.mark.parametrize("name", MATRICES)
def test_functions_are_those_of_the_dense_matrix(fisher: Fisher, dense: Tensor, name: str) -> None:
    verb, reference = MATRICES[name]
    matrix = verb(fisher).to_dense()
    torch.testing.assert_close(matrix @ matrix if "squared" in name else matrix, reference(dense), **close)


def test_matvec_is_the_dense_product(fisher: Fisher, dense: Tensor, flat: Tensor) -> None:
    torch.testing.assert_close(fisher @ flat, dense @ flat, **close)


def test_solve_is_the_dense_solution(fisher: Fisher, dense: Tensor, flat: Tensor) -> None:
    expected = torch.linalg.solve(dense + 0.3 * eye(dense), flat)
    torch.testing.assert_close(fisher.solve(flat, damping=0.3), expected, **close)


def test_solve_passes_the_rule_on(fisher: Fisher) -> None:
    kronecker = Fisher({"fc": fisher["fc"]}, meta={})
    v = torch.ones(15, dtype=torch.float64)
    factored, exact = (kronecker.solve(v, damping=0.3, rule=rule) for rule in ("factored", "exact"))
    assert not torch.allclose(factored, exact)


def test_quadratic_is_the_form_of_the_dense_matrix(fisher: Fisher, dense: Tensor, flat: Tensor) -> None:
    torch.testing.assert_close(fisher.quadratic(flat), flat @ dense @ flat, **close)


def test_kl_is_half_of_it(fisher: Fisher, dense: Tensor, flat: Tensor) -> None:
    torch.testing.assert_close(fisher.kl(flat), 0.5 * (flat @ dense @ flat), **close)


@pytest.mark.parametrize("verb", [Fisher.matvec, Fisher.solve])
def test_a_mapping_gives_a_dict(fisher: Fisher, flat: Tensor, named: dict[str, Tensor], verb: Any) -> None:
    result = verb(fisher, named)
    assert isinstance(result, dict)
    assert {name: tuple(t.shape) for name, t in result.items()} == shapes(fisher)
    expected = verb(fisher, flat)
    assert torch.equal(nn.utils.parameters_to_vector([result[n] for n in fisher.parameter_names]), expected)


@pytest.mark.parametrize("form", [list, tuple])
def test_a_sequence_gives_the_same_kind(fisher: Fisher, flat: Tensor, named: dict[str, Tensor], form: Any) -> None:
    result = fisher @ form(named[name] for name in fisher.parameter_names)
    assert type(result) is form
    assert torch.equal(nn.utils.parameters_to_vector(result), fisher @ flat)


def test_quadratic_takes_every_form(fisher: Fisher, flat: Tensor, named: dict[str, Tensor]) -> None:
    assert torch.equal(fisher.quadratic(named), fisher.quadratic(flat))


def test_parameter_names_are_weight_then_bias_in_the_order_of_layers(fisher: Fisher) -> None:
    assert fisher.parameter_names == ("fc.weight", "fc.bias", "conv.weight", "conv.bias", "head.weight")


def test_top_eigenpairs_are_eigenpairs(fisher: Fisher, dense: Tensor) -> None:
    values, vectors = fisher.top_eigenpairs(20)
    flat = torch.stack(
        [nn.utils.parameters_to_vector([vectors[n][i] for n in fisher.parameter_names]) for i in range(20)]
    )
    torch.testing.assert_close(values, torch.linalg.eigvalsh(dense).flip(0)[:20], **close)
    torch.testing.assert_close(flat @ dense, values.unsqueeze(-1) * flat, **close)
    torch.testing.assert_close(flat.norm(dim=1), torch.ones(20, dtype=torch.float64), **close)


def test_samples_have_the_covariance(fisher: Fisher, dense: Tensor) -> None:
    n = 20_000
    drawn = fisher.sample(n, torch.Generator().manual_seed(0))
    samples = torch.cat([drawn[name].reshape(n, -1) for name in fisher.parameter_names], dim=1)
    deviation = ((dense.diagonal().outer(dense.diagonal()) + dense.square()) / n).sqrt()
    assert ((samples.T @ samples / n - dense).abs() / deviation).max() < 6


def test_eigsh_agrees_with_numpy(fisher: Fisher, dense: Tensor) -> None:
    values = scipy.sparse.linalg.eigsh(fisher.to_scipy(), k=4, v0=np.ones(fisher.shape[0]))[0]
    np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(dense.numpy())[-4:], rtol=1e-8)


def test_cg_agrees_with_numpy(fisher: Fisher, dense: Tensor, flat: Tensor) -> None:
    solution, status = scipy.sparse.linalg.cg(fisher.to_scipy(), flat.numpy(), rtol=1e-13, maxiter=2000)
    assert status == 0
    np.testing.assert_allclose(solution, np.linalg.solve(dense.numpy(), flat.numpy()), rtol=1e-8, atol=1e-8)


def test_the_operator_is_symmetric_and_takes_matrices(fisher: Fisher, dense: Tensor) -> None:
    operator = fisher.to_scipy()
    identity = np.eye(fisher.shape[0])
    np.testing.assert_allclose(operator @ identity, dense.numpy(), atol=1e-10)
    np.testing.assert_allclose(operator.T @ identity, dense.numpy(), atol=1e-10)


def test_the_operator_of_a_float32_fisher_is_float64(fisher: Fisher) -> None:
    result = fisher.to(torch.float32).to_scipy() @ np.ones(fisher.shape[0])
    assert result.dtype == np.float64


def test_is_a_mapping_of_layers(fisher: Fisher) -> None:
    assert list(fisher) == ["fc", "conv", "head"]
    assert len(fisher) == 3
    assert "conv" in fisher
    assert "pool" not in fisher


def test_an_unknown_layer_names_close_matches(fisher: Fisher) -> None:
    with pytest.raises(KeyError, match="no layer 'conv2' among 3; did you mean conv"):
        fisher["conv2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: {**v, "pool.weight": v["fc.bias"]}, "unknown pool.weight"),
        (lambda v: {name: t for name, t in v.items() if name != "fc.bias"}, "missing fc.bias"),
        (lambda v: {**v, "fc.bias": torch.zeros(4)}, "'fc.bias' has shape"),
        (lambda v: list(v.values())[:2], "got 2 tensors, expected 5"),
        (lambda v: torch.zeros(3), r"shape \(3,\), expected a flat one"),
    ],
)
def test_a_vector_that_does_not_fit_is_refused(
    fisher: Fisher, named: dict[str, Tensor], change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        fisher.matvec(change(named))


def test_a_singular_layer_is_named(fisher: Fisher, flat: Tensor) -> None:
    blocks = {**fisher, "conv": fisher["conv"] * 0.0}
    with pytest.raises(NumericalError, match="layer 'conv'"):
        Fisher(blocks, meta={}).solve(flat)


def test_no_layers_are_refused() -> None:
    with pytest.raises(ArgumentError, match="at least one block"):
        Fisher({}, meta={})


def test_a_parameter_in_two_blocks_is_refused(fisher: Fisher) -> None:
    with pytest.raises(ArgumentError, match=r"fc.bias, fc.weight in more than one block"):
        Fisher({"fc": fisher["fc"], "again": fisher["fc"]}, meta={})


def test_a_dense_matrix_too_large_is_refused(fisher: Fisher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_module, "MAX_DENSE", 30)
    with pytest.raises(ArgumentError, match="a Fisher of 3 layers: to_dense would make a 51 x 51 matrix"):
        fisher.to_dense()


@pytest.mark.parametrize("factor", [-1.0, float("nan")])
def test_a_scale_that_makes_no_fisher_is_refused(fisher: Fisher, factor: float) -> None:
    with pytest.raises(ArgumentError, match="finite number >= 0"):
        fisher * factor


def test_what_is_derived_says_so(fisher: Fisher) -> None:
    assert (2 * fisher.sqrt()).meta["derived"] == ("sqrt()", "* 2")
    assert "derived" not in fisher.meta


def test_to_changes_the_dtype(fisher: Fisher) -> None:
    assert fisher.to(torch.float32).dtype == torch.float32


def test_prints_a_short_table(fisher: Fisher) -> None:
    lines = repr(fisher).splitlines()
    assert lines[0] == "Fisher of 3 layers, 51 parameters"
    assert lines[1] == "likelihood Categorical(), kind sampled, samples 2, counts (examples 7, terms 9)"
    assert lines[2].split() == ["layer", "shape", "trace"]
    assert lines[3].split() == ["fc", "3", "x", "5", f"{fisher['fc'].trace().item():.3g}"]
    assert len(lines) == 6


def test_a_long_table_is_cut() -> None:
    blocks = {
        f"layer{i}": KroneckerBlock(WeightLayout(f"layer{i}.weight", None, (1, 1)), torch.eye(1), torch.eye(1))
        for i in range(100)
    }
    text = repr(Fisher(blocks, meta={}))
    assert "... 70 more layers" in text
    assert len(text.splitlines()) < 35


def test_prints_on_the_meta_device(fisher: Fisher) -> None:
    assert repr(fisher.to("meta")).splitlines()[3].split()[-1] == "-"
