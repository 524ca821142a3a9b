"""How old what preconditions a layer is, how far the factors have moved since, and of how many examples they are.

What is computed of blocks here reads nothing from the device, so that it may be done on the step path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import einsum
from torch import Tensor

from ..errors import NotReadyError
from ..linalg.damping import factored_damping
from ..linalg.eigen import eigenbases
from ..linalg.sides import Diagonal, Side, inner
from ..linalg.subspace import off_diagonal_share
from ..structures import (
    Block,
    DiagonalBlock,
    EigenBlock,
    KroneckerBlock,
    Trained,
    damped_inverses_of,
    diagonals_in,
)
from .gradients import cosine, of_layer

if TYPE_CHECKING:
    from ..preconditioner import KFAC

PASSES = 0.0
"""It goes through no data."""


@dataclass(frozen=True)
class Staleness:
    """What preconditions a layer in training, beside the averages as they are now.

    Args:
        age: steps since the inverse in use was made; None where nobody noted it.
        off_diagonal_A: the share, in the Frobenius norm, of U^T A U that is off its diagonal, with A as it is now and
            U the eigenvectors of the A that the inverse was made of: 0 where they still fit, at most 1. None of a side
            that is kept as a diagonal, and where a structure has no sides.
        off_diagonal_G: the same of G.
        cosine: of the preconditioned gradients by the inverse in use and by one that is made now; None without a
            gradient.
        residual: |P (F + lambda) g - g| / |g| with P the inverse in use, F and lambda as they are now: 0 where P is
            made now, no unit; None without a gradient.
        effective_captures: (sum w)^2 / sum w^2 over the weights w of the moving average: (1 + rho) / (1 - rho) in the
            end.
        effective_examples: captures times the examples of the last one, over all ranks; None before one was seen.
        effective_positions: captures times the positions of the layer in the last one; None likewise, and of a layer
            whose weight gradients are squared, which has none.
        dimension_A: side of A. Fewer positions than that leave A singular, and the damping decides.
        dimension_G: side of G likewise.

    Cost: an inverse and an eigendecomposition of each side; no pass over data.
    Source: Martens & Grosse 2015 (arXiv:1503.05671), section 5; George et al. 2018 (arXiv:1806.03884), section 4.
    """

    age: int | None
    off_diagonal_A: float | None
    off_diagonal_G: float | None
    cosine: float | None
    residual: float | None
    effective_captures: float
    effective_examples: float | None
    effective_positions: float | None
    dimension_A: int
    dimension_G: int


def measure(kfac: KFAC, *, gradient: Mapping[str, Tensor] | None = None) -> dict[str, Staleness]:
    """The staleness of every layer that has an inverse.

    Where layers are shared out among ranks they are brought together, and all ranks call it.

    Args:
        kfac: that has taken a step.
        gradient: of the loss by parameter name; None to leave out what needs one.

    Raises:
        NotReadyError: nothing was inverted yet.
    """
    factors = kfac._shared.whole()
    names = [name for name in factors.inverses if name in factors.average.G]
    if not names:
        raise NotReadyError("no inverses yet: run a training step (or kfac.update and kfac.precondition) first")
    decay = kfac.schedule.decay_at(kfac._clock.at_most)
    found = {}
    for name in names:
        (block,) = factors.blocks([name]).values()
        damping = factors._dampings({name: block}, kfac.damping_now())[name]
        old = factors.inverses[name]
        angle = residual = None
        if gradient is not None:
            g = of_layer(block, gradient)
            fresh, _ = damped_inverses_of({name: block}, {name: damping}, rule=kfac.damping.rule, previous={})
            angle = cosine(old.matvec(g), fresh[name].matvec(g))
            residual = float(relative_residual(block, old, damping, g))
        of_A, of_G = (None if share is None else float(share) for share in off_diagonal(block, old))
        captures = float(effective_captures(factors.average.A_weight[name], decay))
        # Elsewhere it is backwards that are counted.
        positions = factors.positions.get(name) if factors.layers[name].gradient_sums is None else None
        found[name] = Staleness(
            age=kfac._clock.at_most - factors.made[name] if name in factors.made else None,
            off_diagonal_A=of_A,
            off_diagonal_G=of_G,
            cosine=angle,
            residual=residual,
            effective_captures=captures,
            effective_examples=None if factors.examples is None else captures * factors.examples,
            effective_positions=None if positions is None else captures * float(positions),
            dimension_A=factors.layers[name].layout.d_in,
            dimension_G=factors.layers[name].layout.d_out,
        )
    return found


def effective_captures(weight: Tensor, decay: float) -> Tensor:
    """(sum w)^2 / sum w^2 of the weights w_s = rho^(t - s) of t captures, from their sum.

    With x = rho^t = 1 - (1 - rho) sum w it is (1 + rho) (1 - x) / ((1 - rho) (1 + x)), exact where rho stays the same.

    Args:
        weight: the sum of the weights, as ``MovingAverage`` keeps it.
        decay: rho.
    """
    return (1 + decay) * weight / (2 - weight * (1 - decay))


def kept_dimension(block: Trained, inverse: Block) -> Tensor | None:
    """tr(F P), 0-d: the effective dimension of F with P in the place of (F + lambda I)^-1.

    With the inverse of separately damped factors it is that of the factored damping. None where the two are of types
    that have no closed form together.
    """
    if isinstance(block, KroneckerBlock):
        if isinstance(inverse, KroneckerBlock):
            pairs = zip(block.sides, inverse.sides, strict=True)
            of_A, of_G = (inner(*pair) for pair in pairs)
            return (of_A * of_G).sum()
        if isinstance(inverse, EigenBlock):
            of_A, of_G = diagonals_in(block, (inverse.basis_A, inverse.basis_G))
            return einsum(of_G, inverse.values, of_A, "... o, ... o i, ... i ->")
        return None
    if isinstance(inverse, EigenBlock | DiagonalBlock) and type(inverse) is type(block):
        return (block.values * inverse.values).sum()
    return None


def relative_residual(block: Trained, inverse: Block, damping: Tensor, v: Tensor) -> Tensor:
    """|P (F + lambda) v - v| / |v|, 0-d, with F damped as P is: factor by factor, or as a whole; 0 where v is zero.

    Args:
        block: F.
        inverse: P.
        damping: lambda, of the block's leading shape.
        v: [*matrix_shape].
    """
    if isinstance(block, KroneckerBlock) and isinstance(inverse, KroneckerBlock):
        (A, G), (of_A, of_G) = block.sides, factored_damping(*block.sides, damping)
        left = G @ v + _wide(of_G, v) * v
        damped = left @ A + _wide(of_A, v) * left
    else:
        damped = block.matvec(v) + _wide(damping, v) * v
    length = torch.linalg.vector_norm(v)
    distance: Tensor = torch.linalg.vector_norm(inverse.matvec(damped) - v)
    return distance / torch.where(length > 0, length, 1)


def off_diagonal(block: Trained, inverse: Block) -> tuple[Tensor | None, Tensor | None]:
    """The share of A and of G off their diagonals in the eigenvectors of what an inverse was made of, 0-d each.

    Of an inverse that is known by its eigenbasis nothing is read; of one that is not, its sides are decomposed.
    """
    if not isinstance(block, KroneckerBlock):
        return None, None
    if isinstance(inverse, EigenBlock):
        bases = inverse.basis_A, inverse.basis_G
    elif isinstance(inverse, KroneckerBlock):
        (_, of_A), (_, of_G) = eigenbases(inverse.sides)[0]
        bases = of_A, of_G
    else:
        return None, None
    of_A, of_G = (_share(side, basis) for side, basis in zip(block.sides, bases, strict=True))
    return of_A, of_G


def _share(side: Side, basis: Tensor | None) -> Tensor | None:
    return None if isinstance(side, Diagonal) or basis is None else off_diagonal_share(side, basis.to(side))


def _wide(number: Tensor, v: Tensor) -> Tensor:
    """A number for each of the leading dimensions of v."""
    return number[..., None, None].to(v)
