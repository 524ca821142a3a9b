"""Who has which layer, and what travels for it: from shapes alone, for the ranks there are or for any number."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..costs import Costing, refresh_flops, update_flops
from ..layers.layer import Layer
from ..statistics import statistic_dtype
from .packing import basis_pieces, inverse_pieces, sum_pieces

Kind = Literal["all_reduce", "reduce", "broadcast", "all_to_all"]


@dataclass(frozen=True)
class Grid:
    """The ranks as a grid: each layer belongs to a column, whose ranks all precondition it.

    Ranks of a row follow one another, since what goes along rows travels at every step, along columns at a refresh.

    Args:
        world: number of ranks.
        workers: ranks of a column, a divisor of ``world``.
    """

    world: int
    workers: int

    @classmethod
    def of(cls, world: int, fraction: float) -> Grid:
        """The grid whose columns are nearest to a fraction of all ranks; the larger of two that are as near."""
        divisors = [n for n in range(1, world + 1) if world % n == 0]
        return cls(world, min(divisors, key=lambda n: (abs(n - fraction * world), -n)))

    @property
    def columns(self) -> int:
        """Number of columns."""
        return self.world // self.workers

    def column(self, rank: int) -> int:
        """The column of a rank."""
        return rank % self.columns

    def ranks_of_column(self, column: int) -> list[int]:
        """The ranks of a column."""
        return list(range(column, self.world, self.columns))

    def ranks_of_row(self, rank: int) -> list[int]:
        """The ranks in the row of a rank, one of each column."""
        first = rank - self.column(rank)
        return list(range(first, first + self.columns))


def longest_first(
    costs: Mapping[str, float], bins: int, *, among: Mapping[str, Sequence[int]] | None = None
) -> dict[str, int]:
    """Each job to the bin with the least load, the longest job first: at most 4/3 of the best makespan.

    Ties go to the earlier job and the lower bin, so that every rank finds the same.

    Args:
        costs: of the jobs.
        bins: their number.
        among: the bins that each job may go to, in order; None for all.

    Source: Graham 1969 (Bounds on multiprocessing timing anomalies).
    """
    loads = [0.0] * bins
    found = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        found[name] = min(range(bins) if among is None else among[name], key=loads.__getitem__)
        loads[found[name]] += costs[name]
    return {name: found[name] for name in costs}


def owners(layers: Mapping[str, Layer], grid: Grid, costing: Costing, *, every: int) -> dict[str, int]:
    """The rank that keeps and inverts each layer.

    Columns share out what is done between two refreshes, the ranks of a column the refresh itself.

    Args:
        layers: by name, in the order that every rank has.
        grid: of the ranks.
        costing: what costs depend on.
        every: steps between two refreshes.
    """
    inverting = {name: float(refresh_flops(layer, costing)) for name, layer in layers.items()}
    of_steps = {name: float(every * update_flops(layer, costing)) for name, layer in layers.items()}
    whole = {name: inverting[name] / grid.workers + of_steps[name] for name in layers}
    columns = longest_first(whole, grid.columns)
    found: dict[str, int] = {}
    for column in set(columns.values()):
        ranks = grid.ranks_of_column(column)
        inside = longest_first({name: inverting[name] for name in layers if columns[name] == column}, grid.workers)
        found |= {name: ranks[place] for name, place in inside.items()}
    return {name: found[name] for name in layers}


@dataclass(frozen=True)
class Stretch:
    """Neighbouring numbers of one buffer that travel together.

    Args:
        root: the rank that they go to, or come from; None where all have them.
        names: of the layers in it, in order.
        numel: how many numbers.
    """

    root: int | None
    names: tuple[str, ...]
    numel: int


Stretches = dict[torch.dtype, list[Stretch]]


@dataclass(frozen=True)
class Message:
    """One collective.

    Args:
        kind: of it.
        nbytes: of the tensor that is handed to it; to all_to_all each rank hands one of its own, and it is their sum.
        ranks: how many take part.
        stays: of these bytes those that are for the rank itself.
    """

    kind: Kind
    nbytes: int
    ranks: int
    stays: int = 0

    @property
    def sent(self) -> float:
        """Bytes that a rank sends on average, by a ring: no algorithm sends less in all."""
        if self.kind == "all_to_all":
            return (self.nbytes - self.stays) / self.ranks
        once = self.nbytes * (self.ranks - 1) / self.ranks
        return 2 * once if self.kind == "all_reduce" else once


@dataclass(frozen=True)
class Layout:
    """What travels, and between whom.

    Args:
        layers: by name, in the order that every rank has.
        grid: of the ranks.
        owners: the rank that keeps each layer.
        costing: what shapes of sums and inverses depend on.
    """

    layers: Mapping[str, Layer]
    grid: Grid
    owners: Mapping[str, int]
    costing: Costing

    @classmethod
    def of(cls, layers: Mapping[str, Layer], grid: Grid, costing: Costing, *, every: int) -> Layout:
        """With owners by cost."""
        if grid.world > 1:
            # Inverses are what ranks are sent.
            costing = replace(costing, uses=None)
        return cls(layers, grid, owners(layers, grid, costing, every=every), costing)

    @property
    def replicated(self) -> bool:
        """Whether all ranks precondition every layer; then all keep its averages too, and any of them can be saved."""
        return self.grid.workers == self.grid.world

    def keeps(self, rank: int, name: str) -> bool:
        """Whether a rank keeps the averages of a layer."""
        return self.replicated or self.owners[name] == rank

    def works(self, rank: int, name: str) -> bool:
        """Whether a rank has the inverse of a layer."""
        return self.grid.column(self.owners[name]) == self.grid.column(rank)

    @property
    def averages_at_work(self) -> bool:
        """Whether whoever preconditions a layer keeps its averages too: all ranks, or its owner alone."""
        return self.replicated or self.grid.workers == 1

    @property
    def counts(self) -> int:
        """How many counts and flags there are of a capture: M of each head, five of all, three of each layer."""
        return self.costing.heads + 5 + 3 * len(self.layers)

    def sums(self) -> Stretches:
        """A capture: the sums of each layer to whoever keeps it, and the counts, last in the first buffer, to all."""

        def numel(name: str) -> int:
            return sum(piece.numel for piece in sum_pieces(self.layers[name], self.costing.heads))

        found = self._stretches(self.layers, lambda name: None if self.replicated else self.owners[name], numel)
        first = next(iter(found.values()))
        if self.replicated:
            first[0] = Stretch(None, first[0].names, first[0].numel + 3 * self.counts)
        else:
            first.append(Stretch(None, (), 3 * self.counts))
        return found

    def inverses(self, names: Iterable[str], column: int) -> Stretches:
        """A refresh: the inverses of a column's layers from their owners to its other ranks."""

        def numel(name: str) -> int:
            return sum(piece.numel for piece in inverse_pieces(self.layers[name], self.costing.rule).values())

        mine = [name for name in names if self.grid.column(self.owners[name]) == column]
        return self._stretches(mine, self.owners.__getitem__, numel) if self.grid.workers > 1 else {}

    def bases(self, names: Iterable[str]) -> Stretches:
        """The eigenbases of layers in 'ekfac' from their owners to all ranks, which square weight gradients in them."""

        def numel(name: str) -> int:
            return sum(piece.numel for piece in basis_pieces(self.layers[name]).values())

        sent = [name for name in names if numel(name)] if self.grid.world > 1 else []
        return self._stretches(sent, self.owners.__getitem__, numel)

    def handed_on(self, names: Iterable[str], column: int) -> Stretches:
        """What owners invert without a refresh of all, to those ranks of a column that have no averages of it."""
        return {} if self.averages_at_work else self.inverses(names, column)

    def results(self, names: Iterable[str], rank: int) -> Stretches:
        """A step: preconditioned gradients along the row of a rank, from its rank in the column of each layer."""
        row = self.grid.ranks_of_row(rank)

        def root(name: str) -> int:
            return row[self.grid.column(self.owners[name])]

        return self._stretches(names, root, lambda name: self.layers[name].layout.numel) if len(row) > 1 else {}

    def capture_messages(self) -> list[Message]:
        """The collectives of a capture, which all ranks take part in."""
        return _messages(self.sums(), "reduce", self.grid.world)

    def refresh_messages(self, column: int) -> list[Message]:
        """Those of a refresh for the ranks of a column, where nothing fails, up to ``rescale_messages``."""
        agreed = [Message("all_reduce", (len(self.layers) + 1) * torch.int32.itemsize, self.grid.world)]
        spread = _messages(self.inverses(self._turning(False), column), "broadcast", self.grid.workers)
        bases = _messages(self.bases(self._turning(True)), "broadcast", self.grid.world)
        return agreed + spread + bases if self.grid.world > 1 else []

    def rescale_messages(self, column: int) -> list[Message]:
        """Those of the eigenvalues in 'ekfac', once at a step with a capture or a refresh or both."""
        return _messages(self.handed_on(self._turning(True), column), "broadcast", self.grid.workers)

    def staggered_messages(self, column: int, names: Collection[str]) -> list[Message]:
        """Those of a step at which these layers alone are refreshed, and nothing is captured."""
        turning = [name for name in self._turning(True) if name in names]
        others = [name for name in self._turning(False) if name in names]
        bases = {} if self.replicated else self.bases(turning)
        return [
            *_messages(self.handed_on(others, column), "broadcast", self.grid.workers),
            *_messages(bases, "broadcast", self.grid.world),
            *_messages(self.handed_on(turning, column), "broadcast", self.grid.workers),
        ]

    def _turning(self, turns: bool) -> list[str]:
        """The layers that are kept in eigenbases, or those that are not."""
        return [name for name, layer in self.layers.items() if layer.turns == turns]

    def step_messages(self) -> list[Message]:
        """Those of a step for layers that all ranks have the gradients of, alike for all rows."""
        names = [name for name, layer in self.layers.items() if not layer.sharded]
        return _messages(self.results(names, 0), "broadcast", self.grid.columns)

    def _stretches(
        self, names: Iterable[str], root: Callable[[str], int | None], numel: Callable[[str], int]
    ) -> Stretches:
        """The layers in stretches of one root, by dtype; a root that nothing goes to has none."""
        grouped: dict[torch.dtype, dict[int | None, list[str]]] = {}
        for name in names:
            by_root = grouped.setdefault(statistic_dtype(self.layers[name].like.dtype), {})
            by_root.setdefault(root(name), []).append(name)
        return {
            dtype: [
                Stretch(one, tuple(inside), sum(map(numel, inside)))
                for one, inside in sorted(by_root.items(), key=lambda pair: -1 if pair[0] is None else pair[0])
            ]
            for dtype, by_root in grouped.items()
        }


def _messages(stretches: Stretches, kind: Kind, ranks: int) -> list[Message]:
    if ranks == 1:
        return []
    return [
        Message("all_reduce" if one.root is None else kind, one.numel * dtype.itemsize, ranks)
        for dtype, several in stretches.items()
        for one in several
    ]


def offsets(stretches: Sequence[Stretch]) -> list[slice]:
    """Where each stretch lies in its buffer."""
    ends, end = [], 0
    for one in stretches:
        ends.append(slice(end, end + one.numel))
        end += one.numel
    return ends
