"""Layer kinds that users add, and what is refused as one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.layers import KINDS, LinearKind, kind_of

from ..reference import assert_same
from .test_kinds import assert_gradient_is_made_of_pairs


class Equalised(nn.Module):
    """A linear layer with its weight scaled in the forward, as generators of images have it."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, features))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = features**-0.5

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


class EqualisedKind(kc.LayerKind):
    def activations(self, module: nn.Module, inputs: Tensor) -> Tensor:
        return module.scale * rearrange(inputs, "n ... d -> n (...) d")

    def output_gradients(self, module: nn.Module, gradient: Tensor) -> Tensor:
        return rearrange(gradient, "n ... d -> n (...) d")


@pytest.fixture
def registered() -> Iterator[None]:
    kc.register_layer(Equalised, EqualisedKind)
    yield
    kc.unregister_layer(Equalised)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("shape", [(4, 3), (4, 5, 3), (4, 2, 5, 3)])
def test_the_weight_gradient_is_made_of_its_pairs(shape):
    assert_gradient_is_made_of_pairs(Equalised(3, 2), torch.randn(*shape))


@pytest.mark.usefixtures("registered")
def test_its_block_is_that_of_brute_force_on_one_example():
    model, inputs, drawn = nn.Sequential(Equalised(3, 4), nn.Tanh(), Equalised(4, 3)), torch.randn(1, 3), torch.ones(1)
    drawn = drawn.long()
    fisher = kc.estimate(model, [inputs], "categorical", options=kc.Options(draws=[[drawn]]))
    loss = nn.functional.cross_entropy(model(inputs), drawn)
    loss.backward()
    for name, block in fisher.items():
        layer = model.get_submodule(name)
        V = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1).flatten()
        assert_same(block.to_dense(), torch.outer(V, V))


@pytest.mark.usefixtures("registered")
def test_it_trains_and_is_named_after_its_module():
    model, criterion = nn.Sequential(Equalised(3, 4), nn.Tanh(), nn.Linear(4, 3)), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion)
    kfac.attach(optimizer)
    criterion(model(torch.randn(5, 3)), torch.tensor([0, 1, 2, 0, 1])).backward()
    optimizer.step()
    assert list(kfac.fisher()) == ["0", "2"]
    assert {row.kind for row in kfac.coverage().rows} == {"Equalised", "linear"}


def test_as_a_decorator_it_gives_the_class_back():
    class Mine(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    @kc.register_layer(Mine)
    class MineKind(EqualisedKind):
        name = "mine"

    try:
        assert issubclass(MineKind, EqualisedKind)
        assert kind_of(Mine(2, 2)).name == "mine"
    finally:
        kc.unregister_layer(Mine)
    assert kind_of(Mine(2, 2)) is None


@pytest.mark.usefixtures("registered")
def test_the_kind_of_the_nearest_type_is_taken():
    class Nearer(Equalised):
        pass

    class Other(Equalised):
        def forward(self, x: Tensor) -> Tensor:
            return x

    assert isinstance(kind_of(Nearer(2, 2)), EqualisedKind)
    assert kind_of(Other(2, 2)) is None
    assert "Equalised with its forward replaced by Other" in kc.coverage(Other(2, 2)).rows[0].reason
    kc.register_layer(Nearer, LinearKind)
    try:
        assert kind_of(Nearer(2, 2)).name == "linear"
    finally:
        kc.unregister_layer(Nearer)


def test_a_kind_of_the_library_serves_another_type_and_stays_as_it_is():
    before = LinearKind.modules
    kc.register_layer(Equalised, LinearKind)
    try:
        assert isinstance(kind_of(Equalised(2, 2)), LinearKind)
        assert LinearKind.modules == before
        assert kind_of(nn.Linear(2, 2)) is KINDS[0]
    finally:
        kc.unregister_layer(Equalised)


class Half(kc.LayerKind):
    def activations(self, module: nn.Module, inputs: Tensor) -> Tensor:
        return inputs


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((5,), "register_layer got 5: expected a class of modules"),
        ((nn.Linear(2, 2),), "register_layer got Linear: expected a class of modules"),
        ((int,), "register_layer got the class int"),
        ((nn.Module, EqualisedKind), "nn.Module, which every module is"),
        ((Equalised, 5), r"register_layer\(Equalised\) got 5: expected a subclass of kc.LayerKind"),
        ((Equalised, nn.Linear), "got the class Linear: expected a subclass of kc.LayerKind"),
        ((Equalised, EqualisedKind()), "got EqualisedKind: expected a subclass"),
        ((Equalised, Half), "Half does not define output_gradients"),
    ],
)
def test_what_is_no_kind_of_a_module_is_refused(arguments, match):
    with pytest.raises(kc.ArgumentError, match=match):
        kc.register_layer(*arguments)
    assert kind_of(Equalised(2, 2)) is None


@pytest.mark.parametrize("method", ["activations", "output_gradients"])
@pytest.mark.parametrize(
    ("wrong", "found"), [(lambda x: x[:, 0], r"\(5, 3\)"), (lambda x: x[..., :2], r"\(5, 1, 2\)")], ids=["flat", "cut"]
)
def test_a_kind_that_gives_another_form_is_refused_with_the_layer(method, wrong, found):
    right = getattr(EqualisedKind, method)
    kind = type("Wrong", (EqualisedKind,), {method: lambda self, module, x: wrong(right(self, module, x))})
    kc.register_layer(Equalised, kind)
    try:
        with pytest.raises(kc.CaptureError, match=rf"layer '0': {method} .* {found}, expected \[batch, positions, 3\]"):
            kc.estimate(nn.Sequential(Equalised(3, 3)), [torch.randn(5, 3)], "categorical")
    finally:
        kc.unregister_layer(Equalised)


@pytest.mark.usefixtures("registered")
def test_registering_twice_is_refused_with_the_remedy():
    with pytest.raises(kc.ArgumentError, match=r"as EqualisedKind: call kc\.unregister_layer\(Equalised\) first"):
        kc.register_layer(Equalised, LinearKind)
    assert isinstance(kind_of(Equalised(2, 2)), EqualisedKind)


def test_a_model_that_is_wrapped_already_asks_for_a_refresh():
    model, criterion = nn.Sequential(Equalised(3, 4), nn.Linear(4, 2)), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion)
    kfac.attach(optimizer)
    kc.register_layer(Equalised, EqualisedKind)
    try:
        criterion(model(torch.randn(5, 3)), torch.tensor([0, 1, 0, 1, 1])).backward()
        with pytest.raises(kc.ModelChangedError, match=r"kfac\.refresh"):
            optimizer.step()
    finally:
        kc.unregister_layer(Equalised)


def test_what_is_not_registered_cannot_be_taken_back():
    with pytest.raises(kc.ArgumentError, match="the class Equalised is not registered; registered are"):
        kc.unregister_layer(Equalised)


def test_a_kind_registered_after_wrapping_is_found_by_refresh():
    model = nn.Sequential(Equalised(3, 4), nn.Linear(4, 2))
    kfac = kc.KFAC(model, "categorical")
    kc.register_layer(Equalised, EqualisedKind)
    try:
        assert not {row.path: row for row in kfac.coverage().rows}["0.weight"].covered
        kfac.refresh()
        assert kfac.coverage().share == 1.0
        assert list(kfac.layers) == ["0", "1"]
    finally:
        kc.unregister_layer(Equalised)
