"""Convolutions over 1, 2 or 3 spatial dimensions, as linear layers on unfolded patches (Grosse & Martens 2016)."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .base import LayerKind

_ConvNd = nn.Conv1d | nn.Conv2d | nn.Conv3d


class ConvolutionKind(LayerKind):
    """``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d`` with all their arguments; a position is an output pixel.

    A grouped convolution is that many independent convolutions: a factor pair each, stacked in front.
    """

    name: ClassVar[str] = "convolution"
    modules: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    edges: ClassVar[int | None] = 1

    def activations(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """(batch, C, *space) as patches [batch, positions, C * kernel], with [groups] in front where there are any."""
        assert isinstance(module, _ConvNd)
        if inputs.ndim == len(module.kernel_size) + 1:
            inputs = inputs[None]
        windows = _windows(module, _padded(module, inputs))
        space = [f"o{i}" for i in range(len(module.kernel_size))]
        kernel = [f"k{i}" for i in range(len(module.kernel_size))]
        pattern = f"n (groups c) {' '.join(space)} {' '.join(kernel)}"
        patches = f"n ({' '.join(space)}) (c {' '.join(kernel)})"
        return _by_group(windows, pattern, patches, module.groups)

    def output_gradients(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """(batch, C, *space) as [batch, positions, C], with [groups] in front where there are any."""
        assert isinstance(module, _ConvNd)
        if gradient.ndim == len(module.kernel_size) + 1:
            gradient = gradient[None]
        space = [f"o{i}" for i in range(len(module.kernel_size))]
        return _by_group(gradient, f"n (groups c) {' '.join(space)}", f"n ({' '.join(space)}) c", module.groups)


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


def _windows(module: _ConvNd, x: Tensor) -> Tensor:
    """A view (batch, C, *output space, *kernel) of a padded input."""
    for axis, size in enumerate(module.kernel_size):
        span = module.dilation[axis] * (size - 1) + 1
        x = x.unfold(2 + axis, span, module.stride[axis])[..., :: module.dilation[axis]]
    return x
