"""One call to look inside: four kinds of sources, levels and their cost, and what cannot be inspected."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.inspection import rules, sections, work
from kfac_cond.inspection.sections import Job, Section
from kfac_cond.inspection.sources import passes_of_estimate
from kfac_cond.inspection.spectra import spectrum_of


class Twice(nn.Module):
    """A layer that is used twice, one of its own, a parameter in no layer, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head, self.idle = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scale * torch.tanh(self.shared(torch.tanh(self.shared(x)))))


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.fixture
def data() -> list[Tensor]:
    return [torch.randn(8, 4), torch.randn(5, 4)]


def forwards_of(module: nn.Module) -> list[int]:
    """A list that grows with every forward."""
    seen: list[int] = []
    module.register_forward_hook(lambda *_: seen.append(1))
    return seen


def trained(model: nn.Module, data: list[Tensor]) -> kc.KFAC:
    kfac = kc.KFAC(model, "categorical", damping=3e-2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac.attach(optimizer)
    outputs = model(data[0])
    nn.functional.cross_entropy(outputs, torch.zeros(len(outputs), dtype=torch.int64)).backward()
    optimizer.step()
    return kfac


# -- a model -----------------------------------------------------------------------------------------------------------


def test_a_model_is_inspected_by_the_blocks_of_an_estimate(model: nn.Module, data: list[Tensor]) -> None:
    options = kc.Options(seed=3)
    report = kc.inspect(model, data, "categorical", samples=3, options=options)
    fisher = kc.estimate(model, data, "categorical", samples=3, options=options)
    assert list(report) == list(fisher) == ["0", "2"]
    for depth, (name, block) in enumerate(fisher.items()):
        found = report[name]
        assert (found.kind, found.shape, found.parameters) == ("linear", block.layout.matrix_shape, block.layout.numel)
        assert found.depth == depth
        expected = torch.linalg.eigvalsh(block.to_dense()).double().clamp(min=0)
        assert found.effective_dimension(0.1) == pytest.approx(float((expected / (expected + 0.1)).sum()), rel=1e-5)
        assert found.spectrum is not None and found.spectrum.trace == pytest.approx(float(block.trace()), rel=1e-6)
        error = fisher.sampling_error()[name]
        assert found.sampling is not None
        assert found.sampling.trace == error.trace
        assert found.sampling.top_eigenvalue.error == pytest.approx(error.top_eigenvalue.error)
    assert report.whole.trace == pytest.approx(float(fisher.trace()), rel=1e-6)
    assert report.whole.trace_error == fisher.sampling_error().trace
    assert (report.whole.parameters, report.whole.covered) == (51, 1.0)


def test_what_is_counted() -> None:
    report = kc.inspect(Twice(), [torch.randn(5, 3), torch.randn(4, 3)], "categorical", level="quick", samples=2)
    shared, scale = report["shared"].counts, report["scale"].counts
    assert shared is not None and scale is not None
    assert (shared.form, shared.uses, shared.positions, shared.terms, shared.examples) == ("kronecker", 2, 18.0, 9.0, 9)
    assert (scale.form, scale.uses, scale.positions) == ("universal", None, None)
    assert scale.note


def test_operations_of_a_capture_are_those_of_the_coverage(model: nn.Module, data: list[Tensor]) -> None:
    report, rows = kc.inspect(model, data, "categorical", level="quick"), kc.coverage(model, data[0]).rows
    found = {row.layer: row.capture_flops for row in rows if row.d_in}
    assert {name: layer.cost.capture_flops for name, layer in report.items()} == found


def test_terms_and_examples_are_different_numbers() -> None:
    likelihood = kc.Categorical(dim=-1)
    report = kc.inspect(nn.Linear(3, 2), [torch.randn(5, 7, 3)], likelihood, level="quick")
    counts = report[""].counts
    assert counts is not None and (counts.terms, counts.examples, counts.positions) == (35.0, 5, 35.0)
    assert report[""].trace_per_example == pytest.approx(7 * report[""].spectrum.trace)
    assert report.to_dict()["layers"][0]["spectrum"]["per_example"] == report[""].trace_per_example


def test_a_layer_that_never_took_part_is_named(caplog: pytest.LogCaptureFixture) -> None:
    report = kc.inspect(Twice(), [torch.randn(5, 3)], "categorical", level="quick")
    assert "idle" not in report
    assert "never took part" in report.problems["idle"]
    chosen = kc.inspect(Twice(), [torch.randn(5, 3)], "categorical", level="quick", layers="head")
    assert (list(chosen), chosen.problems) == (["head"], {})


def test_parameters_that_no_block_covers_are_named(model: nn.Module, data: list[Tensor]) -> None:
    kfac = kc.KFAC(model, "categorical", rules={"2": {"exclude": True}})
    kfac.update(model(data[0]))
    nn.functional.cross_entropy(model(data[0]), torch.zeros(8, dtype=torch.int64)).backward()
    kfac.precondition()
    report = kc.inspect(kfac)
    assert (list(report), report.whole.uncovered) == (["0"], ("2.weight", "2.bias"))
    assert report.whole.covered == pytest.approx(30 / 51)
    assert "not covered: 2.weight, 2.bias" in repr(report)


def test_nothing_is_changed(data: list[Tensor]) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    kc.inspect(model, data, "categorical")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model._forward_hooks and not model[0]._forward_hooks and model.training


def test_an_interruption_anywhere_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    labelled = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
    state = torch.get_rng_state()
    given = stop = 0

    def interrupted() -> Iterator[Any]:
        nonlocal given
        for batch in labelled:
            given += 1
            if given == stop:
                raise KeyboardInterrupt
            yield batch

    kc.inspect(model, interrupted, "categorical", level="full")
    whole, given = given, 0
    while stop < whole:
        given, stop = 0, stop + 1
        with pytest.raises(KeyboardInterrupt):
            kc.inspect(model, interrupted, "categorical", level="full")
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters()) and model.training
        assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


def test_one_draw_has_no_spread(model: nn.Module, data: list[Tensor]) -> None:
    report = kc.inspect(model, data, "categorical", samples=1)
    assert report["0"].sampling is None
    assert "samples=2" in report.problems["sampling"]


# -- the damping -------------------------------------------------------------------------------------------------------


def test_dampings_of_the_whole_are_those_of_all_eigenvalues(model: nn.Module, data: list[Tensor]) -> None:
    report = kc.inspect(model, data, "categorical", damping=0.05, level="quick")
    e = torch.cat([torch.as_tensor(layer.spectrum.values.copy()) for layer in report.values()])
    found = report.whole.calibration
    assert found is not None and report.lambdas == found.lambdas and len(found.lambdas) == 61
    assert report.whole.effective_dimension == pytest.approx(float((e / (e + 0.05)).sum()))
    for damping, kept, below in zip(found.lambdas, found.effective_dimension, found.share_below, strict=True):
        assert kept == pytest.approx(float((e / (e + damping)).sum()))
        assert below == pytest.approx(float((e < damping).double().mean()))
    assert found.rank == int((e > 0).sum())
    for share, damping in ((0.5, found.keeps_half), (0.9, found.keeps_most)):
        assert float((e / (e + damping)).sum()) == pytest.approx(share * found.rank, rel=1e-6)
    assert float((e * e / (e + found.keeps_trace)).sum()) == pytest.approx(0.9 * float(e.sum()), rel=1e-6)
    own = [layer.damping_for_trace(0.9) for layer in report.values()]
    assert found.layers_apart == pytest.approx(max(own) / min(own))
    assert found.lambdas[-1] / 10 < float(e.max()) <= found.lambdas[-1]


def test_a_whole_that_is_zero(model: nn.Module, data: list[Tensor]) -> None:
    report = kc.inspect(kc.estimate(model, data, "categorical") * 0.0)
    found = report.whole.calibration
    assert found is not None and (found.rank, found.keeps_most, found.layers_apart) == (0, float("inf"), None)
    assert report.whole.trace == 0.0
    assert json.loads(report.to_json())["whole"]["calibration"]["keeps_most"] is None


def test_label_noise_scales_the_fisher_and_its_dampings(data: list[Tensor]) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    sharp, noisy = (
        kc.inspect(model, data, kc.Gaussian(variance), level="quick", options=kc.Options(seed=2))
        for variance in (1.0, 4.0)
    )
    for name, layer in noisy.items():
        assert 4 * layer.spectrum.trace == pytest.approx(sharp[name].spectrum.trace, rel=1e-5)
        assert 4 * layer.damping_for(0.5) == pytest.approx(sharp[name].damping_for(0.5), rel=1e-5)
        assert layer.spectrum.participation == pytest.approx(sharp[name].spectrum.participation, rel=1e-5)


# -- a running job -----------------------------------------------------------------------------------------------------


def test_a_running_job_is_inspected_without_a_pass(model: nn.Module, data: list[Tensor]) -> None:
    kfac = trained(model, data)
    seen, before = forwards_of(model), kfac.state_dict()
    report = kc.inspect(kfac)
    assert not seen
    fisher = kfac.fisher()
    for name, block in fisher.items():
        assert report[name].spectrum.trace == pytest.approx(spectrum_of(block).trace)
        assert report[name].kind == "linear"
        assert report[name].health.failures == 0
        assert report[name].counts.form == "kronecker"
    assert (report.damping, report.whole.covered) == (3e-2, 1.0)
    assert report.whole.effective_dimension == pytest.approx(
        sum(one.effective_dimension(3e-2) for one in report.values())
    )
    after = kfac.state_dict()
    assert repr(before) == repr(after)


def test_a_job_that_has_captured_nothing(model: nn.Module) -> None:
    with pytest.raises(kc.NotReadyError, match="no factors yet"):
        kc.inspect(kc.KFAC(model, "categorical"))


def test_layers_of_a_running_job(model: nn.Module, data: list[Tensor]) -> None:
    assert list(kc.inspect(trained(model, data), layers="2")) == ["2"]


# -- a Fisher and a file -----------------------------------------------------------------------------------------------


def test_a_file_says_what_its_fisher_says(model: nn.Module, data: list[Tensor], tmp_path: Path) -> None:
    fisher = kc.estimate(model, data, "categorical", samples=2)
    fisher.save(tmp_path / "f.safetensors")
    of_fisher, of_file = kc.inspect(fisher), kc.inspect(str(tmp_path / "f.safetensors"))
    for name in fisher:
        assert of_file[name].spectrum.trace == of_fisher[name].spectrum.trace
        assert (of_file[name].kind, of_file[name].shape) == ("", fisher[name].layout.matrix_shape)
    assert of_fisher["0"].sampling is not None and of_file["0"].sampling is None
    assert of_file["0"].counts.terms == 13.0
    assert of_file.problems == {}


def test_what_is_computed_once_is_not_kept_with_the_fisher_given(model: nn.Module, data: list[Tensor]) -> None:
    fisher = kc.estimate(model, data, "categorical")
    held = set(vars(fisher["0"]))
    report = kc.inspect(fisher, damping=0.1)
    assert set(vars(fisher["0"])) == set(vars(report.fisher["0"])) == held
    assert report.fisher["0"].A is fisher["0"].A


def test_a_layer_known_by_its_products_alone_is_named(model: nn.Module, data: list[Tensor]) -> None:
    fisher = kc.estimate(model, data, "categorical")
    report = kc.inspect(fisher + fisher)
    assert report["0"].spectrum is None
    assert "need the dense matrix" in report.problems["the spectrum of 0"]
    assert report.whole.trace == pytest.approx(2 * float(fisher.trace()), rel=1e-6)
    assert "the spectrum of 0" in repr(report) and report.to_dict()["problems"]
    with pytest.raises(kc.ArgumentError, match="has no spectrum of it"):
        report["0"].effective_dimension(0.1)


def test_all_parameters_in_one_block(model: nn.Module, data: list[Tensor]) -> None:
    fisher = kc.estimate(model, data, "categorical", structure="dense", kind="exact")
    report = kc.inspect(fisher)
    assert report["*"].parameters == 51
    assert report["*"].spectrum.trace == pytest.approx(float(fisher.trace()), rel=1e-6)
    assert "*" in repr(report)


# -- levels ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    number: float
    curve: tuple[float, ...] = (1.0, 2.0)


def section(name: str, level: str = "standard", passes: float = 2.0, **fails: Exception) -> Section:
    def measure(job: Job) -> tuple[Any, dict[str, Any]]:
        for error in fails.values():
            raise error
        number = float(sum(len(x) for x in job.over_data[1]))
        return Found(job.damping), {layer: Found(number) for layer in job.fisher}

    return Section(name, level, lambda size: passes * size.samples * size.layers / 2, measure, "kl")


def test_the_cost_is_said_before_anything_runs(
    model: nn.Module, data: list[Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sections, "SECTIONS", (section("kl"), section("approximation", "full", 5.0)))
    said: list[str] = []

    class Telling(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(f"{len(seen)} {record.getMessage()}")

    seen = forwards_of(model)
    handler = Telling()
    logging.getLogger("kfac_cond").addHandler(handler)
    caplog.set_level(logging.INFO, "kfac_cond")
    try:
        totals = {}
        for level in ("quick", "standard", "full"):
            totals[level] = kc.inspect(model, data, "categorical", level=level, samples=2).meta["passes"]
    finally:
        logging.getLogger("kfac_cond").removeHandler(handler)
    once = passes_of_estimate(2)
    assert totals == {"quick": once, "standard": once + 4.0, "full": once + 14.0}
    assert said[0] == (
        "0 inspection of Sequential, level 'quick': about 1.67 passes over the data, a forward and a backward each "
        "(estimate 1.67)"
    )
    assert "(estimate 1.67, kl 4, approximation 10)" in said[-1]


def test_sections_go_to_their_places(model: nn.Module, data: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "RULES", ())
    monkeypatch.setattr(sections, "SECTIONS", (section("signal"), section("approximation", "full")))
    report = kc.inspect(model, data, "categorical", damping=0.25)
    assert (report["2"].signal, report["2"].approximation, report.whole.kl) == (Found(13.0), None, Found(0.25))
    assert report.to_dict()["layers"][1]["signal"] == {"number": 13.0, "curve": [1.0, 2.0]}
    assert report.to_dict()["whole"]["kl"]["number"] == 0.25


def test_where_no_damping_is_given_sections_get_that_of_training(
    model: nn.Module, data: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sections, "SECTIONS", (section("signal"),))
    report = kc.inspect(model, data, "categorical")
    assert report.whole.kl.number == report["0"].health.damping == kc.KFAC(model, "categorical").damping.at(0)
    assert report.damping is None


@pytest.mark.parametrize("error", [kc.LikelihoodError("no labels"), RuntimeError("out of memory")])
def test_a_section_that_fails_is_named_and_the_others_go_on(
    error: Exception,
    model: nn.Module,
    data: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(rules, "RULES", ())
    monkeypatch.setattr(sections, "SECTIONS", (section("empirical", error=error), section("signal")))
    report = kc.inspect(model, data, "categorical")
    assert report["0"].empirical is None and report["0"].signal == Found(13.0)
    assert str(error) in report.problems["empirical"]
    assert "not found: empirical" in repr(report)
    assert any("empirical could not be found" in record.getMessage() for record in caplog.records)


def test_data_that_can_be_gone_through_once(
    model: nn.Module, data: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sections, "SECTIONS", (section("signal"),))
    assert kc.inspect(model, iter(data), "categorical", level="quick")["0"].counts.uses == 1
    with pytest.raises(kc.ArgumentError, match="an iterator can be gone through once"):
        kc.inspect(model, iter(data), "categorical")
    assert kc.inspect(model, lambda: iter(data), "categorical")["0"].signal == Found(13.0)


def test_a_running_job_with_data_has_the_sections(
    model: nn.Module, data: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sections, "SECTIONS", (section("signal"),))
    kfac = trained(model, data)
    assert kc.inspect(kfac).meta["note"] == "without data, what the blocks say alone"
    report = kc.inspect(kfac, data)
    assert report["0"].signal == Found(13.0) and report.whole.kl.number == 3e-2


# -- what cannot be inspected ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": "deep"}, "level='deep': expected one of quick, standard, full"),
        ({"samples": 0}, "samples=0: expected a whole number >= 1"),
        ({"damping": -1.0}, "damping=-1.0: expected a finite number >= 0"),
        ({"layers": 3}, "layers=3: expected a pattern"),
        ({"layers": []}, "expected a pattern, or a list"),
        ({"layers": "0", "options": kc.Options(layers="2")}, "layers are given twice"),
        (
            {"level": "quick", "options": kc.Options(held_out=[torch.ones(1, 3)])},
            "at level='quick', which measures no KL",
        ),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str, model: nn.Module, data: list[Tensor]) -> None:
    with pytest.raises(kc.ArgumentError, match=message):
        kc.inspect(model, data, "categorical", **arguments)


@pytest.mark.parametrize("pattern", ["blocks.*.mlp", "*.weihgt", ["0", "3"]])
def test_a_pattern_that_matches_nothing_names_what_is_near(
    pattern: Any, model: nn.Module, data: list[Tensor], tmp_path: Path
) -> None:
    fisher = kc.estimate(model, data, "categorical")
    for given in ((model, data, "categorical"), (fisher,), (trained(model, data),)):
        with pytest.raises(kc.CoverageError, match=r"matches none of 2 layers; did you mean '(0|2)"):
            kc.inspect(*given, layers=pattern)


@pytest.mark.parametrize("pattern", ["0", "0.weight", "*.bias"])
def test_patterns_match_layers_modules_and_parameters(pattern: str, model: nn.Module, data: list[Tensor]) -> None:
    fisher = kc.estimate(model, data, "categorical")
    names = ["0"] if pattern.startswith("0") else ["0", "2"]
    assert list(kc.inspect(model, data, "categorical", layers=pattern, level="quick")) == names
    assert list(kc.inspect(fisher, layers=pattern)) == names


def empty() -> Iterator[Tensor]:
    yield from ()


@pytest.mark.parametrize("nothing", [list, lambda: [torch.randn(0, 4)], lambda: empty])
def test_no_examples(nothing: Callable[[], Any], model: nn.Module) -> None:
    with pytest.raises(kc.ArgumentError, match=r"0 examples|M = 0"):
        kc.inspect(model, nothing(), "categorical")


def test_weights_that_are_not_finite(model: nn.Module, data: list[Tensor]) -> None:
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(kc.NumericalError, match="not finite"):
        kc.inspect(model, data, "categorical")


def test_a_fisher_with_a_block_that_is_not_finite(model: nn.Module, data: list[Tensor]) -> None:
    fisher = kc.estimate(model, data, "categorical")
    fisher["2"].G[0, 0] = torch.inf
    with pytest.raises(kc.NumericalError, match="layer '2': 1 of 9 numbers of its G are not finite"):
        kc.inspect(fisher)


def test_files_that_are_no_fisher(model: nn.Module, data: list[Tensor], tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        kc.inspect(path)
    kc.estimate(model, data, "categorical").save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(kc.StateError, match="truncated"):
        kc.inspect(path)


def test_a_file_of_another_version(
    model: nn.Module, data: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kfac_cond.structures import storage

    monkeypatch.setattr(storage, "VERSION", 7)
    kc.estimate(model, data, "categorical").save(tmp_path / "f.safetensors")
    monkeypatch.undo()
    with pytest.raises(kc.StateError, match="has format version 7, this library reads 1"):
        kc.inspect(tmp_path / "f.safetensors")


def test_sources_that_are_none(model: nn.Module, data: list[Tensor]) -> None:
    fisher = kc.estimate(model, data, "categorical")
    for given, message in (
        ((3,), "source is 3: expected a model"),
        ((model,), "a model is inspected over data"),
        ((fisher, data, "categorical"), "has no model to run"),
    ):
        with pytest.raises(kc.ArgumentError, match=message):
            kc.inspect(*given)
    with pytest.raises(kc.ArgumentError, match="came without data"):
        kc.inspect(fisher, level="full")


def test_one_batch_is_not_taken_for_batches(model: nn.Module) -> None:
    with pytest.raises(kc.ArgumentError, match="which is one batch"):
        kc.inspect(model, torch.randn(8, 4), "categorical")


def test_an_inverse_that_fails_is_named(model: nn.Module, data: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise kc.NumericalError("no inverse")

    monkeypatch.setattr(work, "inverted", failing)
    report = kc.inspect(model, data, "categorical")
    assert report.problems["the inverse of 0"] == "no inverse"
    assert report["0"].health.residual is None
