"""A report in the making: what each section found goes to its place, and what failed is said."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ArgumentError, KFACError, NumericalError
from ..structures import Fisher
from .calibration import calibrated
from .meter import Meter
from .numerics import cost_of, inverted, numerics_of, warmed_up, with_predictions
from .proposals import DAMPING
from .report import Counts, LayerReport, Report, Whole
from .sections import Job, Section
from .sources import Known, copied
from .spectra import Spectrum, spectrum_of

logger = logging.getLogger("kfac_cond")


class Work:
    """A report in the making.

    Args:
        fisher: of its layers.
        damping: that it is read at; None to leave that open.
    """

    def __init__(self, fisher: Fisher, damping: float | None) -> None:
        self.fisher, self.damping = fisher, damping
        #: lambda of whatever needs one.
        self.at = DAMPING if damping is None else damping
        self.problems: dict[str, str] = {}
        self._known = Known()
        self._of_layers: dict[str, dict[str, Any]] = {name: {} for name in fisher}
        self._of_whole: dict[str, Any] = {}

    def look(self, known: Callable[[Fisher], Known], meter: Meter, *, invert: bool, seed: int) -> None:
        """What the blocks say by themselves.

        Args:
            known: looks at the model.
            meter: told of every layer.
            invert: whether each block is inverted once, to see how well that goes and how long it takes.
            seed: of random vectors.

        Raises:
            NumericalError: a block that is not finite.
        """
        spectra = self._spectra(meter)
        try:
            self._known = known(self.fisher)
        except KFACError as error:
            self._failed("coverage", error)
        if spectra:
            self._of_whole["calibration"] = calibrated(list(spectra.values()))
        for name, spectrum in spectra.items():
            block, failures = self.fisher[name], self._known.failures.get(name)
            self._of_layers[name]["health"] = numerics_of(block, spectrum, failures=failures)
        layers, used = self._known.layers, self._known.used
        costs = {name: cost_of(block, layers.get(name), used.get(name)) for name, block in self.fisher.items()}
        if invert and self.at > 0.0 and spectra:
            warmed_up(self.fisher[next(iter(spectra))])
            for name in meter.each(spectra, "inverses"):
                found = self._of_layers[name]
                try:
                    found["health"], costs[name] = inverted(
                        self.fisher[name], self.at, found["health"], costs[name], seed=seed
                    )
                except NumericalError as error:
                    self._failed(f"the inverse of {name}", error)
        for name, cost in with_predictions(costs).items():
            self._of_layers[name]["cost"] = cost
        meter.note("label draws")
        self._sampling()

    def add(self, section: Section, job: Job) -> None:
        """Measure a section; one that fails is named, and the others go on."""
        try:
            whole, layers = section.measure(job)
        except Exception as error:
            self._failed(section.name, error)
            return
        if whole is not None:
            self._of_whole[section.whole or section.name] = whole
        for name, found in layers.items():
            self._of_layers[name][section.name] = found

    def report(self, facts: Mapping[str, Any]) -> Report:
        """What was found."""
        meta, counts = dict(self.fisher.meta), self.fisher.meta.get("counts", {})
        for name in self._known.without:
            self.problems[name] = "no block: it never took part in a forward, or on no position"
        layers = {
            name: LayerReport(
                name,
                self._known.layers[name].kind.name if name in self._known.layers else "",
                block.layout.matrix_shape,
                block.layout.numel,
                depth,
                counts=self._counts(name, counts),
                **self._of_layers[name],
            )
            for depth, (name, block) in enumerate(self.fisher.items())
        }
        every = list(layers.values())
        spectra = [one.spectrum for one in every if one.spectrum is not None]
        whole = Whole(
            sum(one.parameters for one in every),
            sum(float(self.fisher[one.name].trace()) if one.spectrum is None else one.spectrum.trace for one in every),
            None if self.damping is None else sum(one.effective_dimension(self.damping) for one in spectra),
            self._known.covered,
            self._known.uncovered,
            unused=tuple(self._known.without),
            **self._of_whole,
        )
        meta.pop("counts", None)
        if _number(counts.get("terms")) is not None:
            meta |= {"examples": counts.get("examples"), "terms": _number(counts["terms"])}
        # Eigenbases that were needed in between are as large as the factors, and go.
        fisher = copied(self.fisher, self.fisher)
        return Report(
            layers, whole, meta={**facts, **meta}, damping=self.damping, fisher=fisher, problems=self.problems
        )

    def _spectra(self, meter: Meter) -> dict[str, Spectrum]:
        found: dict[str, Spectrum] = {}
        for name in meter.each(self.fisher, "spectra"):
            try:
                self._of_layers[name]["spectrum"] = found[name] = spectrum_of(self.fisher[name])
            except ArgumentError as error:
                self._failed(f"the spectrum of {name}", error)
        return found

    def _sampling(self) -> None:
        """Standard errors of drawing labels, where the draws are held apart."""
        if not self.fisher._groups:
            if self.fisher.meta.get("samples") == 1 and self.fisher.meta.get("kind") == "sampled":
                self.problems["sampling"] = (
                    "one draw a term has no spread to tell an error from: pass samples=2 or more"
                )
            return
        errors = self.fisher.sampling_error()
        self._of_whole["trace_error"] = errors.trace
        for name, error_of_layer in errors.items():
            self._of_layers[name]["sampling"] = error_of_layer

    def _counts(self, name: str, counts: Mapping[str, Any]) -> Counts:
        form, note = self._known.forms.get(name, ("", ""))
        used, layer = self._known.used.get(name), self._known.layers.get(name)
        return Counts(
            form,
            note,
            None if used is None or layer is None or not layer.modules else used.calls,
            counts.get("positions", {}).get(name),
            _number(counts.get("terms")),
            counts.get("examples"),
        )

    def _failed(self, what: str, error: Exception) -> None:
        known = isinstance(error, KFACError)
        self.problems[what] = str(error) if known else f"{type(error).__name__}: {error}"
        logger.warning("%s could not be found: %s", what, self.problems[what], exc_info=not known)


def _number(value: Any) -> float | None:
    """M, where there is one head."""
    return None if value is None or isinstance(value, Mapping) else float(value)
