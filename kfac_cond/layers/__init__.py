"""Layer kinds, one file each: every layer brought to [batch, positions, features] before any mathematics."""

from __future__ import annotations

from torch import nn

from .attention import AttentionKind
from .base import LayerKind, Override, Part
from .bilinear import BilinearKind
from .compound import CompoundKind
from .convolution import ConvolutionKind, TransposedConvolutionKind
from .embedding import EmbeddingBagKind, EmbeddingKind
from .layout import WeightLayout
from .linear import LinearKind, TransposedLinearKind
from .normalisation import BatchNormKind, GroupNormKind, InstanceNormKind, LayerNormKind, RMSNormKind
from .recurrent import RecurrentCellKind, RecurrentKind
from .registry import register_layer, registered, unregister_layer
from .universal import UniversalKind

#: The kinds with a Kronecker form, in the order in which they are asked.
KINDS: tuple[LayerKind, ...] = (
    LinearKind(),
    TransposedLinearKind(),
    ConvolutionKind(),
    TransposedConvolutionKind(),
    BilinearKind(),
    EmbeddingKind(),
    EmbeddingBagKind(),
    LayerNormKind(),
    RMSNormKind(),
    GroupNormKind(),
    InstanceNormKind(),
    BatchNormKind(),
    AttentionKind(),
    RecurrentKind(),
    RecurrentCellKind(),
)

#: The form of whatever no kind takes.
UNIVERSAL = UniversalKind()


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of ``module``, or None where it has no (a, g) form."""
    return next((kind for kind in (*registered(module), *KINDS) if kind.matches(module)), None)


def overridden(module: nn.Module) -> Override | None:
    """The type that ``module`` would count as, had its class or somebody else not replaced a method; or None."""
    kinds = (*registered(module), *KINDS)
    return next((found for kind in kinds if (found := kind.overridden(module)) is not None), None)


__all__ = [
    "KINDS",
    "UNIVERSAL",
    "AttentionKind",
    "BatchNormKind",
    "BilinearKind",
    "CompoundKind",
    "ConvolutionKind",
    "EmbeddingBagKind",
    "EmbeddingKind",
    "GroupNormKind",
    "InstanceNormKind",
    "LayerKind",
    "LayerNormKind",
    "LinearKind",
    "Override",
    "Part",
    "RMSNormKind",
    "RecurrentCellKind",
    "RecurrentKind",
    "TransposedConvolutionKind",
    "TransposedLinearKind",
    "UniversalKind",
    "WeightLayout",
    "kind_of",
    "overridden",
    "register_layer",
    "unregister_layer",
]
