"""The optimizer's boundary: closures, groups, several optimizers, wrappers, and who is refused."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .reference import assert_same
from .training import (
    batches,
    expected_updates,
    found_updates,
    gradients_of,
    network,
    parameters_of,
    train,
    wrapped,
)


def sgd(parameters, **options) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, **{"lr": 0.1, **options})


def plain_run(model: nn.Module, data, **options) -> Tensor:
    """The parameters that the ordinary loop ends with."""
    model = copy.deepcopy(model)
    optimizer = sgd(model.parameters())
    _, criterion = wrapped(model, optimizer, **options)
    train(model, criterion, optimizer, data)
    return parameters_of(model)


# -- closures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_keyword", [True, False])
@pytest.mark.parametrize("zero_inside", [True, False])
def test_a_closure_gives_the_ordinary_step(as_keyword, zero_inside):
    model, data = network(), batches(3)
    expected = plain_run(model, data)
    optimizer = sgd(model.parameters())
    kfac, criterion = wrapped(model, optimizer)
    for inputs, labels in data:
        if not zero_inside:
            optimizer.zero_grad()

        def closure(inputs=inputs, labels=labels) -> Tensor:
            if zero_inside:
                optimizer.zero_grad()
            loss = criterion(model(inputs), labels)
            loss.backward()
            return loss

        returned = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
        assert returned.requires_grad
    assert torch.equal(parameters_of(model), expected)
    assert kfac.step == 3


def test_each_evaluation_of_a_closure_is_preconditioned_and_one_step_counted():
    model, (inputs, labels) = network(), batches(1)[0]
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    kfac, criterion = wrapped(model, optimizer)
    plain, seen = [], []

    def closure() -> Tensor:
        if plain:
            seen.append(gradients_of(model))
        optimizer.zero_grad()
        loss = criterion(model(inputs), labels)
        loss.backward()
        plain.append(gradients_of(model))
        return loss

    optimizer.step(closure)
    fisher = kfac.fisher()
    factors = {name: (fisher[name].A[None], fisher[name].G[None]) for name in fisher}
    expected = expected_updates(model, factors, plain[1], damping=lambda *_: 0.1, rule="factored")
    found = torch.cat([seen[1]["0.weight"], seen[1]["0.bias"][:, None]], 1)
    assert len(plain) == 3
    assert_same(found, expected["0"][0])
    assert kfac.step == 1


# -- groups and rates -----------------------------------------------------------------------------------------------


def test_a_scheduler_s_rate_reaches_the_trust_region():
    model, data = network(), batches(2)
    optimizer = sgd(model.parameters(), lr=10.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=1e-8)
    kfac, criterion = wrapped(model, optimizer, trust_region=kc.KLClip(1e-3))
    train(model, criterion, optimizer, data[:1])
    first = kfac.metrics()["kfac/trust_region_scale"]
    scheduler.step()
    train(model, criterion, optimizer, data[1:])
    assert first < 1
    assert kfac.metrics()["kfac/trust_region_scale"] == 1


def groups_of(model: nn.Module, *, split: str) -> list[dict]:
    if split == "layers":
        return [{"params": model[0].parameters(), "lr": 0.2}, {"params": model[2].parameters(), "lr": 0.05}]
    weights = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": weights, "lr": 0.2}, {"params": [p for p in model.parameters() if p.ndim == 1], "lr": 0.05}]


@pytest.mark.parametrize("split", ["layers", "weights and biases"])
def test_parameter_groups_change_the_rates_alone(split):
    model, (inputs, labels) = network(), batches(1)[0]
    optimizer = torch.optim.SGD(groups_of(model, split=split))
    _, criterion = wrapped(model, optimizer)
    before = parameters_of(model)
    criterion(model(inputs), labels).backward()
    optimizer.step()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    steps = torch.cat([(rates[id(p)] * p.grad).flatten() for p in model.parameters()])
    assert_same(parameters_of(model), before - steps)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_rate_may_be_a_tensor(shape):
    model, data = network(), batches(2)
    if shape and torch.__version__.startswith("2.6"):
        pytest.skip("this torch steps with 0-d rates alone")
    expected = plain_run(model, data, trust_region=kc.KLClip(1e-4))
    optimizer = sgd(model.parameters(), lr=torch.full(shape, 0.1))
    _, criterion = wrapped(model, optimizer, trust_region=kc.KLClip(1e-4))
    train(model, criterion, optimizer, data)
    assert_same(parameters_of(model), expected)


# -- several optimizers ---------------------------------------------------------------------------------------------


def two_optimizers(model: nn.Module, *, split: str) -> tuple[torch.optim.SGD, torch.optim.SGD]:
    first, second = ([*group["params"]] for group in groups_of(model, split=split))
    return sgd(first), sgd(second)


@pytest.mark.parametrize("split", ["layers", "weights and biases"])
@pytest.mark.parametrize("reverse", [False, True])
def test_two_optimizers_step_as_one(split, reverse):
    model, data = network(), batches(4)
    expected = plain_run(model, data, schedule=kc.Schedule(factors=2, inverses=2))
    optimizers = two_optimizers(model, split=split)
    kfac, criterion = wrapped(model, *optimizers, schedule=kc.Schedule(factors=2, inverses=2))
    for inputs, labels in data:
        model.zero_grad()
        criterion(model(inputs), labels).backward()
        for optimizer in reversed(optimizers) if reverse else optimizers:
            optimizer.step()
    assert_same(parameters_of(model), expected)
    assert kfac.step == 4


@pytest.mark.parametrize("order", ["aabb", "abab", "aaaa", "abba"])
def test_alternate_stepping_counts_every_iteration(order):
    """Each preconditions its own layers with the factors of its own forward."""
    model, data = network(), batches(4)
    optimizers = dict(zip("ab", two_optimizers(model, split="layers"), strict=True))
    kfac, criterion = wrapped(model, *optimizers.values(), schedule=kc.Schedule(factors=1, inverses=1, decay=0.0))
    for (inputs, labels), name in zip(data, order, strict=True):
        model.zero_grad()
        criterion(model(inputs), labels).backward()
        plain = gradients_of(model)
        fisher_inputs = inputs
        optimizers[name].step()
        layer = "0" if name == "a" else "2"
        A = kfac.fisher()["0"].A
    rows = torch.cat([fisher_inputs, torch.ones(8, 1)], 1)
    assert_same(A, rows.mT @ rows / 8)
    factors = {layer: (kfac.fisher()[layer].A[None], kfac.fisher()[layer].G[None])}
    expected = expected_updates(model, factors, plain, damping=lambda *_: 0.1, rule="factored")
    assert_same(found_updates(model, [layer])[layer], expected[layer])
    model(data[0][0])
    assert kfac.step == 4


def test_the_step_of_one_leaves_the_other_s_gradients():
    model, (inputs, labels) = network(), batches(1)[0]
    first, second = two_optimizers(model, split="layers")
    _, criterion = wrapped(model, first, second)
    criterion(model(inputs), labels).backward()
    plain = gradients_of(model)
    first.step()
    assert torch.equal(model[2].weight.grad, plain["2.weight"])


def test_a_layer_is_preconditioned_once_where_two_optimizers_share_it():
    model, (inputs, labels) = network(), batches(1)[0]
    first, second = two_optimizers(model, split="weights and biases")
    _, criterion = wrapped(model, first, second)
    criterion(model(inputs), labels).backward()
    first.step()
    once = gradients_of(model)
    second.step()
    assert torch.equal(model[0].bias.grad, once["0.bias"])


def test_an_optimizer_that_steps_twice_is_preconditioned_twice():
    model, (inputs, labels) = network(), batches(1)[0]
    first, second = two_optimizers(model, split="layers")
    _, criterion = wrapped(model, first, second, schedule=kc.Schedule())
    criterion(model(inputs), labels).backward()
    plain = gradients_of(model)
    first.step()
    once = gradients_of(model)
    model[0].weight.grad, model[0].bias.grad = plain["0.weight"], plain["0.bias"]
    first.step()
    assert torch.equal(model[0].weight.grad, once["0.weight"])


def test_the_trust_region_sees_the_rates_of_all_optimizers():
    """A layer whose bias another optimizer moves faster is bounded by the faster rate."""
    model, (inputs, labels) = network(), batches(1)[0]
    slow = sgd([p for p in model.parameters() if p.ndim > 1], lr=1e-6)
    fast = sgd([p for p in model.parameters() if p.ndim == 1], lr=10.0)
    kfac, criterion = wrapped(model, slow, fast, trust_region=kc.KLClip(1e-4))
    criterion(model(inputs), labels).backward()
    slow.step()
    assert kfac.metrics()["kfac/trust_region_scale"] < 0.1


def test_a_step_without_gradients_is_not_counted():
    model = network()
    optimizer = sgd(model.parameters())
    kfac, criterion = wrapped(model, optimizer)
    optimizer.step()
    train(model, criterion, optimizer, batches(1))
    assert kfac.step == 1


def test_a_dropped_optimizer_is_forgotten():
    model = network()
    optimizer = sgd(model.parameters())
    kfac, criterion = wrapped(model, optimizer)
    optimizer = sgd(model.parameters())
    kfac.attach(optimizer)
    gc.collect()
    train(model, criterion, optimizer, batches(3))
    assert "attached to 1 optimizer" in str(kfac)
    assert kfac.step == 3


# -- attaching ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [2, 3])
def test_attaching_again_changes_nothing(times):
    """As a rerun notebook cell does."""
    model, data = network(), batches(2)
    expected = plain_run(model, data)
    optimizer = sgd(model.parameters())
    _, criterion = wrapped(model, *[optimizer] * times)
    train(model, criterion, optimizer, data)
    assert torch.equal(parameters_of(model), expected)
    assert len(optimizer._optimizer_step_pre_hooks) == 1


class Wrapper(torch.optim.Optimizer):
    """As Accelerate does: an optimizer that holds one, and never ran the base's constructor."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure=None):
        return self.optimizer.step(closure)


def test_a_wrapper_around_an_optimizer_is_seen_through():
    model, data = network(), batches(2)
    expected = plain_run(model, data)
    optimizer = sgd(model.parameters())
    _, criterion = wrapped(model, Wrapper(Wrapper(optimizer)))
    train(model, criterion, optimizer, data)
    assert torch.equal(parameters_of(model), expected)


class Stepper:
    def step(self) -> None:
        """Not a torch optimizer."""


REFUSED = {
    "not an optimizer": (lambda model: Stepper(), r"Stepper: expected a torch\.optim\.Optimizer.*precondition"),
    "a scheduler": (
        lambda model: torch.optim.lr_scheduler.StepLR(sgd(model.parameters()), 1),
        r"StepLR: expected a torch\.optim\.Optimizer; pass its \.optimizer",
    ),
    "other parameters": (lambda model: sgd(network().parameters()), "this SGD holds 4 parameters, and none"),
    "the model": (lambda model: model, "Sequential: expected"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_attached_is_refused_by_name(case):
    build, message = REFUSED[case]
    model = network()
    good = sgd(model.parameters())
    kfac, criterion = wrapped(model)
    with pytest.raises(kc.AttachError, match=message):
        kfac.attach(good, build(model))
    assert not good._optimizer_step_pre_hooks
    assert not criterion._forward_pre_hooks


def test_an_optimizer_that_steps_inside_backward_is_refused():
    model, (inputs, labels) = network(), batches(1)[0]
    optimizers = {p: sgd([p]) for p in model.parameters()}
    _, criterion = wrapped(model, *optimizers.values())
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    before = parameters_of(model)
    with pytest.raises(kc.AttachError, match="inside the backward pass"):
        criterion(model(inputs), labels).backward()
    assert torch.equal(parameters_of(model), before)


def test_a_parameter_that_is_stepped_inside_backward_is_refused():
    model = network()
    model[0].weight._in_backward_optimizers = [sgd([model[0].weight])]
    kfac, _ = wrapped(model)
    with pytest.raises(kc.AttachError, match=r"'0\.weight' is stepped inside the backward"):
        kfac.attach(sgd(model.parameters()))


def test_no_call_heard_before_a_due_step_names_both_remedies():
    model, (inputs, labels) = network(), batches(1)[0]
    optimizer = sgd(model.parameters())
    kfac, _ = wrapped(model, optimizer)
    before = parameters_of(model)
    nn.functional.cross_entropy(model(inputs), labels).backward()
    plain = gradients_of(model)
    with pytest.raises(kc.CaptureError, match=r"kc\.Categorical\(\).*another criterion object"):
        optimizer.step()
    assert torch.equal(parameters_of(model), before)
    assert torch.equal(model[0].weight.grad, plain["0.weight"])
    assert kfac.step == 0


# -- copies ---------------------------------------------------------------------------------------------------------

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_model_and_optimizer_is_plain(how):
    model, data = network(), batches(2)
    optimizer = sgd(model.parameters(), momentum=0.9)
    kfac, criterion = wrapped(model, optimizer)
    train(model, criterion, optimizer, data)
    other, stepper = COPIES[how]((model, optimizer))
    before = kfac.step
    train(other, nn.CrossEntropyLoss(), stepper, data)
    assert kfac.step == before
    reference = copy.deepcopy(model)
    plain = sgd(reference.parameters(), momentum=0.9)
    plain.load_state_dict(optimizer.state_dict())
    train(reference, nn.CrossEntropyLoss(), plain, data)
    assert torch.equal(parameters_of(other), parameters_of(reference))


def test_a_copy_of_the_model_can_be_wrapped():
    model = network()
    wrapped(model)
    assert wrapped(copy.deepcopy(model))[0].step == 0


def test_the_optimizer_s_own_state_round_trips_while_attached():
    model, data = network(), batches(2)
    optimizer = sgd(model.parameters(), momentum=0.9)
    kfac, criterion = wrapped(model, optimizer)
    train(model, criterion, optimizer, data[:1])
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, criterion, optimizer, data[1:])
    assert kfac.step == 2


def test_attach_without_an_optimizer_is_refused_and_listens_to_nothing():
    model, criterion = network(), nn.CrossEntropyLoss()
    kfac = kc.KFAC(model, criterion)
    with pytest.raises(kc.AttachError, match=r"got no optimizer: .*attach\(optimizer\)"):
        kfac.attach()
    assert not (criterion._forward_hooks or criterion._forward_pre_hooks)
