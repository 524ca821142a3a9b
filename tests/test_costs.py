"""What coverage predicts is what training holds, and its operations are those of the formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .helpers import EVERY_STEP
from .training import convolutional


def held(kfac: kc.KFAC) -> tuple[int, int]:
    """Bytes of the averages and of the inverses of all layers."""
    layers = kfac.state_dict()["layers"].values()

    def size(part: Any) -> int:
        return sum(one.nbytes for one in (part or {}).values() if isinstance(one, Tensor))

    return sum(size(one["average"]) for one in layers), sum(size(one["inverse"]) for one in layers)


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 6, bias=False), nn.LayerNorm(6), nn.Linear(6, 3), nn.BatchNorm1d(3))


def frozen() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    model[0].weight.requires_grad_(False)
    return model


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)), (8, 3)),
    "convolution": (convolutional, (4, 2, 5, 5)),
    "norms": (normed, (8, 3)),
    "frozen": (frozen, (8, 3)),
    "half": (lambda: nn.Sequential(nn.Linear(3, 3)).bfloat16(), (8, 3)),
}


@pytest.mark.parametrize("limit", [None, 4, 1])
@pytest.mark.parametrize("rule", ["factored", "exact"])
@pytest.mark.parametrize("name", MODELS)
def test_the_bytes_predicted_are_the_bytes_held(name, rule, limit):
    make, shape = MODELS[name]
    model, criterion = make(), nn.CrossEntropyLoss()
    inputs = torch.randn(*shape).to(next(model.parameters()).dtype)
    if name == "convolution":
        model[-1] = nn.Linear(model[:-1](inputs).shape[-1], 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rules = {"*": {"max_factor_dim": limit}}
    kfac = kc.KFAC(model, criterion, damping=kc.Damping(0.1, rule=rule), schedule=EVERY_STEP, rules=rules)
    kfac.attach(optimizer)
    table = kfac.coverage()
    for _ in range(2):
        optimizer.zero_grad()
        criterion(model(inputs), torch.zeros(shape[0], dtype=torch.long)).backward()
        optimizer.step()
    assert (table.factor_bytes, table.inverse_bytes) == held(kfac)
    if rule == "factored":
        assert kc.coverage(model, rules=rules).to_dict() == table.to_dict()


def test_heads_have_an_average_of_G_each():
    model = nn.Linear(3, 4)
    product = kc.Product({"a": kc.Categorical(), "b": kc.Categorical()})
    kfac = kc.KFAC(model, product, schedule=EVERY_STEP)
    outputs = model(torch.randn(5, 3))
    kfac.update({"a": outputs, "b": 2 * outputs})
    outputs.sum().backward()
    kfac.precondition()
    table = kfac.coverage()
    assert (table.factor_bytes, table.inverse_bytes) == held(kfac)


@pytest.mark.parametrize(
    ("rule", "limit", "expected"),
    [("factored", None, 4**3 + 5**3), ("exact", None, 9 * (4**3 + 5**3)), ("factored", 4, 4**3 + 5)],
)
def test_the_operations_of_a_refresh(rule, limit, expected):
    rules = {"*": {"max_factor_dim": limit}}
    kfac = kc.KFAC(nn.Linear(3, 5), "categorical", damping=kc.Damping(rule=rule), rules=rules)
    assert kfac.coverage().refresh_flops == expected


@pytest.mark.parametrize(
    ("sharing", "limit", "expected"),
    [("expand", None, 2 * 14 * (16 + 25)), ("reduce", None, 2 * 7 * (16 + 25)), ("expand", 4, 2 * 14 * (16 + 5))],
)
def test_the_operations_of_a_batch(sharing, limit, expected):
    rules = {"*": {"sharing": sharing, "max_factor_dim": limit}}
    assert kc.coverage(nn.Linear(3, 5), torch.randn(7, 2, 3), rules=rules).capture_flops == expected


def test_groups_count_each():
    table = kc.coverage(nn.Conv2d(4, 6, 3, groups=2, bias=False), torch.randn(2, 4, 5, 5))
    assert table.refresh_flops == 2 * (18**3 + 3**3)
    assert table.capture_flops == 2 * 2 * 9 * 2 * (18**2 + 3**2)
