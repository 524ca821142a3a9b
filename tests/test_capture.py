"""What is captured and when: forwards of the wrapped model, whatever else happens around them."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .helpers import (
    EVERY_STEP,
    Apply,
    assert_factors,
    assert_same_fisher,
    categorical_loss,
    classifier,
    plain_factors,
    stepped,
    updated,
)
from .reference import assert_same


def expected_factors(model: nn.Module, inputs: Tensor, drawn: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    return plain_factors(model, inputs, lambda outputs: categorical_loss(outputs, drawn), divisor=drawn.numel())


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(7, 3), torch.randint(3, (7,))


def test_one_step_has_the_factors_of_its_draws(batch):
    model = classifier()
    assert_factors(updated(model, "categorical", batch), expected_factors(model, *batch))


def test_several_draws_are_averaged(batch):
    model, inputs = classifier(), batch[0]
    draws = [torch.randint(3, (7,)) for _ in range(3)]
    found = updated(model, "categorical", (inputs, draws))
    each = [expected_factors(model, inputs, drawn) for drawn in draws]
    expected = {name: (A, torch.stack([one[name][1] for one in each]).mean(0)) for name, (A, _) in each[0].items()}
    assert_factors(found, expected)


# -- which forwards count ---------------------------------------------------------------------------------------------


def evaluate_without_grad(model: nn.Module, kfac: kc.KFAC) -> None:
    with torch.no_grad():
        model(torch.randn(4, 3))


def evaluate_in_inference_mode(model: nn.Module, kfac: kc.KFAC) -> None:
    with torch.inference_mode():
        model(torch.randn(4, 3))


def evaluate_with_grad(model: nn.Module, kfac: kc.KFAC) -> None:
    model(torch.randn(4, 3))


def evaluate_paused(model: nn.Module, kfac: kc.KFAC) -> None:
    with kfac.paused():
        model(torch.randn(4, 3)).sum().backward()
        model.zero_grad()


def fail(model: nn.Module, kfac: kc.KFAC) -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(4, 9))


def fail_halfway(model: nn.Module, kfac: kc.KFAC) -> None:
    layer, model[2] = model[2], nn.Identity()
    model[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.randn(4, 3))
    model[1]._forward_hooks.popitem()
    model[2] = layer


ELSEWHERE = [
    evaluate_without_grad,
    evaluate_in_inference_mode,
    evaluate_with_grad,
    evaluate_paused,
    fail,
    fail_halfway,
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("other", ELSEWHERE, ids=lambda f: f.__name__)
def test_other_forwards_leave_no_trace_in_the_factors(other, when, batch):
    model, (inputs, drawn) = classifier(), batch

    def run(kfac: kc.KFAC) -> None:
        if when == "before":
            other(model, kfac)
        outputs = model(inputs)
        if when == "after":
            other(model, kfac)
        kfac.update(outputs, draws=drawn)
        outputs.sum().backward()

    assert_factors(stepped(model, "categorical", run), expected_factors(model, inputs, drawn))


def test_validation_without_grad_does_not_use_up_a_due_step(batch):
    model, criterion = classifier(), nn.CrossEntropyLoss()

    def run(kfac: kc.KFAC) -> None:
        with torch.no_grad():
            criterion(model(torch.randn(4, 3)), torch.randint(3, (4,)))
        criterion(model(batch[0]), batch[1]).backward()

    expected = kc.estimate(model, [batch[0]], "categorical", options=kc.Options(seed=5))
    assert_same_fisher(stepped(model, criterion, run, seed=5), expected)


@pytest.mark.parametrize("mode", [True, False])
def test_train_and_eval_mode(mode, batch):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).train(mode)
    twin = copy.deepcopy(model)
    found = updated(model, "categorical", batch)
    assert list(found) == ["0", "1", "2"]
    linear = kc.Fisher({name: found[name] for name in ("0", "2")}, meta=found.meta)
    assert_factors(linear, expected_factors(twin, *batch))


def test_forwards_with_grad_that_find_no_loss_hold_no_more_than_some_graphs(caplog):
    model = classifier()
    kfac = kc.KFAC(model, nn.CrossEntropyLoss())
    held = []
    for _ in range(40):
        inputs = torch.randn(2, 3, requires_grad=True)
        model(inputs)
        held.append(weakref.ref(inputs))
    del inputs
    gc.collect()
    assert sum(one() is not None for one in held) <= 20
    assert caplog.text.count("wait for their loss") == 1
    kfac.remove()
    gc.collect()
    assert sum(one() is not None for one in held) == 0


def test_a_step_lets_go_of_its_graphs(batch):
    model, criterion = classifier(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion, schedule=EVERY_STEP)
    kfac.attach(optimizer)
    inputs = batch[0].clone().requires_grad_()
    held = weakref.ref(inputs)
    criterion(model(inputs), batch[1]).backward()
    del inputs
    optimizer.step()
    gc.collect()
    assert held() is None


# -- layers and parameters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_a_frozen_weight_leaves_the_bias(bias, batch):
    model = classifier()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(bias)
    found, full = updated(model, "categorical", batch), expected_factors(model, *batch)
    assert_same(found["0"].A, torch.ones(1, 1))
    assert_same(found["0"].G, full["0"][1])
    assert found["2"].A.shape == ((5, 5) if bias else (4, 4))


def test_a_frozen_bias_leaves_the_weight(batch):
    model = classifier()
    model[0].bias.requires_grad_(False)
    found, full = updated(model, "categorical", batch), expected_factors(model, *batch)
    assert_same(found["0"].A, full["0"][0][:3, :3])
    assert_same(found["0"].G, full["0"][1])


def test_a_frozen_layer_is_left_out_and_the_others_are_as_they_were(batch):
    model = classifier()
    _, G = expected_factors(model, *batch)["2"]
    model[0].requires_grad_(False)
    found = updated(model, "categorical", batch)
    assert list(found) == ["2"]
    assert_same(found["2"].G, G)


class TwoBranches(nn.Module):
    """The branch called ``used`` is; the other may be."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(3, 3), nn.Linear(3, 3)
        self.both = False

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + self.spare(x) if self.both else self.used(x)


def run_of(model: nn.Module, *batches: tuple[Tensor, Tensor]):
    def run(kfac: kc.KFAC) -> None:
        for number, (inputs, drawn) in enumerate(batches):
            model.both = number > 0
            outputs = model(inputs)
            kfac.update(outputs, draws=drawn)
            outputs.sum().backward()

    return run


def test_a_layer_not_used_in_one_micro_batch_adds_zero_to_G_while_M_counts(batch):
    model, (inputs, drawn) = TwoBranches(), batch
    found = stepped(model, "categorical", run_of(model, (inputs[:3], drawn[:3]), (inputs[3:], drawn[3:])))["spare"]
    model.both = True
    A, G = expected_factors(model, inputs[3:], drawn[3:])["spare"]
    assert_same(found.A, A)
    assert_same(found.G, G * 4 / 7)


def test_a_layer_not_used_at_first_skips_in_A_and_counts_as_zero_in_G(batch):
    """After two captures with rho: A is the second's, G is (rho 0 + G_2) / (rho + 1)."""
    model, (inputs, drawn) = TwoBranches(), batch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    kfac = kc.KFAC(model, "categorical", schedule=kc.Schedule(factors=1, inverses=1, decay=0.8))
    kfac.attach(optimizer)
    for model.both in (False, True):
        outputs = model(inputs)
        kfac.update(outputs, draws=drawn)
        outputs.sum().backward()
        optimizer.step()
    A, G = expected_factors(model, inputs, drawn)["spare"]
    assert_same(kfac.fisher()["spare"].A, A)
    assert_same(kfac.fisher()["spare"].G, G / 1.8)


def test_a_layer_that_never_fired_is_named_after_the_first_step(batch, caplog):
    model = TwoBranches()
    with caplog.at_level(logging.WARNING, logger="kfac_cond"):
        fisher = stepped(model, "categorical", run_of(model, batch))
    assert list(fisher) == ["used"]
    assert "spare" in caplog.text
    assert "used," not in caplog.text


class Tied(nn.Module):
    """Two modules with one weight, and optionally one bias."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=bias), nn.Linear(3, 3, bias=bias)
        self.second.weight = self.first.weight
        self.second.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("bias", [True, False])
def test_tied_linear_layers_are_one_layer_with_two_uses(bias, batch):
    tied = Tied(bias=bias)
    apart = copy.deepcopy(tied)
    apart.second.weight = nn.Parameter(tied.first.weight.detach().clone())
    found = updated(tied, "categorical", batch)
    expected = expected_factors(apart, *batch)
    assert list(found) == ["first"]
    assert_same(found["first"].A, (expected["first"][0] + expected["second"][0]) / 2)
    assert_same(found["first"].G, expected["first"][1] + expected["second"][1])


def test_a_module_used_on_other_shapes_counts_all_its_positions():
    layer, head = nn.Linear(3, 3), nn.Linear(3, 3)
    model = nn.Sequential(layer, Apply(lambda h: h.mean(1)), layer, head)
    inputs = torch.randn(4, 5, 3)
    found = kc.estimate(model, [inputs], "categorical", options=kc.Options(draws=[[torch.randint(3, (4,))]]))["0"]
    first = torch.cat([inputs.reshape(-1, 3), torch.ones(20, 1)], 1)
    second = torch.cat([layer(inputs).mean(1).detach(), torch.ones(4, 1)], 1)
    assert_same(found.A, (first.T @ first + second.T @ second) / 24)


def test_uses_on_other_numbers_of_examples_are_refused_for_reduce():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, Apply(lambda h: h.reshape(2, 2, 3)), layer, Apply(lambda h: h.mean(1)))
    rules = {"0": {"sharing": "reduce"}}
    with pytest.raises(kc.CaptureError, match="sharing='expand'"):
        kc.estimate(model, [torch.randn(4, 3)], "categorical", rules=rules)


def test_examples_not_along_the_first_dimension_are_refused_for_reduce():
    model = nn.Sequential(nn.Linear(3, 3), Apply(lambda h: h.mean(0)))
    rules = {"0": {"sharing": "reduce"}}
    with pytest.raises(kc.CaptureError, match="dimension 0"):
        kc.estimate(model, [torch.randn(5, 2, 3)], "categorical", rules=rules)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_update_after_backward_names_the_mistake(batch):
    model = classifier()
    kfac = kc.KFAC(model, "categorical")
    outputs = model(batch[0])
    outputs.sum().backward()
    with pytest.raises(kc.CaptureError, match=r"before loss\.backward"):
        kfac.update(outputs)


@pytest.mark.parametrize("change", [Tensor.detach, lambda outputs: torch.zeros(7, 3, requires_grad=True)])
def test_outputs_of_nothing_we_know_are_refused(change, batch):
    model = classifier()
    kfac = kc.KFAC(model, "categorical")
    outputs = model(batch[0])
    with pytest.raises(kc.CaptureError, match="the tensor that the model returned"):
        kfac.update(change(outputs))


def test_a_layer_that_returns_no_tensor_is_named():
    model = nn.Sequential(nn.Linear(3, 4), Apply(lambda h: h[0]), nn.Linear(4, 3))
    model[0].register_forward_hook(lambda module, args, output: (output,))
    kc.estimate(model, [torch.randn(5, 3)], "categorical")  # ours comes first: it sees the layer's own output
    kfac = kc.KFAC(model, "categorical")
    model[0].register_forward_hook(lambda module, args, output: (output,), prepend=True)
    with pytest.raises(kc.CaptureError, match="layer '0'"):
        model(torch.randn(5, 3))
    kfac.remove()


def test_an_unfrozen_layer_is_named(batch):
    model = classifier()
    model[0].weight.requires_grad_(False)
    kc.KFAC(model, "categorical")
    model[0].weight.requires_grad_(True)
    with pytest.raises(kc.ModelChangedError, match=r"layer '0'.*kfac.refresh"):
        model(batch[0])


# -- dtypes and sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "statistics"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_statistics_are_float32_at_least(dtype, statistics, sharing):
    model, inputs = classifier().to(dtype), torch.randn(6, 2, 3, dtype=dtype)
    whole = nn.Sequential(model, Apply(lambda h: h.mean(1)))
    block = updated(whole, "categorical", (inputs, None), rules={"*": {"sharing": sharing}})["0.0"]
    assert block.A.dtype == block.G.dtype == statistics


def test_a_bfloat16_model_has_float32_products_of_its_activations():
    model, inputs = classifier().bfloat16(), torch.randn(64, 3, dtype=torch.bfloat16)
    block = kc.estimate(model, [inputs], "categorical")["0"]
    a = torch.cat([inputs.double(), torch.ones(64, 1)], 1)
    assert_same(block.A.double(), a.T @ a / 64, tolerance=1e-6)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("where", [0, 1])
def test_a_micro_batch_of_size_zero_adds_nothing(where, sharing, batch):
    model, empty = classifier(), (torch.randn(0, 3), torch.zeros(0, dtype=torch.long))
    rules = {"*": {"sharing": sharing}}
    batches = [batch]
    batches.insert(where, empty)
    found = updated(model, "categorical", *batches, rules=rules)
    assert_same_fisher(found, updated(model, "categorical", batch, rules=rules))


# -- hooks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_wrapped_model_is_inert(copied, batch):
    model = classifier()
    kfac = kc.KFAC(model, "categorical")
    twin = copied(model)
    twin(batch[0])
    outputs = model(batch[0])
    kfac.update(outputs, draws=batch[1])
    assert kc.KFAC(twin, "categorical").layers.keys() == kfac.layers.keys()


def hooks_of(*modules: nn.Module) -> list[int]:
    return [
        len(hooks)
        for whole in modules
        for module in whole.modules()
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_pre_hooks_with_kwargs,
            module._forward_hooks_always_called,
            module._backward_hooks,
        )
    ]


def test_remove_leaves_no_trace(batch):
    model, criterion = classifier(), nn.CrossEntropyLoss()
    before = hooks_of(model, criterion)
    stepped(model, criterion, lambda kfac: criterion(model(batch[0]), batch[1]).backward())
    assert hooks_of(model, criterion) == before


def test_users_own_hooks_stay(batch):
    model, calls = classifier(), []
    model[0].register_forward_hook(lambda *_: calls.append("mine"))
    kfac = kc.KFAC(model, "categorical")
    kfac.remove()
    model(batch[0])
    assert calls == ["mine"]
