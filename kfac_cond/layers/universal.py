"""The universal form: a parameter that is known by its gradient alone, whatever the model does with it.

Let D be the gradient, with respect to a parameter as a (d_out x d_in) matrix, of the sum over all terms of -log p at
labels drawn from the model: one backward. Scores have mean zero, and labels are drawn independently of each other given
the inputs, so that what D D^T and the like hold of products between two terms vanishes in expectation:

    E[D o D] / M = the diagonal of F        R = E[D D^T] / M,  C = E[D^T D] / M: both partial traces of F
    t = tr R = tr C = tr F

The block is R (x) C / t, of which R, C and hence t are summed and averaged by themselves and combined where they are
read. D is squared as it comes from one backward, before anything is added or averaged. A parameter is as a layer with
one example, of which D is the gradient: its pairs (a, g) have V = D.
"""

from __future__ import annotations

from math import prod
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from .base import LayerKind
from .layout import WeightLayout
from .summed import MOMENTS, GradientSums

MIN_DRAWS = 10
"""Effective label draws before such a parameter is preconditioned in training.

The square of an entry of D has in one draw a relative standard deviation near sqrt(2), whatever the number of examples:
it is the square of a sum over terms, which tends to a normal variable. After 10 draws it is below one half.
"""


class UniversalKind(LayerKind):
    """Any parameter without a kind of its own; a layer of this kind has no modules, and its parameter one place."""

    name: ClassVar[str] = "universal"
    modules: ClassVar[tuple[type[nn.Module], ...]] = ()
    draws_needed: ClassVar[int] = MIN_DRAWS
    gradient_sums: ClassVar[GradientSums | None] = MOMENTS

    def activations(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Of gradients D [batch, *matrix_shape] the a of which V = D: the identity, or D where it has fewer rows."""
        if _fewer_rows(inputs):
            return rearrange(inputs, "n ... o i -> ... n o i")
        return _identities(inputs, inputs.shape[-1])

    def output_gradients(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """Of gradients D [batch, *matrix_shape] the g of which V = D."""
        if _fewer_rows(gradient):
            return _identities(gradient, gradient.shape[-2])
        return rearrange(gradient, "n ... o i -> ... n i o")


def universal_layout(name: str, shape: tuple[int, ...]) -> WeightLayout:
    """A parameter as a matrix, or a stack of them: its last two dimensions, of those that are not of size one.

    The others count groups. A vector, with one such dimension at most, is a column.

    Args:
        name: canonical name of the parameter.
        shape: its shape.
    """
    long = [index for index, size in enumerate(shape) if size != 1]
    if len(long) < 2:
        return WeightLayout(name, None, shape, output_dims=len(shape))
    groups = prod(shape[index] for index in long[:-2])
    return WeightLayout(name, None, shape, groups=groups, output_dims=long[-1])


def _fewer_rows(gradient: Tensor) -> bool:
    """Whether the identity of the rows is the smaller one."""
    return gradient.shape[-2] < gradient.shape[-1]


def _identities(gradient: Tensor, size: int) -> Tensor:
    """[*groups, batch, size, size]."""
    eye = torch.eye(size, dtype=gradient.dtype, device=gradient.device)
    return eye.expand(*gradient.shape[1:-2], len(gradient), size, size)
