"""Damped inverses of some blocks on the step path: what fails is replaced on the device by what there was before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..linalg.eigen import attempted_eigenbases
from ..linalg.inverse import attempted_inverses
from .base import Block, Rule
from .diagonal import DiagonalBlock
from .eigen import EigenBlock
from .inverses import Trained, damped_inverse, damped_sides, damped_values, product_values
from .kronecker import KroneckerBlock

#: What an inverse of each type holds.
_HELD: dict[type[Block], tuple[str, ...]] = {
    KroneckerBlock: ("A", "G"),
    EigenBlock: ("basis_A", "basis_G", "values"),
    DiagonalBlock: ("values",),
}


def unread_inverses_of(
    blocks: Mapping[str, Trained],
    dampings: Mapping[str, Tensor],
    *,
    rule: Rule,
    previous: Mapping[str, Block],
) -> tuple[dict[str, Block], dict[str, Tensor]]:
    """(F + damping I)^-1 of each block without a look at whether it worked; one that failed is the previous one.

    Of a block in a basis of its own nothing fails that its eigenvalues do not.

    The rule 'exact' waits for the device all the same, since eigh does.

    Args:
        blocks, dampings, rule: as for ``damped_inverses_of``.
        previous: the last inverse of each.

    Returns:
        (inverses, failed): a 0-d bool for each, on its device.
    """
    products = {name: block for name, block in blocks.items() if isinstance(block, KroneckerBlock)}
    found, usable = (_factored if rule == "factored" else _exact)(products, dampings)
    for name, block in blocks.items():
        if not isinstance(block, KroneckerBlock):
            found[name], _ = damped_inverse(block, dampings[name])
            usable[name] = torch.isfinite(block.values.sum())
    inverses, failed = {}, {}
    for name in blocks:
        old = previous[name]
        if isinstance(blocks[name], EigenBlock):
            # Its basis was seen to, and what is averaged is in it.
            inverses[name], failed[name] = found[name], ~usable[name]
        elif type(old) is not type(found[name]):
            # Of another rule, as after a resume with another damping: it serves until all are looked at.
            inverses[name], failed[name] = old, torch.ones_like(usable[name])
        else:
            inverses[name], failed[name] = _chosen(usable[name], found[name], old), ~usable[name]
    return inverses, failed


def _factored(
    blocks: Mapping[str, KroneckerBlock], dampings: Mapping[str, Tensor]
) -> tuple[dict[str, Block], dict[str, Tensor]]:
    inverses, flags = attempted_inverses(*damped_sides(blocks, dampings))
    pairs = zip(blocks.items(), inverses[::2], inverses[1::2], strict=True)
    found: dict[str, Block] = {name: block.with_sides(A, G) for (name, block), A, G in pairs}
    return found, _both(blocks, flags)


def _exact(
    blocks: Mapping[str, KroneckerBlock], dampings: Mapping[str, Tensor]
) -> tuple[dict[str, Block], dict[str, Tensor]]:
    bases, flags = attempted_eigenbases([side for block in blocks.values() for side in block.sides])
    found: dict[str, Block] = {}
    for (name, block), of_A, of_G in zip(blocks.items(), bases[::2], bases[1::2], strict=True):
        damped, _ = damped_values(*product_values(of_A, of_G), dampings[name])
        found[name] = EigenBlock(block.layout, of_A[1], of_G[1], damped.reciprocal(), block.name)
    return found, _both(blocks, flags)


def _both(blocks: Mapping[str, KroneckerBlock], flags: list[Tensor]) -> dict[str, Tensor]:
    # Whole: a fresh side beside an old one would be split by another pi.
    return {name: A & G for name, A, G in zip(blocks, flags[::2], flags[1::2], strict=True)}


def _chosen(usable: Tensor, new: Block, old: Block) -> Block:
    """The new block where it is usable, else the old one, decided on the device."""
    held = {name: tensor for name in _HELD[type(new)] if (tensor := getattr(new, name)) is not None}
    chosen = {name: torch.where(usable, tensor, getattr(old, name).to(tensor)) for name, tensor in held.items()}
    return replace(new, **chosen)  # type: ignore[type-var]
