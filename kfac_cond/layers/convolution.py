"""Convolutions over 1, 2 or 3 spatial dimensions, as linear layers on unfolded patches (Grosse & Martens 2016)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

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
        """(batch, C, *space) as patches [batch, positions, C * kernel], with [groups] in front where there are any."""
        assert isinstance(module, _ConvNd)
        return _patches(module, _windows(module, _padded(module, _batched(module, inputs)), module.stride))

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
    """The patches of an input whose pixels are spread out, of as many output pixels as the call asked for."""
    assert isinstance(module, _ConvTransposeNd)
    x, dims, stride = _batched(module, inputs), len(module.kernel_size), module.stride
    spread = x.new_zeros(*x.shape[:2], *(s * (size - 1) + 1 for s, size in zip(stride, x.shape[2:], strict=True)))
    spread[tuple(slice(None, None, s) for s in (1, 1, *stride))] = x
    before: list[int] = []
    after: list[int] = []
    for axis in reversed(range(dims)):
        length, padding = spread.shape[2 + axis], int(module.padding[axis])
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1)
        # The size that was asked for may have the batch and the channels in front.
        own = length - 2 * padding + reach + module.output_padding[axis]
        pixels = own if output_size is None else output_size[axis - dims]
        # Negative, where there is more padding than the kernel reaches.
        before += [reach - padding, 0]
        after += [0, pixels + padding - length]
    # In this order, since a margin that is cut off may be longer than what there was.
    windows = _windows(module, F.pad(F.pad(spread, after), before), (1,) * dims)
    return _patches(module, windows.flip([*range(2 + dims, 2 + 2 * dims)]))


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


def _padded(module: _ConvNd, x: Tensor) -> Tensor:
    """The input with the margins the module reads, in its own padding mode."""
    if module.padding_mode != "zeros":
        return F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    margins: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        if isinstance(module.padding, str):
            # 'same' puts the odd one at the end, 'valid' has none (torch.nn.Conv2d).
            total = module.dilation[axis] * (module.kernel_size[axis] - 1) if module.padding == "same" else 0
            margins += [total // 2, total - total // 2]
        else:
            margins += [int(module.padding[axis])] * 2
    return F.pad(x, margins)


def _windows(module: _ConvNd | _ConvTransposeNd, x: Tensor, stride: Sequence[int]) -> Tensor:
    """A view (batch, C, *output space, *kernel) of a padded input."""
    for axis, size in enumerate(module.kernel_size):
        span = module.dilation[axis] * (size - 1) + 1
        x = x.unfold(2 + axis, span, stride[axis])[..., :: module.dilation[axis]]
    return x


def _patches(module: _ConvNd | _ConvTransposeNd, windows: Tensor) -> Tensor:
    """Windows as [batch, positions, C * kernel], with [groups] in front where there are any."""
    space, kernel = _axes(module, "o"), _axes(module, "k")
    return _by_group(windows, f"n (groups c) {space} {kernel}", f"n ({space}) (c {kernel})", module.groups)
