"""Who does what, as a user states it, and the table of what that costs on any number of ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..checks import check_module, checked_rules, described, is_number, is_size
from ..costs import Costing, basis_bytes, factor_bytes, inverse_bytes, refresh_flops, update_flops
from ..damping import Rule
from ..errors import ArgumentError
from ..layers.layer import Layer
from ..layers.shards import Cut, cuts_of
from ..layers.survey import survey
from ..tables import in_bytes, in_flops, table
from .group import Group, is_initialised
from .layout import Grid, Layout, Message
from .meshes import refuse_same_data, with_different_data
from .ranks import Ranks
from .shuffle import planned

EVERY = 100
"""Steps between two refreshes where a schedule does not say a number."""


@dataclass(frozen=True)
class Plan:
    """How the work on the layers is shared among the ranks of a run.

    Each layer has an owner, which keeps its averages and inverts it. Owners are found by the predicted operations, the
    longest layer first, the same on all ranks. What differs is how many ranks precondition a layer:

    ======================  =================================================================================
    'replicate', 1          all: inverses are sent at a refresh, nothing at a step; every rank keeps everything
    'shard', 0              the owner alone: it sends the result at every step; memory is shared out
    a fraction in between   that part of the ranks (the nearest divisor of their number)
    ======================  =================================================================================

    All give the same update.

    Args:
        mesh: the ranks with different data: a process group, or a ``DeviceMesh`` of one dimension (``mesh["data"]`` of
            a larger one). None for all processes; where ``parallelize_module`` cut weights, for the ranks along the
            other dimension of its mesh.
        strategy: 'replicate', 'shard', or the fraction of the ranks that precondition a layer, in [0, 1].
        flops: operations a second of a rank, for the predicted times.
        bandwidth: bytes a second that a rank sends, likewise.

    Raises:
        ArgumentError: one of them is out of range, or a mesh of several dimensions.

    Source: Pauloski et al. 2021 (arXiv:2107.01739): COMM-OPT, MEM-OPT and HYBRID-OPT are 1, 0 and a fraction.
    """

    mesh: dist.ProcessGroup | DeviceMesh | None = None
    strategy: Literal["replicate", "shard"] | float = "replicate"
    flops: float = 1e12
    bandwidth: float = 1e10

    def __post_init__(self) -> None:
        if self.strategy not in ("replicate", "shard") and not (is_number(self.strategy) and 0 <= self.strategy <= 1):
            raise ArgumentError(
                f"Plan(strategy={self.strategy!r}): expected 'replicate', 'shard', or the fraction of the ranks that "
                f"precondition a layer, in [0, 1]"
            )
        for name in ("flops", "bandwidth"):
            value = getattr(self, name)
            if not (is_number(value) and value > 0):
                raise ArgumentError(f"Plan({name}={value!r}): expected a positive number a second")
        if isinstance(self.mesh, DeviceMesh):
            if self.mesh.ndim != 1:
                raise ArgumentError(
                    f"Plan(mesh=...) has the dimensions {self.mesh.mesh_dim_names or self.mesh.ndim}: expected the one "
                    f"along which ranks have different data, say mesh['data']"
                )
        elif self.mesh is not None and not (dist.is_available() and isinstance(self.mesh, dist.ProcessGroup)):
            raise ArgumentError(
                f"Plan(mesh=...) is {described(self.mesh)}: expected a process group, a DeviceMesh of one dimension, "
                f"or None for all processes"
            )

    @property
    def fraction(self) -> float:
        """The part of the ranks that preconditions a layer."""
        named: dict[Any, float] = {"replicate": 1.0, "shard": 0.0}
        return float(named.get(self.strategy, self.strategy))

    def group(self, cuts: Sequence[Cut] = ()) -> Group:
        """The ranks with different data that there are.

        Args:
            cuts: over which ranks weights are cut; those of one have the same data.

        Raises:
            ArgumentError: ranks with the same data are among them, or which have different data cannot be told.
        """
        if self.mesh is None:
            return with_different_data(cuts)
        group = Group(self.mesh.get_group() if isinstance(self.mesh, DeviceMesh) else self.mesh)
        refuse_same_data(group, cuts)
        return group

    def ranks(self, cuts: Sequence[Cut] = ()) -> Ranks:
        """The ranks there are, as they work together; all of them call it."""
        return Ranks(self.group(cuts), self.fraction)

    @property
    def world(self) -> int:
        """How many ranks there are now, where no weight is cut."""
        return self.group().size if is_initialised() else 1

    def of(
        self,
        model: nn.Module,
        *,
        world: int,
        rules: Mapping[str, Mapping[str, Any]] | None = None,
        structure: str = "kfac",
        rule: Rule = "factored",
        every: int = EVERY,
    ) -> PlanTable:
        """What this plan costs for a model on so many ranks; no process group is needed, and nothing allocated.

        Args:
            model: of any device, the meta device among them.
            world: number of ranks.
            rules: as for ``KFAC``.
            structure: as for ``KFAC``.
            rule: of the damping.
            every: steps between two refreshes.

        Raises:
            ArgumentError: not a module, or no such number of ranks.

        Examples:
            >>> import torch, kfac_cond as kc
            >>> table = kc.Plan(strategy="shard").of(torch.nn.Linear(3, 2), world=4)
            >>> table.owners, table.ranks[0].factor_bytes, table.ranks[1].factor_bytes
            ({'': 0}, 96, 0)
        """
        check_module(model)
        found = survey(model, checked_rules(rules), training=structure)
        group = self.group(cuts_of(model)) if is_initialised() else None
        return self.table(found.layers, Costing(rule, 1, structure), world=world, every=every, group=group)

    def table(
        self, layers: Mapping[str, Layer], costing: Costing, *, world: int, every: int, group: Group | None = None
    ) -> PlanTable:
        """The table for these layers; of the ranks of ``group``, where it is for so many."""
        if not is_size(world):
            raise ArgumentError(f"world={world!r}: expected a number of ranks >= 1")
        layout = Layout.of(layers, Grid.of(world, self.fraction), costing, every=every)
        return PlanTable(self, layout, group if group is not None and group.size == world else None)


@dataclass(frozen=True)
class LayerPlan:
    """What one layer costs, and whom.

    Args:
        name: of the layer.
        owner: the rank that keeps its averages and inverts it.
        workers: the ranks that precondition its gradient.
        factor_bytes: of its averages, on each rank that keeps them.
        inverse_bytes: of its inverse, on each worker.
        refresh_flops: operations of inverting it, once.
        update_flops: operations of preconditioning its gradient, on each worker.
        refresh_ms: predicted milliseconds of inverting it.
    """

    name: str
    owner: int
    workers: tuple[int, ...]
    factor_bytes: int
    inverse_bytes: int
    refresh_flops: int
    update_flops: int
    refresh_ms: float


@dataclass(frozen=True)
class RankPlan:
    """What one rank does.

    Args:
        rank: its number.
        layers: that it owns.
        factor_bytes: of the averages that it keeps.
        inverse_bytes: of the inverses that it has, and of the bases of all layers in 'ekfac'.
        refresh_flops: operations of a refresh.
        update_flops: operations of a step.
        refresh_ms: predicted milliseconds of a refresh: its operations, and what it sends.
        step_ms: of a step likewise.
        capture_bytes: that it sends for a capture, on average over the ranks.
        refresh_bytes: for a refresh, over the ranks of its column.
        step_bytes: at every step.
    """

    rank: int
    layers: int
    factor_bytes: int
    inverse_bytes: int
    refresh_flops: int
    update_flops: int
    refresh_ms: float
    step_ms: float
    capture_bytes: int
    refresh_bytes: int
    step_bytes: int


class PlanTable:
    """Owners, memory, operations and messages; ``print`` it.

    Args:
        plan: that it is of.
        layout: of some layers on some ranks.
        group: these ranks; None for ranks that are not there.
    """

    def __init__(self, plan: Plan, layout: Layout, group: Group | None = None) -> None:
        self.plan, self.layout = plan, layout
        #: How gradients of which each rank has a part travel; None where there are none.
        self._routes = planned(layout, group)

    @property
    def owners(self) -> dict[str, int]:
        """The owner of each layer."""
        return dict(self.layout.owners)

    @cached_property
    def layers(self) -> tuple[LayerPlan, ...]:
        """A row a layer."""
        grid, costing = self.layout.grid, self.layout.costing
        return tuple(
            LayerPlan(
                name,
                owner := self.layout.owners[name],
                tuple(grid.ranks_of_column(grid.column(owner))),
                factor_bytes(layer, costing),
                inverse_bytes(layer, costing),
                flops := refresh_flops(layer, costing),
                update_flops(layer, costing),
                1e3 * flops / self.plan.flops,
            )
            for name, layer in self.layout.layers.items()
        )

    @cached_property
    def ranks(self) -> tuple[RankPlan, ...]:
        """A row a rank."""
        capture, step = (_sent(messages) for messages in (self.capture_messages, self.step_messages))
        rescaled = [_sent(self.layout.rescale_messages(column)) for column in range(self.layout.grid.columns)]
        columns = [self._column(column) for column in range(self.layout.grid.columns)]
        parted = self._parted()
        owned: dict[int, list[LayerPlan]] = {}
        for row in self.layers:
            owned.setdefault(row.owner, []).append(row)
        everything = sum(row.factor_bytes for row in self.layers)
        found = []
        for rank in range(self.layout.grid.world):
            mine = owned.get(rank, [])
            inverses, updates, refresh = columns[self.layout.grid.column(rank)]
            flops = sum(row.refresh_flops for row in mine)
            found.append(
                RankPlan(
                    rank,
                    len(mine),
                    everything if self.layout.replicated else sum(row.factor_bytes for row in mine),
                    inverses,
                    flops,
                    updates + parted[rank],
                    self._ms(flops, refresh),
                    self._ms(updates + parted[rank], step),
                    capture + rescaled[self.layout.grid.column(rank)],
                    refresh,
                    step,
                )
            )
        return tuple(found)

    @property
    def capture_messages(self) -> list[Message]:
        """The collectives of a capture."""
        return self.layout.capture_messages()

    @property
    def step_messages(self) -> list[Message]:
        """The collectives of a step that preconditions all layers, as each rank sees them."""
        return self.layout.step_messages() + (self._routes.messages() if self._routes is not None else [])

    def refresh_messages(self, rank: int) -> list[Message]:
        """The collectives of a refresh that a rank takes part in, where nothing fails."""
        return self.layout.refresh_messages(self.layout.grid.column(rank))

    def rescale_messages(self, rank: int) -> list[Message]:
        """Those that follow them where layers are in 'ekfac', or a capture without a refresh: new eigenvalues."""
        return self.layout.rescale_messages(self.layout.grid.column(rank))

    def staggered_messages(self, rank: int, names: Collection[str]) -> list[Message]:
        """Those of a step at which ``Schedule(stagger=True)`` refreshes these layers, and nothing is captured."""
        return self.layout.staggered_messages(self.layout.grid.column(rank), names)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dictionaries."""
        return {
            "strategy": self.plan.strategy,
            "world": self.layout.grid.world,
            "workers": self.layout.grid.workers,
            "layers": [asdict(row) for row in self.layers],
            "ranks": [asdict(row) for row in self.ranks],
        }

    def __str__(self) -> str:
        grid = self.layout.grid
        said = f"{grid.world} rank{'s' * (grid.world > 1)}, each layer preconditioned by {grid.workers}"
        layers = table(
            ("layer", "owner", "averages", "inverse", "refresh", "ms", "step"),
            [
                (
                    row.name or "(the model)",
                    str(row.owner),
                    in_bytes(row.factor_bytes),
                    in_bytes(row.inverse_bytes),
                    in_flops(row.refresh_flops),
                    f"{row.refresh_ms:.3g}",
                    in_flops(row.update_flops),
                )
                for row in self.layers
            ],
            [""] * len(self.layers),
            right=range(1, 7),
        )
        ranks = table(
            ("rank", "layers", "averages", "inverses", "refresh ms", "step ms", "capture", "refresh", "step"),
            [
                (
                    str(row.rank),
                    str(row.layers),
                    in_bytes(row.factor_bytes),
                    in_bytes(row.inverse_bytes),
                    f"{row.refresh_ms:.3g}",
                    f"{row.step_ms:.3g}",
                    *map(in_bytes, (row.capture_bytes, row.refresh_bytes, row.step_bytes)),
                )
                for row in _few(self.ranks)
            ],
            [""] * len(_few(self.ranks)),
            right=range(1, 9),
        )
        return "\n".join((f"{said}; strategy {self.plan.strategy!r}", "", layers, "", ranks))

    def _column(self, column: int) -> tuple[int, int, int]:
        """Of each rank of a column: bytes of its inverses, operations of a step that all do, bytes for a refresh."""
        grid = self.layout.grid
        mine = [row for row in self.layers if grid.column(row.owner) == column]
        inverses = sum(row.inverse_bytes for row in mine)
        bases = sum(basis_bytes(self.layout.layers[row.name]) for row in self.layers if row not in mine)
        updates = sum(row.update_flops for row in mine if self._routes is None or row.name not in self._routes.to)
        return inverses + bases, updates, _sent(self.layout.refresh_messages(column))

    def _parted(self) -> list[int]:
        """Operations of the steps of each rank for the layers that one rank preconditions for all."""
        found = [0] * self.layout.grid.world
        routes = self._routes
        for row in self.layers:
            if routes is not None and row.name in routes.to:
                # Ranks with the same data follow one another.
                found[routes.to[row.name] * len(found) // routes.ranks] += row.update_flops
        return found

    def _ms(self, flops: int, nbytes: int) -> float:
        return 1e3 * (flops / self.plan.flops + nbytes / self.plan.bandwidth)


SHOWN = 16
"""Rows of ranks in a printed table."""


def _few(ranks: tuple[RankPlan, ...]) -> list[RankPlan]:
    """All ranks, or of many those that have most to keep and to do."""
    if len(ranks) <= SHOWN:
        return list(ranks)
    most = sorted(ranks, key=lambda row: (-row.refresh_flops, -row.factor_bytes, row.rank))[:SHOWN]
    return sorted(most, key=lambda row: row.rank)


def _sent(messages: Iterable[Message]) -> int:
    """Bytes that a rank sends for these, on average."""
    return round(sum(one.sent for one in messages))
