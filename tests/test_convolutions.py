"""Convolutions of a size at which their windows are not unfolded, in estimates and in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.linalg.products import gram_flops

from .helpers import EVERY_STEP, Apply
from .reference import assert_same
from .test_never_a_square import Largest

ARGUMENTS: dict[str, dict[str, Any]] = {
    "padding": {"padding": 1},
    "valid": {"padding": "valid"},
    "same": {"padding": "same", "dilation": 2},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect": {"padding": (1, 2), "padding_mode": "reflect"},
    "replicate": {"padding": "same", "padding_mode": "replicate"},
    "stride": {"stride": 2, "padding": 1},
    "groups": {"padding": 1, "groups": 2},
}


def network(convolution: nn.Module) -> nn.Sequential:
    return nn.Sequential(convolution, nn.Tanh(), Apply(lambda h: h.flatten(2).mean(-1)))


def windows(module: nn.Conv2d, inputs: Tensor) -> Tensor:
    """[groups, batch, positions, features] by what each of them is: a product with one row of the identity."""
    features = module.weight[0].numel()
    one = nn.Conv2d(
        module.in_channels,
        module.groups * features,
        module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        bias=False,
        padding_mode=module.padding_mode,
    )
    one.weight.data = torch.eye(features).reshape(features, *module.weight.shape[1:]).repeat(module.groups, 1, 1, 1)
    return one(inputs).detach().unflatten(1, (module.groups, features)).flatten(3).permute(1, 0, 3, 2)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_input_side_is_that_of_the_windows(name, bias, sharing, monkeypatch):
    monkeypatch.setattr("kfac_cond.linalg.patches.STARTED", {"cpu": 0})
    module, inputs = nn.Conv2d(24, 4, 3, bias=bias, **ARGUMENTS[name]), torch.randn(5, 24, 9, 10)
    assert kc.layers.kind_of(module).activations(module, inputs).correlates
    rules = {"*": {"sharing": sharing}}
    fisher = kc.estimate(network(module), [inputs[:2], inputs[2:]], "categorical", rules=rules)
    rows = windows(module, inputs)
    if bias:
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
    rows = rows.mean(-2) if sharing == "reduce" else rows.flatten(1, 2)
    expected = rows.mT @ rows / rows.shape[-2]
    assert_same(fisher["0"].A, expected if module.groups > 1 else expected[0])


@pytest.mark.parametrize("kernel", [1, 3])
def test_pixels_that_no_window_reads_do_not_count(kernel, monkeypatch):
    monkeypatch.setattr("kfac_cond.linalg.patches.STARTED", {"cpu": 0})
    module, inputs = nn.Conv2d(24, 4, kernel, stride=2), torch.randn(5, 24, 10, 10)
    inputs[..., 9] = float("nan")
    fisher = kc.estimate(network(module), [inputs], "categorical")
    assert torch.isfinite(fisher["0"].A).all()


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("transposed", [False, True])
def test_no_step_unfolds_them(sharing, transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    model, criterion = network(kind(32, 32, 3, padding=1)).float(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion, schedule=EVERY_STEP, rules={"*": {"sharing": sharing}})
    kfac.attach(optimizer)
    inputs, labels = torch.randn(32, 32, 16, 16, dtype=torch.float32), torch.zeros(32, dtype=torch.long)
    with Largest() as largest:
        criterion(model(inputs), labels).backward()
        optimizer.step()
    assert largest.numel <= 18**2 / 16**2 * inputs.numel()


def test_the_operations_predicted_are_those_of_thirteen_products():
    model, inputs = nn.Conv2d(32, 32, 3, padding=1, bias=False), torch.randn(16, 32, 16, 16)
    of_G = 2 * 16 * 16**2 * 32**2
    row, *_ = kc.coverage(model, inputs).rows
    products = 13 * 16 * 18 + 2 * 2 * 3 * 16 + 4
    assert row.capture_flops == of_G + 2 * 16 * 32**2 * products
    reduced, *_ = kc.coverage(model, inputs, rules={"*": {"sharing": "reduce"}}).rows
    assert reduced.capture_flops == gram_flops(16, 288, inputs.device) + gram_flops(16, 32, inputs.device)
