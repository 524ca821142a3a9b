"""torch.func on a wrapped model: calls on other tensors and inside transforms are no calls of the model."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn import functional

import kfac_cond as kc

from .helpers import (
    EVERY_STEP,
    assert_factors,
    assert_same_fisher,
    categorical_loss,
    classifier,
    factors_heard,
    listening_in_both_ways,
    plain_factors,
    stepped,
)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3), torch.randint(3, (6,))


# -- torch.func -------------------------------------------------------------------------------------------------------


def own(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def others(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.randn_like(p) for name, p in model.named_parameters()}


@listening_in_both_ways
def test_a_functional_call_on_the_model_s_own_parameters_is_a_call(listening, batch):
    model, (inputs, labels) = classifier(), batch
    plain = factors_heard(model, listening, lambda loss: loss(model(inputs), labels).backward())
    called = lambda loss: loss(functional_call(model, own(model), (inputs,)), labels).backward()  # noqa: E731
    assert_same_fisher(factors_heard(model, listening, called), plain)


def with_other_tensors(model, loss, inputs, labels):
    loss(functional_call(model, others(model), (inputs,)), labels)


def with_other_tensors_that_train(model, loss, inputs, labels):
    tensors = {name: tensor.requires_grad_() for name, tensor in others(model).items()}
    loss(functional_call(model, tensors, (inputs,)), labels).backward()


def with_one_other_tensor(model, loss, inputs, labels):
    loss(functional_call(model, {"2.bias": torch.zeros(3)}, (inputs,)), labels)


def gradients_of_examples(model, loss, inputs, labels):
    one = lambda tensors, x, y: loss(functional_call(model, tensors, (x[None],)), y[None])  # noqa: E731
    vmap(grad(one), in_dims=(None, 0, 0))(own(model), inputs, labels)


def a_batched_model(model, loss, inputs, labels):
    loss(vmap(model)(inputs), labels)


def gradient_of_inputs(model, loss, inputs, labels):
    grad(lambda x: loss(model(x), labels))(inputs)


def jacobian(model, loss, inputs, labels):
    jacrev(lambda tensors: functional_call(model, tensors, (inputs,)))(own(model))


def a_direction_of_inputs(model, loss, inputs, labels):
    jvp(lambda x: loss(model(x), labels), (inputs,), (inputs,))


def a_direction_of_parameters(model, loss, inputs, labels):
    jvp(lambda tensors: functional_call(model, tensors, (inputs,)), (own(model),), (others(model),))


FUNCTIONAL = [
    with_other_tensors,
    with_other_tensors_that_train,
    with_one_other_tensor,
    gradients_of_examples,
    a_batched_model,
    gradient_of_inputs,
    jacobian,
    a_direction_of_inputs,
    a_direction_of_parameters,
]


@listening_in_both_ways
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("other", FUNCTIONAL, ids=lambda f: f.__name__)
def test_functional_calls_and_transforms_leave_no_trace_in_the_factors(other, when, listening, batch):
    model, (inputs, labels) = classifier(), batch
    plain = factors_heard(model, listening, lambda loss: loss(model(inputs), labels).backward())

    def run(loss: nn.Module) -> None:
        if when == "before":
            other(model, loss, torch.randn(4, 3), torch.randint(3, (4,)))
        outputs = model(inputs)
        if when == "after":
            other(model, loss, torch.randn(4, 3), torch.randint(3, (4,)))
        loss(outputs, labels).backward()

    assert_same_fisher(factors_heard(model, listening, run), plain)


@listening_in_both_ways
@pytest.mark.parametrize("other", FUNCTIONAL, ids=lambda f: f.__name__)
def test_a_due_step_of_functional_calls_and_transforms_alone_is_an_error(other, listening, batch):
    model = classifier()

    def run(loss: nn.Module) -> None:
        other(model, loss, *batch)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)

    with pytest.raises(kc.CaptureError, match=r"no forward of the wrapped model .*functional_call on other tensors"):
        factors_heard(model, listening, run)


@listening_in_both_ways
def test_weights_after_an_inner_step_leave_the_factors_of_the_inner_forward(listening, batch):
    """As in meta-learning; a criterion's second call leads back to the inner forward, so that it is not to be heard."""
    model, (inputs, labels) = classifier(), batch
    plain = factors_heard(model, listening, lambda loss: loss(model(inputs), labels).backward())

    def run(kfac: kc.KFAC) -> None:
        inner = torch.autograd.grad(criterion(model(inputs), labels), list(model.parameters()), create_graph=True)
        after = {name: p - 0.1 * g for (name, p), g in zip(model.named_parameters(), inner, strict=True)}
        outputs = functional_call(model, after, (inputs,))
        with kfac.paused():
            criterion(outputs, labels).backward()

    criterion = nn.CrossEntropyLoss()
    likelihood = criterion if listening == "criterion" else "categorical"
    assert_same_fisher(stepped(model, likelihood, run), plain)


def test_a_functional_call_on_another_model_s_parameters_is_refused_by_name(batch):
    model, teacher = classifier(), classifier()
    kc.KFAC(model, "categorical")
    with pytest.raises(kc.ModelChangedError, match=r"layer '0' has other parameters.*kfac\.paused\(\)"):
        functional_call(model, own(teacher), (batch[0],))


def test_parameters_that_were_replaced_are_named_until_refresh(batch):
    model, (inputs, labels) = classifier(), batch
    kfac = kc.KFAC(model, "categorical", schedule=EVERY_STEP)
    model.load_state_dict(classifier().state_dict(), assign=True)
    with pytest.raises(kc.ModelChangedError, match=r"layer '0' has other parameters.*kfac\.refresh\(\)"):
        model(inputs)
    kfac.refresh()
    outputs = model(inputs)
    kfac.update(outputs, draws=labels)
    functional.cross_entropy(outputs, labels).backward()
    kfac.precondition()
    expected = plain_factors(model, inputs, lambda out: categorical_loss(out, labels), divisor=6)
    assert_factors(kfac.fisher(), expected)


class Hypernetwork(nn.Module):
    """A layer that is called on a weight that another one gives, beside a call of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.target, self.giver, self.head = nn.Linear(3, 3), nn.Linear(1, 9), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.giver(torch.ones(1, 1)).reshape(3, 3)
        return self.head(functional_call(self.target, {"weight": weight}, (x,)))


def test_a_layer_called_on_a_computed_weight_is_not_taken_for_itself(batch, caplog):
    """It has no Kronecker pair with inputs that its own weight never saw, and is named."""
    with caplog.at_level(logging.WARNING, "kfac_cond"):
        fisher = kc.estimate(Hypernetwork(), [batch[0]], "categorical")
    assert {"giver", "head"} <= set(fisher)
    assert "target" not in fisher
    assert "target" in caplog.text
