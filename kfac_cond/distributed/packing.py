"""Tensors on their way as stretches of one flat buffer: symmetric matrices as triangles, counts exact to 2^36."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..damping import Rule
from ..layers.layer import Layer
from ..layers.summed import GradientMoments, GradientSquares
from ..linalg.triangles import fold, triangle_size, unfolded
from ..statistics import LayerSums
from ..structures import Block, DiagonalBlock, EigenBlock, KroneckerBlock

LIMB = 2.0**12
"""Counts travel as three numbers below this one: float32 adds 4096 of them without rounding."""


@dataclass(frozen=True)
class Piece:
    """The shape of a tensor on its way, and whether its last two dimensions are a symmetric matrix.

    Args:
        shape: of the tensor.
        symmetric: exactly symmetric in the last two dimensions, of which one triangle is sent.
    """

    shape: tuple[int, ...]
    symmetric: bool = False

    @property
    def numel(self) -> int:
        """How many numbers are sent."""
        if not self.symmetric:
            return prod(self.shape)
        *leading, d, _ = self.shape
        return prod(leading) * triangle_size(d)

    def pack(self, tensor: Tensor, flat: Tensor) -> None:
        """Write the numbers to send into a stretch of zeros."""
        if self.symmetric:
            fold(tensor, flat)
        else:
            flat.copy_(tensor.reshape(-1))

    def packed(self, tensor: Tensor) -> Tensor:
        """The numbers to send, flat."""
        flat = tensor.new_zeros(self.numel)
        self.pack(tensor, flat)
        return flat

    def unpacked(self, flat: Tensor) -> Tensor:
        """The tensor again, in memory of its own."""
        if self.symmetric:
            return unfolded(flat, self.shape)
        return flat.reshape(self.shape).clone()


def limbs(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers as [3, n] of ``dtype``, whose sums over up to 4096 ranks are exact for whole numbers below 2^36."""
    high = (counts / LIMB**2).floor()
    middle = ((counts - high * LIMB**2) / LIMB).floor()
    return torch.stack([high, middle, counts - high * LIMB**2 - middle * LIMB]).to(dtype)


def from_limbs(three: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers [n] whose ``limbs`` were added."""
    high, middle, low = three.to(dtype).unbind()
    return high * LIMB**2 + middle * LIMB + low


def sum_pieces(layer: Layer, slots: int) -> tuple[Piece, ...]:
    """What is sent of a layer's sums: A, and what G is made of."""
    of_A, of_G = layer.sum_shapes
    whole = {side: side not in layer.diagonal_sides for side in "AG"}
    if isinstance(layer.gradient_sums, GradientMoments):
        sides = zip("AG", layer.layout.side_shapes(layer.max_factor_dim), strict=True)
        return Piece(of_A), *(Piece((slots, *shape), whole[side]) for side, shape in sides)
    if layer.gradient_sums is not None:
        return Piece(of_A), Piece((slots, *of_G))
    if layer.triangles:
        return Piece(of_A), Piece((slots, *of_G))
    return Piece(of_A, whole["A"]), Piece((slots, *of_G), whole["G"])


def pack_sums(pieces: Sequence[Piece], sums: LayerSums, flat: Tensor) -> None:
    """Write the numbers of ``sum_pieces`` into a stretch of zeros."""
    of_A, *of_G = pieces
    slots = len(sums.G)
    parts = torch.split(sums.G.reshape(slots, -1), [prod(piece.shape) // slots for piece in of_G], dim=-1)
    places = torch.split(flat, [piece.numel for piece in pieces])
    of_A.pack(sums.A, places[0])
    for piece, part, place in zip(of_G, parts, places[1:], strict=True):
        piece.pack(part.reshape(piece.shape), place)


def unpacked_sums(layer: Layer, pieces: Sequence[Piece], flat: Sequence[Tensor], count: Tensor) -> LayerSums:
    """The sums again, with their count."""
    A, *of_G = (piece.unpacked(one) for piece, one in zip(pieces, flat, strict=True))
    slots = len(of_G[0])
    G = of_G[0] if len(of_G) == 1 else torch.cat([one.reshape(slots, -1) for one in of_G], dim=-1)
    return LayerSums(A, count, G.reshape(slots, *layer.sum_shapes[1]))


def basis_pieces(layer: Layer) -> dict[str, Piece]:
    """What is sent of a layer's eigenbases: the identity of a side that is a diagonal is not."""
    shapes = zip("AG", layer.layout.side_shapes(layer.max_factor_dim), strict=True)
    return {f"basis_{side}": Piece(shape) for side, shape in shapes if side not in layer.diagonal_sides}


def inverse_type(layer: Layer, rule: Rule) -> type[KroneckerBlock | EigenBlock | DiagonalBlock]:
    """The block that a layer's inverse is."""
    if isinstance(layer.gradient_sums, GradientSquares):
        return DiagonalBlock
    return KroneckerBlock if rule == "factored" and not layer.turns else EigenBlock


def inverse_pieces(layer: Layer, rule: Rule) -> dict[str, Piece]:
    """What is sent of a layer's inverse, by the name of the block's tensor; bases that every rank has are not."""
    kind = inverse_type(layer, rule)
    if kind is KroneckerBlock:
        shapes = zip("AG", layer.layout.side_shapes(layer.max_factor_dim), strict=True)
        return {side: Piece(shape, side not in layer.diagonal_sides) for side, shape in shapes}
    bases = basis_pieces(layer) if kind is EigenBlock and not layer.turns else {}
    return bases | {"values": Piece(layer.layout.matrix_shape)}


def inverse_of(layer: Layer, rule: Rule, tensors: Mapping[str, Tensor | None]) -> Block:
    """The block of the tensors that ``inverse_pieces`` names, and of its bases where there are any."""
    kind = inverse_type(layer, rule)
    absent = {"basis_A": None, "basis_G": None} if kind is EigenBlock else {}
    return kind(layer.layout, **absent | dict(tensors), name=layer.name)  # type: ignore[arg-type]
