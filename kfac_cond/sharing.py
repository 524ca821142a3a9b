"""The factors of a run, and the ranks that they are shared out among."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence

from .checks import described
from .costs import Costing
from .damping import DampingNow, Rule
from .distributed import EVERY, Plan, PlanTable, Ranks, is_initialised
from .errors import ArgumentError, RankError
from .factors import Factors
from .layers.layer import Layer
from .layers.shards import cuts_of
from .schedules import Schedule
from .state import Loaded
from .statistics import Slots
from .wrapping import Wrapped


class Shared:
    """What is kept of the layers of a wrapped model, on this rank and on the others.

    A process group may come after the wrapping: the ranks are looked for where they are needed.

    Args:
        wrapped: has the layers as they are at the time.
        slots: what is summed apart.
        rule: of the damping.
        schedule: says the steps between two refreshes, and the patience.
    """

    def __init__(self, wrapped: Wrapped, slots: Slots, rule: Callable[[], Rule], schedule: Schedule) -> None:
        self.plan = Plan()
        self.factors = Factors.empty(wrapped.layers, slots.weights, patience=schedule.patience)
        self._wrapped, self._slots, self._rule = wrapped, slots, rule
        self._every = schedule.inverses if isinstance(schedule.inverses, int) else EVERY
        #: Steps between two refreshes of all layers, where it is known beforehand.
        self._period = schedule.inverses if isinstance(schedule.inverses, int) and not schedule.stagger else None
        self._ranks: Ranks | None = None
        #: Over which ranks weights are cut, as the model was last looked at.
        self._cuts = cuts_of(wrapped.model)

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The layers there are now."""
        return self._wrapped.layers

    @property
    def costing(self) -> Costing:
        """What costs depend on."""
        ranks = self.plan.world if self._ranks is None else self._ranks.size
        uses = self._period if ranks == 1 else None
        return Costing(self._rule(), len(self._slots), self._wrapped.structure, uses)

    def ranks(self) -> Ranks:
        """The ranks there are, with the layers shared out among them.

        Raises:
            RankError: their number changed while layers were shared out.
        """
        before = self._ranks
        if before is not None and self._cuts:
            # Weights on a mesh outlive no process group.
            return before
        world = self.plan.world
        if before is not None and before.size == world:
            return before
        if before is not None and not before.layout.replicated:
            raise RankError(
                f"there are {world} ranks where there were {before.size}, which had layers that the others did not: "
                f"save kfac.state_dict() before the process group changes, and load it into a new KFAC after"
            )
        self._ranks = self.plan.ranks(self._cuts)
        self._assign()
        self.factors = self.factors.placed(self._ranks)
        return self._ranks

    def whole(self) -> Factors:
        """The factors of all layers, on every rank; all of them call it where layers are shared out."""
        return self.factors.whole(self.ranks())

    def refresh(self, damping: DampingNow, *, only: Container[str] | None = None) -> None:
        """Invert averages anew; see ``Factors.refresh``."""
        ranks = self.ranks()
        self.factors.refresh(damping, ranks, only=only)

    def refresh_unread(self, names: Iterable[str], damping: DampingNow) -> None:
        """Invert some averages on the step path; see ``Factors.refresh_unread``."""
        ranks = self.ranks()
        self.factors.refresh_unread(names, damping, ranks)

    def rescale(self, damping: DampingNow) -> None:
        """Follow what was captured and refreshed; see ``Factors.rescale``."""
        ranks = self.ranks()
        self.factors.rescale(damping, ranks)

    def distribute(self, plan: Plan) -> None:
        """Share out anew by another plan; all ranks call it.

        Raises:
            ArgumentError: not a plan.
        """
        if not isinstance(plan, Plan):
            raise ArgumentError(f"distribute() got {described(plan)}: expected kc.Plan(...)")
        # What it refuses it refuses before anything changes.
        ranks = plan.ranks(self._cuts)
        whole = self._brought_together()
        self.plan, self._ranks = plan, ranks
        self._place(whole)

    def changed(self, names: Sequence[str]) -> None:
        """Go on with the layers there are now, keeping what is not of these; all ranks call it."""
        whole = self._brought_together()
        self._place(whole.restricted(self._wrapped.layers, without=names))

    def load(self, loaded: Loaded) -> None:
        """Take over the factors of a state, of the layers there are now; those it has not stay as they are."""
        missing = loaded.unmatched.missing_keys
        before = self._brought_together() if missing else self.factors
        whole = Factors(self._wrapped.layers, loaded.average, loaded.health, loaded.inverses)
        whole.references, whole.made = loaded.references, loaded.made
        self._place(whole.with_those(missing, of=before))

    def table(self, world: int | None) -> PlanTable:
        """The plan in numbers, for so many ranks, or for those there are."""
        group = self.plan.group(self._cuts) if is_initialised() else None
        if world is None:
            world = 1 if group is None else group.size
        return self.plan.table(self._wrapped.layers, self.costing, world=world, every=self._every, group=group)

    def _brought_together(self) -> Factors:
        """The factors of all layers, from the ranks that they are shared out among, where they are."""
        return self.factors if self._ranks is None else self.whole()

    def _place(self, whole: Factors) -> None:
        """Go on with these factors of the layers there are now, each rank with its part of them."""
        cuts = cuts_of(self._wrapped.model)
        if {cut.ranks for cut in cuts} != {cut.ranks for cut in self._cuts}:
            # Other ranks have the same data than before.
            self._cuts, self._ranks = cuts, None
        self.factors = whole
        if self._ranks is None:
            self.ranks()
        else:
            self._assign()
            self.factors = whole.placed(self._ranks)

    def _assign(self) -> None:
        if self._ranks is not None:
            self._ranks.assign(self._wrapped.layers, self.costing, every=self._every)
