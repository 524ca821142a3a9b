"""What is measured of a layer at one training step: tensors of one number each, and nothing is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..damping import DampingNow
from ..factors import Factors
from ..gradients import gradient_matrix, rate_of
from ..layers.layer import Layer
from ..layers.shards import whole
from ..statistics import statistic_dtype
from ..structures import Block, DiagonalBlock, EigenBlock, KroneckerBlock, Trained, diagonals_in
from ..watching import Step
from .readings import ABSENT
from .staleness import effective_captures, kept_dimension, off_diagonal, relative_residual

OF_STEPS = ("gradient_norm", "update_norm", "weight_norm", "step_to_weight", "cosine", "decrease", "kl")
"""Of a layer's gradient g, its preconditioned gradient u as the optimizer gets it, and its weights w; eta is the
learning rate: |g|, |u|, |w|, eta |u| / |w|, the cosine of u and g, eta g^T u and eta^2 u^T F u / 2."""

OF_FACTORS = (
    "trace",
    "participation",
    "effective_dimension",
    "residual",
    "off_diagonal_A",
    "off_diagonal_G",
    "dead_inputs",
    "dead_outputs",
    "effective_examples",
    "effective_positions",
)
"""tr F; (tr F)^2 / tr F^2; tr F P with P the inverse in use; |P (F + lambda) g - g| / |g|; the shares of A and G off
their diagonals in the basis in use; zero entries of the diagonals of A and G; what the averages are made of."""

STALE = "stale_cosine"
"""Cosine of the gradients that the inverse before and the inverse after the last refresh precondition."""


def of_step(layer: Layer, step: Step, g: Tensor, u: Tensor, block: Trained | None) -> dict[str, Tensor]:
    """``OF_STEPS`` of a layer.

    Args:
        layer: the layer.
        step: gives the learning rate.
        g: its gradient as a matrix.
        u: what became of it.
        block: F; None where it is kept elsewhere.
    """
    rate = rate_of(layer, step.rates)
    eta = rate.reshape(()).to(g) if isinstance(rate, Tensor) else g.new_full((), rate)
    of_g, of_u, of_w = torch.linalg.vector_norm(g), torch.linalg.vector_norm(u), weight_norm(layer).to(g)
    slope = (g * u).sum()
    found = {
        "gradient_norm": of_g,
        "update_norm": of_u,
        "weight_norm": of_w,
        "step_to_weight": _over(eta * of_u, of_w),
        "decrease": eta * slope,
    }
    if layer.layout.numel > 1:
        # Of one number it is always 1.
        found["cosine"] = _over(slope, of_g * of_u)
    if block is not None:
        found["kl"] = 0.5 * eta.square() * (u * block.matvec(u)).sum()
    return found


def of_factors(
    layer: Layer, factors: Factors, block: Trained, inverse: Block | None, g: Tensor, damping: DampingNow, decay: float
) -> dict[str, Tensor]:
    """``OF_FACTORS`` of a layer whose averages are here."""
    name = layer.name
    found = {
        "trace": block.trace(),
        "participation": _over(block.trace().square(), block.frobenius_norm().square()),
    }
    if isinstance(block, KroneckerBlock):
        dead = ((diagonal == 0).sum() for diagonal in side_diagonals(block))
        found |= dict(zip(("dead_inputs", "dead_outputs"), dead, strict=True))
    captures = effective_captures(factors.average.A_weight[name], decay)
    if factors.examples is not None:
        found["effective_examples"] = captures * factors.examples
    if layer.gradient_sums is None and name in factors.positions:
        found["effective_positions"] = captures * factors.positions[name].to(captures)
    if inverse is None:
        return found
    added = factors._dampings({name: block}, damping)[name]
    found["residual"] = relative_residual(block, inverse, added, g)
    dimension = kept_dimension(block, inverse)
    if dimension is not None:
        found["effective_dimension"] = dimension
    if isinstance(inverse, EigenBlock):
        shares = zip(("off_diagonal_A", "off_diagonal_G"), off_diagonal(block, inverse), strict=True)
        found |= {key: share for key, share in shares if share is not None}
    return found


def spectra(block: Trained, inverse: Block | None) -> dict[str, Tensor]:
    """The diagonals of A and G; in the basis of the inverse, where it has one, so that they are nearly eigenvalues."""
    if isinstance(block, KroneckerBlock) and isinstance(inverse, EigenBlock):
        return dict(zip("AG", diagonals_in(block, (inverse.basis_A, inverse.basis_G)), strict=True))
    return dict(zip("AG", side_diagonals(block), strict=True))


def side_diagonals(block: Trained) -> tuple[Tensor, Tensor]:
    """Of A and of G; of a block without sides the sums of its diagonal, or of its eigenvalues, over the other side."""
    if isinstance(block, KroneckerBlock):
        of_A, of_G = (side.diagonal(dim1=-2, dim2=-1) for side in block.sides)
        return of_A, of_G
    assert isinstance(block, EigenBlock | DiagonalBlock)
    return block.values.sum(-2), block.values.sum(-1)


def gradient_of(layer: Layer, gradients: Mapping[str, Tensor], grad_scale: Tensor | None) -> Tensor:
    """A layer's gradient as its matrix, without a gradient scaler's factor; of shards all ranks bring it together."""
    matrix = gradient_matrix(layer, gradients)
    return matrix if grad_scale is None else matrix / grad_scale.to(matrix)


def weight_norm(layer: Layer) -> Tensor:
    """|w| over what trains of a layer, 0-d; of shards only a number is brought together."""
    squares = [
        whole(p.detach().to(statistic_dtype(p.dtype)).square().sum()).to(layer.device)
        for p in layer.parameters.values()
    ]
    return torch.stack(squares).sum().sqrt()


def angle(left: Tensor, right: Tensor) -> Tensor:
    """The cosine of two tensors, 0-d; absent where one is zero."""
    return _over((left * right).sum(), torch.linalg.vector_norm(left) * torch.linalg.vector_norm(right))


def _over(number: Tensor, other: Tensor) -> Tensor:
    """The quotient; absent where the divisor is not positive."""
    return torch.where(other > 0, number / torch.where(other > 0, other, 1), ABSENT)
