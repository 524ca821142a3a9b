"""Gradients overwritten where they are, against the block's own product; what cannot be goes the plain way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import kfac_cond as kc
from kfac_cond import gradients as written
from kfac_cond import in_place

from .memory import Allocated

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)), (6, 7)),
    "no bias": (lambda: nn.Sequential(nn.Linear(7, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)), (6, 7)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 3, bias=False), nn.Flatten()),
        (6, 2, 5, 5),
    ),
}
OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "groups": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten()), (6, 4, 3, 3)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 2, 2), nn.Flatten()), (6, 3, 2, 2)),
    "bias alone": (lambda: nn.Sequential(nn.Linear(7, 3).requires_grad_(False)), (6, 7)),
    "diagonal": (lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten()), (6, 2)),
}


def trained(name: str, **settings: object) -> tuple[nn.Module, kc.KFAC]:
    """A model with gradients, and the inverses of its factors."""
    torch.manual_seed(0)
    build, shape = (MODELS | OTHERS)[name]
    model = build().double()
    if name == "bias alone":
        model[0].bias.requires_grad_(True)
    kfac = kc.KFAC(model, "categorical", damping=0.1, **settings)  # type: ignore[arg-type]
    for _ in range(2):
        model.zero_grad()
        x = torch.randint(9, shape) if name == "diagonal" else torch.randn(shape, dtype=torch.float64)
        outputs = model(x)
        kfac.update(outputs)
        nn.functional.cross_entropy(outputs, torch.randint(outputs.shape[1], outputs.shape[:1])).backward()
        kfac.precondition(lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    return model, kfac


def held(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def found(kfac: kc.KFAC) -> dict[str, in_place.Place]:
    gradients = {name: written.gradients_of(layer) for name, layer in kfac.layers.items()}
    return in_place.places(kfac.layers, list(kfac.layers), gradients, kfac._shared)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_product_of_the_block(name: str) -> None:
    model, kfac = trained(name)
    assert set(found(kfac)) == set(kfac.layers)
    before = {key: one.clone() for key, one in held(model).items()}
    expected = {}
    for layer, inverse in kfac._shared.factors.inverses.items():
        expected |= inverse.matvec({key: before[key] for key in kfac.layers[layer].layout.names})
    kept = {key: one.data_ptr() for key, one in held(model).items()}
    kfac.precondition()
    for key, one in held(model).items():
        torch.testing.assert_close(one, expected[key], rtol=1e-12, atol=1e-14)
        assert one.data_ptr() == kept[key]


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_go_the_plain_way(name: str) -> None:
    model, kfac = trained(name)
    assert not found(kfac)
    before = {key: one.clone() for key, one in held(model).items()}
    kfac.precondition()
    assert not any(torch.equal(one, before[key]) for key, one in held(model).items())


def test_inverses_that_are_solved_with_go_the_plain_way() -> None:
    model, kfac = trained("perceptron", schedule=kc.Schedule(factors=1, inverses=1))
    assert not found(kfac)
    before = {key: one.clone() for key, one in held(model).items()}
    kfac.precondition()
    assert not any(torch.equal(one, before[key]) for key, one in held(model).items())


@pytest.mark.parametrize("what", ["missing", "strided", "half", "subclass"])
def test_other_gradients_go_the_plain_way(what: str) -> None:
    model, kfac = trained("perceptron")
    first = model[0]
    if what == "missing":
        first.bias.grad = None
    elif what == "strided":
        first.weight.grad = first.weight.grad.mT.contiguous().mT
    elif what == "half":
        model.bfloat16()
        first.weight.grad = torch.randn_like(first.weight)
    else:
        first.weight.grad = nn.Parameter(first.weight.grad)
    assert "0" not in found(kfac)


def test_a_trust_region_sees_gradients_and_updates_before_anything_is_written() -> None:
    model, kfac = trained("perceptron", trust_region=kc.NormConstraint(1e-3))
    kfac.precondition(lr=1.0)
    length = torch.stack([one.norm() for one in held(model).values()]).norm()
    torch.testing.assert_close(length, torch.tensor(1e-3, dtype=torch.float64))


def test_the_products_are_two_a_layer_and_the_memory_is_that_of_the_largest_weight() -> None:
    _, kfac = trained("perceptron")
    with FlopCounterMode(display=False) as flops, Allocated() as memory:
        kfac.precondition()
    assert flops.get_total_flops() == sum(2 * o * i * (o + i) for o, i in ((5, 7), (3, 5)))
    assert memory.most < 2 * 5 * 7 * 8
