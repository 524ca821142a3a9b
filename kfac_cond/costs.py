"""What a layer costs, from shapes alone: numbers held, and operations of a capture and of a refresh."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from .damping import Rule
from .layers.survey import Layer
from .statistics import count_dtype, statistic_dtype

_CUBIC = {"factored": 1, "exact": 9}
"""Operations of one factorisation over d^3: a Cholesky factor takes 1/3 and the inverse from it 2/3; an
eigendecomposition with its vectors about 9 (Golub & Van Loan, Matrix Computations, section 8.3)."""


@dataclass(frozen=True)
class Plan:
    """What costs depend on beside a layer's shapes.

    Args:
        rule: of the damping; 'factored' holds inverses of both sides, 'exact' their eigenbases and the eigenvalues.
        heads: number of heads of the likelihood, each with an average of G of its own.
    """

    rule: Rule = "factored"
    heads: int = 1


def factor_bytes(layer: Layer, plan: Plan) -> int:
    """Bytes of the moving averages of A and of G, and of their weights."""
    weight = layer.weight
    of_A, of_G = layer.layout.side_shapes(layer.max_factor_dim)
    numbers = prod(of_A) + plan.heads * prod(of_G)
    return numbers * statistic_dtype(weight.dtype).itemsize + (1 + plan.heads) * count_dtype(weight.device).itemsize


def inverse_bytes(layer: Layer, plan: Plan) -> int:
    """Bytes of what the layer's gradient is preconditioned with."""
    sides = layer.layout.side_shapes(layer.max_factor_dim)
    if plan.rule == "exact":
        # The basis of a diagonal side is the identity, which is not held.
        kept = [shape for shape, d in zip(sides, _sizes(layer), strict=True) if d <= layer.max_factor_dim]
        numbers = sum(map(prod, kept)) + prod(layer.layout.matrix_shape)
    else:
        numbers = sum(map(prod, sides))
    return numbers * statistic_dtype(layer.weight.dtype).itemsize


def refresh_flops(layer: Layer, plan: Plan) -> int:
    """Floating-point operations of inverting both sides."""
    return layer.layout.groups * sum(
        _CUBIC[plan.rule] * d**3 if d <= layer.max_factor_dim else d for d in _sizes(layer)
    )


def capture_flops(layer: Layer, positions: int) -> int:
    """Floating-point operations of adding the products of ``positions`` rows to A and to G, for one draw of labels."""
    return 2 * positions * layer.layout.groups * sum(d**2 if d <= layer.max_factor_dim else d for d in _sizes(layer))


def _sizes(layer: Layer) -> tuple[int, int]:
    return layer.layout.d_in, layer.layout.d_out
