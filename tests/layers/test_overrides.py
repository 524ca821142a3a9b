"""Modules that only look like a kind's own: what their weight means is changed, by whatever method, hook or wrapper."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn import qat
from torch.ao.quantization import get_default_qat_qconfig
from torch.nn import functional
from torch.nn.utils import prune

import kfac_cond as kc
from kfac_cond.layers import kind_of, overridden
from kfac_cond.layers.survey import survey

from ..reference import assert_same, exact_fisher


def standardised(weight: Tensor) -> Tensor:
    axes = (*range(1, weight.ndim),)
    return (weight - weight.mean(axes, keepdim=True)) / (weight.std(axes, keepdim=True) + 1e-5)


class InForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, standardised(self.weight), self.bias)


class InConvForward(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, standardised(weight), bias)


class InForwardOf1d(nn.Conv1d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, standardised(weight), bias)


class Transposed(nn.ConvTranspose1d):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return functional.conv_transpose1d(input, standardised(self.weight), self.bias)


class Halved(nn.Bilinear):
    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        return super().forward(input1, input2) / 2


class Permuted(nn.LSTM):
    def permute_hidden(self, hx, permutation):
        return hx


class Centred(nn.InstanceNorm1d):
    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return super()._apply_instance_norm(input - 1.0)


def on_the_instance() -> nn.Module:
    module = nn.Conv2d(2, 3, 2)
    plain = module._conv_forward
    module._conv_forward = lambda x, weight, bias: plain(x, standardised(weight), bias)
    return module


CHANGED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "forward": (lambda: InForward(2, 3, 2), "Conv2d with its forward replaced by InForward"),
    "_conv_forward": (lambda: InConvForward(2, 3, 2), "Conv2d with its _conv_forward replaced by InConvForward"),
    "of 1d": (lambda: InForwardOf1d(2, 3, 2), "Conv1d with its _conv_forward replaced by InForwardOf1d"),
    "instance": (on_the_instance, "Conv2d with its _conv_forward replaced on this instance"),
    "transposed": (lambda: Transposed(2, 3, 2), "ConvTranspose1d with its forward replaced by Transposed"),
    "bilinear": (lambda: Halved(2, 3, 2), "Bilinear with its forward replaced by Halved"),
    "recurrent": (lambda: Permuted(2, 3), "LSTM with its permute_hidden replaced by Permuted"),
    "norm": (
        lambda: Centred(3, affine=True),
        "InstanceNorm1d with its _apply_instance_norm replaced by Centred",
    ),
    "quantised linear": (
        lambda: qat.Linear(3, 4, qconfig=get_default_qat_qconfig()),
        "Linear with its forward replaced by Linear",
    ),
    "quantised convolution": (
        lambda: qat.Conv2d(2, 3, 2, qconfig=get_default_qat_qconfig()),
        "Conv2d with its forward replaced by Conv2d",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_module_is_in_the_universal_form_and_says_why(name):
    make, reason = CHANGED[name]
    module = make()
    assert kind_of(module) is None
    found = survey(nn.Sequential(module))
    assert not any(layer.modules for layer in found.layers.values())
    assert all(row.covered and row.form == "universal" and reason in row.reason for row in found.rows)
    assert len(found.rows) == len([*module.parameters()])


class Described(nn.Conv2d):
    """What it computes is what its parent does."""

    def extra_repr(self) -> str:
        return "described"

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


@pytest.mark.parametrize("module", [Described(2, 3, 2, bias=False), nn.LSTM(2, 3), nn.ConvTranspose2d(2, 3, 2)])
def test_a_module_that_changes_nothing_is_plain(module):
    assert overridden(module) is None
    assert kind_of(module) is not None


def hooked(change: Callable[[nn.Module], nn.Module], module: nn.Module) -> nn.Module:
    """In eval, where no power iteration moves the weight from one forward to the next."""
    return nn.Sequential(change(module), nn.Flatten(), nn.LazyLinear(3)).eval()


RECOMPUTED: dict[str, Callable[[], nn.Module]] = {
    "old weight norm": lambda: hooked(nn.utils.weight_norm, nn.Conv1d(2, 3, 2)),
    "old spectral norm": lambda: hooked(nn.utils.spectral_norm, nn.Conv1d(2, 3, 2)),
    "weight norm": lambda: hooked(nn.utils.parametrizations.weight_norm, nn.ConvTranspose1d(2, 2, 2)),
    "spectral norm": lambda: hooked(nn.utils.parametrizations.spectral_norm, nn.Linear(4, 3)),
    "pruned": lambda: hooked(lambda m: prune.l1_unstructured(m, "weight", amount=2), nn.Conv1d(2, 3, 2)),
    "standardised": lambda: hooked(lambda m: m, InForwardOf1d(2, 3, 2)),
}


@pytest.fixture(params=RECOMPUTED)
def recomputed(request) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, inputs = RECOMPUTED[request.param](), torch.randn(3, 2, 4)
    model(inputs)
    return model, inputs


def output_fisher(outputs: Tensor) -> Tensor:
    p = torch.softmax(outputs, -1)
    return torch.diag(p) - torch.outer(p, p)


def test_a_weight_that_is_computed_from_another_has_the_block_of_its_definition(recomputed):
    """The parameter is the one that trains, and its block that of its own gradient, not of a plain layer's."""
    model, inputs = recomputed
    assert kc.coverage(model).share == 1.0
    options = kc.Options(dtype=torch.float64)
    found = kc.estimate(model, [inputs], "categorical", structure="block", kind="exact", options=options)
    changed = {row.path for row in survey(model).rows if not row.path.startswith("2.")}
    assert {name for name, layer in survey(model).layers.items() if not layer.modules} == changed
    for name in changed:
        expected = exact_fisher(model, inputs, output_fisher, parameters=[model.get_parameter(name)], divisor=3)
        assert_same(found[name].to_dense(), expected)


def test_a_lazy_linear_layer_once_built_is_plain():
    module = nn.LazyLinear(3)
    module(torch.randn(2, 4))
    assert type(module) is nn.Linear
    assert kind_of(module) is not None
