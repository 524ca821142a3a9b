"""Training in other structures than 'kfac', for all layers or by rule: the blocks of an estimate, and a plain solve."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import kfac_cond as kc

from .fisher_cases import MODELS, case
from .helpers import EVERY_STEP, classifier
from .reference import assert_same
from .training import batches, network, parameters_of, train

TRAINED = ["kfac", "tkfac", "diagonal", "ekfac"]


def step(kfac: kc.KFAC, model: nn.Module, inputs: torch.Tensor, **draws: object) -> dict[str, torch.Tensor]:
    """One step by hand; the gradients before it."""
    model.zero_grad()
    outputs = model(inputs)
    kfac.update(outputs, **draws)
    outputs.square().sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    kfac.precondition()
    return before


@pytest.mark.parametrize("structure", ["kfac", "tkfac", "diagonal"])
@pytest.mark.parametrize("model", MODELS)
def test_the_averages_are_the_blocks_of_an_estimate(model, structure):
    of = case(model, "categorical")
    wrapped = copy.deepcopy(of.model)
    kfac = kc.KFAC(wrapped, of.likelihood, structure=structure, schedule=EVERY_STEP)
    step(kfac, wrapped, of.inputs, draws=of.draws)
    expected = of.estimate(structure, "sampled")
    assert kfac.fisher().meta["structure"] == structure
    assert list(kfac.fisher()) == list(expected)
    for name, block in kfac.fisher().items():
        assert type(block) is type(expected[name])
        assert_same(block.to_dense(), expected[name].to_dense())


@pytest.mark.parametrize("model", MODELS)
def test_a_diagonal_is_that_of_the_fisher(model):
    """Straight from the definition: squares of the gradients of single examples."""
    of = case(model, "categorical")
    wrapped = copy.deepcopy(of.model)
    kfac = kc.KFAC(wrapped, of.likelihood, structure="diagonal", schedule=EVERY_STEP)
    step(kfac, wrapped, of.inputs, draws=of.draws)
    for block in kfac.fisher().values():
        assert_same(block.diagonal().flatten(), of.block("sampled", block).diagonal())


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("rule", ["factored", "exact"])
def test_a_diagonal_divides_entry_by_entry(rule, relative):
    model = classifier()
    damping = kc.Damping(0.1, rule=rule, relative=relative)
    kfac = kc.KFAC(model, "categorical", structure="diagonal", damping=damping, schedule=EVERY_STEP)
    before = step(kfac, model, torch.randn(6, 3))
    for name, block in kfac.fisher().items():
        added = 0.1 * (block.values.mean() if relative else 1.0)
        expected = block.layout.to_matrix(before) / (block.values + added)
        assert_same(block.layout.to_matrix({key: p.grad for key, p in model.named_parameters()}), expected), name


def test_without_damping_an_entry_that_is_zero_leaves_its_gradient_finite():
    model, inputs = classifier(), torch.randn(6, 3)
    inputs[:, 1] = 0.0
    kfac = kc.KFAC(model, "categorical", structure="diagonal", damping=0.0, schedule=EVERY_STEP)
    step(kfac, model, inputs)
    assert torch.isfinite(torch.cat([p.grad.flatten() for p in model.parameters()])).all()


def test_a_rule_says_it_for_some_layers():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    rules = {"0": {"structure": "diagonal"}, "2": {"structure": "tkfac"}, "4": {"damping": 0.3}}
    plain, mixed = (
        kc.KFAC(one, "categorical", rules=rule, schedule=EVERY_STEP)
        for one, rule in ((model, {"4": {"damping": 0.3}}), (copy.deepcopy(model), rules))
    )
    inputs, draws = torch.randn(6, 3), torch.randint(3, (6,))
    for kfac in (plain, mixed):
        step(kfac, kfac._wrapped.model, inputs, draws=draws)
    fisher = mixed.fisher()
    assert [type(block).__name__ for block in fisher.values()] == ["DiagonalBlock", "KroneckerBlock", "KroneckerBlock"]
    expected = kc.estimate(
        model, [inputs], "categorical", structure=["diagonal", "tkfac", "kfac"], options=kc.Options(draws=[[draws]])
    )
    for name, one in zip("024", expected, strict=True):
        assert_same(fisher[name].to_dense(), one[name].to_dense())
    assert torch.equal(plain._wrapped.model[4].weight.grad, mixed._wrapped.model[4].weight.grad)


def test_a_layer_in_the_universal_form_may_be_a_diagonal():
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.w

    model, inputs, draws = Raw(), torch.randn(5, 3), torch.randint(3, (5,))
    kfac = kc.KFAC(model, "categorical", rules={"w": {"structure": "diagonal"}}, schedule=EVERY_STEP)
    step(kfac, model, inputs, draws=draws)
    loss = nn.functional.cross_entropy(model(inputs), draws, reduction="sum")
    (D,) = torch.autograd.grad(loss, [model.w])
    assert_same(kfac.fisher()["w"].values, D.square() / 5)


@pytest.mark.parametrize("structure", TRAINED)
def test_micro_batches_are_exact(structure):
    """Summed over two forwards as over one, a norm's moments among them."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3))

    inputs, draws, found = torch.randn(6, 3), torch.randint(3, (6,)), []
    for sizes in ([6], [2, 4]):
        model = made()
        kfac = kc.KFAC(model, "categorical", structure=structure, schedule=EVERY_STEP)
        for x, y in zip(inputs.split(sizes), draws.split(sizes), strict=True):
            outputs = model(x)
            kfac.update(outputs, draws=y)
            outputs.sum().backward()
        kfac.precondition()
        found.append(kfac.fisher())
    for block, expected in zip(*(one.values() for one in found), strict=True):
        assert_same(block.to_dense(), expected.to_dense())


@pytest.mark.parametrize("structure", TRAINED)
def test_a_resumed_run_is_the_same_to_the_last_bit(structure):
    def made() -> tuple[nn.Module, torch.optim.Optimizer, kc.KFAC]:
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kfac = kc.KFAC(
            model, "categorical", structure=structure, schedule=kc.Schedule(factors=2, inverses=4), data=kc.Data(seed=1)
        )
        kfac.attach(optimizer)
        return model, optimizer, kfac

    data, criterion = batches(10), nn.CrossEntropyLoss()
    model, optimizer, kfac = made()
    train(model, criterion, optimizer, data[:5])
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(kfac.state_dict())
    train(model, criterion, optimizer, data[5:])
    again, optimizer, kfac = made()
    again.load_state_dict(weights)
    kfac.load_state_dict(state)
    train(again, criterion, optimizer, data[5:])
    assert torch.equal(parameters_of(again), parameters_of(model))


def test_a_state_of_another_structure_is_refused():
    one, other = (kc.KFAC(network(), "categorical", structure=word) for word in ("diagonal", "kfac"))
    step(one, one._wrapped.model, torch.randn(4, 3))
    with pytest.raises(kc.StateError, match=r"layer '0': A is .* with the same structure and rules"):
        other.load_state_dict(one.state_dict())


@pytest.mark.parametrize("structure", ["kpsvd", "shampoo"])
def test_other_words_are_refused(structure):
    with pytest.raises(kc.ArgumentError, match="KFAC trains with one of kfac, tkfac, diagonal, ekfac"):
        kc.KFAC(network(), "categorical", structure=structure)


@pytest.mark.parametrize("structure", TRAINED)
def test_a_step_lets_go_of_its_inputs_without_a_garbage_collection(structure):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    kfac, inputs, held = kc.KFAC(model, "categorical", structure=structure, schedule=EVERY_STEP), torch.randn(5, 3), []
    model[1].register_forward_hook(lambda module, args, output: held.append(weakref.ref(args[0])))
    gc.disable()
    try:
        step(kfac, model, inputs)
        assert held[0]() is None
    finally:
        gc.enable()
