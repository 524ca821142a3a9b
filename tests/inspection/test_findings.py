"""Rules on planted faults, and on a healthy net; how findings are sorted, put together and said."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kfac_cond as kc
from kfac_cond.inspection import LayerReport, Whole
from kfac_cond.inspection.approximation import ApproximationError
from kfac_cond.inspection.calibration import cosine_expected
from kfac_cond.inspection.findings import Finding, Limit, grouped
from kfac_cond.inspection.limits import LIMITS
from kfac_cond.inspection.off_diagonal import BlockDiagonality
from kfac_cond.inspection.spectra import spectrum_of
from kfac_cond.inspection.staleness import Staleness
from kfac_cond.layers.layout import WeightLayout
from kfac_cond.structures.sampling import Estimated

Report = kc.Report
SGD_DAMPING = 1e4


def healthy_parts(examples: int = 256) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A net whose labels are drawn from it, and batches of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
    model.append(nn.Linear(8, 4))
    inputs = torch.randn(examples, 6)
    # Not from the model itself: a gradient that is noise alone is a finding.
    labels = torch.distributions.Categorical(logits=model(inputs) + inputs[:, :4]).sample()
    return model, list(zip(inputs.split(64), labels.split(64), strict=True))


def inspected(level: str = "full", **settings: Any) -> Report:
    model, data = healthy_parts()
    settings = {"damping": 0.01, "samples": 16, "options": kc.Options(seed=0), **settings}
    return kc.inspect(model, data, "categorical", level=level, **settings)


@pytest.fixture(scope="module")
def healthy() -> Report:
    torch.set_default_dtype(torch.float32)
    return inspected()


def changed(report: Report, name: str = "2", whole: dict[str, Any] | None = None, **sections: Any) -> Report:
    """The same report with sections of one layer, and of the whole, in the place of its own."""
    layers = {key: replace(layer, **(sections if key == name else {})) for key, layer in report.items()}
    return kc.Report(
        layers,
        replace(report.whole, **(whole or {})),
        meta=report.meta,
        damping=report.damping,
        problems=report.problems,
    )


def codes(report: Report) -> list[tuple[str, str]]:
    return [(one.code, one.layer) for one in report.findings()]


def spectrum(A: list[float], G: list[float], dtype: torch.dtype = torch.float32) -> Any:
    layout = WeightLayout("w", None, (len(G), len(A)))
    sides = (torch.diag(torch.tensor(values, dtype=dtype)) for values in (A, G))
    return spectrum_of(kc.KroneckerBlock(layout, *sides, "2"))


def test_a_healthy_net_is_silent(healthy: Report) -> None:
    assert healthy.problems == {}
    assert healthy.findings() == []


# -- planted faults ----------------------------------------------------------------------------------------------------


def of_health(**numbers: Any) -> Callable[[Report], Report]:
    return lambda report: changed(report, health=replace(report["2"].health, **numbers))


def of_section(section: str, **numbers: Any) -> Callable[[Report], Report]:
    return lambda report: changed(report, **{section: replace(getattr(report["2"], section), **numbers)})


def of_whole(section: str, **numbers: Any) -> Callable[[Report], Report]:
    return lambda report: changed(report, whole={section: replace(getattr(report.whole, section), **numbers)})


def of_staleness(**numbers: Any) -> Callable[[Report], Report]:
    fresh = Staleness(0, 0.0, 0.0, 1.0, 0.0, 19.0, 1e4, 1e4, 9, 8)
    return lambda report: changed(report, staleness=replace(fresh, **numbers))


def of_noise(relative: float) -> Callable[[Report], Report]:
    noisy = Estimated(1.0, relative, 4, 3)
    return lambda report: changed(report, sampling=replace(report["2"].sampling, trace=noisy))


def of_approximation(**numbers: Any) -> Callable[[Report], Report]:
    errors = dict.fromkeys(("kfac_standard_error", "ekfac_standard_error", "gap_standard_error"), 0.01)
    known = ApproximationError(0.5, 0.45, 0.9, 1.0, 1.0, 256, **errors)
    return lambda report: changed(report, approximation=replace(known, **numbers))


def of_spectrum(A: list[float], G: list[float]) -> Callable[[Report], Report]:
    found = spectrum(A, G)
    return lambda report: changed(report, spectrum=found, shape=(len(G), len(A)), parameters=len(A) * len(G))


def coupled(share: float, error: float) -> Callable[[Report], Report]:
    return lambda report: changed(report, whole={"block_diagonality": BlockDiagonality(share, error, 1.0, 4, 4)})


def named_problem(report: Report) -> Report:
    report = changed(report)
    report.problems["the inverse of 2"] = "not positive definite"
    return report


#: By code: (what is found, what beside it is not).
PLANTED: dict[str, tuple[Callable[[Report], Report], Callable[[Report], Report]]] = {
    "not-finite": (of_section("update", cosine=math.nan), of_section("kl", ratio=1.1)),
    "no-curvature": (of_spectrum([0.0] * 3, [0.0] * 4), of_spectrum([1.0] * 3, [1.0] * 4)),
    "dead-inputs": (of_spectrum([1.0, 1.0, 0.0], [1.0]), of_spectrum([1.0] * 39 + [0.0], [1.0])),
    "dead-outputs": (of_spectrum([1.0], [1.0, 1.0, 0.0]), of_spectrum([1.0], [1.0] * 39 + [0.0])),
    "ill-conditioned": (of_spectrum([1e8, 1.0], [1.0, 1.0]), of_spectrum([1e4, 1.0], [1.0, 1.0])),
    "rank-deficient": (
        of_spectrum([1.0, 1e-20, 1e-20, 1e-20], [1.0] * 30),
        of_spectrum([1.0, 1.0, 1.0, 1e-20], [1.0] * 30),
    ),
    "few-positions": (of_staleness(effective_positions=8.0), of_staleness(effective_positions=9.0)),
    "label-noise": (of_noise(0.3), of_noise(0.2)),
    "asymmetry": (of_health(asymmetry=2e-3), of_health(asymmetry=1e-6)),
    "negative-mass": (of_health(negative_mass=0.02), of_health(negative_mass=1e-6)),
    "residual": (of_health(residual=0.02), of_health(residual=1e-3)),
    "failed": (of_health(failures=2), of_health(failures=0)),
    "no-inverse": (named_problem, changed),
    "stale": (of_staleness(cosine=0.8), of_staleness(cosine=0.95)),
    "drifted": (of_staleness(cosine=None, off_diagonal_G=0.6), of_staleness(cosine=0.99, off_diagonal_G=0.6)),
    "disproportionate": (of_section("update", update_to_weight=50.0), of_section("update", update_to_weight=5.0)),
    "empirical-differs": (of_section("empirical", trace_ratio=0.05), of_section("empirical", trace_ratio=0.2)),
    "labels-surprise": (of_section("empirical", trace_ratio=4.0), of_section("empirical", trace_ratio=2.0)),
    "kl-concentrated": (of_section("kl", share=0.95), of_section("kl", share=0.8)),
    "independence-gap": (of_approximation(independence_gap=0.4), of_approximation(independence_gap=0.8)),
    "ekfac-better": (of_approximation(ekfac=0.2), of_approximation(ekfac=0.2, ekfac_standard_error=0.2)),
    "sampling-check": (of_whole("sampling", probability=1e-6), of_whole("sampling", probability=1e-3)),
    "wrong-scale": (of_whole("kl", scale=0.5), of_whole("kl", scale=0.8)),
    "kl-underpredicted": (
        of_whole("kl", measured=1.0, decrease=0.1, predicted=0.1),
        of_whole("kl", measured=0.2, decrease=0.1, predicted=0.1),
    ),
    "not-quadratic": (of_whole("kl", remainder=0.5), of_whole("kl", remainder=0.1)),
    "small-batch": (of_whole("signal", ratio=0.05), of_whole("signal", ratio=0.2)),
    "coupled-layers": (coupled(0.7, 0.05), coupled(0.7, 0.2)),
    "layers-apart": (of_spectrum([1e3, 1e3], [1e3, 1.0]), of_spectrum([1.0, 0.2], [1.0, 0.5])),
}


@pytest.mark.parametrize("code", PLANTED)
def test_a_planted_fault_is_found_and_what_is_near_it_is_not(code: str, healthy: Report) -> None:
    faulty, near = PLANTED[code]
    found = [one for one in faulty(healthy).findings() if one.code == code]
    assert len(found) == 1
    assert found[0].layer in ("2", "")
    assert code not in [one.code for one in near(healthy).findings()]


@pytest.mark.parametrize("code", PLANTED)
def test_a_finding_names_its_layer_and_says_what_to_do(code: str, healthy: Report) -> None:
    (one,) = [one for one in PLANTED[code][0](healthy).findings() if one.code == code]
    assert one.message.startswith("`2`: ") or not one.layer
    assert len(one.advice) > 10
    assert not one.advice.endswith(".") and not one.message.endswith(".")
    assert str(one) == f"{one.severity}: {one.message}; {one.advice}"


def test_every_limit_has_a_planted_fault() -> None:
    elsewhere = {"uncovered", "unused", "acts-as-sgd", "large-step", "skipped-captures"}
    assert {limit.code for limit in LIMITS} == {*PLANTED, *elsewhere}
    assert len({limit.code for limit in LIMITS}) == len(LIMITS)


# -- planted in a model ------------------------------------------------------------------------------------------------


def test_a_damping_above_the_spectrum_makes_sgd_of_it() -> None:
    report = inspected("standard", damping=SGD_DAMPING)
    found = {one.layer: one for one in report.findings() if one.code == "acts-as-sgd"}
    assert set(found) == set(report)
    assert "all eigenvalues lie below damping 1e+04" in found["2"].message
    assert "K-FAC acts as SGD there" in found["2"].message
    tried = report["2"].damping_for_trace(0.9)
    assert f"try {tried:.1g}" in found["2"].advice
    assert f"({report['2'].damping_for(0.9):.1g} keeps 90 % of its effective dimension)" in found["2"].advice
    again = inspected("standard", damping=tried)
    assert "acts-as-sgd" not in {one.code for one in again.findings() if one.layer == "2"}


def test_of_blocks_alone_the_cosine_is_that_which_is_expected() -> None:
    model, data = healthy_parts()
    fisher = kc.estimate(model, data, "categorical", samples=8)
    report = kc.inspect(fisher, damping=SGD_DAMPING)
    assert {one.layer for one in report.findings() if one.code == "acts-as-sgd"} == set(report)
    assert "acts-as-sgd" not in {one.code for one in kc.inspect(fisher, damping=1e-2).findings()}


def test_the_wrong_temperature_is_found() -> None:
    model, data = healthy_parts()
    hotter = kc.Tempered(kc.Categorical(), 3.0)
    drawn = [hotter.sample(model(inputs).detach(), torch.Generator().manual_seed(3)) for inputs, _ in data]
    options = kc.Options(draws=[[labels] for labels in drawn])
    assert "sampling-check" in {one.code for one in wrong_draws(model, data, options)}


def wrong_draws(model: nn.Module, data: Any, options: kc.Options) -> list[Finding]:
    from kfac_cond.inspection import sampling_check

    check = sampling_check.measure(model, data, "categorical", samples=1, options=options)
    return changed(inspected("quick"), whole={"sampling": check}).findings()


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_a_wrong_factor_is_found(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from kfac_cond.inspection import sources

    right = sources.estimate
    monkeypatch.setattr(sources, "estimate", lambda *args, **settings: right(*args, **settings) * factor)
    found = [one for one in inspected("standard").findings() if one.code == "wrong-scale"]
    assert len(found) == 1
    assert found[0].number == pytest.approx(1 / factor, rel=0.5)


def test_of_a_running_job_the_average_is_what_is_likely_off(healthy: Report) -> None:
    job = of_staleness()(of_whole("kl", scale=0.3)(healthy))
    (found,) = [one for one in job.findings() if one.code == "wrong-scale"]
    assert found.advice.startswith("its factors are averages over past steps")


def test_of_many_positions_the_structure_is_what_is_likely_off(healthy: Report) -> None:
    many = replace(healthy["2"].counts, positions=1e4)
    report = changed(of_whole("kl", scale=3.0)(healthy), counts=many)
    (found,) = [one for one in report.findings() if one.code == "wrong-scale"]
    assert found.advice.startswith("'kfac' leaves out what the positions")


def test_a_dead_unit_is_found() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = 0.0, -1.0
    report = kc.inspect(model, [torch.randn(64, 6)], "categorical", level="quick", samples=32)
    found = {(one.code, one.layer): one for one in report.findings()}
    assert (
        "1 of 8 outputs have no effect on any prediction, and so no gradient (3)" in found["dead-outputs", "0"].message
    )
    assert "1 of 9 inputs are always zero (3)" in found["dead-inputs", "2"].message


class Partly(nn.Module):
    """A layer that no forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_layers_without_a_block_are_found() -> None:
    report = kc.inspect(Partly(), [torch.randn(32, 4)], "categorical", level="quick", samples=32)
    assert [one for one in codes(report) if one[0] == "unused"] == [("unused", "idle")]
    report = changed(report, whole={"covered": 0.75, "uncovered": ("a", "b", "c", "d")})
    (found,) = [one for one in report.findings() if one.code == "uncovered"]
    assert found.message == "25 % of the trainable numbers have no block (a, b, c ...)"


def test_weights_that_are_not_finite_in_a_running_job() -> None:
    model, data = healthy_parts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, "categorical")
    kfac.attach(optimizer)
    for inputs, labels in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    with torch.no_grad():
        model[2].weight[0, 0] = math.inf
    report = kc.inspect(kfac, data)
    assert ("not-finite", "2") in codes(report)
    assert {one.severity for one in report.findings()} == {"error"}
    assert set(report.problems) == {"empirical"}


# -- numbers of rules --------------------------------------------------------------------------------------------------


def test_the_expected_cosine_is_that_of_dense_matrices() -> None:
    model, data = healthy_parts()
    block = kc.estimate(model, data, "categorical")["2"]
    F = block.to_dense().double()
    P = torch.linalg.inv(F + 0.03 * torch.eye(len(F), dtype=torch.float64))
    expected = (P @ F).trace() / (F.trace() * (P @ P @ F).trace()).sqrt()
    assert cosine_expected(spectrum_of(block), 0.03) == pytest.approx(float(expected), rel=1e-4)
    assert cosine_expected(spectrum([0.0], [0.0]), 0.03) == 1.0


def test_a_flat_spectrum_below_the_damping_is_no_fault_of_the_damping(healthy: Report) -> None:
    below = of_spectrum([1.0] * 3, [1.0] * 3)(healthy)
    assert "acts-as-sgd" not in {one.code for one in below.findings()}


# -- together ----------------------------------------------------------------------------------------------------------


def test_the_most_severe_come_first_and_those_of_a_rule_together(healthy: Report) -> None:
    report = of_whole("sampling", probability=1e-6)(of_section("empirical", trace_ratio=0.05)(healthy))
    report = changed(report, name="4", empirical=replace(report["4"].empirical, trace_ratio=0.01))
    report = changed(report, health=replace(report["2"].health, residual=0.5))
    assert codes(report) == [
        ("sampling-check", ""),
        ("residual", "2"),
        ("empirical-differs", "4"),
        ("empirical-differs", "2"),
    ]


def test_many_layers_with_the_same_finding_make_one_line() -> None:
    found = [
        Finding("warning", f"blocks.{i}", "residual", f"`blocks.{i}`: off", 1.0 + i, 1.0, "raise it")
        for i in range(300)
    ]
    (group,) = grouped(found)
    assert len(group.layers) == 300
    assert str(group) == (
        "warning: `blocks.299`: off (and so in 299 more: blocks.298, blocks.297, blocks.296 ...); raise it"
    )


def test_a_report_without_any_section_has_none() -> None:
    layers = {name: LayerReport(name, "linear", (2, 2), 4, 0) for name in "abcd"}
    assert kc.Report(layers, Whole(16), meta={}, damping=0.1).findings() == []


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.code)
def test_every_limit_is_in_the_documented_table_with_its_reason(limit: Limit) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reading.md").read_text(encoding="utf8")
    assert f"| `{limit.code}` | {limit.severity} | {limit.quantity} | {limit.reason} |" in page
    known = limit.value in (0, 1) or f"{limit.value:.4f}".rstrip("0").rstrip(".") in limit.quantity
    assert known, "the table says another threshold than the code has"
