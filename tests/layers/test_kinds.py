"""Each layer kind: the sum over positions of g a^T is the layer's own weight gradient, whatever its arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.layers import (
    BatchNormKind,
    BilinearKind,
    ConvolutionKind,
    LayerNormKind,
    LinearKind,
    TransposedConvolutionKind,
    TransposedLinearKind,
    kind_of,
    overridden,
)

from ..helpers import Apply
from ..reference import assert_same


def assert_gradient_is_made_of_pairs(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    """sum_{n,s} g [a, 1]^T = the matrix of the parameters' gradients of a random linear functional of the output."""
    kind = kind_of(module)
    outputs = module(*args, **kwargs)
    gradient = torch.randn_like(outputs)
    outputs.backward(gradient)
    a, g = kind.of_call(module, args, kwargs, outputs.dtype), kind.output_gradients(module, gradient)
    assert a.shape[:-1] == g.shape[:-1]
    biased = getattr(module, "bias", None) is not None
    if biased:
        a = torch.cat([a, torch.ones(*a.shape[:-1], 1)], -1)
    layout = kind.layout(module, weight="weight", bias="bias" if biased else None)
    expected = layout.to_matrix({name: p.grad for name, p in module.named_parameters()})
    assert_same(torch.einsum("...nso, ...nsi -> ...oi", g, a), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (5,), (5, 2), (5, 2, 3), (1,), (5, 1)])
def test_linear(shape, bias):
    assert_gradient_is_made_of_pairs(nn.Linear(3, 4, bias=bias), torch.randn(*shape, 3))


@pytest.mark.parametrize("shape", [(0,), (0, 2), (5, 0)])
def test_linear_without_examples_or_positions(shape):
    a = LinearKind().activations(nn.Linear(3, 4), torch.randn(*shape, 3))
    assert a.shape == (shape[0], shape[1] if len(shape) > 1 else 1, 3)


KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SPACE = {1: (9,), 2: (7, 8), 3: (4, 5, 4)}


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    dims = draw(st.sampled_from([1, 2, 3]))

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    groups = draw(st.sampled_from([1, 2, 3]))
    kernel, dilation = sizes(1, 3), sizes(1, 2)
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.just("numbers")))
    if padding == "numbers":
        padding = sizes(0, 2)
    stride = (1,) * dims if padding == "same" else sizes(1, 3)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    assume(all(one <= size for one, size in zip(span, SPACE[dims], strict=True)))
    module = KINDS[dims](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    batch = draw(st.sampled_from([(), (1,), (3,)]))
    assume(mode == "zeros" or batch)  # torch pads an unbatched input in other modes only with a batch dimension
    return module, torch.randn(*batch, module.in_channels, *SPACE[dims])


@settings(max_examples=120, deadline=None)
@given(convolutions())
def test_any_convolution(case):
    assert_gradient_is_made_of_pairs(*case)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_in_any_memory_layout(layout):
    module, inputs = nn.Conv2d(2, 3, 2).to(memory_format=layout), torch.randn(4, 2, 5, 5)
    assert_gradient_is_made_of_pairs(module, inputs.to(memory_format=layout))


def test_a_convolution_that_reads_margins_alone():
    module = nn.Conv1d(2, 3, 1, stride=100, padding=5)
    assert_gradient_is_made_of_pairs(module, torch.randn(4, 2, 2))


def test_a_convolution_without_examples():
    module = nn.Conv2d(2, 3, 2)
    assert ConvolutionKind().activations(module, torch.randn(0, 2, 4, 5)).shape == (0, 12, 8)


def test_a_grouped_convolution_is_independent_convolutions():
    """ORACLES 13."""
    whole, inputs = nn.Conv2d(4, 6, 2, groups=2), torch.randn(3, 4, 4, 4)
    parts = [nn.Conv2d(2, 3, 2) for _ in range(2)]
    for index, part in enumerate(parts):
        part.weight.data = whole.weight.data[3 * index : 3 * index + 3]
        part.bias.data = whole.bias.data[3 * index : 3 * index + 3]
    likelihood = kc.Gaussian(1.0, event_dims=(1,))
    found = kc.estimate(whole, [inputs], likelihood, kind="exact")[""]
    each = [kc.estimate(p, [x], likelihood, kind="exact")[""] for p, x in zip(parts, inputs.split(2, 1), strict=True)]
    assert_same(found.A, torch.stack([one.A for one in each]))
    assert_same(found.G, torch.stack([one.G for one in each]))


def test_a_convolution_is_a_linear_layer_on_unfolded_input():
    """ORACLES 13."""
    convolution, inputs = nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=1), torch.randn(4, 2, 5, 6)
    linear = nn.Linear(12, 3)
    linear.weight.data, linear.bias.data = convolution.weight.data.flatten(1), convolution.bias.data
    unfold = nn.Unfold((2, 3), stride=(1, 2), padding=1)
    unfolded = nn.Sequential(Apply(lambda x: unfold(x).mT), linear, Apply(lambda h: h.mean(1)))
    pooled = nn.Sequential(convolution, Apply(lambda h: h.flatten(2).mean(2)))
    options = kc.Options(seed=1)
    found = kc.estimate(pooled, [inputs], "categorical", options=options)["0"]
    expected = kc.estimate(unfolded, [inputs], "categorical", options=options)["1"]
    assert_same(found.to_dense(), expected.to_dense())


# -- which modules are of which kind ----------------------------------------------------------------------------------


class Renamed(nn.Linear):
    """Computes just what a linear layer does."""


class Changed(nn.Linear):
    """Does not: what its weight means is not known."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Linear(2, 2), LinearKind),
        (Renamed(2, 2), LinearKind),
        (Changed(2, 2), None),
        (nn.Conv1d(1, 1, 1), ConvolutionKind),
        (nn.Conv3d(1, 1, 1), ConvolutionKind),
        (nn.ConvTranspose1d(1, 1, 1), TransposedConvolutionKind),
        (nn.ConvTranspose3d(1, 1, 1), TransposedConvolutionKind),
        (nn.MultiheadAttention(2, 1).out_proj, None),
        (nn.Bilinear(2, 2, 2), BilinearKind),
        (nn.LayerNorm(2), LayerNormKind),
        (nn.BatchNorm2d(2), BatchNormKind),
        (nn.LocalResponseNorm(2), None),
        (nn.PReLU(), None),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else str(x and x.__name__),
)
def test_the_kind_of_a_module(module, kind):
    found = kind_of(module)
    assert found is None if kind is None else type(found) is kind


def conv1d_of_transformers(d_in: int, d_out: int) -> nn.Module:
    """A module with the name, place and arithmetic of the transformers library's ``Conv1D``."""

    class Conv1D(nn.Module):
        __module__ = "transformers.pytorch_utils"

        def __init__(self) -> None:
            super().__init__()
            self.nf = d_out
            self.weight, self.bias = nn.Parameter(torch.randn(d_in, d_out)), nn.Parameter(torch.randn(d_out))

        def forward(self, x: Tensor) -> Tensor:
            flat = torch.addmm(self.bias, x.reshape(-1, d_in), self.weight)
            return flat.view(*x.shape[:-1], d_out)

    return Conv1D()


@pytest.mark.parametrize("shape", [(5,), (5, 2)])
def test_transposed_linear(shape):
    module = conv1d_of_transformers(3, 4)
    assert type(kind_of(module)) is TransposedLinearKind
    assert_gradient_is_made_of_pairs(module, torch.randn(*shape, 3))


@pytest.mark.parametrize(
    "make", [lambda: conv1d_of_transformers(3, 4), lambda: nn.Linear(3, 4), lambda: nn.Conv1d(3, 4, 1)]
)
def test_a_module_whose_own_forward_was_replaced_is_of_no_kind(make):
    module = make()
    before = overridden(module)
    module.forward = lambda x: x
    assert (before, overridden(module), kind_of(module)) == (None, (type(module), "forward"), None)


def test_transposed_linear_has_the_block_of_its_linear_twin():
    module, linear = conv1d_of_transformers(3, 4), nn.Linear(3, 4)
    linear.weight.data, linear.bias.data = module.weight.data.T.clone(), module.bias.data
    inputs, options = torch.randn(5, 2, 3), kc.Options(seed=1)
    found, expected = (
        kc.estimate(nn.Sequential(one, nn.ReLU(inplace=True)), [inputs], "categorical", options=options)["0"]
        for one in (module, linear)
    )
    assert_same(found.to_dense(), expected.to_dense())
