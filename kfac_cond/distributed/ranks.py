"""What the ranks of a run do together at a capture, a refresh and a step; one process by itself does it alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..costs import Costing
from ..damping import Rule
from ..errors import RankError
from ..layers.layer import Layer
from ..layers.summed import Bases
from ..linalg.ladder import Rung
from ..structures import Block
from .exchange import exchanged, union
from .group import Group
from .layout import Grid, Layout, Stretches
from .packing import Piece, basis_pieces, inverse_of, inverse_pieces, inverse_type
from .reduce import Captured, Reduction
from .shuffle import Shuffle, Shuffles

_WANTING = 16
"""What is added to the code of a rung where the layer was found unsettled."""

Make = Callable[[Container[str], dict[str, Block]], dict[str, Rung]]
"""Puts the inverses of layers that this rank owns among others, and says how far each factorisation climbed."""


class Alone:
    """The capture of one process, where the others' would be waited for."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured

    def wait(self, *, functional: bool) -> Captured:
        """The capture itself."""
        return self.captured


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
        self._shuffles = Shuffles(group)

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
        self._shuffles.clear()

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
        self, make: Make, previous: dict[str, Block], unsettled: Set[str], *, rule: Rule
    ) -> tuple[dict[str, Rung], dict[str, Block], Set[str]]:
        """How far the factorisation of each layer climbed on its owner, the inverses, and which layers were unsettled.

        The inverses are those that this rank works with, without those of layers in 'ekfac' that others own.

        Args:
            make: makes the inverses of layers that this rank owns.
            previous: the inverses before; one that stands in is not sent. By itself a rank has the new ones put in
                their place, one after another: those of other ranks stay as they are until all are known to be there.
            unsettled: the layers that this rank found to want another refresh.
            rule: of the damping, which says what an inverse is.

        Raises:
            RankError: a rank did not take part.
        """
        self._damped_by(rule)
        if self.size == 1:
            climbed = make(set(self.owned()), previous)
            return climbed, {name: previous[name] for name in climbed}, unsettled
        found = dict(previous)
        try:
            climbed = make(set(self.owned()), found)
        except Exception as error:
            # Said before it is raised: the others would wait for what does not come.
            self.agreed({}, (), raised=True)
            raise _raised(self.rank, str(error)) from error
        rungs, wanting = self.agreed(climbed, unsettled)
        return rungs, self.spread({name: found[name] for name in climbed}, rungs, previous), wanting

    def agreed(
        self, mine: Mapping[str, Rung], unsettled: Collection[str], *, raised: bool = False
    ) -> tuple[dict[str, Rung], set[str]]:
        """How far the factorisations of all owners climbed, by layer, and which layers their owners found unsettled.

        A layer that none tried is absent.

        Args:
            mine: of the layers of this rank that were tried.
            unsettled: what this rank found; of a layer it is the owner that finds it.
            raised: an error stopped this rank.

        Raises:
            RankError: an error stopped another rank.
        """
        names = list(self.layout.layers)
        tried = [mine[name] + 1 if name in mine else 0 for name in names]
        numbers = [code + _WANTING * (name in unsettled) for name, code in zip(names, tried, strict=True)]
        numbers.append((self.rank + 1) * raised)
        codes = torch.tensor(numbers, dtype=torch.int32).to(self._device)
        self.group.all_reduce(codes, "the agreement on what was inverted", largest=True).wait()
        if codes.is_meta:
            # Where there is nothing to read, what is known here stands for all.
            return dict(mine), set(unsettled)
        *found, stopped = codes.tolist()
        if stopped and not raised:
            raise _raised(stopped - 1, "see its log")
        codes_of = dict(zip(names, found, strict=True))
        rungs = {name: Rung(code % _WANTING - 1) for name, code in codes_of.items() if code % _WANTING}
        return rungs, {name for name, code in codes_of.items() if code >= _WANTING}

    def spread(
        self, mine: Mapping[str, Block], rungs: Mapping[str, Rung], previous: Mapping[str, Block]
    ) -> dict[str, Block]:
        """The inverses that this rank works with, from their owners; those of layers in 'ekfac' are not sent.

        Args:
            mine: those that this rank made.
            rungs: as agreed; where the previous inverse stands in nothing is sent.
            previous: the inverses before.
        """
        layers = self.layout.layers
        names = [name for name in rungs if self.layout.works(self.rank, name) and not layers[name].turns]
        fresh = [name for name in names if rungs[name] != Rung.PREVIOUS]
        found = self._received(self.layout.inverses(fresh, self.grid.column(self.rank)), mine, {})
        return {**{name: previous[name] for name in names if name in previous}, **found, **mine}

    def handed_on(
        self, names: Iterable[str], mine: Mapping[str, Block], bases: Mapping[str, Bases], *, rule: Rule
    ) -> dict[str, Block]:
        """Inverses that this rank works with and has no averages for, from their owners.

        Args:
            names: the layers, the same on all ranks.
            mine: their inverses, where this rank has them.
            bases: of layers in 'ekfac'.
            rule: of the damping.
        """
        self._damped_by(rule)
        # One of another rule stayed as it was, as after a resume with another damping.
        types = {name: inverse_type(self.layout.layers[name], rule) for name in names}
        fresh = [name for name, kind in types.items() if name not in mine or type(mine[name]) is kind]
        return self._received(self.layout.handed_on(fresh, self.grid.column(self.rank)), mine, bases)

    def bases(self, names: Sequence[str], mine: Mapping[str, Bases]) -> dict[str, Bases]:
        """The eigenbases of these layers, without those that this rank owns.

        Args:
            names: of layers in 'ekfac', the same on all ranks.
            mine: their bases, where this rank owns them.
        """
        others = [name for name in names if self.layout.owners[name] != self.rank]
        held = {name: dict(zip(("basis_A", "basis_G"), mine[name], strict=True)) for name in names if name in mine}
        pieces = {name: basis_pieces(self.layout.layers[name]) for name in names}
        found = self._sent(
            self.layout.bases(names),
            held,
            pieces,
            self.group,
            list(range(self.size)),
            "the eigenbases from their owners",
        )
        of = {name: found.get(name, {}) for name in others}
        return {name: (tensors.get("basis_A"), tensors.get("basis_G")) for name, tensors in of.items()}

    def _received(
        self, stretches: Stretches, mine: Mapping[str, Block], bases: Mapping[str, Bases]
    ) -> dict[str, Block]:
        """The inverses in these stretches that others of the column own."""
        layers, rule = self.layout.layers, self.layout.costing.rule
        names = [name for several in stretches.values() for one in several for name in one.names]
        pieces = {name: inverse_pieces(layers[name], rule) for name in names}
        held = {
            name: {key: getattr(mine[name], key) for key in pieces[name]}
            for name in names
            if self.layout.owners[name] == self.rank
        }
        ranks = self.grid.ranks_of_column(self.grid.column(self.rank))
        found = self._sent(stretches, held, pieces, self._column, ranks, "the inverses from their owners")
        blocks = {}
        for name, tensors in found.items():
            known = dict(zip(("basis_A", "basis_G"), bases[name], strict=True)) if layers[name].turns else {}
            blocks[name] = inverse_of(layers[name], rule, known | tensors)
        return blocks

    def _sent(
        self,
        stretches: Stretches,
        mine: Mapping[str, Mapping[str, Tensor | None]],
        pieces: Mapping[str, Mapping[str, Piece]],
        group: Group,
        ranks: list[int],
        what: str,
    ) -> dict[str, dict[str, Tensor]]:
        """The tensors of the layers that other ranks own, by layer and key, where each layer is."""
        owned = {name for name in pieces if self.layout.owners[name] == self.rank}
        flat = exchanged(
            stretches,
            {name: _flat(mine[name], pieces[name]) for name in owned},
            group,
            ranks,
            sizes={name: sum(piece.numel for piece in of.values()) for name, of in pieces.items()},
            device=self._device,
            what=what,
        )
        return {
            name: _tensors(one, pieces[name], self.layout.layers[name].device)
            for name, one in flat.items()
            if name not in owned
        }

    def _damped_by(self, rule: Rule) -> None:
        """What is sent of an inverse depends on the rule of its damping."""
        if rule != self.layout.costing.rule:
            self.layout = replace(self.layout, costing=replace(self.layout.costing, rule=rule))

    # -- a step -------------------------------------------------------------------------------------------------------

    def exchanges(self, names: Sequence[str]) -> bool:
        """Whether preconditioned gradients of these layers come from other ranks; the same on all."""
        return bool(self.layout.results(names, self.rank))

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

    def shuffle(self, names: Sequence[str], gradients: Mapping[str, Mapping[str, Tensor]]) -> Shuffle:
        """How the gradients of these layers, of which each rank has a part, get to where they are preconditioned.

        Args:
            names: of layers that have an inverse on some rank; the same on all.
            gradients: by layer and parameter, those that there are here.
        """
        layers = {name: self.layout.layers[name] for name in names}
        return self._shuffles.of(layers, gradients, self.layout.costing, self.worked())

    # -- by itself, on each ------------------------------------------------------------------------------------------

    @contextmanager
    def alike(self, what: str) -> Iterator[dict[str, Any]]:
        """What each rank does by itself, on all of them or on none: an error of one is an error of all, at its end.

        Within it there is a dictionary, whose entries are to be the same on all ranks.

        Args:
            what: is done, in messages.

        Raises:
            RankError: another rank met an error, has another entry, or did not take part.
        """
        noted: dict[str, Any] = {}
        if self.size == 1:
            yield noted
            return
        try:
            yield noted
        except Exception as error:
            # Said before it is raised: the others would go on without this rank.
            self.group.objects((str(error) or repr(error), noted), what)
            raise
        found = self.group.objects((None, noted), what)
        for rank, (refusal, _) in enumerate(found):
            if refusal is not None:
                raise RankError(f"rank {rank} refused {what}, which is then taken over by none: {refusal}")
        for rank, (_, other) in enumerate(found):
            if other != found[0][1]:
                raise RankError(
                    f"rank 0 has {what} with {found[0][1]}, and rank {rank} with {other}; it is taken over by none. "
                    f"Expected the same on all ranks: load the same checkpoint on each."
                )

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


def _flat(tensors: Mapping[str, Tensor | None], pieces: Mapping[str, Piece]) -> Tensor:
    """The numbers of some tensors, as they are sent."""
    packed = [piece.packed(tensor) for key, piece in pieces.items() if (tensor := tensors[key]) is not None]
    return torch.cat(packed) if packed else torch.empty(0)


def _tensors(flat: Tensor, pieces: Mapping[str, Piece], device: torch.device) -> dict[str, Tensor]:
    """The tensors again."""
    parts = torch.split(flat, [piece.numel for piece in pieces.values()])
    return {key: piece.unpacked(part).to(device) for (key, piece), part in zip(pieces.items(), parts, strict=True)}


def _raised(rank: int, what: str) -> RankError:
    return RankError(
        f"rank {rank} could not invert the layers that it owns ({what}): nothing is changed by this step. Look "
        f"there, and start again from the last checkpoint."
    )
