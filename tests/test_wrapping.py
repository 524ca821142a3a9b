"""What wrapping leaves untouched, which models it refuses, and models beside each other."""

from __future__ import annotations

import copy
import gc
import logging

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond import wrapping
from kfac_cond.wrapping import Wrapped

from .training import (
    EVERY_STEP,
    backward_of,
    batches,
    network,
    noisy_network,
    parameters_of,
    train,
)

# -- bitwise plain --------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("likelihood", [nn.CrossEntropyLoss(), "categorical"], ids=["criterion", "forward"])
def test_attached_but_never_due_is_bitwise_plain(name, likelihood):
    model = noisy_network()
    plain = copy.deepcopy(model)
    criterion = likelihood if isinstance(likelihood, nn.Module) else nn.CrossEntropyLoss()
    torch.manual_seed(3)
    train(plain, nn.CrossEntropyLoss(), OPTIMIZERS[name](plain.parameters()), batches(5))
    optimizer = OPTIMIZERS[name](model.parameters())
    kc.KFAC(model, likelihood, schedule=kc.Schedule(factors=None, inverses=None)).attach(optimizer)
    torch.manual_seed(3)
    train(model, criterion, optimizer, batches(5))
    left = [key for key, tensor in plain.state_dict().items() if not torch.equal(tensor, model.state_dict()[key])]
    assert left == []


def test_within_paused_training_is_bitwise_plain():
    model = noisy_network()
    plain = copy.deepcopy(model)
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion)
    kfac.attach(optimizer)
    torch.manual_seed(3)
    with kfac.paused():
        train(model, criterion, optimizer, batches(3))
    torch.manual_seed(3)
    train(plain, criterion, torch.optim.SGD(plain.parameters(), lr=0.1), batches(3))
    assert torch.equal(parameters_of(model), parameters_of(plain))
    assert kfac.step == 0


def test_precondition_within_paused_does_nothing():
    model, (inputs, labels) = network(), batches(1)[0]
    kfac = kc.KFAC(model, "categorical")
    plain = backward_of(kfac, model, inputs, labels)
    with kfac.paused():
        kfac.precondition()
    assert torch.equal(model[0].weight.grad, plain["0.weight"])
    assert kfac.step == 0


def test_validation_without_gradients_uses_up_no_due_step():
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion, schedule=kc.Schedule(factors=5, inverses=5))
    kfac.attach(optimizer)
    with torch.no_grad():
        criterion(model(torch.randn(4, 3)), torch.zeros(4, dtype=torch.long))
    train(model, criterion, optimizer, batches(1))
    assert len(kfac.fisher()) == 2


# -- wrapping -------------------------------------------------------------------------------------------------------


def test_a_second_wrapping_is_refused():
    model = network()
    kc.KFAC(model, "categorical")
    with pytest.raises(kc.AttachError, match="already wrapped"):
        kc.KFAC(model, "categorical")


def test_a_part_of_a_wrapped_model_is_refused():
    model = network()
    kc.KFAC(model, "categorical")
    with pytest.raises(kc.AttachError, match="already wrapped"):
        kc.KFAC(model[0], "categorical")


def test_after_remove_the_model_can_be_wrapped_anew():
    model = network()
    kc.KFAC(model, "categorical").remove()
    assert kc.KFAC(model, "categorical").step == 0


@pytest.mark.parametrize("part", [lambda model: model, lambda model: model[0], nn.Sequential])
def test_a_wrapped_model_whose_kfac_is_lost_is_wrapped_anew_after_detach(part):
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kc.KFAC(model, criterion).attach(optimizer)
    gc.collect()
    with pytest.raises(kc.AttachError, match=r"kc\.detach\(model\)"):
        kc.KFAC(model, criterion)
    kc.detach(part(model))
    kc.KFAC(model, criterion, schedule=EVERY_STEP).attach(optimizer)
    train(model, criterion, optimizer, batches(2))


def test_detach_of_a_plain_model_does_nothing():
    model = network()
    handle = model[0].register_forward_hook(lambda module, args, output: None)
    kc.detach(model)
    assert list(model[0]._forward_hooks) == [handle.id]


@pytest.mark.parametrize("model", [None, kc.Data(), nn.Linear])
def test_detach_of_something_else_is_refused(model):
    with pytest.raises(kc.ArgumentError, match=r"expected a torch\.nn\.Module"):
        kc.detach(model)


@pytest.mark.parametrize("take_off", [lambda kfac, model: kfac.remove(), lambda kfac, model: kc.detach(model)])
@pytest.mark.parametrize("attribute", ["_forward_hooks", "_forward_pre_hooks"])
def test_remove_and_detach_leave_no_hook(attribute, take_off):
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion)
    kfac.attach(optimizer)
    train(model, criterion, optimizer, batches(1))
    take_off(kfac, model)
    assert not any(getattr(module, attribute) for module in [*model.modules(), criterion])
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("model", "reason"),
    [(nn.LazyLinear(3), "weight: a lazy module"), (nn.ReLU(), "no trainable parameter")],
    ids=["uncovered", "empty"],
)
def test_a_model_without_a_covered_layer_is_refused(model, reason):
    with pytest.raises(kc.CoverageError, match=reason):
        kc.KFAC(model, "categorical")


@pytest.mark.parametrize(
    "arguments",
    [
        {"structure": "shampoo"},
        {"damping": -1.0},
        {"damping": float("nan")},
        {"rules": {"nowhere": {}}},
        {"rules": {"0": 5}},
        {"rules": {"0": {"structure": "kpsvd"}}},
        {"rules": "head"},
        {"trust_region": 1e-3},
        {"schedule": 5},
        {"schedule": kc.Schedule},
        {"data": {"seed": 3}},
    ],
    ids=str,
)
def test_a_refused_argument_leaves_no_hook(arguments):
    model = network()
    with pytest.raises(kc.ArgumentError):
        kc.KFAC(model, "categorical", **arguments)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_layer_that_never_fires_is_named_after_the_first_step(caplog):
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model, criterion = Partly(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kc.KFAC(model, criterion, schedule=EVERY_STEP).attach(optimizer)
    with caplog.at_level(logging.WARNING, "kfac_cond"):
        train(model, criterion, optimizer, batches(3))
    assert [record.getMessage().count("unused") for record in caplog.records] == [1]


# -- two models -----------------------------------------------------------------------------------------------------


def test_a_gan_with_two_preconditioners_trains():
    generator, discriminator = (
        nn.Sequential(nn.Linear(2, 3)),
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),
    )
    criterion = nn.BCEWithLogitsLoss()
    steps = {model: torch.optim.SGD(model.parameters(), lr=0.05) for model in (generator, discriminator)}
    kfacs = {model: kc.KFAC(model, criterion, damping=0.1, schedule=EVERY_STEP) for model in steps}
    for model, optimizer in steps.items():
        kfacs[model].attach(optimizer)
    for inputs, _ in batches(3):
        noise = torch.randn(8, 2)
        steps[discriminator].zero_grad()
        real, fake = discriminator(inputs), discriminator(generator(noise).detach())
        (criterion(real, torch.ones(8, 1)) + criterion(fake, torch.zeros(8, 1))).backward()
        steps[discriminator].step()
        steps[generator].zero_grad()
        criterion(discriminator(generator(noise)), torch.ones(8, 1)).backward()
        steps[generator].step()
    assert [kfacs[model].step for model in steps] == [3, 3]


def test_a_teacher_s_calls_are_ignored():
    student, teacher, criterion = network(), network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    kfac = kc.KFAC(student, criterion, schedule=EVERY_STEP, data=kc.Data(seed=2))
    kfac.attach(optimizer)
    alone = copy.deepcopy(student)
    other = kc.KFAC(alone, "categorical", schedule=EVERY_STEP, data=kc.Data(seed=2))
    inputs, labels = batches(1)[0]
    criterion(teacher(inputs), labels)
    criterion(student(inputs), labels).backward()
    criterion(teacher(inputs), labels)
    optimizer.step()
    backward_of(other, alone, inputs, labels)
    other.precondition()
    assert torch.equal(kfac.fisher()["0"].G, other.fisher()["0"].G)


@pytest.mark.parametrize("structure", ["kpsvd", "nonsense"])
def test_training_takes_no_other_structure_by_rule(structure):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    with pytest.raises(
        kc.ArgumentError, match=f"structure='{structure}', expected one of kfac, tkfac, diagonal, ekfac for training"
    ):
        kc.KFAC(model, "categorical", rules={"0": {"structure": structure}})


def test_a_model_that_did_not_change_is_not_surveyed_again(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    wrapped = Wrapped(model, {}, "kfac")
    surveys = []
    original = wrapping.survey
    monkeypatch.setattr(wrapping, "survey", lambda *args, **kwargs: surveys.append(1) or original(*args, **kwargs))
    for _ in range(3):
        wrapped.require_unchanged()
    assert not surveys
    # What changes nothing that is covered is looked at once.
    model.eval()
    for _ in range(3):
        wrapped.require_unchanged()
    assert len(surveys) == 1


CHANGES = {
    "replaced": lambda model: setattr(model, "0", torch.nn.Linear(3, 5)),
    "another parameter": lambda model: setattr(model[0], "weight", torch.nn.Parameter(torch.randn(4, 4))),
    "frozen": lambda model: model[0].weight.requires_grad_(False),
    "taken out": lambda model: model.pop(2),
    "added": lambda model: model.append(torch.nn.Linear(2, 2)),
    "another forward": lambda model: setattr(model[0], "forward", lambda x: x),
    "another attribute": lambda model: setattr(model[3], "stride", (2,)),
    "another method of its class": lambda model: setattr(type(model[4]), "_conv_forward", lambda *args: args[1]),
    "of another class": lambda model: setattr(model[0], "__class__", type("Own", (torch.nn.Linear,), {"forward": abs})),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_a_survey_looks_at_is_marked(change):
    own = type("OwnConv", (torch.nn.Conv1d,), {})
    parts = [torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2), torch.nn.Conv1d(1, 1, 1), own(1, 1, 1)]
    model = torch.nn.Sequential(*parts)
    before = wrapping.Marks(model)
    assert wrapping.Marks(model).same(before)
    CHANGES[change](model)
    assert not wrapping.Marks(model).same(before)
