"""What a Kronecker block can do beside the verbs that all blocks share."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kfac_cond.errors import ArgumentError, NumericalError
from kfac_cond.layers.layout import WeightLayout
from kfac_cond.linalg.sides import whole
from kfac_cond.structures import EigenBlock, KroneckerBlock

LINEAR = WeightLayout("fc.weight", "fc.bias", (3, 4))
close = {"rtol": 0.0, "atol": 1e-10}


@pytest.fixture(params=["", "A", "G", "AG"], ids="diagonal {}".format)
def diagonal(request: pytest.FixtureRequest) -> str:
    """The sides that are diagonals."""
    return request.param


def factored_inverse(A: Tensor, G: Tensor, damping: float) -> Tensor:
    """The definition, by torch.kron and torch.linalg.inv."""
    pi = math.sqrt((A.trace() / len(A)) / (G.trace() / len(G)))
    damped_A = A + pi * math.sqrt(damping) * torch.eye(len(A), dtype=A.dtype)
    damped_G = G + math.sqrt(damping) / pi * torch.eye(len(G), dtype=G.dtype)
    return torch.linalg.inv(torch.kron(damped_G, damped_A))


def test_factored_inverse_is_its_definition(layout: WeightLayout, kronecker, diagonal: str) -> None:
    block: KroneckerBlock = kronecker(layout, diagonal=diagonal)
    A, G = (whole(side).reshape(-1, *side.shape[-2:]) for side in block.sides)
    expected = torch.block_diag(*[factored_inverse(a, g, 0.3) for a, g in zip(A, G, strict=True)])
    torch.testing.assert_close(block.inverse(damping=0.3, rule="factored").to_dense(), expected, **close)


def test_factored_solve_is_its_definition(kronecker) -> None:
    block: KroneckerBlock = kronecker(LINEAR)
    v = torch.arange(15.0, dtype=torch.float64)
    expected = factored_inverse(block.A, block.G, 0.3) @ v
    torch.testing.assert_close(block.solve(v, damping=0.3, rule="factored"), expected, **close)


def test_without_damping_both_rules_agree(kronecker, diagonal: str) -> None:
    block: KroneckerBlock = kronecker(LINEAR, diagonal=diagonal)
    torch.testing.assert_close(block.inverse(rule="factored").to_dense(), block.inverse().to_dense(), **close)


@pytest.mark.parametrize("c", [1e-6, 1e6])
def test_factored_inverse_is_invariant_to_where_the_scale_is(kronecker, c: float) -> None:
    block: KroneckerBlock = kronecker(LINEAR)
    moved = KroneckerBlock(LINEAR, A=block.A * c, G=block.G / c)
    expected = block.inverse(damping=0.3, rule="factored").to_dense()
    torch.testing.assert_close(moved.inverse(damping=0.3, rule="factored").to_dense(), expected, **close)


@pytest.mark.parametrize("verb", ["sqrt", "inverse", "inverse_sqrt"])
def test_functions_without_damping_stay_kronecker(kronecker, verb: str) -> None:
    assert isinstance(getattr(kronecker(LINEAR), verb)(), KroneckerBlock)


@pytest.mark.parametrize("verb", ["inverse", "inverse_sqrt"])
def test_functions_with_exact_damping_are_in_the_eigenbasis(kronecker, verb: str) -> None:
    assert isinstance(getattr(kronecker(LINEAR), verb)(damping=0.1), EigenBlock)


def test_the_eigenbasis_is_computed_once(kronecker) -> None:
    block: KroneckerBlock = kronecker(LINEAR)
    assert block.eigen() is block.eigen()


def test_the_eigenbasis_is_the_same_matrix(layout: WeightLayout, kronecker, diagonal: str) -> None:
    block: KroneckerBlock = kronecker(layout, diagonal=diagonal)
    torch.testing.assert_close(block.eigen().to_dense(), block.to_dense(), **close)


def test_the_eigenbasis_knows_the_factors_it_came_from(layout: WeightLayout, kronecker, diagonal: str) -> None:
    block: KroneckerBlock = kronecker(layout, diagonal=diagonal)
    torch.testing.assert_close(block.eigen().A, block.A, **close)
    torch.testing.assert_close(block.eigen().to(torch.float64).G, block.G, **close)


@pytest.mark.parametrize("factor", ["A", "G"])
@pytest.mark.parametrize("verb", ["sqrt", "inverse", "inverse_sqrt", "__mul__"])
def test_a_function_of_an_eigen_block_has_no_factors(kronecker, verb: str, factor: str) -> None:
    block = kronecker(LINEAR).eigen()
    derived = 2.0 * block if verb == "__mul__" else getattr(block, verb)()
    with pytest.raises(ArgumentError, match=f"layer 'fc': it has no {factor}.*structure='ekfac'"):
        getattr(derived, factor)


@pytest.mark.parametrize("verb", ["sqrt", "inverse", "inverse_sqrt", "eigen"])
def test_functions_keep_a_diagonal_side_diagonal(kronecker, diagonal: str, verb: str) -> None:
    assert getattr(kronecker(LINEAR, diagonal=diagonal), verb)().diagonal_sides == tuple(diagonal)


def test_a_side_whose_diagonal_could_be_a_matrix_is_told_by_its_layout(kronecker) -> None:
    """Three groups with three outputs each: (3, 3) is three diagonals there, and one matrix without groups."""
    grouped = kronecker(WeightLayout("conv.weight", None, (9, 2), groups=3), diagonal="G")
    assert grouped.G.shape == kronecker(LINEAR).G.shape
    assert grouped.diagonal_sides == ("G",)
    assert kronecker(LINEAR).diagonal_sides == ()


def test_the_eigenvalues_of_a_diagonal_carry_no_round_off_of_a_decomposition() -> None:
    """Of token frequencies, say, the rarest is not zero."""
    A = torch.logspace(-15.5, 0, 5, dtype=torch.float64)
    block = KroneckerBlock(LINEAR, A=A, G=torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(block.inverse().A, 1 / A, rtol=1e-12, atol=0)
    torch.testing.assert_close(block.eigen().inverse().values, (1 / A).expand(3, 5), rtol=1e-12, atol=0)


def test_the_scale_goes_to_G(kronecker) -> None:
    block: KroneckerBlock = kronecker(LINEAR)
    doubled = block * 2
    assert torch.equal(doubled.A, block.A)
    assert torch.equal(doubled.G, 2 * block.G)


def test_a_block_does_not_change(kronecker) -> None:
    with pytest.raises(AttributeError):
        kronecker(LINEAR).A = torch.eye(5)


@pytest.mark.parametrize("factor", ["A", "G"])
def test_the_singular_factor_is_named(kronecker, factor: str) -> None:
    block: KroneckerBlock = kronecker(LINEAR)
    sides = {"A": block.A, "G": block.G}
    x = torch.randn(len(sides[factor]), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sides[factor] = x @ x.T
    with pytest.raises(NumericalError, match=f"layer 'fc': its factor {factor} is singular"):
        KroneckerBlock(LINEAR, **sides, name="fc").inverse()


def test_two_good_factors_are_not_singular_for_the_span_of_their_product() -> None:
    A = torch.diag(torch.logspace(-11, 0, 5, dtype=torch.float64))
    G = torch.diag(torch.logspace(-11, 0, 3, dtype=torch.float64))
    logdet = KroneckerBlock(LINEAR, A=A, G=G).logdet()
    torch.testing.assert_close(logdet, 3 * A.diagonal().log().sum() + 5 * G.diagonal().log().sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("arguments", [{}, {"rule": "factored"}])
@pytest.mark.parametrize("factor", ["A", "G"])
def test_a_factor_that_is_not_finite_is_refused_by_name(kronecker, factor: str, arguments: dict[str, str]) -> None:
    block: KroneckerBlock = kronecker(LINEAR)
    sides = {"A": block.A.clone(), "G": block.G.clone()}
    sides[factor][0, 0] = torch.nan
    with pytest.raises(NumericalError, match=f"layer 'fc': (its factor )?{factor}"):
        KroneckerBlock(LINEAR, **sides, name="fc").inverse(damping=0.1, **arguments)


@pytest.mark.parametrize("damping", [1e-3, 1e-9])
def test_an_indefinite_factor_gets_no_other_damping_in_silence(damping: float) -> None:
    A = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, -0.05], dtype=torch.float64))
    block = KroneckerBlock(LINEAR, A=A, G=torch.eye(3, dtype=torch.float64), name="fc")
    with pytest.raises(NumericalError, match=f"factor A is not positive definite with damping {damping:.3g}"):
        block.inverse(damping=damping, rule="factored")


def test_the_factored_rule_needs_factors(kronecker) -> None:
    with pytest.raises(ArgumentError, match="layer 'fc': rule='factored'"):
        kronecker(LINEAR).eigen().inverse(damping=0.1, rule="factored")


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ({"A": torch.eye(4)}, r"A has shape \(4, 4\), expected \(5, 5\) or \(5,\)"),
        ({"A": torch.ones(4)}, r"A has shape \(4,\), expected \(5, 5\) or \(5,\)"),
        ({"G": torch.eye(5)}, r"G has shape \(5, 5\), expected \(3, 3\)"),
        ({"A": torch.eye(5, dtype=torch.float32)}, "A is torch.float32 on cpu, G torch.float64"),
    ],
)
def test_factors_that_do_not_fit_are_refused(sides: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"layer 'fc': {message}"):
        KroneckerBlock(
            LINEAR,
            **{"A": torch.eye(5, dtype=torch.float64), "G": torch.eye(3, dtype=torch.float64), **sides},
            name="fc",
        )


def test_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"values has shape \(5, 3\), expected \(3, 5\)"):
        EigenBlock(LINEAR, torch.eye(5), torch.eye(3), torch.ones(5, 3))


@pytest.mark.parametrize("field", ["basis_A", "basis_G", "values_A", "values_G"])
def test_what_belongs_to_a_side_has_its_shape(field: str) -> None:
    sides = {"basis_A": None, "basis_G": None, field: torch.ones(7)}
    with pytest.raises(ArgumentError, match=rf"{field} has shape \(7,\), expected"):
        EigenBlock(LINEAR, values=torch.ones(3, 5), **sides)


def test_a_block_without_a_name_is_called_by_its_parameters() -> None:
    with pytest.raises(ArgumentError, match=r"the block of fc\.weight and fc\.bias"):
        KroneckerBlock(LINEAR, A=torch.eye(4), G=torch.eye(3))
