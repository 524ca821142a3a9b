"""The eigenbases that 'ekfac' keeps its layers in, as they follow the factors from refresh to refresh."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..layers.summed import Bases
from ..linalg.eigen import eigenbases
from ..linalg.ladder import Rung, read_status
from ..linalg.sides import Diagonal
from ..linalg.subspace import OFF_DIAGONAL, followed, off_diagonal_share
from .kronecker import KroneckerBlock


def near(block: KroneckerBlock, bases: Bases) -> Tensor:
    """Whether one step from the bases is enough for the block's factors, 0-d bool."""
    shares = [
        off_diagonal_share(side, basis.to(side))
        for side, basis in zip(block.sides, bases, strict=True)
        if not isinstance(side, Diagonal) and basis is not None
    ]
    return torch.stack([share <= OFF_DIAGONAL for share in shares]).all() if shares else _yes(block)


def stepped(block: KroneckerBlock, bases: Bases) -> Bases:
    """The bases after one step towards those of the block's factors."""
    of_A, of_G = (
        None if isinstance(side, Diagonal) or basis is None else followed(side, basis.to(side))
        for side, basis in zip(block.sides, bases, strict=True)
    )
    return of_A, of_G


def diagonals_in(block: KroneckerBlock, bases: Bases) -> tuple[Tensor, Tensor]:
    """The diagonals of the block's factors in these bases, none negative: of A [..., d_in], of G [..., d_out]."""
    of_A, of_G = (
        side.diagonal(dim1=-2, dim2=-1)
        if isinstance(side, Diagonal) or basis is None
        else (basis.to(side) * (side @ basis.to(side))).sum(dim=-2)
        for side, basis in zip(block.sides, bases, strict=True)
    )
    return of_A.clamp(min=0), of_G.clamp(min=0)


def decomposed(
    blocks: Mapping[str, KroneckerBlock], previous: Mapping[str, Bases]
) -> tuple[dict[str, Bases], dict[str, Rung]]:
    """The eigenbases (of A, of G) of each block, and the rung that each ended on.

    A layer with a side that fails keeps its previous bases, both of them, or takes the identity.
    """
    found, rungs = eigenbases([side for block in blocks.values() for side in block.sides])
    bases: dict[str, Bases] = {}
    ended: dict[str, Rung] = {}
    for index, name in enumerate(blocks):
        (_, of_A), (_, of_G) = found[2 * index : 2 * index + 2]
        bases[name] = of_A, of_G
        ended[name] = max(rungs[2 * index : 2 * index + 2])
        if ended[name] >= Rung.PREVIOUS and name in previous:
            bases[name], ended[name] = previous[name], Rung.PREVIOUS
    return bases, ended


def refreshed(
    blocks: Mapping[str, KroneckerBlock], previous: Mapping[str, Bases]
) -> tuple[dict[str, Bases], dict[str, Rung]]:
    """New bases of all blocks: decomposed, or followed where one step is enough, which is read in one transfer.

    Returns:
        (bases, rungs) of all.
    """
    known = [name for name in blocks if name in previous]
    close = read_status([near(blocks[name], previous[name]).reshape(1) for name in known])
    follow = [name for name, enough in zip(known, close, strict=True) if enough]
    anew, rungs = decomposed({name: block for name, block in blocks.items() if name not in follow}, previous)
    steps = {name: stepped(blocks[name], previous[name]) for name in follow}
    return anew | steps, rungs | dict.fromkeys(follow, Rung.FIRST)


def _yes(block: KroneckerBlock) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=block.device)
