"""Damped inverses of many Kronecker blocks at once, batched over equal sizes, with the failure ladder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from einops import einsum
from torch import Tensor

from ..linalg.damping import factored_damping
from ..linalg.eigen import Eigenbasis, eigenbases
from ..linalg.inverse import damped_inverses
from ..linalg.ladder import Rung
from .base import Block, Rule
from .eigen import EigenBlock
from .kronecker import KroneckerBlock


def damped_inverses_of(
    blocks: Mapping[str, KroneckerBlock],
    dampings: Mapping[str, Tensor],
    *,
    rule: Rule,
    previous: Mapping[str, Block],
) -> tuple[dict[str, Block], dict[str, Rung]]:
    """(F + damping I)^-1 of each block, and the rung of the failure ladder that each ended on.

    Args:
        blocks: the blocks by layer name.
        dampings: lambda of each, shaped as the block's leading dimensions.
        rule: 'factored' (Cholesky of the separately damped factors) or 'exact' (eigenbases of both).
        previous: the last inverses, which stand in where a factorisation fails.

    Returns:
        (inverses, rungs); the rung of a block is the higher one of its two factors.
    """
    if rule == "factored":
        return _factored(blocks, dampings, previous)
    return _exact(blocks, dampings, previous)


def _factored(
    blocks: Mapping[str, KroneckerBlock], dampings: Mapping[str, Tensor], previous: Mapping[str, Block]
) -> tuple[dict[str, Block], dict[str, Rung]]:
    matrices: list[Tensor] = []
    added: list[Tensor] = []
    before: list[Tensor | None] = []
    for name, block in blocks.items():
        last = previous.get(name)
        matrices += [block.A, block.G]
        added += factored_damping(block.A, block.G, dampings[name])
        before += [last.A, last.G] if isinstance(last, KroneckerBlock) else [None, None]
    inverses, rungs = damped_inverses(matrices, added, before)
    ended = _higher(blocks, rungs)
    found: dict[str, Block] = {}
    for index, (name, block) in enumerate(blocks.items()):
        last = previous.get(name)
        if ended[name] == Rung.PREVIOUS and isinstance(last, KroneckerBlock):
            # Whole: a fresh side beside an old one would be split by another pi.
            found[name] = last
        else:
            found[name] = replace(block, A=inverses[2 * index], G=inverses[2 * index + 1])
    return found, ended


def _exact(
    blocks: Mapping[str, KroneckerBlock], dampings: Mapping[str, Tensor], previous: Mapping[str, Block]
) -> tuple[dict[str, Block], dict[str, Rung]]:
    bases, rungs = eigenbases([matrix for block in blocks.values() for matrix in (block.A, block.G)])
    ended = _higher(blocks, rungs)
    found: dict[str, Block] = {}
    for index, (name, block) in enumerate(blocks.items()):
        last = previous.get(name)
        failed = ended[name] >= Rung.PREVIOUS
        if failed and isinstance(last, EigenBlock):
            found[name], ended[name] = last, Rung.PREVIOUS
        else:
            # Without a previous inverse the identity: values of one, whatever the basis.
            inverse = _exact_inverse(block, bases[2 * index], bases[2 * index + 1], dampings[name])
            found[name] = replace(inverse, values=torch.ones_like(inverse.values)) if failed else inverse
    return found, ended


def _exact_inverse(block: KroneckerBlock, of_A: Eigenbasis, of_G: Eigenbasis, damping: Tensor) -> EigenBlock:
    """(G (x) A + damping I)^-1 in the eigenbasis."""
    values = einsum(of_G[0], of_A[0], "... o, ... i -> ... o i")
    # With no damping an eigenvalue that is zero but for round-off must not become an infinite step.
    round_off = values.amax(dim=(-2, -1), keepdim=True) * torch.finfo(values.dtype).eps
    damped = torch.maximum(values + damping[..., None, None], round_off)
    # A block that is all zero has no scale of its own: left as it is.
    return EigenBlock(block.layout, of_A[1], of_G[1], torch.where(damped > 0, damped, 1).reciprocal(), block.name)


def _higher(blocks: Mapping[str, KroneckerBlock], rungs: list[Rung]) -> dict[str, Rung]:
    return {name: max(rungs[2 * index], rungs[2 * index + 1]) for index, name in enumerate(blocks)}
