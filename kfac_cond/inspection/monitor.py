"""The cheap quantities of a run while it trains: no extra backward, and nobody waits for the device."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import described, is_size
from ..distributed import is_initialised
from ..errors import ArgumentError
from ..layers.layer import Layer
from ..preconditioner import KFAC
from ..structures import Trained
from ..watching import Step
from . import watched
from .alerts import alerts, in_words
from .findings import Finding
from .limits import NOT_FINITE
from .readings import ABSENT, Arriving, Measured, Reading

logger = logging.getLogger("kfac_cond")

KEPT = 1000
"""Readings that a monitor keeps."""

WHOLE = "*"
"""What stands for the whole among the names of layers."""


@runtime_checkable
class Board(Protocol):
    """What TensorBoard's ``SummaryWriter`` has, and whatever else has it."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one number."""

    def add_histogram(self, tag: str, values: Any, global_step: int) -> Any:
        """Write a histogram of some."""


Writer = Board | Callable[[int, dict[str, float]], Any]


class Monitor:
    """Measures a run at every so many steps, and writes what it finds.

    At a step that is due it looks at gradients before and after they are preconditioned, and at the factors as they
    are; the numbers stay on the device, start on their way to the host at once, and are written at a later step when
    they are there. Training is bitwise what it is without. Such a step takes as long as a few others (four products
    with a layer's sides, and some dozens of small operations), and the memory of one more gradient; the rest cost
    nothing, but for a refresh now and then, whose gradients are preconditioned with the inverses before as well.

    By layer: lengths of gradient, update and weights, their ratio and cosine; KL and share of the KL of the update
    that the optimizer is handed, and the decrease it predicts; trace, participation ratio and effective dimension of
    the block; age of the inverse, residual and drift of its basis, the turn of the last refresh; examples and positions
    behind the averages against their sides; dead inputs and outputs; failures. What each is: ``watched.OF_STEPS``,
    ``watched.OF_FACTORS``. Histograms are of the diagonals of A and G, in the basis of the inverse where it has one.

    Of several ranks all make one, where layers or weights are shared out among them; rank 0 writes.

    Args:
        kfac: to look at.
        every: steps between two readings, beginning with step 0.
        writer: a ``SummaryWriter`` (anything with ``add_scalar`` and ``add_histogram``); a callable that gets
            (step, {tag: number}); or None, where ``readings`` is all that is wanted. One that raises does not stop the
            run: it is named in one warning, and counted in ``writer_failures``.

    Attributes:
        readings: the last ``KEPT``, oldest first.
        writer_failures: how many readings a writer did not take.

    Raises:
        ArgumentError: not a KFAC, no such number, or a writer that is none of these.

    Examples:
        >>> import torch, kfac_cond as kc
        >>> model, criterion = torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> kfac = kc.KFAC(model, criterion)
        >>> kfac.attach(optimizer)
        >>> monitor = kc.Monitor(kfac, every=1)
        >>> criterion(model(torch.randn(5, 3)), torch.tensor([0, 1, 0, 1, 1])).backward()
        >>> optimizer.step()
        >>> monitor.flush()
        >>> monitor.readings[0].layers[""]["age"]
        0.0

    Source: as of each quantity; see ``inspection.staleness`` and ``inspection.updates``.
    """

    def __init__(self, kfac: KFAC, *, every: int = 200, writer: Writer | None = None) -> None:
        if not isinstance(kfac, KFAC):
            raise ArgumentError(f"Monitor({described(kfac)}): expected a kc.KFAC")
        if not is_size(every):
            raise ArgumentError(f"Monitor(every={every!r}): expected a number of steps >= 1")
        if not (writer is None or isinstance(writer, Board) or callable(writer)):
            raise ArgumentError(
                f"Monitor(writer={described(writer)}): expected a SummaryWriter (add_scalar and add_histogram), a "
                f"callable of (step, numbers), or None"
            )
        self.every, self.readings, self.writer_failures = every, deque[Reading](maxlen=KEPT), 0
        self._kfac, self._writer = kfac, writer
        #: The step whose numbers are on their way: of each optimizer's part, with what the host knows.
        self._under_way: list[tuple[Measured, Arriving]] = []
        self._step = -1
        self._known: dict[str, dict[str, float]] = {}
        self._angles: dict[str, Tensor] = {}
        #: Captures left out by the last reading; nobody knows before the first, since a state may be loaded until then.
        self._skipped: int | None = None
        #: Whether a gradient scaler, whose overflows are nothing to be told of, is at work.
        self._scaled = False
        self._heard: set[Any] = set()
        kfac.watchers.append(self)

    @property
    def findings(self) -> list[Finding]:
        """Those of the last reading."""
        return list(self.readings[-1].findings) if self.readings else []

    def flush(self) -> None:
        """Write what is on its way; waits for the device, and so has its place after the last step."""
        self._deliver()

    def remove(self) -> None:
        """Write what is on its way, and look on no more. Twice does nothing."""
        if self in self._kfac.watchers:
            self._kfac.watchers.remove(self)
        self.flush()

    # -- on the step path ---------------------------------------------------------------------------------------------

    def around(self, step: Step) -> AbstractContextManager[None]:
        """What ``KFAC`` calls at every step; nothing for a user."""
        due = step.number % self.every == 0
        if step.number != self._step and (due or all(one.arrived for _, one in self._under_way)):
            self._deliver()
        # The same on every rank, whichever has the inverses: gradients of shards are brought together by all.
        inverted = step.shared.factors.inverted & step.gradients.keys()
        turning = {name for name in step.refreshing() if name in inverted and name not in self._angles}
        return self._looking(step, due=due, turning=turning) if due or turning else nullcontext()

    @contextmanager
    def _looking(self, step: Step, *, due: bool, turning: set[str]) -> Iterator[None]:
        names = [name for name in step.gradients if due or name in turning]
        before = {name: {key: g.clone() for key, g in step.gradients[name].items()} for name in names}
        old = {name: self._by_the_inverse_before(step, name, before[name]) for name in names if name in turning}
        yield
        # Anew: the step may have looked at the model again, or shared its layers out.
        layers, factors = step.shared.layers, step.shared.factors
        measured = self._begun(step) if due else None
        for name in names:
            layer = layers.get(name)
            if layer is None:
                continue
            g = watched.gradient_of(layer, before.pop(name), step.grad_scale)
            u = watched.gradient_of(layer, step.gradients[name], step.grad_scale)
            if name in old and factors.made.get(name) == step.number:
                stale = old.pop(name)
                self._angles[name] = u.new_full((), ABSENT) if stale is None else watched.angle(stale, u)
            if measured is not None:
                self._measure(measured, layer, step, g, u)
        if measured is not None:
            if self._kfac.trust_region is not None:
                scale = self._kfac.metrics().get("kfac/trust_region_scale")
                measured.add(WHOLE, ("trust_region_scale",), {} if scale is None else {"trust_region_scale": scale})
            self._send(measured, step)

    @staticmethod
    def _by_the_inverse_before(step: Step, name: str, gradients: Mapping[str, Tensor]) -> Tensor | None:
        """The gradient as it would be preconditioned without this step's refresh; None where another rank does so."""
        g = watched.gradient_of(step.shared.layers[name], gradients, step.grad_scale)
        inverse = step.shared.factors.inverse_of(name, g)
        return None if inverse is None else inverse.matvec(g)

    def _begun(self, step: Step) -> Measured:
        """A reading of this step, which may have parts before."""
        if step.number != self._step:
            self._step, self._known, self._scaled = step.number, {}, step.grad_scale is not None
        return Measured(next(iter(step.shared.layers.values())).device)

    def _measure(self, measured: Measured, layer: Layer, step: Step, g: Tensor, u: Tensor) -> None:
        name, factors = layer.name, step.shared.factors
        block: Trained | None = None
        values: dict[str, Tensor] = {}
        inverse = factors.inverse_of(name, g)
        if name in factors.average.A and name in factors.average.G:
            (block,) = factors.blocks([name]).values()
            decay = self._kfac.schedule.decay_at(step.number)
            values = watched.of_factors(layer, factors, block, inverse, g, self._kfac.damping_now(), decay)
        values |= watched.of_step(layer, step, g, u, block)
        if name in self._angles:
            values[watched.STALE] = self._angles.pop(name)
        measured.add(name, (*watched.OF_STEPS, *watched.OF_FACTORS, watched.STALE), values)
        if isinstance(self._writer, Board) or self._shared_out(step):
            # In the same order on every rank, whatever it has a writer for.
            rows = {} if block is None else watched.spectra(block, inverse)
            for side, size in zip("AG", (layer.layout.d_in, layer.layout.d_out), strict=True):
                measured.add_row(name, side, size * layer.layout.groups, rows.get(side))
        self._known[name] = {"failures": float(factors.health.failures.get(name, 0))}
        if name in factors.made:
            self._known[name]["age"] = float(step.number - factors.made[name])

    def _send(self, measured: Measured, step: Step) -> None:
        vector = measured.vector()
        if self._shared_out(step):
            ranks = step.shared.ranks()
            what = "the readings of kc.Monitor, which every rank makes where layers are shared out"
            ranks.group.all_reduce(vector, what, largest=True).wait()
        self._under_way.append((measured, Arriving(vector)))

    @staticmethod
    def _shared_out(step: Step) -> bool:
        return not step.shared.ranks().layout.replicated

    # -- on the host --------------------------------------------------------------------------------------------------

    def _deliver(self) -> None:
        """Make a reading of what is on its way, and write it."""
        parts, self._under_way = self._under_way, []
        layers: dict[str, dict[str, float]] = {}
        spectra: dict[str, dict[str, tuple[float, ...]]] = {}
        for measured, arriving in parts:
            numbers = arriving.numbers()
            if numbers is None:
                return
            single, rows = measured.named(numbers)
            layers |= single
            spectra |= rows
        if not layers:
            return
        for name, known in self._known.items():
            layers.setdefault(name, {}).update(known)
        of_whole = layers.pop(WHOLE, {})
        reading = Reading(self._step, self._whole(layers) | of_whole, layers, spectra)
        found = [one for one in alerts(reading, self._sides()) if not (self._scaled and one.code == NOT_FINITE.code)]
        reading = replace(reading, findings=tuple(found))
        self.readings.append(reading)
        if is_initialised() and dist.get_rank() != 0:
            return
        for line in in_words(found, self._heard):
            logger.warning("step %d: %s", reading.step, line)
        self._write(reading)

    def _whole(self, layers: dict[str, dict[str, float]]) -> dict[str, float]:
        """Sums over layers, and what is counted of the run; each layer gets its share of the KL."""
        found = {key: sum(of.get(key, 0.0) for of in layers.values()) for key in ("kl", "trace", "decrease")}
        for of in layers.values():
            if "kl" in of and found["kl"] > 0:
                of["kl_share"] = of["kl"] / found["kl"]
        kept = [of["effective_dimension"] for of in layers.values() if "effective_dimension" in of]
        if kept:
            found["effective_dimension"] = sum(kept)
        counted = self._kfac._shared.factors.metrics()
        found |= {key.removeprefix("kfac/"): float(value) for key, value in counted.items()}
        found["damping"] = self._kfac.damping.at(self._step)
        skipped = counted["kfac/skipped_captures"]
        found["new_skipped_captures"] = float(skipped - (skipped if self._skipped is None else self._skipped))
        self._skipped = skipped
        return found

    def _sides(self) -> dict[str, int]:
        """Of layers whose factors are moments of positions the larger side that is kept whole."""
        found = {}
        for name, layer in self._kfac.layers.items():
            sides = [
                size
                for side, size in (("A", layer.layout.d_in), ("G", layer.layout.d_out))
                if side not in layer.diagonal_sides
            ]
            if layer.gradient_sums is None and layer.sharing == "expand" and sides:
                found[name] = max(sides)
        return found

    def _write(self, reading: Reading) -> None:
        """Hand it to the writer; what that raises is a matter of the log, not of the run."""
        if self._writer is None:
            return
        try:
            if isinstance(self._writer, Board):
                _write_board(self._writer, reading)
            else:
                self._writer(reading.step, reading.flat())
        except Exception:
            self.writer_failures += 1
            if self.writer_failures == 1:
                logger.warning(
                    "kc.Monitor: its writer %s raised at step %d; training goes on, readings are in monitor.readings, "
                    "and it is tried again at the next",
                    described(self._writer),
                    reading.step,
                    exc_info=True,
                )


def _write_board(board: Board, reading: Reading) -> None:
    for tag, value in reading.flat().items():
        board.add_scalar(tag, value, reading.step)
    for layer, sides in reading.spectra.items():
        for side, values in sides.items():
            board.add_histogram(f"kfac_{side}/{layer}", torch.tensor(values), reading.step)
