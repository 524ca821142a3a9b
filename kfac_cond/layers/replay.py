"""A module's call run again with a zero added at each linear map's output: the zeros' gradients are the outputs'."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Part
from .sharing import both, kept


@dataclass(frozen=True)
class _Piece:
    """One application of a linear map: its inputs, the zero added to its outputs, and which positions are real."""

    a: Tensor
    zero: Tensor
    keep: Tensor | None


class Replay:
    """What the linear maps of one call were given, and zeros through which gradients of their outputs are read.

    A kind runs its module's arithmetic again on detached inputs and calls ``linear`` where the module multiplies by a
    weight. Parameters are detached as well: the graph of a replay ends at its zeros.

    Args:
        module: whose call it is.
        wanted: names of the parts that are layers; of others nothing is kept.
    """

    def __init__(self, module: nn.Module, wanted: Container[str]) -> None:
        self.module = module
        #: What the module returned, as far as it is differentiable.
        self.outputs: Sequence[Tensor | None] = ()
        self._wanted = wanted
        self._parts: dict[str, Part] = {}
        self._pieces: dict[str, dict[int, _Piece]] = {}

    def linear(self, part: Part, a: Tensor, *, place: int = 0, keep: Tensor | None = None) -> Tensor:
        """W a + b with a part's weight and bias, at positions.

        Args:
            part: whose weight it is; where its rows are groups, those of the group ``place``.
            a: [batch, positions, d_in].
            place: where these positions come among those of other calls.
            keep: [batch, positions, 1] bool, or None where all positions are real.
        """
        weight, bias = self._held(part.weight), self._held(part.bias)
        assert weight is not None
        if part.groups > 1:
            weight = weight.chunk(part.groups)[place]
            bias = None if bias is None else bias.chunk(part.groups)[place]
        z = F.linear(a, weight, bias)
        if part.name not in self._wanted:
            return z
        zero = torch.zeros_like(z, requires_grad=True)
        self._parts[part.name] = part
        self._pieces.setdefault(part.name, {})[place] = _Piece(a.detach(), zero, keep)
        return z + zero

    def _held(self, attribute: str | None) -> Tensor | None:
        if attribute is None:
            return None
        path, _, last = attribute.rpartition(".")
        # A recurrent module without biases has no such attribute.
        held = getattr(self.module.get_submodule(path), last, None)
        return held.detach() if isinstance(held, Tensor) else None

    def inputs(self, name: str, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What a part was given, [..., batch, positions, d_in], and its real positions where not all of them are.

        Groups come in front, the shorter ones filled up; of them the real positions are always said.

        Args:
            name: of the part.
            positions: the batch's mask of real positions.
        """
        pieces = self._in_order(name)
        if self._parts[name].groups == 1:
            a = torch.cat([piece.a for piece in pieces], dim=-2)
            own = [piece.keep for piece in pieces if piece.keep is not None]
            keep = torch.cat(own, dim=-2) if own else None
            return a, both(keep, kept(positions, *a.shape[:2]))
        keeps = []
        for piece in pieces:
            keep = both(piece.keep, kept(positions, *piece.a.shape[:2]))
            keeps.append(piece.a.new_ones(*piece.a.shape[:2], 1, dtype=torch.bool) if keep is None else keep)
        return _stacked([piece.a for piece in pieces]), _stacked(keeps)

    def output_gradients(self, gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """The gradients of the parts' outputs, [..., batch, positions, d_out], of those that any gradient reaches.

        Args:
            gradients: of ``outputs``, None where none arrived.
        """
        pairs = zip(self.outputs, gradients, strict=True)
        reached = [(y, g.to(y.dtype)) for y, g in pairs if y is not None and g is not None and y.requires_grad]
        pieces = {name: self._in_order(name) for name in self._pieces}
        zeros = [piece.zero for of_one in pieces.values() for piece in of_one]
        if not (reached and zeros):
            return {}
        outputs, scores = zip(*reached, strict=True)
        found = iter(torch.autograd.grad(outputs, zeros, scores, retain_graph=True, allow_unused=True))
        arrived: dict[str, Tensor] = {}
        for name, of_one in pieces.items():
            own = [next(found) for _ in of_one]
            if any(g is not None for g in own):
                whole = [torch.zeros_like(piece.zero) if g is None else g for piece, g in zip(of_one, own, strict=True)]
                arrived[name] = torch.cat(whole, dim=-2) if self._parts[name].groups == 1 else _stacked(whole)
        return arrived

    def _in_order(self, name: str) -> list[_Piece]:
        return [piece for _, piece in sorted(self._pieces[name].items())]


def _stacked(pieces: Sequence[Tensor]) -> Tensor:
    """[batch, positions, d] of each group as [groups, batch, positions, d], filled up with zeros."""
    longest = max(piece.shape[1] for piece in pieces)
    return torch.stack([F.pad(piece, (0, 0, 0, longest - piece.shape[1])) for piece in pieces])
