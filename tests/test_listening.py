"""Who is listened to, and that what is heard is the Fisher of the loss that was called."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .helpers import EVERY_STEP, Apply, assert_same_fisher, classifier, stepped
from .reference import assert_same
from .test_capture import hooks_of

LABELS = torch.tensor([0, 2, 1, 1, 2, 0, 0])
IGNORING = torch.tensor([0, 2, 1, -100, 2, 0, -100])
SOFT = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0], [0.0, 0.25, 0.75]], dtype=torch.float64)
SOFT = SOFT[[0, 1, 2, 0, 1, 2, 0]]
WEIGHT = torch.tensor([0.5, 2.0, 1.25], dtype=torch.float64)

CRITERIA = [
    pytest.param({}, LABELS, id="plain"),
    pytest.param({"reduction": "sum"}, LABELS, id="sum"),
    pytest.param({"weight": WEIGHT}, LABELS, id="weight"),
    pytest.param({"weight": WEIGHT, "reduction": "sum"}, LABELS, id="weight-sum"),
    pytest.param({}, IGNORING, id="ignored"),
    pytest.param({"ignore_index": 1}, LABELS, id="ignore_index"),
    pytest.param({"ignore_index": 1, "weight": WEIGHT}, LABELS, id="ignore_index-weight"),
    pytest.param({"label_smoothing": 0.2}, LABELS, id="smoothing"),
    pytest.param({"label_smoothing": 0.2, "weight": WEIGHT}, LABELS, id="smoothing-weight"),
    pytest.param({}, SOFT, id="soft"),
    pytest.param({"weight": WEIGHT, "label_smoothing": 0.2}, SOFT, id="soft-smoothing-weight"),
]


def gauss_newton(layer: nn.Linear, loss: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Hessian of a loss of a linear model, which is its Gauss-Newton matrix, with vec of the matrix [W, b]."""
    rows = torch.cat([inputs, torch.ones(*inputs.shape[:-1], 1)], -1)
    matrix = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    return torch.func.hessian(lambda v: loss(rows @ v.reshape(matrix.shape).T))(matrix.flatten())


@pytest.mark.parametrize(("arguments", "targets"), CRITERIA)
def test_cross_entropy_is_the_gauss_newton_of_the_weighted_loss(arguments, targets):
    """All inputs equal, where the Kronecker form is exact."""
    criterion, layer, inputs = nn.CrossEntropyLoss(**arguments), nn.Linear(4, 3), torch.randn(1, 4).expand(7, 4)
    found = kc.estimate(layer, [(inputs, targets)], criterion, kind="exact")[""].to_dense()
    assert_same(found, gauss_newton(layer, lambda outputs: criterion(outputs, targets), inputs))


PLANE = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (nn.MSELoss, {}),
        (nn.BCEWithLogitsLoss, {}),
        (nn.BCEWithLogitsLoss, {"pos_weight": torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)}),
        (nn.BCEWithLogitsLoss, {"weight": torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)}),
    ],
)
def test_other_criteria_are_the_gauss_newton_of_their_loss(kind, arguments, reduction):
    criterion, layer, inputs = kind(**arguments, reduction=reduction), nn.Linear(4, 3), torch.randn(1, 4).expand(2, 4)
    found = kc.estimate(layer, [(inputs, PLANE)], criterion, kind="exact")[""].to_dense()
    assert_same(found, gauss_newton(layer, lambda outputs: criterion(outputs, PLANE), inputs))


def heard(criterion: nn.Module, model: nn.Module, inputs: Tensor, targets: Tensor, **settings: Any) -> kc.Fisher:
    def run(kfac: kc.KFAC) -> None:
        criterion(model(inputs), targets).backward()

    return stepped(model, criterion, run, seed=4, **settings)


@pytest.mark.parametrize(("arguments", "targets"), CRITERIA)
def test_a_criterion_heard_has_the_factors_of_its_estimate(arguments, targets):
    criterion, model, inputs = nn.CrossEntropyLoss(**arguments), classifier(), torch.randn(7, 3)
    expected = kc.estimate(model, [(inputs, targets)], criterion, options=kc.Options(seed=4))
    assert_same_fisher(heard(criterion, model, inputs, targets), expected)


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_a_criterion_heard_has_classes_along_dimension_1(weight):
    """(N, C, d1), as torch's criterion orders them."""
    model = nn.Sequential(classifier(), Apply(lambda h: h.transpose(1, 2)))
    inputs, targets = torch.randn(5, 4, 3), torch.randint(3, (5, 4))
    criterion = nn.CrossEntropyLoss(weight=weight)
    expected = kc.estimate(model, [(inputs, targets)], kc.Categorical(dim=1, weight=weight), options=kc.Options(seed=4))
    assert_same_fisher(heard(criterion, model, inputs, targets), expected)
    assert expected["0.0"].G.shape == (4, 4)


def test_a_criterion_heard_with_keyword_arguments():
    criterion, model, inputs = nn.CrossEntropyLoss(), classifier(), torch.randn(7, 3)

    def run(kfac: kc.KFAC) -> None:
        criterion(target=LABELS, input=model(inputs)).backward()

    assert_same_fisher(stepped(model, criterion, run, seed=4), heard(criterion, model, inputs, LABELS))


def test_a_criterion_is_heard_on_outputs_as_the_loss_sees_them():
    """Flattened after the forward: nothing is ambiguous."""
    criterion, model, inputs = nn.CrossEntropyLoss(), classifier(), torch.randn(5, 4, 3)

    def run(kfac: kc.KFAC) -> None:
        criterion(model(inputs).flatten(0, 1), torch.randint(3, (20,))).backward()

    expected = kc.estimate(model, [inputs], kc.Categorical(dim=-1), options=kc.Options(seed=4))
    assert_same_fisher(stepped(model, criterion, run, seed=4), expected)


# -- calls of others --------------------------------------------------------------------------------------------------


def test_a_criterion_called_on_a_teachers_outputs_is_ignored():
    criterion, model, teacher, inputs = nn.CrossEntropyLoss(), classifier(), classifier(), torch.randn(7, 3)

    def run(kfac: kc.KFAC) -> None:
        outputs = model(inputs)
        criterion(teacher(inputs), LABELS).backward()
        criterion(outputs, LABELS).backward()
        criterion(teacher(inputs), LABELS).backward()

    found, alone = stepped(model, criterion, run), heard(criterion, model, inputs, LABELS)
    assert_same(found["0"].A, alone["0"].A)
    assert found["0"].G.shape == alone["0"].G.shape


def test_two_models_with_one_criterion_hear_their_own():
    criterion, models, inputs = nn.CrossEntropyLoss(), [classifier(), classifier()], torch.randn(2, 7, 3)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.0) for model in models]
    kfacs = [kc.KFAC(model, criterion, schedule=EVERY_STEP) for model in models]
    for kfac, optimizer, model, x in zip(kfacs, optimizers, models, inputs, strict=True):
        kfac.attach(optimizer)
        criterion(model(x), LABELS).backward()
    for optimizer in optimizers:
        optimizer.step()
    found = [kfac.fisher()["0"].A for kfac in kfacs]
    rows = torch.cat([inputs, torch.ones(2, 7, 1)], -1)
    assert_same(torch.stack(found), rows.mT @ rows / 7)


def test_a_student_hears_through_a_frozen_teacher_that_it_feeds():
    """The scores pass through another model's layers and reach the student's."""
    criterion, student, judge, inputs = nn.CrossEntropyLoss(), classifier(), classifier(), torch.randn(7, 3)
    judge.requires_grad_(False)

    def run(kfac: kc.KFAC) -> None:
        criterion(judge(student(inputs)), LABELS).backward()

    whole = kc.estimate(nn.Sequential(student, judge), [inputs], "categorical", options=kc.Options(seed=4))
    found = stepped(student, criterion, run, seed=4)
    assert_same(found["0"].G, whole["0.0"].G)


def test_a_criterion_called_without_grad_is_ignored():
    criterion, model, inputs = nn.CrossEntropyLoss(), classifier(), torch.randn(7, 3)

    def run(kfac: kc.KFAC) -> None:
        outputs = model(inputs)
        with torch.no_grad():
            criterion(outputs, LABELS)
        criterion(outputs.detach(), LABELS)
        criterion(outputs, LABELS).backward()
        criterion(outputs.detach(), LABELS)

    assert_same_fisher(stepped(model, criterion, run, seed=4), heard(criterion, model, inputs, LABELS))


@pytest.mark.parametrize("freed", [False, True])
def test_two_calls_on_one_forward_are_refused(freed):
    criterion, model, inputs = nn.CrossEntropyLoss(), classifier(), torch.randn(7, 3)

    def run(kfac: kc.KFAC) -> None:
        outputs = model(inputs)
        loss = criterion(outputs, LABELS)
        if freed:
            loss.backward()
        criterion(outputs, LABELS)

    with pytest.raises(kc.CaptureError, match="called twice on one forward"):
        stepped(model, criterion, run)


def test_two_calls_while_paused_are_not_heard():
    criterion, model, inputs = nn.CrossEntropyLoss(), classifier(), torch.randn(7, 3)

    def run(kfac: kc.KFAC) -> None:
        outputs = model(inputs)
        loss = criterion(outputs, LABELS)
        with kfac.paused():
            criterion(outputs, LABELS)
        loss.backward()

    assert_same_fisher(stepped(model, criterion, run, seed=4), heard(criterion, model, inputs, LABELS))


# -- nothing heard ----------------------------------------------------------------------------------------------------


def functional(model: nn.Module, inputs: Tensor) -> None:
    nn.functional.cross_entropy(model(inputs), LABELS).backward()


def another_object(model: nn.Module, inputs: Tensor) -> None:
    nn.CrossEntropyLoss()(model(inputs), LABELS).backward()


@pytest.mark.parametrize("loss", [functional, another_object])
@pytest.mark.parametrize("remedy", ["kc.Categorical", "that object"])
def test_a_criterion_that_is_not_called_is_an_error_with_both_remedies(loss, remedy):
    model, inputs = classifier(), torch.randn(7, 3)
    with pytest.raises(kc.CaptureError, match=remedy):
        stepped(model, nn.CrossEntropyLoss(), lambda kfac: loss(model, inputs))


def test_no_forward_at_all_is_an_error():
    model = classifier()

    def run(kfac: kc.KFAC) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)

    with pytest.raises(kc.CaptureError, match="no forward of the wrapped model"):
        stepped(model, "categorical", run)


def test_parts_of_the_model_called_alone_are_an_error_with_the_remedy():
    model = classifier()
    with pytest.raises(kc.CaptureError, match="the wrapped model itself was not called"):
        stepped(model, "categorical", lambda kfac: model[2](model[0](torch.randn(4, 3))).sum().backward())


# -- the model's own forward ------------------------------------------------------------------------------------------

OUTPUTS = {
    "tensor": (lambda h: h, None),
    "logits": (lambda h: SimpleNamespace(logits=h, other=1), None),
    "dict": (lambda h: {"logits": h}, None),
    "picked": (lambda h: (0, {"scores": h}), lambda args, kwargs, outputs: outputs[1]["scores"]),
}


@pytest.mark.parametrize("form", OUTPUTS)
def test_the_root_forward_is_heard_whatever_it_returns(form):
    wrap, pick = OUTPUTS[form]
    body, inputs = classifier(), torch.randn(7, 3)
    model = nn.Sequential(body, Apply(wrap))

    def run(kfac: kc.KFAC) -> None:
        h = model(inputs)
        h = pick((), {}, h) if pick else getattr(h, "logits", h)
        h = h["logits"] if isinstance(h, dict) else h
        nn.functional.cross_entropy(h, LABELS).backward()

    found = stepped(model, "categorical", run, data=kc.Data(outputs=pick, seed=4))
    expected = kc.estimate(nn.Sequential(body), [inputs], "categorical", options=kc.Options(seed=4))
    assert_same_fisher(found, expected)


def test_an_output_without_a_tensor_is_refused_at_the_step_with_the_remedy():
    model = nn.Sequential(classifier(), Apply(lambda h: (h, 1)))
    with pytest.raises(kc.CaptureError, match=r"tuple of \['Tensor', 'int'\].*kc\.Data\(outputs="):
        stepped(model, "categorical", lambda kfac: model(torch.randn(7, 3))[0].sum().backward())


def test_an_output_without_a_tensor_may_be_followed_by_an_explicit_update():
    body, inputs = classifier(), torch.randn(7, 3)
    model = nn.Sequential(body, Apply(lambda h: (h, 1)))

    def run(kfac: kc.KFAC) -> None:
        outputs, _ = model(inputs)
        kfac.update(outputs)
        outputs.sum().backward()

    expected = kc.estimate(nn.Sequential(body), [inputs], "categorical", options=kc.Options(seed=4))
    assert_same_fisher(stepped(model, "categorical", run, seed=4), expected)


def test_outputs_that_do_not_fit_the_likelihood_are_refused_at_the_step():
    model = nn.Sequential(classifier(classes=1), nn.Flatten(0))
    with pytest.raises(kc.LikelihoodError, match="no dimension of classes"):
        stepped(model, "categorical", lambda kfac: model(torch.randn(7, 3)).sum().backward())


def test_class_weights_without_labels_are_refused_with_the_explicit_form():
    model = classifier()
    with pytest.raises(kc.CaptureError, match=r"kfac\.update\(outputs, targets=labels\)"):
        stepped(model, kc.Categorical(weight=WEIGHT), lambda kfac: model(torch.randn(7, 3)).sum().backward())


def test_class_weights_with_labels_picked_from_the_call():
    model, inputs = classifier(), torch.randn(7, 3)
    likelihood = kc.Categorical(weight=WEIGHT)
    data = kc.Data(targets=lambda args, kwargs, outputs: LABELS, seed=4)
    found = stepped(model, likelihood, lambda kfac: model(inputs).sum().backward(), data=data)
    expected = kc.estimate(model, [(inputs, LABELS)], likelihood, options=kc.Options(seed=4))
    assert_same_fisher(found, expected)


def test_class_weights_with_labels_in_the_explicit_form():
    model, inputs, likelihood = classifier(), torch.randn(7, 3), kc.Categorical(weight=WEIGHT)

    def run(kfac: kc.KFAC) -> None:
        outputs = model(inputs)
        kfac.update(outputs, targets=LABELS)
        outputs.sum().backward()

    expected = kc.estimate(model, [(inputs, LABELS)], likelihood, options=kc.Options(seed=4))
    assert_same_fisher(stepped(model, likelihood, run, seed=4), expected)


def test_targets_of_the_explicit_form_are_never_the_labels_drawn():
    model, inputs = classifier(), torch.randn(7, 3)

    def run_with(labels: Tensor) -> Callable[[kc.KFAC], None]:
        def run(kfac: kc.KFAC) -> None:
            outputs = model(inputs)
            kfac.update(outputs, targets=labels)
            outputs.sum().backward()

        return run

    found = [stepped(model, "categorical", run_with(torch.full((7,), label))) for label in (0, 1)]
    assert torch.equal(found[0]["0"].G, found[1]["0"].G)


# -- on and off -------------------------------------------------------------------------------------------------------


def test_a_criterion_has_no_hook_before_attach_nor_after_remove():
    model, criterion = classifier(), nn.CrossEntropyLoss()
    before = hooks_of(criterion)
    kfac = kc.KFAC(model, criterion)
    assert hooks_of(criterion) == before
    kfac.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    kfac.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    assert sum(hooks_of(criterion)) == sum(before) + 2  # the hook, and its note that it takes keyword arguments
    kfac.remove()
    assert hooks_of(criterion) == before


def test_a_criterion_stays_as_it_is_where_nothing_is_due():
    model, criterion = classifier(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion, schedule=kc.Schedule(factors=2, inverses=2))
    kfac.attach(optimizer)
    criterion(model(torch.randn(7, 3)), LABELS).backward()
    optimizer.step()
    before = kfac.fisher()["0"].A
    criterion(model(torch.randn(7, 3)), LABELS).backward()
    optimizer.step()
    assert torch.equal(kfac.fisher()["0"].A, before)


def test_a_criterion_shared_with_a_model_of_other_outputs_is_ignored_there():
    """One object for a model on (N, C) and another on a single unbatched row of logits."""
    model, other, criterion = classifier(), torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss()
    kfac = kc.KFAC(model, criterion, schedule=EVERY_STEP)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac.attach(optimizer)
    inputs = torch.randn(5, next(model.parameters()).shape[1])
    loss = criterion(model(inputs), torch.tensor([0, 1, 2, 1, 0]))
    criterion(other(torch.randn(4)), torch.tensor(1)).backward()
    loss.backward()
    optimizer.step()
    assert kfac.fisher()
