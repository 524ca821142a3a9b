"""Training in 'ekfac': what is averaged, in which basis, what a change of basis makes of it, and the step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.linalg import subspace
from kfac_cond.linalg.subspace import followed, off_diagonal_share

from .fisher_cases import MODELS, case
from .helpers import EVERY_STEP, classifier
from .reference import assert_same
from .test_training_structures import step
from .training import batches

ONE_BASIS = kc.Schedule(factors=1, inverses=100, decay=0.6)


def example_gradients(model: nn.Module, inputs: Tensor, labels: Tensor, name: str) -> Tensor:
    """V_n of each example, weight and bias as one matrix, [n, out, in + 1]."""
    found = []
    for x, y in zip(inputs, labels, strict=True):
        loss = nn.functional.cross_entropy(model(x[None]), y[None], reduction="sum")
        layer = model.get_submodule(name)
        weight, bias = torch.autograd.grad(loss, [layer.weight, layer.bias])
        found.append(torch.cat([weight, bias[:, None]], 1))
    return torch.stack(found)


def squares(model: nn.Module, batch: tuple[Tensor, Tensor], name: str, bases: tuple[Tensor, Tensor]) -> Tensor:
    """(1/M) sum (U_G^T V_n U_A)^2."""
    U_A, U_G = bases
    V = example_gradients(model, *batch, name)
    return (U_G.mT @ V @ U_A).square().mean(0)


def trained(model: nn.Module, data: list, **settings) -> kc.KFAC:
    """A K-FAC after a step by hand on each batch, the labels being the draws."""
    settings = {"structure": "ekfac", "damping": 0.1, "schedule": ONE_BASIS, **settings}
    kfac = kc.KFAC(model, "categorical", **settings)
    for inputs, labels in data:
        step(kfac, model, inputs, draws=labels)
    return kfac


# -- what is averaged --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_squares_in_the_basis_of_the_factors_are_the_block_of_an_estimate(model):
    of = case(model, "categorical")
    wrapped = copy.deepcopy(of.model)
    kfac = kc.KFAC(wrapped, of.likelihood, structure="ekfac", schedule=kc.Schedule(factors=1, inverses=1, decay=0.0))
    for _ in range(2):
        step(kfac, wrapped, of.inputs, draws=of.draws)
    expected = of.estimate("ekfac", "sampled")
    for name, block in kfac.fisher().items():
        assert isinstance(block, kc.EigenBlock)
        assert_same(block.to_dense(), expected[name].to_dense(), tolerance=1e-8)


@pytest.mark.parametrize("schedule", [EVERY_STEP, ONE_BASIS, kc.Schedule(factors=1, inverses=2, decay=0.6)], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_the_trace_is_that_of_the_fisher_whatever_the_bases(model, schedule):
    of, found = case(model, "categorical"), []
    for structure in ("ekfac", "diagonal"):
        wrapped = copy.deepcopy(of.model)
        kfac = kc.KFAC(wrapped, of.likelihood, structure=structure, schedule=schedule)
        for scale in (1.0, -0.5, 2.0, 0.3):
            step(kfac, wrapped, scale * of.inputs, draws=of.draws)
        found.append(kfac.fisher())
    for name, block in found[0].items():
        assert_same(block.trace(), found[1][name].trace())


def test_captures_are_averaged_in_the_basis_in_use():
    model, data = classifier(), batches(4, classes=3)
    kfac = trained(model, data)
    for name, block in kfac.fisher().items():
        bases = block.basis_A, block.basis_G
        of_first = kc.estimate(model, [data[0][0]], "categorical", options=kc.Options(draws=[[data[0][1]]]))[name]
        (U_A, U_G), A, G = bases, of_first.A, of_first.G
        assert_same(U_A.mT @ A @ U_A, torch.diag((U_A.mT @ A @ U_A).diagonal()))
        # The first capture, before there was a basis: the products of eigenvalues, with the trace of the squares.
        product = (U_G.mT @ G @ U_G).diagonal()[:, None] * (U_A.mT @ A @ U_A).diagonal()
        trace = example_gradients(model, *data[0], name).square().sum((1, 2)).mean()
        found = [product * trace / product.sum(), *(squares(model, one, name, bases) for one in data[1:])]
        weights = [0.6 ** (3 - index) for index in range(4)]
        expected = sum(w * one for w, one in zip(weights, found, strict=True)) / sum(weights)
        assert_same(block.values, expected)


def test_a_change_of_basis_keeps_the_diagonal_of_what_was_known():
    model, data = classifier(), batches(3, classes=3)
    kfac = trained(model, data[:2])
    before = kfac.fisher()
    after = trained(copy.deepcopy(model), data[:2])
    after._refreshes._of_all = True
    after._shared.factors._turn(list(after.layers))
    for name, block in after.fisher().items():
        turned = torch.kron(block.basis_G, block.basis_A)
        expected = (turned.mT @ before[name].to_dense() @ turned).diagonal().reshape(block.values.shape)
        assert not torch.allclose(block.basis_A, before[name].basis_A)
        assert_same(block.values, expected)


def test_each_head_is_averaged_by_itself():
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = torch.tanh(self.body(x))
            return {"a": self.a(h), "b": self.b(h)}

    heads = kc.Product({"a": kc.Categorical(), "b": kc.Gaussian(0.5, reduction="sum")}, weights={"b": 0.3})
    found, made = [], TwoHeads()
    for structure in ("ekfac", "diagonal"):
        model = copy.deepcopy(made)
        kfac = kc.KFAC(model, heads, structure=structure, schedule=EVERY_STEP, data=kc.Data(seed=3))
        for size in (4, 6, 5):
            model.zero_grad()
            outputs = model(torch.linspace(-1, 1, 3 * size).reshape(size, 3))
            kfac.update(outputs)
            sum(one.square().sum() for one in outputs.values()).backward()
            kfac.precondition()
        found.append(kfac.fisher())
    for name, block in found[0].items():
        assert_same(block.trace(), found[1][name].trace())


# -- the step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relative", [False, True])
def test_the_update_divides_in_the_basis(relative):
    model, data = classifier(), batches(3, classes=3)
    kfac = trained(model, data[:2], damping=kc.Damping(0.1, relative=relative))
    gradients = step(kfac, model, data[2][0], draws=data[2][1])
    for block in kfac.fisher().values():
        added = 0.1 * (block.values.mean() if relative else 1.0)
        rotated = block.basis_G.mT @ block.layout.to_matrix(gradients) @ block.basis_A
        expected = block.basis_G @ (rotated / (block.values + added)) @ block.basis_A.mT
        assert_same(block.layout.to_matrix({key: p.grad for key, p in model.named_parameters()}), expected)


def test_a_rule_says_it_for_some_layers():
    model, data = classifier(), batches(2, classes=3)
    first = next(iter(kc.KFAC(copy.deepcopy(model), "categorical").layers))
    kfac = trained(model, data, structure="kfac", rules={first: {"structure": "ekfac"}})
    kinds = {name: type(block).__name__ for name, block in kfac.fisher().items()}
    assert kinds.pop(first) == "EigenBlock"
    assert set(kinds.values()) == {"KroneckerBlock"}
    row = next(row for row in kfac.coverage().rows if row.layer == first)
    assert row.structure == "ekfac"
    held = sum(x.numel() * x.element_size() for x in dict(kfac.state_dict()["layers"])[first]["average"].values())
    assert row.factor_bytes == held
    inverse = dict(kfac.state_dict()["layers"])[first]["inverse"]
    assert row.inverse_bytes == sum(x.numel() * x.element_size() for x in inverse.values() if isinstance(x, Tensor))


@pytest.mark.parametrize("limit", [1, 3])
def test_a_side_that_is_a_diagonal_has_the_identity_for_its_basis(limit):
    model, data = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), batches(3, classes=3)
    kfac = trained(model, data, rules={"*": {"max_factor_dim": limit}}, schedule=EVERY_STEP)
    plain = trained(copy.deepcopy(model), data, structure="diagonal", schedule=EVERY_STEP)
    for name, block in kfac.fisher().items():
        assert (block.basis_A is None, block.basis_G is None) == (True, limit == 1 or name == "0")
        assert_same(block.trace(), plain.fisher()[name].trace())


def test_a_parameter_in_the_universal_form_is_in_the_bases_of_its_own_moments():
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.w)

    made, data = Raw(), batches(14, classes=3)
    found = {}
    for structure in ("ekfac", "tkfac"):
        model = copy.deepcopy(made)
        kfac = trained(model, data, structure=structure, schedule=kc.Schedule(factors=1, inverses=1, decay=0.95))
        found[structure] = kfac.fisher()["w"]
        assert kfac.metrics()["kfac/plain_layers"] == 0
    assert isinstance(found["ekfac"], kc.EigenBlock)
    assert_same(found["ekfac"].trace(), found["tkfac"].trace())
    rotated = found["ekfac"].basis_G.mT @ found["tkfac"].G @ found["ekfac"].basis_G
    assert off_diagonal_share(rotated, torch.eye(3)) < 0.2


# -- bases that follow -------------------------------------------------------------------------------------------------


def random_factor(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, size, generator=generator) * torch.linspace(0.1, 3, size)
    return x.mT @ x


def test_a_step_brings_the_basis_nearer():
    matrix = random_factor(6)
    basis = torch.linalg.qr(torch.linalg.eigh(matrix)[1] + 0.05 * random_factor(6, 1) / 6)[0]
    shares = []
    for _ in range(200):
        shares.append(off_diagonal_share(matrix, basis).item())
        basis = followed(matrix, basis)
        assert_same(basis.mT @ basis, torch.eye(6))
    assert shares[0] > shares[1] > shares[5] > shares[20]
    assert shares[-1] < 1e-8
    values = (basis.mT @ matrix @ basis).diagonal()
    assert_same(values.sort().values, torch.linalg.eigvalsh(matrix))


def test_the_share_is_of_the_matrix_in_the_basis():
    matrix, basis = random_factor(4), torch.linalg.qr(random_factor(4, 2))[0]
    rotated = basis.mT @ matrix @ basis
    rest = rotated - torch.diag(rotated.diagonal())
    assert_same(off_diagonal_share(matrix, basis), rest.norm() / matrix.norm())
    assert off_diagonal_share(0 * matrix, basis) == 0


def test_a_singular_matrix_leaves_an_orthonormal_basis():
    matrix = torch.diag(torch.tensor([0.0, 2.0, 0.0, 1.0]))
    basis = followed(matrix, torch.linalg.qr(random_factor(4, 2))[0])
    assert_same(basis.mT @ basis, torch.eye(4))
    zero = followed(torch.zeros(4, 4), basis)
    assert_same(zero.mT @ zero, torch.eye(4))


@pytest.mark.parametrize(("threshold", "decomposes"), [(1.0, False), (0.0, True)])
def test_a_basis_that_is_near_is_followed_and_another_decomposed(monkeypatch, threshold, decomposes):
    monkeypatch.setattr("kfac_cond.structures.bases.OFF_DIAGONAL", threshold)
    model, data = classifier(), batches(3, classes=3)
    kfac = trained(model, data[:2], schedule=kc.Schedule(factors=1, inverses=2))
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda *args: calls.append(args) or eigh(*args))
    step(kfac, model, data[2][0], draws=data[2][1])
    assert bool(calls) == decomposes
    for block in kfac.fisher().values():
        assert_same(block.basis_A.mT @ block.basis_A, torch.eye(len(block.basis_A)))


def test_followed_bases_end_where_decomposed_ones_do():
    assert subspace.OFF_DIAGONAL < 1
    of = case("perceptron", "categorical")
    wrapped = copy.deepcopy(of.model)
    kfac = kc.KFAC(wrapped, of.likelihood, structure="ekfac", schedule=kc.Schedule(factors=1, inverses=1, decay=0.9))
    for _ in range(3):
        step(kfac, wrapped, of.inputs, draws=of.draws)
    for name, block in kfac.fisher().items():
        _, A, G = name, *kfac._shared.factors._factors_of_bases([name])[name].sides
        assert off_diagonal_share(A, block.basis_A) < 1e-6
        assert off_diagonal_share(G, block.basis_G) < 1e-6


def test_positions_may_be_averaged_first():
    of = case("tokens", "categorical")
    wrapped, rules = copy.deepcopy(of.model), {"*": {"sharing": "reduce"}}
    schedule = kc.Schedule(factors=1, inverses=1, decay=0.0)
    kfac = kc.KFAC(wrapped, of.likelihood, structure="ekfac", rules=rules, schedule=schedule)
    for _ in range(2):
        step(kfac, wrapped, of.inputs, draws=of.draws)
    options = kc.Options(draws=[of.draws])
    expected = kc.estimate(of.model, [of.inputs], of.likelihood, structure="ekfac", rules=rules, options=options)
    for name, block in kfac.fisher().items():
        assert_same(block.to_dense(), expected[name].to_dense(), tolerance=1e-8)
