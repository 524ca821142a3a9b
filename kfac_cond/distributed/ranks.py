"""What the ranks of a run do together at a capture, a refresh and a step; one process by itself does it alone."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..costs import Costing
from ..damping import Rule
from ..errors import KFACError, RankError
from ..layers.layer import Layer
from ..linalg.ladder import Rung
from ..structures import Block
from .exchange import exchanged, union
from .group import Group
from .layout import Grid, Layout
from .packing import Piece, inverse_of, inverse_pieces
from .reduce import Captured, Reduction

Make = Callable[[Container[str]], tuple[dict[str, Block], dict[str, Rung]]]


class Alone:
    """The capture of one process, where the others' would be waited for."""

    def __init__(self, captured: Captured) -> None:
        self._captured = captured

    def wait(self, *, functional: bool) -> Captured:
        """The capture itself."""
        return self._captured


class Ranks:
    """The ranks of one group, with who owns which layer.

    Every method that sends is called by all ranks, in the same order; what it depends on is the same on all of them.

    Args:
        group: of all ranks.
        fraction: of the ranks that precondition a layer, at least one.
    """

    def __init__(self, group: Group, fraction: float) -> None:
        self.group = group
        self.grid = Grid.of(group.size, fraction)
        self.layout: Layout
        grid, rank = self.grid, group.rank
        between = 1 < grid.workers < grid.world
        self._row = group.part(grid.ranks_of_row(rank)) if between else group
        self._column = group.part(grid.ranks_of_column(grid.column(rank))) if between else group

    @property
    def rank(self) -> int:
        """The number of this rank within the group."""
        return self.group.rank

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self.group.size

    def assign(self, layers: Mapping[str, Layer], costing: Costing, *, every: int) -> None:
        """Share these layers out.

        Args:
            layers: by name, in the order that every rank has.
            costing: what costs depend on.
            every: steps between two refreshes.
        """
        self.layout = Layout.of(layers, self.grid, costing, every=every)

    def owned(self) -> list[str]:
        """The layers that this rank owns."""
        return [name for name, owner in self.layout.owners.items() if owner == self.rank]

    def kept(self) -> list[str]:
        """The layers whose averages this rank keeps."""
        return [name for name in self.layout.layers if self.layout.keeps(self.rank, name)]

    def worked(self) -> list[str]:
        """The layers whose inverses this rank has."""
        return [name for name in self.layout.layers if self.layout.works(self.rank, name)]

    # -- a capture ----------------------------------------------------------------------------------------------------

    def reduced(self, captured: Captured) -> Reduction | Alone:
        """Begin to bring the captures of all ranks together."""
        return Alone(captured) if self.size == 1 else Reduction(captured, self.layout, self.group)

    # -- a refresh ----------------------------------------------------------------------------------------------------

    def inverted(
        self, make: Make, previous: Mapping[str, Block], *, rule: Rule
    ) -> tuple[dict[str, Rung], dict[str, Block]]:
        """How far the factorisation of each layer climbed on its owner, and the inverses that this rank works with.

        Args:
            make: gives the inverses and rungs of layers that this rank owns.
            previous: the inverses before; one that stands in is not sent.
            rule: of the damping, which says what an inverse is.

        Raises:
            RankError: a rank did not take part.
        """
        self.layout = replace(self.layout, costing=replace(self.layout.costing, rule=rule))
        if self.size == 1:
            mine, climbed = make(set(self.owned()))
            return climbed, mine
        try:
            mine, climbed = make(set(self.owned()))
        except Exception as error:
            # Said before it is raised: the others would wait for what does not come.
            self.agreed({}, raised=True)
            raise _raised(self.rank, str(error)) from error
        rungs = self.agreed(climbed)
        return rungs, self.spread(mine, rungs, previous)

    def agreed(self, mine: Mapping[str, Rung], *, raised: bool = False) -> dict[str, Rung]:
        """How far the factorisations of all owners climbed, by layer; a layer that none tried is absent.

        Args:
            mine: of the layers of this rank that were tried.
            raised: an error stopped this rank.

        Raises:
            RankError: an error stopped another rank.
        """
        names = list(self.layout.layers)
        numbers = [*(mine[name] + 1 if name in mine else 0 for name in names), (self.rank + 1) * raised]
        codes = torch.tensor(numbers, dtype=torch.int32).to(self._device)
        self.group.all_reduce(codes, "the agreement on what was inverted", largest=True).wait()
        if codes.is_meta:
            # Where there is nothing to read, what is known here stands for all.
            return dict(mine)
        *found, stopped = codes.tolist()
        if stopped and not raised:
            raise _raised(stopped - 1, "see its log")
        return {name: Rung(code - 1) for name, code in zip(names, found, strict=True) if code}

    def spread(
        self, mine: Mapping[str, Block], rungs: Mapping[str, Rung], previous: Mapping[str, Block]
    ) -> dict[str, Block]:
        """The inverses that this rank works with, from their owners.

        Args:
            mine: those that this rank made.
            rungs: as agreed; where the previous inverse stands in nothing is sent.
            previous: the inverses before.
        """
        names = [name for name in rungs if self.layout.works(self.rank, name)]
        fresh = [name for name in names if rungs[name] != Rung.PREVIOUS]
        column = self.grid.column(self.rank)
        stretches = self.layout.inverses(fresh, column)
        pieces = {name: inverse_pieces(self.layout.layers[name], self.layout.costing.rule) for name in fresh}
        flat = exchanged(
            stretches,
            {name: _flat(mine[name], pieces[name]) for name in fresh if name in mine},
            self._column,
            self.grid.ranks_of_column(column),
            sizes={name: sum(piece.numel for piece in of.values()) for name, of in pieces.items()},
            device=self._device,
            what="the inverses from their owners",
        )
        known = {**previous, **{name: self._block(name, one) for name, one in flat.items()}, **mine}
        return {name: known[name] for name in names}

    def _block(self, name: str, flat: Tensor) -> Block:
        layer, rule = self.layout.layers[name], self.layout.costing.rule
        pieces = inverse_pieces(layer, rule)
        parts = torch.split(flat, [piece.numel for piece in pieces.values()])
        tensors = {key: piece.unpacked(part) for (key, piece), part in zip(pieces.items(), parts, strict=True)}
        return inverse_of(layer, rule, {key: one.to(layer.device) for key, one in tensors.items()})

    # -- a step -------------------------------------------------------------------------------------------------------

    def exchanged(self, names: Sequence[str], mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The preconditioned gradients of these layers, as their matrices, from ranks that have the inverses.

        Args:
            names: of layers that have an inverse on some rank; the same on all.
            mine: those that this rank computed.
        """
        stretches = self.layout.results(names, self.rank)
        if not stretches:
            return dict(mine)
        layouts = {name: self.layout.layers[name].layout for name in names}
        flat = exchanged(
            stretches,
            mine,
            self._row,
            self.grid.ranks_of_row(self.rank),
            sizes={name: layout.numel for name, layout in layouts.items()},
            device=self._device,
            what="the preconditioned gradients from their owners",
        )
        return {name: mine.get(name, flat[name].reshape(layouts[name].matrix_shape)) for name in names}

    # -- by itself, on each ------------------------------------------------------------------------------------------

    @contextmanager
    def alike(self, what: str) -> Iterator[None]:
        """What each rank does by itself, on all of them or on none: an error of one is an error of all, at its end.

        Args:
            what: is done, in messages.

        Raises:
            RankError: another rank met an error, or did not take part.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except KFACError as error:
            # Said before it is raised: the others would go on without this rank.
            self.group.objects(str(error), what)
            raise
        for rank, refusal in enumerate(self.group.objects(None, what)):
            if refusal is not None:
                raise RankError(f"rank {rank} refused {what}, which is then taken over by none: {refusal}")

    # -- everything, on all -------------------------------------------------------------------------------------------

    def union(self, mine: Mapping[str, Any], what: str) -> dict[str, Any]:
        """The entries of all ranks by layer: nested dictionaries of tensors and plain values.

        Args:
            mine: of the layers that this rank owns.
            what: it is for, in messages.
        """
        found = union(dict(mine), self.group, self._device, what)
        together = {name: entry for one in found for name, entry in one.items()}
        return {name: together[name] for name in self.layout.layers if name in together}

    @property
    def _device(self) -> torch.device:
        """Where buffers are."""
        return next(iter(self.layout.layers.values())).device


def _flat(block: Block, pieces: Mapping[str, Piece]) -> Tensor:
    """The numbers of an inverse, as they are sent."""
    return torch.cat([piece.packed(getattr(block, key)) for key, piece in pieces.items()])


def _raised(rank: int, what: str) -> RankError:
    return RankError(
        f"rank {rank} could not invert the layers that it owns ({what}): nothing is changed by this step. Look "
        f"there, and start again from the last checkpoint."
    )
