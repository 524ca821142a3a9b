"""Two estimates over different data as the one over all of it: sums and counts, added before they are divided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..errors import ArgumentError
from ..linalg.moments import of_unit_trace, trace
from .base import Block
from .kronecker import KroneckerBlock
from .sums import sum_of


@dataclass(frozen=True)
class Counts:
    """What the sums of an estimate were divided by.

    Args:
        examples: N.
        terms: M, the loss's divisor, of each head; the head is '' where there is one.
        positions: for each layer, the number of positions that its A is the mean over.
        adds: whether M of two pieces of data is the sum of theirs; not for a loss that is itself a sum, where M is 1.
        of_gradients: the layers whose A is C / tr R, made of weight gradients: R and C are each a part of F.
    """

    examples: float
    terms: dict[str, float]
    positions: dict[str, float]
    adds: dict[str, bool]
    of_gradients: tuple[str, ...] = ()

    @classmethod
    def of(cls, meta: Mapping[str, Any], layers: Mapping[str, Block]) -> Counts:
        """The counts in a Fisher's ``meta``.

        Args:
            meta: with ``counts = {"examples": N, "terms": M, "adds": bool, "positions": {layer: n}}``; M and whether
                it adds are mappings by head where there are several.
            layers: the blocks; of those that are Kronecker blocks ``positions`` is needed.

        Raises:
            ArgumentError: naming what is absent.
        """
        counts = meta.get("counts", {})
        absent = [f"counts['{key}']" for key in ("examples", "terms", "adds") if key not in counts]
        positions = counts.get("positions", {})
        of_gradients = tuple(counts.get("of_gradients", ()))
        absent += [
            f"counts['positions']['{name}']"
            for name, block in layers.items()
            if isinstance(block, KroneckerBlock) and name not in positions and name not in of_gradients
        ]
        if absent or "derived" in meta:
            why = f"it lacks {', '.join(absent)}" if absent else f"it is {meta['derived'][-1]} of an estimate"
            raise ArgumentError(
                f"merge needs what an estimate was divided by, and {why}: merge Fishers as kc.estimate gives them, "
                "before any other verb; + adds any two"
            )
        held = {name: float(value) for name, value in positions.items()}
        terms, adds = _by_head(counts["terms"]), _by_head(counts["adds"])
        return cls(
            float(counts["examples"]),
            {head: float(M) for head, M in terms.items()},
            held,
            {head: bool(one) for head, one in adds.items()},
            of_gradients,
        )

    def with_others(self, other: Counts) -> Counts:
        """Those of all the data."""
        names = [*self.positions, *(name for name in other.positions if name not in self.positions)]
        positions = {name: self.positions.get(name, 0.0) + other.positions.get(name, 0.0) for name in names}
        terms = {
            head: M + other.terms[head] if self.adds[head] else max(M, other.terms[head])
            for head, M in self.terms.items()
        }
        of_gradients = tuple(dict.fromkeys((*self.of_gradients, *other.of_gradients)))
        return Counts(self.examples + other.examples, terms, positions, self.adds, of_gradients)

    def share(self, total: Counts) -> float:
        """What these data's estimate is multiplied by in that of all: M over M of all.

        Raises:
            ArgumentError: heads whose shares differ, and whose Fishers are no longer apart.
        """
        shares = {head: M / total.terms[head] for head, M in self.terms.items()}
        if max(shares.values()) - min(shares.values()) > 1e-12:
            raise ArgumentError(
                f"merge: these data have {shares} of the valid terms of each head, and the heads' Fishers are already "
                "added: estimate over all the data in one call"
            )
        return next(iter(shares.values()))


def _by_head(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {"": value}


def _plain(by_head: Mapping[str, Any]) -> Any:
    return by_head.get("", by_head)


def merged(
    mine: Mapping[str, Block], my_meta: Mapping[str, Any], theirs: Mapping[str, Block], their_meta: Mapping[str, Any]
) -> tuple[dict[str, Block], dict[str, Any]]:
    """The blocks and meta of an estimate over both pieces of data; see ``Fisher.merge``."""
    for key in ("likelihood", "kind", "structure"):
        if my_meta.get(key) != their_meta.get(key):
            raise ArgumentError(
                f"merge: one Fisher has {key} {my_meta.get(key)}, the other {their_meta.get(key)}; expected the same"
            )
    left, right = Counts.of(my_meta, mine), Counts.of(their_meta, theirs)
    total = left.with_others(right)
    blocks: dict[str, Block] = {}
    for name in [*mine, *(name for name in theirs if name not in mine)]:
        if name in mine and name in theirs:
            blocks[name] = _merged_block(mine[name], theirs[name], left, right)
        else:
            # Not used over the other data: nothing to add, while M counts. A Kronecker block keeps its A.
            block, own = (mine[name], left) if name in mine else (theirs[name], right)
            blocks[name] = block * own.share(total)
    counts = {
        "examples": int(total.examples),
        "terms": _plain(total.terms),
        "adds": _plain(total.adds),
        "positions": total.positions,
        **({"of_gradients": list(total.of_gradients)} if total.of_gradients else {}),
    }
    samples = (my_meta.get("samples"), their_meta.get("samples"))
    meta = {**my_meta, "samples": samples[0] if samples[0] == samples[1] else samples, "counts": counts}
    return blocks, meta


def _merged_block(mine: Block, theirs: Block, left: Counts, right: Counts) -> Block:
    total = left.with_others(right)
    my_share, their_share = left.share(total), right.share(total)
    if not (isinstance(mine, KroneckerBlock) and isinstance(theirs, KroneckerBlock)):
        return sum_of(mine * my_share, theirs * their_share)
    if mine.layout != theirs.layout:
        raise ArgumentError(f"merge: {mine.label} has other parameters in one Fisher than in the other")
    if mine.diagonal_sides != theirs.diagonal_sides:
        kept = [" and ".join(block.diagonal_sides) or "neither side" for block in (mine, theirs)]
        raise ArgumentError(
            f"merge: {mine.label} keeps {kept[0]} as diagonal in one Fisher, {kept[1]} in the other: estimate both "
            "with the same max_factor_dim"
        )
    if mine.name in left.of_gradients:
        return _merged_moments(replace(mine, G=mine.G * my_share), replace(theirs, G=theirs.G * their_share))
    positions = (left.positions[mine.name], right.positions[theirs.name])
    held = sum(positions)
    return replace(
        mine,
        A=mine.A * (positions[0] / held) + theirs.A * (positions[1] / held),
        G=mine.G * my_share + theirs.G * their_share,
    )


def _merged_moments(mine: KroneckerBlock, theirs: KroneckerBlock) -> KroneckerBlock:
    """R (x) C / t of both pieces of data: R and C add, each share being in R already and C = t A."""

    def moment(block: KroneckerBlock) -> Tensor:
        t = trace(block.sides[1])
        return block.A * t.reshape(*t.shape, *[1] * (block.A.dim() - t.dim()))

    C = moment(mine) + moment(theirs)
    return replace(mine, A=of_unit_trace(C, leading=len(mine.layout.matrix_shape) - 2), G=mine.G + theirs.G)
