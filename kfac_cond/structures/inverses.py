"""The blocks that training keeps, and their damped inverses, batched over equal sizes, with the failure ladder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from einops import einsum
from torch import Tensor

from ..layers.layer import Layer
from ..layers.summed import IDENTITIES, Bases, EigenSquares, GradientSquares
from ..linalg.damping import factored_damping
from ..linalg.eigen import Eigenbasis, eigenbases
from ..linalg.inverse import attempted_factors, damped_inverses, solves
from ..linalg.ladder import Rung, read_status
from ..linalg.sides import Diagonal, Side, as_tensor, identity_like
from .base import Block, Rule
from .cholesky import CholeskyBlock
from .diagonal import DiagonalBlock
from .eigen import EigenBlock, side_of_basis
from .kronecker import KroneckerBlock

Trained = KroneckerBlock | EigenBlock | DiagonalBlock
"""What training keeps a layer in."""


def averaged(layer: Layer, A: Tensor, G: Tensor, bases: Bases = IDENTITIES) -> Trained:
    """A layer's block from the averages of what is summed of it, in the bases in use."""
    if isinstance(layer.gradient_sums, EigenSquares):
        _, squares = layer.gradient_sums.parts(G, layer.layout)
        return EigenBlock(layer.layout, *bases, squares, layer.name)
    if isinstance(layer.gradient_sums, GradientSquares):
        return DiagonalBlock(layer.layout, G, layer.name)
    return KroneckerBlock(layer.layout, *layer.factors(A, G), name=layer.name)


def scaling_sides(block: Trained) -> tuple[Side, Side]:
    """Two sides whose product has the scale of the block: its own, or the number one and all of its eigenvalues."""
    if isinstance(block, KroneckerBlock):
        return block.sides
    values = block.values.flatten(-2)
    return Diagonal(values), Diagonal(torch.ones_like(values[..., :1]))


def damped_inverses_of(
    blocks: Mapping[str, Trained],
    dampings: Mapping[str, Tensor],
    *,
    rule: Rule,
    previous: Mapping[str, Block],
    uses: int | None = None,
) -> tuple[dict[str, Block], dict[str, Rung]]:
    """(F + damping I)^-1 of each block, and the rung of the failure ladder that each ended on.

    Args:
        blocks: the blocks by layer name.
        dampings: lambda of each, shaped as the block's leading dimensions.
        rule: 'factored' (Cholesky of the separately damped factors) or 'exact' (eigenbases of both); what is diagonal,
            in some basis, has its eigenvalues damped and nothing else.
        previous: the last inverses, which stand in where a factorisation fails.
        uses: products that each inverse serves for; None where it is not known. For few the rule 'factored' keeps the
            Cholesky factors.

    Returns:
        (inverses, rungs); the rung of a block is the higher one of its two factors.
    """
    products = {name: block for name, block in blocks.items() if isinstance(block, KroneckerBlock)}
    made: dict[str, Block] = {}
    if rule == "factored":
        made = _solving({name: one for name, one in products.items() if solves(one.device, uses)}, dampings)
    others = {name: block for name, block in products.items() if name not in made}
    inverses, rungs = (_factored if rule == "factored" else _exact)(others, dampings, previous)
    rungs |= dict.fromkeys(made, Rung.FIRST)
    diagonals = {name: block for name, block in blocks.items() if not isinstance(block, KroneckerBlock)}
    of_diagonals, raised = _reciprocals(diagonals, dampings)
    found = made | inverses | of_diagonals
    return {name: found[name] for name in blocks}, rungs | raised


def _reciprocals(
    blocks: Mapping[str, EigenBlock | DiagonalBlock], dampings: Mapping[str, Tensor]
) -> tuple[dict[str, Block], dict[str, Rung]]:
    damped = {name: damped_inverse(block, dampings[name]) for name, block in blocks.items()}
    raised = read_status([flag.reshape(1) for _, flag in damped.values()])
    found: dict[str, Block] = {name: inverse for name, (inverse, _) in damped.items()}
    return found, {name: Rung.MORE_DAMPING if more else Rung.FIRST for name, more in zip(blocks, raised, strict=True)}


def damped_inverse(block: EigenBlock | DiagonalBlock, damping: Tensor) -> tuple[EigenBlock | DiagonalBlock, Tensor]:
    """(F + damping I)^-1 in the block's own basis, and a 0-d flag: some eigenvalues had to be raised beyond that."""
    side = side_of_basis(block.basis_A, block.basis_G) if isinstance(block, EigenBlock) else 1
    values, raised = damped_values(block.values, side, damping)
    return block.with_values(values.reciprocal()), raised


def damped_sides(
    blocks: Mapping[str, KroneckerBlock], dampings: Mapping[str, Tensor]
) -> tuple[list[Side], list[Tensor]]:
    """A and G of each block in turn, and what is added to the diagonal of each."""
    matrices: list[Side] = []
    added: list[Tensor] = []
    for name, block in blocks.items():
        matrices += block.sides
        added += factored_damping(*block.sides, dampings[name])
    return matrices, added


def _solving(blocks: Mapping[str, KroneckerBlock], dampings: Mapping[str, Tensor]) -> dict[str, Block]:
    """Inverses by their Cholesky factors, of those blocks whose sides both have one; the others are to climb."""
    factors, flags = attempted_factors(*damped_sides(blocks, dampings))
    usable = read_status([flag.reshape(1) for flag in flags])
    pairs = zip(factors[::2], factors[1::2], usable[::2], usable[1::2], strict=True)
    return {
        name: CholeskyBlock(block.layout, as_tensor(A), as_tensor(G), name=block.name)
        for (name, block), (A, G, *both) in zip(blocks.items(), pairs, strict=True)
        if all(both)
    }


def _factored(
    blocks: Mapping[str, KroneckerBlock], dampings: Mapping[str, Tensor], previous: Mapping[str, Block]
) -> tuple[dict[str, Block], dict[str, Rung]]:
    matrices, added = damped_sides(blocks, dampings)
    inverses, rungs = damped_inverses(matrices, added, [None] * len(matrices))
    ended = _higher(blocks, rungs)
    found: dict[str, Block] = {}
    for index, (name, block) in enumerate(blocks.items()):
        if ended[name] >= Rung.PREVIOUS and name in previous:
            # Whole: a fresh side beside an old one would be split by another pi.
            found[name], ended[name] = previous[name], Rung.PREVIOUS
        elif ended[name] >= Rung.PREVIOUS:
            found[name] = block.with_sides(*map(identity_like, block.sides))
        else:
            found[name] = block.with_sides(*inverses[2 * index : 2 * index + 2])
    return found, ended


def _exact(
    blocks: Mapping[str, KroneckerBlock], dampings: Mapping[str, Tensor], previous: Mapping[str, Block]
) -> tuple[dict[str, Block], dict[str, Rung]]:
    bases, rungs = eigenbases([matrix for block in blocks.values() for matrix in block.sides])
    ended = _higher(blocks, rungs)
    pairs = dict(zip(blocks, zip(bases[::2], bases[1::2], strict=True), strict=True))
    damped = {name: damped_values(*product_values(*pair), dampings[name]) for name, pair in pairs.items()}
    raised = read_status([flag.reshape(1) for _, flag in damped.values()])
    found: dict[str, Block] = {}
    for (name, block), more in zip(blocks.items(), raised, strict=True):
        (_, basis_A), (_, basis_G) = pairs[name]
        inverse = EigenBlock(block.layout, basis_A, basis_G, damped[name][0].reciprocal(), block.name)
        if ended[name] < Rung.PREVIOUS:
            found[name] = inverse
            ended[name] = max(ended[name], Rung.MORE_DAMPING) if more else ended[name]
        elif name in previous:
            found[name], ended[name] = previous[name], Rung.PREVIOUS
        else:
            # Without a previous inverse the identity: values of one, whatever the basis.
            found[name] = replace(inverse, values=torch.ones_like(inverse.values))
    return found, ended


def product_values(of_A: Eigenbasis, of_G: Eigenbasis) -> tuple[Tensor, int]:
    """The eigenvalues of G (x) A, and the side whose round-off they carry."""
    return einsum(of_G[0], of_A[0], "... o, ... i -> ... o i"), side_of_basis(of_A[1], of_G[1])


def damped_values(values: Tensor, size: int, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., o, i] with the damping added, and a 0-d flag: some had to be raised beyond what was asked."""
    # With no damping an eigenvalue that is zero but for round-off must not become an infinite step. A block that is
    # all zero has no scale of its own: one leaves its gradient as it is.
    largest = values.amax(dim=(-2, -1), keepdim=True)
    round_off = largest * (torch.finfo(values.dtype).eps * size)
    least = torch.where(round_off > 0, round_off, 1)
    asked = values + damping[..., None, None].to(values)
    usable = asked > round_off
    return torch.where(usable, asked, least), ~usable.all()


def _higher(blocks: Mapping[str, KroneckerBlock], rungs: list[Rung]) -> dict[str, Rung]:
    return {name: max(rungs[2 * index], rungs[2 * index + 1]) for index, name in enumerate(blocks)}
