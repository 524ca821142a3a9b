"""The table of sections: each has a place, comes with its level, and takes the passes that it says."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.inspection.report import LayerReport, Whole
from kfac_cond.inspection.sections import SECTIONS, Section, Size


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.fixture
def data() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(12, 4), torch.randint(3, (12,))) for _ in range(4)]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_every_section_has_a_place(section: Section) -> None:
    of_layers, of_whole = ({field.name for field in fields(kind)} for kind in (LayerReport, Whole))
    assert section.name in of_layers or section.whole in of_whole
    assert not section.whole or section.whole in of_whole


def test_a_standard_report_has_every_section_of_its_level(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    report = kc.inspect(model, data, "categorical", damping=1e-2)
    assert report.problems == {}
    for section in SECTIONS:
        if section.level == "standard" and section.needs == "data":
            found = [getattr(layer, section.name, None) for layer in report.values()]
            assert all(one is not None for one in found) or getattr(report.whole, section.whole) is not None
    assert report["0"].update.damping == report["0"].empirical.damping == report.whole.kl.damping == 1e-2


def test_a_quick_report_has_none(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    report = kc.inspect(model, data, "categorical", level="quick")
    names = [section.name for section in SECTIONS]
    assert all(getattr(layer, name, None) is None for layer in report.values() for name in names)


@pytest.mark.parametrize("level", ["quick", "standard", "full"])
def test_no_more_forwards_are_run_than_the_cost_says(
    level: str, model: nn.Module, data: list[tuple[Tensor, Tensor]]
) -> None:
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    report = kc.inspect(model, data, "categorical", level=level)
    # A forward alone is a third of a pass; the look at what is used takes one more forward, of one batch.
    assert 0 < len(calls) / len(data) <= 3 * report.meta["passes"] + 1


def test_labels_that_are_not_there_leave_out_what_needs_them(
    model: nn.Module, data: list[tuple[Tensor, Tensor]]
) -> None:
    report = kc.inspect(model, [inputs for inputs, _ in data], "categorical")
    assert set(report.problems) == {"update", "signal", "empirical"}
    assert all("label" in why for why in report.problems.values())
    assert report["0"].kl is not None and report.whole.sampling is not None


def test_a_job_has_its_staleness_without_data(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    kfac = kc.KFAC(model, "categorical")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac.attach(optimizer)
    for inputs, labels in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    without, with_data = kc.inspect(kfac), kc.inspect(kfac, data)
    assert without.problems == with_data.problems == {}
    assert without["0"].staleness is not None and without["0"].staleness.cosine is None
    assert with_data["0"].staleness.cosine is not None and with_data["0"].kl is not None


def test_what_a_proposal_costs_is_paid_once(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    assert {one.name: one.passes(Size(2, 4)) for one in SECTIONS}["update"] == 0.0


def test_what_is_predicted_is_measured_on_held_out_batches_as_well(
    model: nn.Module, data: list[tuple[Tensor, Tensor]]
) -> None:
    options = kc.Options(held_out=data[:1])
    report = kc.inspect(model, data[1:], "categorical", options=options)
    without = kc.inspect(model, data[1:], "categorical")
    assert report.problems == {}
    assert report["0"].kl.held_out is not None and without["0"].kl.held_out is None
    assert report.meta["passes"] > without.meta["passes"]


def test_held_out_batches_are_for_an_inspection_over_data(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    options = kc.Options(held_out=data)
    for structure in ("kfac", "implicit"):
        with pytest.raises(kc.ArgumentError, match="means nothing to an estimate"):
            kc.estimate(model, data, "categorical", structure=structure, options=options)
    with pytest.raises(kc.ArgumentError, match="without data"):
        kc.inspect(kc.estimate(model, data, "categorical"), options=options)
