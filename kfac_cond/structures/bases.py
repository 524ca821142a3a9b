"""The eigenbases that 'ekfac' keeps its layers in, as they follow the factors from refresh to refresh."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..layers.summed import Bases
from ..linalg.eigen import Eigenbasis, eigenbases
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


def decomposed(
    blocks: Mapping[str, KroneckerBlock], previous: Mapping[str, Bases]
) -> tuple[dict[str, tuple[Eigenbasis, Eigenbasis]], dict[str, Rung]]:
    """The eigenbases (of A, of G) of each block, with their eigenvalues, and the rung that each ended on.

    A layer with a side that fails keeps its previous bases, both of them, or takes the identity.
    """
    found, rungs = eigenbases([side for block in blocks.values() for side in block.sides])
    pairs: dict[str, tuple[Eigenbasis, Eigenbasis]] = {}
    ended: dict[str, Rung] = {}
    for index, (name, block) in enumerate(blocks.items()):
        pairs[name] = found[2 * index], found[2 * index + 1]
        ended[name] = max(rungs[2 * index : 2 * index + 2])
        if ended[name] >= Rung.PREVIOUS and name in previous:
            of_A, of_G = (side.diagonal(dim1=-2, dim2=-1) for side in block.sides)
            pairs[name] = (of_A, previous[name][0]), (of_G, previous[name][1])
            ended[name] = Rung.PREVIOUS
    return pairs, ended


def refreshed(
    blocks: Mapping[str, KroneckerBlock], previous: Mapping[str, Bases]
) -> tuple[dict[str, tuple[Eigenbasis, Eigenbasis]], dict[str, Bases], dict[str, Rung]]:
    """New bases of all blocks: decomposed, or followed where one step is enough, which is read in one transfer.

    Returns:
        (decomposed with their eigenvalues, followed, rungs of all).
    """
    known = [name for name in blocks if name in previous]
    close = read_status([near(blocks[name], previous[name]).reshape(1) for name in known])
    follow = [name for name, enough in zip(known, close, strict=True) if enough]
    anew, rungs = decomposed({name: block for name, block in blocks.items() if name not in follow}, previous)
    steps = {name: stepped(blocks[name], previous[name]) for name in follow}
    return anew, steps, rungs | dict.fromkeys(follow, Rung.FIRST)


def _yes(block: KroneckerBlock) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=block.device)
