"""The ways people run modules: copies, hooks of other libraries, memory formats, threads, buffers that are resized."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kfac_cond as kc

from .helpers import (
    EVERY_STEP,
    Apply,
    assert_same_fisher,
    categorical_loss,
    classifier,
    factors_heard,
    listening_in_both_ways,
    plain_factors,
)
from .reference import assert_same
from .training import batches, parameters_of


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3), torch.randint(3, (6,))


# -- copies -----------------------------------------------------------------------------------------------------------


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("form", ["plain", "compiled part"])
def test_a_copy_is_inert_and_can_be_wrapped(copied, form, batch):
    model, (inputs, labels) = classifier(), batch
    if form == "compiled part":
        model[1].compile(backend="eager")
    kfac = kc.KFAC(model, "categorical", schedule=EVERY_STEP)
    twin = copied(model)
    twin(inputs).sum().backward()
    assert not kfac._intake.capture.waiting
    found = factors_heard(twin, "forward", lambda loss: loss(twin(inputs), labels).backward())
    kfac.remove()
    assert_same_fisher(found, factors_heard(model, "forward", lambda loss: loss(model(inputs), labels).backward()))


def _outputs_elsewhere(model: nn.Module, inputs: Tensor, answer: Any) -> None:
    kfac = kc.KFAC(model, "categorical")
    answer.put((model(inputs).tolist(), list(kfac.layers), len(kfac._intake.capture.waiting)))


def test_a_wrapped_model_goes_to_a_spawned_process(batch):
    model = classifier()
    kc.KFAC(model, "categorical")
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_outputs_elsewhere, args=(model, batch[0], answer))
    process.start()
    outputs, layers, waiting = answer.get(timeout=90)
    process.join()
    assert_same(torch.tensor(outputs, dtype=torch.float64), model(batch[0]).detach())
    assert (layers, waiting) == (["0", "2"], 1)


# -- hooks of others --------------------------------------------------------------------------------------------------


def doubled_inputs(model: nn.Sequential) -> nn.Module:
    model[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return nn.Sequential(Apply(lambda x: 2 * x), model[0])


def doubled_outputs(model: nn.Sequential) -> nn.Module:
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    return nn.Sequential(model[0], Apply(lambda h: 2 * h))


def watched_backward(model: nn.Sequential) -> nn.Module:
    model[0].register_full_backward_hook(lambda module, inner, outer: None)
    model[0].register_full_backward_pre_hook(lambda module, outer: None)
    return nn.Sequential(model[0])


def scaled_gradient(model: nn.Sequential) -> nn.Module:
    """A tensor hook that changes gradients changes those of the scores as well."""

    def scale(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(lambda g: 3 * g)

    model[0].register_forward_hook(scale)
    return nn.Sequential(model[0], Apply(lambda h: 3 * h - (2 * h).detach()))


HOOKS = [doubled_inputs, doubled_outputs, watched_backward, scaled_gradient]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("hook", HOOKS, ids=lambda f: f.__name__)
def test_hooks_of_others_are_part_of_the_model(hook, when, batch):
    """What they do is in the factors: inputs as the layer got them, gradients of its own output."""
    model, (inputs, drawn) = classifier(), batch
    bare = copy.deepcopy(model)
    if when == "before":
        hook(model)
    kfac = kc.KFAC(model, "categorical", schedule=EVERY_STEP)
    if when == "after":
        hook(model)
    outputs = model(inputs)
    kfac.update(outputs, draws=drawn)
    functional.cross_entropy(outputs, drawn).backward()
    kfac.precondition()
    first = hook(copy.deepcopy(bare))
    for module in first.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks):
            hooks.clear()
    plain = nn.Sequential(*first, *bare[1:])
    expected = plain_factors(plain, inputs, lambda out: categorical_loss(out, drawn), divisor=6)
    for name, (A, G) in zip(("0", "2"), expected.values(), strict=True):
        assert_same(kfac.fisher()[name].A, A)
        assert_same(kfac.fisher()[name].G, G)


# -- memory formats and views -----------------------------------------------------------------------------------------


def strided(x: Tensor) -> Tensor:
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2]
    return wide.copy_(x)


FORMS = {
    "strided": strided,
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_memory_format_of_inputs_and_gradients_does_not_matter(form):
    """The same numbers in another order, on the way forth and on the way back."""

    def network(between: Callable[[Tensor], Tensor]) -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 2, groups=2), nn.GroupNorm(2, 4)
        spread = [part for layer in layers for part in (layer, Apply(between))]
        return nn.Sequential(*spread, nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))

    inputs = form(torch.randn(5, 2, 3, 3))
    drawn = torch.randint(3, (5,))
    options = kc.Options(draws=[[drawn]])
    between = Formatted.apply if form is not FORMS["expanded"] else Tensor.clone
    Formatted.form = form
    found = kc.estimate(network(between), [inputs], "categorical", structure=["kfac", "ekfac"], options=options)
    plain = kc.estimate(
        network(Tensor.clone), [inputs.contiguous()], "categorical", structure=["kfac", "ekfac"], options=options
    )
    for mine, theirs in zip(found, plain, strict=True):
        for name, block in theirs.items():
            assert_same(mine[name].to_dense(), block.to_dense())


class Formatted(torch.autograd.Function):
    """The identity, with its output and its gradient in another memory format."""

    form: Callable[[Tensor], Tensor]

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return Formatted.form(x.clone())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return Formatted.form(g.clone())


# -- threads ----------------------------------------------------------------------------------------------------------


def train_one(seed: int) -> Tensor:
    torch_model = seeded(seed)
    optimizer, criterion = torch.optim.SGD(torch_model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    kc.KFAC(torch_model, criterion, schedule=EVERY_STEP, data=kc.Data(seed=seed)).attach(optimizer)
    for inputs, labels in batches(10, classes=3, seed=seed):
        optimizer.zero_grad()
        criterion(torch_model(inputs), labels).backward()
        optimizer.step()
    return parameters_of(torch_model)


def seeded(seed: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.PReLU(), nn.Linear(4, 3))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def test_models_trained_in_two_threads_are_those_trained_one_after_the_other():
    expected = [train_one(seed) for seed in (1, 2)]
    found: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda seed=seed: found.update({seed: train_one(seed)})) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[1], expected[0])
    assert torch.equal(found[2], expected[1])


@listening_in_both_ways
def test_a_forward_in_another_thread_is_heard(listening, batch):
    model, (inputs, labels) = classifier(), batch
    plain = factors_heard(model, listening, lambda loss: loss(model(inputs), labels).backward())

    def run(loss: nn.Module) -> None:
        outputs: list[Tensor] = []
        thread = threading.Thread(target=lambda: outputs.append(model(inputs)))
        thread.start()
        thread.join()
        loss(outputs[0], labels).backward()

    assert_same_fisher(factors_heard(model, listening, run), plain)


# -- buffers ----------------------------------------------------------------------------------------------------------


class Observed(nn.Module):
    """A buffer that has no size before the first forward, as the observers of quantisation-aware training have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("largest", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        self.largest.resize_(3).copy_(x.detach().amax(0))
        return self.layer(x)


def test_a_buffer_that_a_forward_resizes_is_put_back(batch):
    model = Observed()
    buffer = model.largest
    kc.estimate(model, [batch[0]], "categorical")
    assert model.largest is buffer
    assert buffer.shape == (0,)
