"""Transposed convolutions: as linear layers on their own unfolding, whatever their arguments and those of the call."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.layers import TransposedConvolutionKind, WeightLayout, kind_of
from kfac_cond.layers.survey import survey

from ..helpers import Apply
from ..reference import assert_same, entries_of, exact_fisher, within_groups
from .test_kinds import assert_gradient_is_made_of_pairs

KINDS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SPACE = {1: (4,), 2: (3, 2), 3: (2, 3, 1)}


def smallest(module: nn.Module, space: tuple[int, ...]) -> list[int]:
    """Sizes of the output without any output padding."""
    each = zip(space, module.stride, module.padding, module.dilation, module.kernel_size, strict=True)
    return [(size - 1) * s - 2 * p + d * (k - 1) + 1 for size, s, p, d, k in each]


@st.composite
def transposed(draw: st.DrawFn) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    dims = draw(st.sampled_from([1, 2, 3]))

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    groups = draw(st.sampled_from([1, 2, 3]))
    kernel, stride, dilation = sizes(1, 3), sizes(1, 3), sizes(1, 2)
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    module = KINDS[dims](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=stride,
        padding=sizes(0, 3),
        output_padding=extra,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
    )
    space = smallest(module, SPACE[dims])
    assume(all(size + more > 0 for size, more in zip(space, extra, strict=True)))
    batch = draw(st.sampled_from([(), (1,), (3,)]))
    call: dict[str, Any] = {}
    if draw(st.booleans()):
        asked = [size + draw(st.integers(0, s - 1)) for size, s in zip(space, stride, strict=True)]
        assume(min(asked) > 0)
        call["output_size"] = draw(st.sampled_from([asked, [*batch, module.out_channels, *asked]]))
    return module, torch.randn(*batch, module.in_channels, *SPACE[dims]), call


@settings(max_examples=200, deadline=None, derandomize=True)
@given(transposed())
def test_any_transposed_convolution(case):
    module, inputs, call = case
    assert_gradient_is_made_of_pairs(module, inputs, **call)


def test_more_padding_than_the_kernel_reaches_and_the_input_is_long():
    """The only pixel of the output reads zeros alone."""
    module = nn.ConvTranspose1d(1, 2, 1, stride=5, padding=2, output_padding=4)
    assert_gradient_is_made_of_pairs(module, torch.randn(3, 1, 1))


@pytest.mark.parametrize("size", [[7], torch.Size([3, 4, 7]), (8,)])
@pytest.mark.parametrize("named", [True, False])
def test_the_size_asked_for_in_the_call(size, named):
    """Not the one that ``output_padding`` gives, which is 8."""
    module, inputs = nn.ConvTranspose1d(2, 4, 3, stride=2, padding=1, output_padding=1), torch.randn(3, 2, 4)
    if named:
        assert_gradient_is_made_of_pairs(module, input=inputs, output_size=size)
    else:
        assert_gradient_is_made_of_pairs(module, inputs, size)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_memory_layout(layout):
    module, inputs = nn.ConvTranspose2d(2, 3, 2, stride=2).to(memory_format=layout), torch.randn(4, 2, 5, 5)
    assert_gradient_is_made_of_pairs(module, inputs.to(memory_format=layout))


def test_an_input_that_is_not_contiguous():
    assert_gradient_is_made_of_pairs(nn.ConvTranspose2d(2, 3, 2, stride=2), torch.randn(5, 4, 2, 3).permute(1, 2, 0, 3))


def test_without_examples():
    module = nn.ConvTranspose2d(2, 3, 2)
    assert TransposedConvolutionKind().activations(module, torch.randn(0, 2, 4, 5)).shape == (0, 30, 8)


def test_a_lazy_one_once_built():
    module = nn.LazyConvTranspose2d(4, 3, stride=2, groups=2)
    assert not survey(module).layers
    module(torch.randn(1, 6, 3, 3))
    assert type(kind_of(module)) is TransposedConvolutionKind
    assert_gradient_is_made_of_pairs(module, torch.randn(2, 6, 3, 3))


ARGUMENTS = {
    "stride": {"stride": 2},
    "padding": {"padding": (2, 1), "kernel_size": (3, 2)},
    "output padding": {"stride": (3, 2), "output_padding": (2, 1)},
    "dilation": {"dilation": (2, 1), "bias": False},
    "all": {"kernel_size": (2, 3), "stride": (2, 1), "padding": 1, "output_padding": (1, 0), "dilation": (1, 2)},
}
CASES = [pytest.param(ARGUMENTS[name], groups, id=f"{name}-{groups}") for name, groups in product(ARGUMENTS, (1, 2))]


def blocks(model: nn.Module, inputs: Tensor, *, divisor: float, layout: WeightLayout) -> Tensor:
    """The Fisher of a Gaussian at every output, in the order of the layer's matrix, between entries of one group."""
    identity = lambda f: torch.eye(f.numel())  # noqa: E731
    whole = exact_fisher(model, inputs, identity, parameters=[*model.parameters()], divisor=divisor)
    order = entries_of(model, layout)
    return whole[order][:, order] * within_groups(layout)


@pytest.mark.parametrize(("arguments", "groups"), CASES)
def test_a_gaussian_at_every_pixel_expand_is_exact(arguments, groups):
    """ORACLES 10 and 13."""
    model = nn.Sequential(
        nn.ConvTranspose2d(2 * groups, 2 * groups, **{"kernel_size": 2, "groups": groups, **arguments})
    )
    inputs = torch.randn(3, 2 * groups, 3, 2)
    found = kc.estimate(model, [inputs], kc.Gaussian(1.0, event_dims=(1,)), kind="exact")["0"]
    pixels = model(inputs).numel() / (2 * groups)
    assert_same(found.to_dense(), blocks(model, inputs, divisor=pixels, layout=found.layout))


@pytest.mark.parametrize(("arguments", "groups"), CASES)
def test_globally_pooled_reduce_is_exact(arguments, groups):
    """ORACLES 10 and 13."""
    convolution = nn.ConvTranspose2d(2 * groups, 2 * groups, **{"kernel_size": 2, "groups": groups, **arguments})
    model = nn.Sequential(convolution, Apply(lambda h: h.flatten(2).mean(-1)))
    inputs = torch.randn(3, 2 * groups, 3, 2)
    rules = {"0": {"sharing": "reduce"}}
    found = kc.estimate(model, [inputs], kc.Gaussian(1.0), kind="exact", rules=rules)["0"]
    assert_same(found.to_dense(), blocks(model, inputs, divisor=3, layout=found.layout))


def test_groups_are_independent_transposed_convolutions():
    """ORACLES 13."""
    whole, inputs = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), torch.randn(3, 4, 2, 2)
    parts = [nn.ConvTranspose2d(2, 3, 2, stride=2) for _ in range(2)]
    for index, part in enumerate(parts):
        part.weight.data = whole.weight.data[2 * index : 2 * index + 2]
        part.bias.data = whole.bias.data[3 * index : 3 * index + 3]
    likelihood = kc.Gaussian(1.0, event_dims=(1,))
    found = kc.estimate(whole, [inputs], likelihood, kind="exact")[""]
    each = [kc.estimate(p, [x], likelihood, kind="exact")[""] for p, x in zip(parts, inputs.split(2, 1), strict=True)]
    assert_same(found.A, torch.stack([one.A for one in each]))
    assert_same(found.G, torch.stack([one.G for one in each]))


def test_it_is_the_convolution_that_it_transposes_the_gradient_of():
    """With stride one: a convolution with the kernel turned around, and channels exchanged."""
    transposed_one, plain = nn.ConvTranspose1d(2, 3, 3), nn.Conv1d(2, 3, 3, padding=2)
    plain.weight.data, plain.bias.data = transposed_one.weight.data.transpose(0, 1).flip(-1), transposed_one.bias.data
    inputs = torch.randn(4, 2, 5)
    likelihood = kc.Gaussian(1.0, event_dims=(1,))
    found, expected = (kc.estimate(one, [inputs], likelihood, kind="exact")[""] for one in (transposed_one, plain))
    turned = torch.cat([torch.arange(6).reshape(2, 3).flip(-1).flatten(), torch.tensor([6])])
    assert_same(found.A, expected.A[turned][:, turned])
    assert_same(found.G, expected.G)
