"""What a layer costs, from shapes alone: numbers held, and operations of a capture and of a refresh."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from .damping import Rule
from .layers.layer import Layer
from .layers.summed import EigenSquares, GradientSquares
from .linalg.inverse import solves
from .linalg.products import gram_flops
from .statistics import count_dtype, statistic_dtype

_CUBIC = {"factored": 3, "exact": 27}
"""Operations of one factorisation over d^3 / 3: a Cholesky factor takes 1 and the inverse from it 2; an
eigendecomposition with its vectors about 27 (Golub & Van Loan, Matrix Computations, section 8.3)."""


@dataclass(frozen=True)
class Costing:
    """What costs depend on beside a layer's shapes.

    Args:
        rule: of the damping; 'factored' holds inverses of both sides, 'exact' their eigenbases and the eigenvalues.
        heads: number of heads of the likelihood, each with an average of G of its own.
        structure: that training keeps layers in where no rule says another.
        uses: products that an inverse serves for; None where it is not known. For few, factors alone are kept.
    """

    rule: Rule = "factored"
    heads: int = 1
    structure: str = "kfac"
    uses: int | None = None


def factor_bytes(layer: Layer, costing: Costing) -> int:
    """Bytes of the moving averages of what is summed for A and for G, with the weights that divide them."""
    of_A, of_G = layer.sum_shapes
    numbers = prod(of_A) + costing.heads * prod(of_G)
    # Of layers that wait for several draws of labels these are counted, and their squares.
    counts = 1 + costing.heads + 2 * (layer.kind.draws_needed > 1)
    dtype = layer.rule.storage or statistic_dtype(layer.like.dtype)
    return numbers * dtype.itemsize + counts * count_dtype(layer.like.device).itemsize


def sum_bytes(layer: Layer, costing: Costing) -> int:
    """Bytes of what one capture sums for A and for G, which waits for its step."""
    of_A, of_G = layer.sum_shapes
    return (prod(of_A) + costing.heads * prod(of_G)) * statistic_dtype(layer.like.dtype).itemsize


def inverse_bytes(layer: Layer, costing: Costing) -> int:
    """Bytes of what the layer's gradient is preconditioned with."""
    if isinstance(layer.gradient_sums, GradientSquares):
        numbers = prod(layer.layout.matrix_shape)
    elif _rule(layer, costing) == "exact":
        # The basis of a diagonal side is the identity, which is not held.
        kept = [shape for shape in _sides(layer) if _is_whole(layer, shape)]
        numbers = sum(map(prod, kept)) + prod(layer.layout.matrix_shape)
    else:
        numbers = sum(map(prod, _sides(layer)))
    return numbers * statistic_dtype(layer.like.dtype).itemsize


def basis_bytes(layer: Layer) -> int:
    """Bytes of the eigenbases of a layer in 'ekfac', which every rank has, and of no other."""
    kept = [shape for shape in _sides(layer) if layer.turns and _is_whole(layer, shape)]
    return sum(map(prod, kept)) * statistic_dtype(layer.like.dtype).itemsize


def refresh_flops(layer: Layer, costing: Costing) -> int:
    """Floating-point operations of inverting both sides, of their factors where these serve, or of the diagonal."""
    if isinstance(layer.gradient_sums, GradientSquares):
        return prod(layer.layout.matrix_shape)
    rule = _rule(layer, costing)
    thirds = 1 if rule == "factored" and solves(layer.device, costing.uses) else _CUBIC[rule]
    return sum(
        prod(shape) * shape[-1] * thirds // 3 if _is_whole(layer, shape) else prod(shape) for shape in _sides(layer)
    )


AT_ONCE = {"cpu": 2**19}
"""Numbers of the sides of layers that are inverted at a time, by type of device, unless one layer alone has more."""
AT_ONCE_ELSEWHERE = 2**28
"""The same on every other device, which inverts many matrices of one size at once, and is waited for each time."""


def in_parts(names: Iterable[str], layers: Mapping[str, Layer]) -> Iterator[list[str]]:
    """Layers in their order, as many at a time as are inverted together."""
    part: list[str] = []
    room = 0
    for name in names:
        layer = layers[name]
        size = sum(map(prod, _sides(layer)))
        if size > room:
            if part:
                yield part
            part, room = [], AT_ONCE.get(layer.device.type, AT_ONCE_ELSEWHERE)
        part.append(name)
        room -= size
    if part:
        yield part


def update_flops(layer: Layer, costing: Costing) -> int:
    """Floating-point operations of preconditioning one gradient of the layer."""
    numbers = prod(layer.layout.matrix_shape)
    if isinstance(layer.gradient_sums, GradientSquares):
        return numbers
    # A product with each side; with the exact rule into both bases and out of them again.
    each = sum(2 * numbers * shape[-1] if _is_whole(layer, shape) else numbers for shape in _sides(layer))
    return 2 * each + numbers if _rule(layer, costing) == "exact" else each


def capture_flops(layer: Layer, rows: int, examples: int, saved: int = 0) -> int:
    """Floating-point operations of adding one draw of labels to what is summed of the layer.

    Of a layer whose weight gradients are made and squared these come first; the universal form has the one of the
    backward, whatever the batch.

    Args:
        layer: the layer.
        rows: positions of all examples; examples for 'reduce'.
        examples: of the batch.
        saved: operations of the outer products of inputs that are not done.
    """
    of_A, of_G = map(prod, _sides(layer))
    numbers = prod(layer.layout.matrix_shape)
    if layer.gradient_sums is None:
        return sum(moment_flops(layer, round(rows * layer.fraction), shape) for shape in _sides(layer)) - saved
    made, count = (2 * rows * numbers, examples) if layer.modules else (0, 1)
    if isinstance(layer.gradient_sums, EigenSquares):
        # Both moments, both halves of the pairs in the other basis, and the squares.
        return 4 * rows * (of_A + of_G) + made + 2 * count * numbers
    if isinstance(layer.gradient_sums, GradientSquares):
        return made + 2 * count * numbers
    return made + 2 * count * (layer.layout.d_out * of_A + layer.layout.d_in * of_G)


def moment_flops(layer: Layer, rows: int, shape: tuple[int, ...]) -> int:
    """Floating-point operations of summing the outer products of rows for one side of a layer.

    Args:
        layer: the layer.
        rows: their number.
        shape: of the side.
    """
    if not _is_whole(layer, shape):
        return 2 * rows * prod(shape)
    *groups, d, _ = shape
    return prod(groups) * gram_flops(rows, d, layer.like.device)


def _rule(layer: Layer, costing: Costing) -> Rule:
    """How the layer is decomposed: an eigenbasis whatever the rule, where it is kept in one."""
    return "exact" if layer.turns else costing.rule


def _sides(layer: Layer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return layer.layout.side_shapes(layer.max_factor_dim)


def _is_whole(layer: Layer, shape: tuple[int, ...]) -> bool:
    """Whether a side of this shape is a matrix, not a diagonal."""
    return len(shape) == len(layer.layout.matrix_shape)
