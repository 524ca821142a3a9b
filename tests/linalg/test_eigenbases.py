"""Eigenbases against torch.linalg.eigh, and the ladder of those that fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kfac_cond.linalg.eigen import Rung, eigenbases, from_eigenbasis

SHAPES = [(3, 3), (5, 5), (2, 3, 3), (1, 1)]
LinAlgError = torch.linalg.LinAlgError


def failing(when: Callable[[Tensor], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make eigh raise for some inputs, as it does where its iteration does not converge."""
    original = torch.linalg.eigh

    def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
        if when(matrix):
            raise LinAlgError("the algorithm failed to converge")
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_reassembles_the_matrix(spd, index: int) -> None:
    matrices = [spd(*shape) for shape in SHAPES]
    bases, rungs = eigenbases(matrices)
    torch.testing.assert_close(from_eigenbasis(*bases[index]), matrices[index], rtol=0, atol=1e-10)
    assert rungs[index] == Rung.FIRST


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_eigenvalues_ascend_and_are_those_of_the_matrix(spd, index: int) -> None:
    matrices = [spd(*shape) for shape in SHAPES]
    values, _ = eigenbases(matrices)[0][index]
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrices[index]), rtol=0, atol=1e-10)


def test_the_basis_is_orthonormal(spd) -> None:
    _, basis = eigenbases([spd(2, 6, 6)])[0][0]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(6, dtype=torch.float64).expand(2, 6, 6), rtol=0, atol=1e-10)


def test_no_eigenvalue_is_negative() -> None:
    x = torch.randn(2, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ((values, _),), _ = eigenbases([x.mT @ x])
    assert torch.linalg.eigvalsh(x.mT @ x).min() < 0 <= values.min()


def test_one_size_is_one_decomposition(spd, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[torch.Size] = []
    failing(lambda matrix: sizes.append(matrix.shape) is not None, monkeypatch)
    eigenbases([spd(*shape) for shape in SHAPES])
    assert sizes == [(3, 3, 3), (1, 5, 5), (1, 1, 1)]


def test_float32_is_tried_again_in_float64(spd, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(lambda matrix: matrix.dtype == torch.float32, monkeypatch)
    matrix = spd(4, dtype=torch.float32)
    ((values, basis),), rungs = eigenbases([matrix])
    assert rungs == [Rung.DOUBLE]
    assert values.dtype == basis.dtype == torch.float32
    torch.testing.assert_close(from_eigenbasis(values, basis), matrix)


def test_float64_is_tried_again_with_a_jitter(spd, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = spd(4)
    failing(lambda batch: torch.equal(batch[0], matrix), monkeypatch)
    (basis,), rungs = eigenbases([matrix])
    assert rungs == [Rung.MORE_DAMPING]
    torch.testing.assert_close(from_eigenbasis(*basis), matrix, rtol=0, atol=1e-10)


def test_one_failure_leaves_the_others_of_its_batch_as_they_are(spd) -> None:
    good = spd(3)
    bases, rungs = eigenbases([torch.full_like(good, torch.nan), good])
    assert rungs == [Rung.IDENTITY, Rung.FIRST]
    torch.testing.assert_close(from_eigenbasis(*bases[1]), good, rtol=0, atol=1e-10)


def test_a_matrix_that_is_not_finite_keeps_its_previous_basis(spd) -> None:
    previous = (torch.tensor([2.0, 3.0]), torch.eye(2))
    (basis,), rungs = eigenbases([torch.full((2, 2), torch.nan)], [previous])
    assert rungs == [Rung.PREVIOUS]
    assert torch.equal(basis[0], previous[0])
    assert torch.equal(basis[1], previous[1])


def test_the_identity_stands_in_where_nothing_went_before() -> None:
    (basis,), rungs = eigenbases([torch.full((2, 3, 3), torch.inf)])
    assert rungs == [Rung.IDENTITY]
    assert torch.equal(from_eigenbasis(*basis), torch.eye(3).expand(2, 3, 3))


def test_a_result_that_is_not_finite_is_a_failure(spd, monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (original(m)[0] * torch.nan, original(m)[1]))
    assert eigenbases([spd(3)])[1] == [Rung.IDENTITY]


def test_runs_on_the_meta_device() -> None:
    ((values, basis),), rungs = eigenbases([torch.ones(2, 3, 3, device="meta")])
    assert (values.shape, basis.shape, rungs) == ((2, 3), (2, 3, 3), [Rung.FIRST])


def test_lengths_must_agree(spd) -> None:
    with pytest.raises(ValueError, match="1 matrices and 2 previous"):
        eigenbases([spd(3)], [None, None])
