"""The explicit form beside the attached one, and what cannot be taken in."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .reference import assert_same
from .training import (
    EVERY_STEP,
    backward_of,
    batches,
    factors_of_draws,
    network,
    parameters_of,
    train,
)


def attached_run(model: nn.Module, *, explicit: bool, steps: int = 4) -> Tensor:
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = kc.Schedule(factors=2, inverses=2)
    kfac = kc.KFAC(model, criterion, schedule=schedule, data=kc.Data(seed=5))
    if not explicit:
        kfac.attach(optimizer)
    for inputs, labels in batches(steps):
        optimizer.zero_grad()
        outputs = model(inputs)
        if explicit:
            kfac.update(outputs)
        criterion(outputs, labels).backward()
        if explicit:
            kfac.precondition()
        optimizer.step()
    return parameters_of(model)


def test_the_explicit_form_is_the_attached_form():
    model = network()
    assert torch.equal(attached_run(copy.deepcopy(model), explicit=False), attached_run(model, explicit=True))


@pytest.mark.parametrize("likelihood", ["categorical", nn.CrossEntropyLoss()], ids=["forward", "criterion"])
def test_an_explicit_update_takes_the_place_of_the_capture_on_its_own(likelihood):
    model, (inputs, labels) = network(), batches(1)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, likelihood, schedule=EVERY_STEP)
    kfac.attach(optimizer)
    drawn = torch.randint(2, (8,))
    outputs = model(inputs)
    loss = nn.functional.cross_entropy(outputs, labels) if likelihood == "categorical" else likelihood(outputs, labels)
    kfac.update(outputs, draws=drawn)
    loss.backward()
    expected = factors_of_draws(model, inputs, [drawn], divisor=8)
    optimizer.step()
    assert_same(kfac.fisher()["0"].G, expected["0"][1][0])


@pytest.mark.parametrize("as_sequence", [True, False])
def test_update_takes_one_draw_or_several(as_sequence):
    model, (inputs, labels) = network(), batches(1)[0]
    kfac = kc.KFAC(model, "categorical", schedule=EVERY_STEP)
    drawn = torch.randint(2, (8,))
    backward_of(kfac, model, inputs, labels, [drawn, 1 - drawn] if as_sequence else drawn)
    kfac.precondition()
    draws = [drawn, 1 - drawn] if as_sequence else [drawn]
    assert_same(kfac.fisher()["0"].G, factors_of_draws(model, inputs, draws, divisor=8)["0"][1][0])


def test_targets_serve_weights_and_never_as_draws():
    model, (inputs, labels) = network(), batches(1)[0]
    weight = torch.tensor([1.0, 3.0])
    kfac = kc.KFAC(model, kc.Categorical(weight=weight), schedule=EVERY_STEP)
    drawn = torch.randint(2, (8,))
    outputs = model(inputs)
    kfac.update(outputs, targets=labels, draws=drawn)
    outputs.sum().backward()
    kfac.precondition()
    last = outputs.softmax(-1) - nn.functional.one_hot(drawn, 2)
    g = (last * weight[labels].sqrt()[:, None]).detach()
    assert_same(kfac.fisher()["2"].G, g.mT @ g / weight[labels].sum())


def test_several_forwards_of_a_step_add_up():
    model, data = network(), batches(2, size=4)
    kfac = kc.KFAC(model, "categorical", schedule=EVERY_STEP)
    drawn = [torch.randint(2, (4,)) for _ in data]
    for (inputs, labels), labels_drawn in zip(data, drawn, strict=True):
        outputs = model(inputs)
        kfac.update(outputs, draws=labels_drawn)
        nn.functional.cross_entropy(outputs, labels).backward()
    kfac.precondition()
    both = torch.cat([inputs for inputs, _ in data])
    expected = factors_of_draws(model, both, [torch.cat(drawn)], divisor=8)
    assert_same(kfac.fisher()["0"].G, expected["0"][1][0])


def test_update_does_nothing_where_no_factors_are_due():
    model, data = network(), batches(2)
    kfac = kc.KFAC(model, "categorical", schedule=kc.Schedule(factors=5, inverses=5))
    backward_of(kfac, model, *data[0])
    kfac.precondition()
    before = kfac.fisher()["0"].A
    backward_of(kfac, model, *data[1])
    kfac.precondition()
    assert torch.equal(kfac.fisher()["0"].A, before)


def test_update_after_backward_names_the_mistake():
    model, (inputs, labels) = network(), batches(1)[0]
    kfac = kc.KFAC(model, "categorical")
    outputs = model(inputs)
    nn.functional.cross_entropy(outputs, labels).backward()
    with pytest.raises(kc.CaptureError, match=r"before\s+loss\.backward"):
        kfac.update(outputs)


def test_update_twice_on_one_forward_is_refused():
    model, (inputs, _) = network(), batches(1)[0]
    kfac = kc.KFAC(model, "categorical")
    outputs = model(inputs)
    kfac.update(outputs)
    with pytest.raises(kc.CaptureError, match="once for each forward"):
        kfac.update(outputs)


def test_update_with_the_outputs_of_another_model_is_refused():
    model, (inputs, _) = network(), batches(1)[0]
    kfac = kc.KFAC(model, "categorical")
    model(inputs)
    with pytest.raises(kc.CaptureError, match="no captured forward of Sequential"):
        kfac.update(network()(inputs))


def test_a_failed_update_leaves_the_listening_as_it_was():
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion)
    kfac.attach(optimizer)
    with pytest.raises(kc.CaptureError):
        kfac.update(network()(torch.randn(2, 3)))
    train(model, criterion, optimizer, batches(1))
    assert len(kfac.fisher()) == 2


def test_class_weights_without_targets_name_the_remedy():
    model, (inputs, _) = network(), batches(1)[0]
    kfac = kc.KFAC(model, kc.Categorical(weight=torch.ones(2)))
    with pytest.raises(kc.CaptureError, match="targets=labels"):
        kfac.update(model(inputs))


def test_precondition_before_update_is_refused():
    model, (inputs, labels) = network(), batches(1)[0]
    kfac = kc.KFAC(model, "categorical")
    nn.functional.cross_entropy(model(inputs), labels).backward()
    with pytest.raises(kc.NotReadyError, match=r"kfac\.update\(outputs\)"):
        kfac.precondition()


def test_precondition_before_backward_is_refused():
    model, (inputs, _) = network(), batches(1)[0]
    kfac = kc.KFAC(model, "categorical")
    kfac.update(model(inputs))
    with pytest.raises(kc.NotReadyError, match=r"after loss\.backward"):
        kfac.precondition()


def test_precondition_while_attached_is_refused():
    model = network()
    kfac = kc.KFAC(model, "categorical")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac.attach(optimizer)
    with pytest.raises(kc.AttachError, match="already"):
        kfac.precondition()


def test_a_trust_region_needs_the_learning_rate():
    model, (inputs, labels) = network(), batches(1)[0]
    kfac = kc.KFAC(model, "categorical", trust_region=kc.KLClip(1e-3))
    backward_of(kfac, model, inputs, labels)
    with pytest.raises(kc.ArgumentError, match="lr="):
        kfac.precondition()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"outputs": 5}, r"update\(outputs\) got 5: expected the tensor"),
        ({"outputs": {"logits": torch.zeros(8, 2)}}, r"got dict: .*output\.logits"),
        ({"targets": 5}, r"update\(targets=...\) got 5"),
        ({"targets": [0, 1]}, r"update\(targets=...\) got list of \['int', 'int'\]"),
        ({"draws": 5}, r"update\(draws=...\) got 5"),
        ({"draws": []}, r"update\(draws=...\) got list of \[\]: .*at least one"),
        ({"draws": [0, 1]}, r"update\(draws=...\) got list of \['int', 'int'\]"),
    ],
)
@pytest.mark.parametrize("due", [True, False])
def test_arguments_of_update_that_are_no_tensors_are_refused_and_nothing_is_changed(due, arguments, match):
    model, criterion = network(), nn.CrossEntropyLoss()
    kfac = kc.KFAC(model, criterion, schedule=EVERY_STEP)
    kfac.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    outputs = model(batches(1)[0][0])
    with pytest.raises(kc.ArgumentError, match=match), contextlib.nullcontext() if due else kfac.paused():
        kfac.update(**{"outputs": outputs, **arguments})
    assert "heard at the calls of CrossEntropyLoss" in str(kfac)
    assert dict(kfac.state_dict()["layers"])["0"]["average"] == {}


@pytest.mark.parametrize("call", ["attach", "update", "refresh"])
def test_after_remove_it_is_refused_with_what_to_do(call):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, "categorical")
    kfac.attach(optimizer)
    kfac.remove()
    argument = {"attach": [optimizer], "update": [torch.zeros(2, 2)], "refresh": []}[call]
    with pytest.raises(kc.AttachError, match=r"was removed from its model: make a new one, kc\.KFAC\(model"):
        getattr(kfac, call)(*argument)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not optimizer._optimizer_step_pre_hooks
