"""The scale and shift of normalisation layers: for each unit u, y_u = w_u x_u + b_u with x the normalised input.

A unit is a feature or a channel. Units are as many layers of one input and one output, stacked as groups are; the
normalised input is computed anew from what the module was given, in the dtype of the statistics.

Source: Osawa et al. 2020 (arXiv:2002.06015), who precondition the scale and shift of batch norm unit by unit.
"""

from __future__ import annotations

from abc import abstractmethod
from math import prod
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .base import LayerKind
from .layout import WeightLayout
from .summed import MOMENTS, GradientSums


class NormKind(LayerKind):
    """What all of them share: a (1 x 1) matrix for each entry of the weight, with the bias (1 x 2).

    Its block is the sum of V_n^T V_n itself, with positions added up before anything is squared: the shift's input is
    the constant 1 at every position, so that a product of means over positions would miss most of it.
    """

    gradient_sums: ClassVar[GradientSums | None] = MOMENTS

    def layout(self, module: nn.Module, *, weight: str | None, bias: str | None) -> WeightLayout:
        """One matrix an entry of the weight, which the bias has the shape of."""
        shape = tuple(cast(Tensor, module.weight).shape)
        return WeightLayout(weight, bias, shape, groups=prod(shape), output_dims=len(shape))

    def activations(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """The normalised input as [units, batch, positions, 1]."""
        return _stacked(self._by_unit(module, self._normalised(module, self._batched(module, inputs))))

    def output_gradients(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """A gradient of the output as [units, batch, positions, 1]."""
        return _stacked(self._by_unit(module, self._batched(module, gradient)))

    def _batched(self, module: nn.Module, x: Tensor) -> Tensor:
        """With a dimension for examples in front, also where the module was given one example alone."""
        return x

    @abstractmethod
    def _normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        """What the module multiplies by its weight."""

    @abstractmethod
    def _by_unit(self, module: nn.Module, x: Tensor) -> Tensor:
        """As [units, batch, positions]."""


def _stacked(x: Tensor) -> Tensor:
    # Many small products follow, each of a unit by itself: they are several times faster on adjacent numbers.
    stacked = x.contiguous().unsqueeze(-1)
    # A layer of one unit is one without groups.
    return stacked[0] if len(stacked) == 1 else stacked


class LayerNormKind(NormKind):
    """``nn.LayerNorm``; a unit is an entry of ``normalized_shape``, positions are between the first and those."""

    name: ClassVar[str] = "layer norm"
    modules: ClassVar[tuple[type[nn.Module], ...]] = (nn.LayerNorm,)

    def _batched(self, module: nn.Module, x: Tensor) -> Tensor:
        return x if x.ndim > len(_shape(module)) else x[None]

    def _normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, nn.LayerNorm)
        return F.layer_norm(x, _shape(module), eps=module.eps)

    def _by_unit(self, module: nn.Module, x: Tensor) -> Tensor:
        leading, units = x.shape[: x.ndim - len(_shape(module))], prod(_shape(module))
        # Transposed as a matrix, which torch copies faster than a permutation of more dimensions.
        rows = x.reshape(prod(leading), units).mT.contiguous()
        return rows.reshape(units, leading[0], prod(leading[1:]))


class RMSNormKind(LayerNormKind):
    """``nn.RMSNorm``, likewise."""

    name: ClassVar[str] = "RMS norm"
    modules: ClassVar[tuple[type[nn.Module], ...]] = (nn.RMSNorm,)

    def _normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, nn.RMSNorm)
        # Without an eps of its own the module has that of the dtype it computes in: float32 for half precision, as
        # here, since it widens its input first.
        return F.rms_norm(x, _shape(module), eps=module.eps)


class GroupNormKind(NormKind):
    """``nn.GroupNorm``; a unit is a channel, a position a pixel."""

    name: ClassVar[str] = "group norm"
    modules: ClassVar[tuple[type[nn.Module], ...]] = (nn.GroupNorm,)

    def _normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, nn.GroupNorm)
        return F.group_norm(x, module.num_groups, eps=module.eps)

    def _by_unit(self, module: nn.Module, x: Tensor) -> Tensor:
        return rearrange(x.reshape(*x.shape[:2], prod(x.shape[2:])), "n units s -> units n s")


class InstanceNormKind(GroupNormKind):
    """``nn.InstanceNorm1d``, ``2d``, ``3d``, likewise."""

    name: ClassVar[str] = "instance norm"
    modules: ClassVar[tuple[type[nn.Module], ...]] = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    methods: ClassVar[tuple[str, ...]] = ("forward", "_apply_instance_norm", "_handle_no_batch_input")

    def _batched(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, _InstanceNorm)
        return x if x.ndim > module._get_no_batch_dim() else x[None]  # type: ignore[no-untyped-call]

    def _normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, _InstanceNorm)
        if module.training or not module.track_running_stats:
            # Without the running statistics, which are not to be updated once more.
            return F.instance_norm(x, eps=module.eps)
        return _by_running_statistics(module, x)


class BatchNormKind(GroupNormKind):
    """``nn.BatchNorm1d``, ``2d``, ``3d``, and ``nn.SyncBatchNorm`` on one process.

    In training the statistics are those of the batch, so that the loss of one example depends on the activations of
    all: what comes back to an example, at any layer whose output passes through a batch norm, is the gradient of the
    whole batch's loss with respect to that example's activations. The sum of all g a is the weight's gradient as
    ever; the part V_n of it is not the gradient of example n's loss alone.
    """

    name: ClassVar[str] = "batch norm"
    modules: ClassVar[tuple[type[nn.Module], ...]] = (
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        nn.SyncBatchNorm,
    )

    def matches(self, module: nn.Module) -> bool:
        """Every batch norm whose statistics are those of this process alone."""
        return super().matches(module) and not _is_synchronised(module)

    def _normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, _BatchNorm)
        if module.training or module.running_mean is None or module.running_var is None:
            # Without the running statistics, which are not to be updated once more.
            return F.batch_norm(x, None, None, training=True, eps=module.eps)
        return _by_running_statistics(module, x)


def _by_running_statistics(module: _BatchNorm | _InstanceNorm, x: Tensor) -> Tensor:
    mean, variance = cast(Tensor, module.running_mean), cast(Tensor, module.running_var)
    return F.batch_norm(x, mean.to(x.dtype), variance.to(x.dtype), training=False, eps=module.eps)


def _is_synchronised(module: nn.Module) -> bool:
    """Whether the module normalises by the statistics of several processes."""
    if not (isinstance(module, nn.SyncBatchNorm) and torch.distributed.is_available()):
        return False
    return torch.distributed.is_initialized() and torch.distributed.get_world_size(module.process_group) > 1


def _shape(module: nn.Module) -> list[int]:
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    return list(module.normalized_shape)
