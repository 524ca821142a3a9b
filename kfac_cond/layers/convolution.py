"""Convolutions over 1, 2 or 3 spatial dimensions, as linear layers on unfolded patches (Grosse & Martens 2016)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..linalg.correlations import Axis
from ..linalg.patches import Patches
from .base import LayerKind
from .layout import WeightLayout

_ConvNd = nn.Conv1d | nn.Conv2d | nn.Conv3d
_ConvTransposeNd = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class ConvolutionKind(LayerKind):
    """``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d`` with all their arguments; a position is an output pixel.

    A grouped convolution is that many independent convolutions: a factor pair each, stacked in front.
    """

    name: ClassVar[str] = "convolution"
    modules: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    methods: ClassVar[tuple[str, ...]] = ("forward", "_conv_forward")

    def activations(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """(batch, C, *space) as patches [batch, positions, C * kernel], with [groups] in front where there are any.

        They are ``Patches``, which answer as a tensor does.
        """
        assert isinstance(module, _ConvNd)
        return _patches(module, _batched(module, inputs))

    def moment_flops(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dtype: torch.dtype
    ) -> int | None:
        """Operations of summing the outer products of windows that are not unfolded."""
        a = self.of_call(module, args, kwargs, dtype)
        return a.moment_flops if isinstance(a, Patches) else None

    def output_gradients(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """(batch, C, *space) as [batch, positions, C], with [groups] in front where there are any."""
        assert isinstance(module, _ConvNd | _ConvTransposeNd)
        space = _axes(module, "o")
        return _by_group(_batched(module, gradient), f"n (groups c) {space}", f"n ({space}) c", module.groups)


class TransposedConvolutionKind(ConvolutionKind):
    """``nn.ConvTranspose1d``, ``2d``, ``3d`` with all their arguments; a position is an output pixel.

    It is a convolution of stride one, with the kernel turned around, over the input with zeros between its pixels.
    """

    name: ClassVar[str] = "transposed convolution"
    modules: ClassVar[tuple[type[nn.Module], ...]] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    methods: ClassVar[tuple[str, ...]] = ("forward",)

    def layout(self, module: nn.Module, *, weight: str | None, bias: str | None) -> WeightLayout:
        """The layer's matrix, of a weight (C_in, C_out / groups, *kernel)."""
        return replace(super().layout(module, weight=weight, bias=bias), transposed=True)

    def of_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dtype: torch.dtype
    ) -> Tensor | None:
        """The patches of one call with (input, output_size=None)."""
        given = {**dict(zip(("input", "output_size"), args, strict=False)), **kwargs}
        x = given.get("input")
        return _of_spread(module, x.detach().to(dtype), given.get("output_size")) if isinstance(x, Tensor) else None

    def activations(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """(batch, C, *space) as patches [batch, positions, C * kernel], with [groups] in front where there are any."""
        return _of_spread(module, inputs, None)


def _of_spread(module: nn.Module, inputs: Tensor, output_size: Sequence[int] | None) -> Tensor:
    """The windows of an input whose pixels are spread out, of as many output pixels as the call asked for."""
    assert isinstance(module, _ConvTransposeNd)
    x, dims = _batched(module, inputs), len(module.kernel_size)
    axes = []
    for axis, (size, kernel, spread) in enumerate(zip(x.shape[2:], module.kernel_size, module.stride, strict=True)):
        padding, dilation = int(module.padding[axis]), module.dilation[axis]
        # The size that was asked for may have the batch and the channels in front.
        own = spread * (size - 1) + 1 - 2 * padding + dilation * (kernel - 1) + module.output_padding[axis]
        positions = own if output_size is None else output_size[axis - dims]
        offsets = tuple(padding - dilation * tap for tap in range(kernel))
        axes.append(Axis(size, offsets, 1, 0, positions, spread))
    return cast(Tensor, Patches(x, tuple(axes), module.groups))


def _patches(module: _ConvNd, x: Tensor) -> Tensor:
    """The windows of an input; margins of zeros are not there, those of another padding mode are made."""
    lower, upper = _margins(module)
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        lower = upper = [0] * len(lower)
    axes = []
    for index, (kernel, stride, dilation, low, up) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, lower, upper, strict=True)
    ):
        size, reach = x.shape[2 + index], dilation * (kernel - 1)
        positions = (size + low + up - reach - 1) // stride + 1
        # A stride may leave some at the end that no window reads.
        size = min(size, max(stride * (positions - 1) + reach + 1 - low, 1))
        x = x.narrow(2 + index, 0, size)
        axes.append(Axis(size, tuple(dilation * tap - low for tap in range(kernel)), stride, 0, positions))
    return cast(Tensor, Patches(x, tuple(axes), module.groups))


def _margins(module: _ConvNd) -> tuple[list[int], list[int]]:
    """Pixels that the module adds at the lower and at the upper end of each axis."""
    if module.padding == "valid":
        return [0] * len(module.kernel_size), [0] * len(module.kernel_size)
    if module.padding == "same":
        # The odd one is at the end (torch.nn.Conv2d).
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [total // 2 for total in totals], [total - total // 2 for total in totals]
    padding = [int(size) for size in module.padding]
    return padding, padding


def _axes(module: _ConvNd | _ConvTransposeNd, letter: str) -> str:
    """Names of the spatial axes."""
    return " ".join(f"{letter}{axis}" for axis in range(len(module.kernel_size)))


def _batched(module: _ConvNd | _ConvTransposeNd, x: Tensor) -> Tensor:
    """With a dimension for examples in front, also where the module was given one example alone."""
    return x[None] if x.ndim == len(module.kernel_size) + 1 else x


def _by_group(x: Tensor, pattern: str, form: str, groups: int) -> Tensor:
    if groups == 1:
        return rearrange(x, f"{pattern} -> {form}".replace("(groups c)", "c"))
    return rearrange(x, f"{pattern} -> groups {form}", groups=groups)
