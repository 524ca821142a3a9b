"""Layers that are given the same tensor share one sum of its outer products, and nothing else."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .passes import Passes
from .reference import assert_same

WIDTH, NAMES = 6, ("query", "key", "value")


class Attention(nn.Module):
    """Three layers of one input; ``between`` is what each of them is given."""

    def __init__(self, *, biases: tuple[bool, bool, bool] = (True, True, True), way: str = "same") -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        for name, bias in zip(NAMES, biases, strict=True):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=bias))
        self.way = way
        self.seen: weakref.ref[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        outputs = []
        for name in NAMES:
            given = h.clone() if self.way == "copies" else h
            outputs.append(getattr(self, name)(given))
            if self.way == "changed":
                with torch.no_grad():
                    h.mul_(2)
        self.seen = weakref.ref(h)
        return self.head(torch.tanh(sum(outputs)).mean(1))


def twins(**kwargs) -> tuple[Attention, Attention]:
    model = Attention(**kwargs)
    plain = Attention(**kwargs | {"way": "copies"})
    plain.load_state_dict(model.state_dict())
    return model, plain


def estimated(model: nn.Module, x: Tensor, **options) -> kc.Fisher:
    return kc.estimate(model, [x], "categorical", options=kc.Options(progress=False, seed=0, **options))


def test_one_product_serves_all_that_have_the_same_input() -> None:
    model, plain = twins()
    x = torch.randn(5, 7, 4)
    with Passes() as passes:
        found = estimated(model, x)
    assert passes.products.count((WIDTH, 35, WIDTH)) == 2 + len(
        NAMES
    )  # one A of the three, a G each, and that of the first
    expected = estimated(plain, x)
    for name in found:
        assert_same(found[name].A, expected[name].A)
        assert_same(found[name].G, expected[name].G)


def test_each_has_memory_of_its_own() -> None:
    found = estimated(Attention(), torch.randn(5, 7, 4))
    assert len({found[name].A.untyped_storage().data_ptr() for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("biases", [(True, False, True), (False, False, True)])
def test_a_layer_without_a_bias_has_no_constant_feature(biases: tuple[bool, bool, bool]) -> None:
    model, plain = twins(biases=biases)
    x = torch.randn(5, 7, 4)
    found, expected = estimated(model, x), estimated(plain, x)
    for name, bias in zip(NAMES, biases, strict=True):
        assert found[name].A.shape[-1] == WIDTH + bias
        assert_same(found[name].A, expected[name].A)


def test_an_input_that_is_changed_in_between_is_another_one() -> None:
    found = kc.estimate(
        Attention(way="changed"),
        [torch.randn(5, 7, 4)],
        "categorical",
        kind="forward_only",
        options=kc.Options(progress=False),
    )
    of_query, of_key = found["query"].A, found["key"].A
    assert_same(of_key[:-1, :-1], 4 * of_query[:-1, :-1])


def test_padded_positions_stay_out() -> None:
    model, plain = twins()
    x, keep = torch.randn(5, 7, 4), torch.rand(5, 7) > 0.4
    data = kc.Data(positions=lambda args, kwargs, outputs=None: keep)
    found, expected = estimated(model, x, data=data), estimated(plain, x, data=data)
    for name in NAMES:
        assert_same(found[name].A, expected[name].A)


def test_training_averages_them_apart() -> None:
    averages = []
    for model in twins():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        criterion = nn.CrossEntropyLoss()
        kfac = kc.KFAC(model, criterion, schedule=kc.Schedule(factors=1, inverses=2))
        kfac.attach(optimizer)
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            x = torch.randn(5, 7, 4, generator=generator)
            optimizer.zero_grad()
            criterion(model(x), torch.randint(3, (5,), generator=generator)).backward()
            optimizer.step()
        averages.append(kfac.fisher())
    for name in averages[0]:
        assert_same(averages[0][name].A, averages[1][name].A)
        assert_same(averages[0][name].G, averages[1][name].G)


def test_the_input_is_not_kept_alive() -> None:
    model = Attention()
    kfac = kc.KFAC(model, kc.Categorical())
    kfac.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.no_grad():
        model(torch.randn(5, 7, 4))
    outputs = model(torch.randn(5, 7, 4))
    del outputs
    kfac.remove()
    gc.collect()
    assert model.seen is not None
    assert model.seen() is None


def test_an_input_made_in_inference_mode_is_taken_each_time() -> None:
    class Biases(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(4, 3), nn.Linear(4, 3)
            for layer in (self.query, self.key):
                layer.weight.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.query(x) + self.key(x)

    with torch.inference_mode():
        x = torch.randn(5, 4)
    found = estimated(Biases(), x)
    assert_same(found["query"].A, torch.ones(1, 1))
    assert_same(found["key"].A, torch.ones(1, 1))
