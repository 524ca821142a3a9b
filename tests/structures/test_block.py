"""Every verb of every structure against the dense matrix of the same block."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from kfac_cond.errors import ArgumentError, NumericalError
from kfac_cond.layers.layout import WeightLayout
from kfac_cond.structures import Block, KroneckerBlock
from kfac_cond.structures import base as base_module

close = {"rtol": 0.0, "atol": 1e-10}


def eye(dense: Tensor) -> Tensor:
    return torch.eye(len(dense), dtype=dense.dtype)


def function(dense: Tensor, of: Callable[[Tensor], Tensor], damping: float = 0.0) -> Tensor:
    """A function of a symmetric matrix by the eigendecomposition of the dense one."""
    values, basis = torch.linalg.eigh(dense + damping * eye(dense))
    return (basis * of(values)) @ basis.T


SCALARS: dict[str, tuple[Callable[[Block], Tensor], Callable[[Tensor], Tensor]]] = {
    "trace": (lambda b: b.trace(), torch.trace),
    "logdet": (lambda b: b.logdet(), torch.logdet),
    "logdet damped": (lambda b: b.logdet(damping=0.3), lambda d: torch.logdet(d + 0.3 * eye(d))),
    "frobenius_norm": (lambda b: b.frobenius_norm(), torch.linalg.matrix_norm),
    "eigenvalues": (lambda b: b.eigenvalues(), lambda d: torch.linalg.eigvalsh(d).flip(0)),
    "diagonal": (lambda b: b.diagonal().flatten(), torch.diagonal),
}
MATRICES: dict[str, tuple[Callable[[Block], Block], Callable[[Tensor], Tensor]]] = {
    "itself": (lambda b: b, lambda d: d),
    "sqrt": (lambda b: b.sqrt(), lambda d: function(d, torch.sqrt)),
    "inverse": (lambda b: b.inverse(), torch.linalg.inv),
    "inverse damped": (lambda b: b.inverse(damping=0.3), lambda d: torch.linalg.inv(d + 0.3 * eye(d))),
    "inverse_sqrt": (lambda b: b.inverse_sqrt(), lambda d: function(d, torch.rsqrt)),
    "inverse_sqrt damped": (lambda b: b.inverse_sqrt(damping=0.3), lambda d: function(d, torch.rsqrt, 0.3)),
    "scaled": (lambda b: 2.5 * b, lambda d: 2.5 * d),
    "scaled from the right": (lambda b: b * 3, lambda d: 3 * d),
    "scaled by numpy": (lambda b: np.float64(2.5) * b, lambda d: 2.5 * d),
    "float32": (lambda b: b.to(torch.float32).to(torch.float64), lambda d: d),
}


@pytest.mark.parametrize("name", SCALARS)
def test_scalars_and_spectra_are_those_of_the_dense_matrix(block: Block, dense: Tensor, name: str) -> None:
    verb, reference = SCALARS[name]
    torch.testing.assert_close(verb(block), reference(dense), **close)


@pytest.mark.parametrize("name", MATRICES)
def test_functions_are_those_of_the_dense_matrix(block: Block, dense: Tensor, name: str) -> None:
    verb, reference = MATRICES[name]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if name == "float32" else close
    torch.testing.assert_close(verb(block).to_dense(), reference(dense), **tolerance)


@pytest.mark.parametrize("name", SCALARS)
def test_scalars_and_spectra_are_the_same_twice_in_a_row(block: Block, name: str) -> None:
    verb = SCALARS[name][0]
    assert torch.equal(verb(block), verb(block))


@pytest.mark.parametrize("name", MATRICES)
def test_functions_are_the_same_twice_in_a_row(block: Block, name: str) -> None:
    verb = MATRICES[name][0]
    assert torch.equal(verb(block).to_dense(), verb(block).to_dense())


def test_matvec_is_the_dense_product(block: Block, dense: Tensor, vector: Tensor) -> None:
    torch.testing.assert_close(block.matvec(vector), dense @ vector, **close)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_solve_is_the_dense_solution(block: Block, dense: Tensor, vector: Tensor, damping: float) -> None:
    expected = torch.linalg.solve(dense + damping * eye(dense), vector)
    torch.testing.assert_close(block.solve(vector, damping=damping), expected, **close)


def test_solve_undoes_matvec(block: Block, vector: Tensor) -> None:
    torch.testing.assert_close(block.solve(block @ vector), vector, **close)


def test_quadratic_is_the_form_of_the_dense_matrix(block: Block, dense: Tensor, vector: Tensor) -> None:
    torch.testing.assert_close(block.quadratic(vector), vector @ dense @ vector, **close)


def test_kl_is_half_of_it(block: Block, dense: Tensor, vector: Tensor) -> None:
    torch.testing.assert_close(block.kl(vector), 0.5 * (vector @ dense @ vector), **close)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_inverse_sqrt_squared_is_the_inverse(block: Block, damping: float) -> None:
    root = block.inverse_sqrt(damping=damping).to_dense()
    torch.testing.assert_close(root @ root, block.inverse(damping=damping).to_dense(), **close)


def test_top_eigenpairs_are_eigenpairs(block: Block, dense: Tensor) -> None:
    values, vectors = block.top_eigenpairs(3)
    flat = vectors.reshape(3, -1)
    torch.testing.assert_close(flat @ dense, values.unsqueeze(-1) * flat, **close)


def test_top_eigenpairs_are_the_largest_and_orthonormal(block: Block, dense: Tensor) -> None:
    values, vectors = block.top_eigenpairs(3)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(dense).flip(0)[:3], **close)
    flat = vectors.reshape(3, -1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(3, dtype=torch.float64), **close)


def test_samples_have_the_covariance(block: Block, dense: Tensor) -> None:
    n = 20_000
    samples = block.sample(n, torch.Generator().manual_seed(0)).reshape(n, -1)
    # An entry of the sample covariance has variance (F_ii F_jj + F_ij^2) / n; six of its standard deviations.
    deviation = ((dense.diagonal().outer(dense.diagonal()) + dense.square()) / n).sqrt()
    assert ((samples.T @ samples / n - dense).abs() / deviation).max() < 6


def test_samples_are_those_of_the_generator(block: Block) -> None:
    first, second = (block.sample(2, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (2, *block.layout.matrix_shape)


def test_the_three_forms_agree(block: Block, vector: Tensor) -> None:
    named = block.layout.from_matrix(vector.reshape(block.layout.matrix_shape))
    as_named, as_matrix = block @ named, block @ vector.reshape(block.layout.matrix_shape)
    assert as_matrix.shape == block.layout.matrix_shape
    assert {name: t.shape for name, t in as_named.items()} == {n: t.shape for n, t in named.items()}
    assert torch.equal(as_matrix.flatten(), block @ vector)
    assert torch.equal(block.layout.to_matrix(as_named), as_matrix)


def test_results_have_the_dtype_of_the_block(block: Block, vector: Tensor) -> None:
    assert (block @ vector.to(torch.bfloat16)).dtype == torch.float64


def test_shape_is_square(block: Block) -> None:
    assert block.shape == (block.layout.numel, block.layout.numel)
    assert (block.dtype, block.device) == (torch.float64, torch.device("cpu"))


def test_a_frozen_bias_gives_the_sub_block(kronecker, layouts: dict[str, WeightLayout]) -> None:
    both: KroneckerBlock = kronecker(layouts["linear"])
    weight = KroneckerBlock(layouts["no-bias"], A=both.A[:-1, :-1], G=both.G)
    keep = torch.arange(15).reshape(3, 5)[:, :-1].flatten()
    torch.testing.assert_close(weight.to_dense(), both.to_dense()[keep][:, keep], **close)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_copies_are_equal(block: Block, copied: Callable[[Block], Block]) -> None:
    assert torch.equal(copied(block).to_dense(), block.to_dense())


def test_repr_names_the_layer_and_its_shape(block: Block) -> None:
    size = " x ".join(map(str, block.layout.matrix_shape))
    assert repr(block) == f"{type(block).__name__}('fc', {size}, float64, cpu)"


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf")])
def test_a_scale_that_makes_no_fisher_is_refused(block: Block, factor: float) -> None:
    with pytest.raises(ArgumentError, match="finite number >= 0"):
        block * factor


@pytest.mark.parametrize("damping", [-1e-3, float("nan"), float("inf")])
@pytest.mark.parametrize("verb", ["inverse", "inverse_sqrt", "logdet"])
def test_a_damping_out_of_range_is_refused(block: Block, verb: str, damping: float) -> None:
    with pytest.raises(ArgumentError, match="damping is"):
        getattr(block, verb)(damping=damping)


@pytest.mark.parametrize("k", [0, 10_000])
def test_a_number_of_eigenpairs_out_of_range_is_refused(block: Block, k: int) -> None:
    with pytest.raises(ArgumentError, match=f"asked for {k} eigenpairs, expected 1 to {block.layout.numel}"):
        block.top_eigenpairs(k)


def test_an_unknown_rule_is_refused(block: Block) -> None:
    with pytest.raises(ArgumentError, match="'exact' or 'factored'"):
        block.inverse(rule="pi")  # type: ignore[arg-type]


def test_a_vector_of_another_shape_is_refused(block: Block) -> None:
    with pytest.raises(ArgumentError, match=r"layer 'fc': got a tensor of shape \(2, 2\)"):
        block.matvec(torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda v: {**v, "fc.wieght": torch.zeros(1)}, "fc.wieght"), (lambda v: {}, "is missing")],
)
def test_a_mapping_of_other_names_is_refused(
    block: Block, vector: Tensor, change: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], message: str
) -> None:
    named = block.layout.from_matrix(vector.reshape(block.layout.matrix_shape))
    with pytest.raises(ArgumentError, match=message):
        block.matvec(change(named))


def test_a_vector_on_another_device_is_refused(block: Block) -> None:
    with pytest.raises(ArgumentError, match="on meta, the block is on cpu"):
        block.matvec(torch.zeros(block.layout.numel, device="meta"))


def test_a_dense_matrix_too_large_is_refused(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_module, "MAX_DENSE", 2)
    with pytest.raises(ArgumentError, match=f"{block.layout.numel} x {block.layout.numel}"):
        block.to_dense()


def test_products_run_on_the_meta_device(block: Block) -> None:
    meta = block.to("meta")
    assert (meta @ torch.zeros(block.layout.numel, device="meta")).is_meta


@pytest.mark.parametrize("verb", ["inverse", "inverse_sqrt", "logdet"])
def test_a_singular_block_without_damping_is_refused_by_name(block: Block, verb: str) -> None:
    with pytest.raises(NumericalError, match=r"(?s)layer 'fc'.*singular.*Pass damping"):
        getattr(block * 0.0, verb)()


@pytest.mark.parametrize("verb", ["inverse", "inverse_sqrt", "logdet"])
def test_a_singular_block_with_damping_is_not(block: Block, verb: str) -> None:
    getattr(block * 0.0, verb)(damping=0.1)
