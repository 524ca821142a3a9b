"""A report as dicts, JSON, a DataFrame and text."""

from __future__ import annotations

import json
from math import inf, nan
from pathlib import Path

import pytest
import torch
from torch import nn

import kfac_cond as kc
from kfac_cond.inspection import rules
from kfac_cond.inspection.plain import finite, flat, plain
from kfac_cond.inspection.report import Counts, LayerReport, Whole


@pytest.fixture
def report() -> kc.Report:
    model = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))
    with torch.no_grad():
        model[0].weight[5], model[0].bias[5] = 0.0, -1.0
    return kc.inspect(model, [torch.randn(32, 4)], "categorical", damping=0.01)


def test_the_dict_is_plain(report: kc.Report) -> None:
    found = report.to_dict()
    assert found == json.loads(json.dumps(found))
    assert (found["version"], found["damping"], len(found["lambdas"])) == (1, 0.01, 61)
    assert [layer["name"] for layer in found["layers"]] == ["0", "2"]
    assert found["findings"] == [vars(one) for one in report.findings()]


def test_spectra_are_written_as_curves_and_largest_values(report: kc.Report) -> None:
    of_layer, spectrum = report.to_dict()["layers"][1]["spectrum"], report["2"].spectrum
    assert spectrum is not None
    assert of_layer["top"] == spectrum.top(10).tolist()
    assert of_layer["A"]["top"] == spectrum.A[:10].tolist()
    assert of_layer["effective_dimension"][30] == spectrum.effective_dimension(report.lambdas[30])
    assert of_layer["share_below"][-1] == 1.0
    assert sum(of_layer["histogram"]["counts"]) == 39.0
    assert len(of_layer["histogram"]["edges"]) == len(of_layer["histogram"]["counts"]) + 1
    assert sum(of_layer["G"]["histogram"]["counts"]) == 3.0
    assert of_layer["dead_inputs"] == [5]


def test_json_has_null_for_what_is_not_finite(report: kc.Report, tmp_path: Path) -> None:
    text = report.to_json(tmp_path / "report.json")
    assert json.loads(text) == json.loads((tmp_path / "report.json").read_text())
    assert "Infinity" not in text and "NaN" not in text
    assert report["2"].spectrum.condition() == inf
    assert json.loads(text)["layers"][1]["spectrum"]["condition"] is None


def test_a_data_frame_has_a_row_for_each_layer(report: kc.Report) -> None:
    frame = report.to_pandas()
    assert list(frame.index) == ["0", "2"]
    assert frame.loc["2", "spectrum.trace"] == report["2"].spectrum.trace
    assert frame.loc["2", "sampling.trace.error"] == report["2"].sampling.trace.error
    assert frame.loc["0", "shape"] == "12 x 5"


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_table_fits_the_terminal(columns: int, report: kc.Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= columns
    assert f"{report['2'].effective_dimension(0.01):.4g}" in str(report)
    assert any(line.startswith("trace ") for line in lines)


def test_of_many_layers_the_first_and_the_last_are_shown() -> None:
    layers = {f"blocks.{i}": LayerReport(f"blocks.{i}", "linear", (2, 2), 4, i) for i in range(100)}
    text = repr(kc.Report(layers, Whole(400), meta={}))
    assert "... 60 more layers" in text
    assert "blocks.19 " in text and "blocks.80 " in text and "blocks.20 " not in text


def test_the_most_severe_findings_are_below_the_table(report: kc.Report, monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(_: kc.Report) -> list[kc.Finding]:
        return [kc.Finding("info", "", f"i{n}", f"message {n}", 1.0, 2.0, "do it") for n in range(9)] + [
            kc.Finding("error", "0", "e", "it is wrong", 1.0, 2.0, "mend it")
        ]

    monkeypatch.setattr(rules, "RULES", (rule,))
    lines = str(report).splitlines()
    (first,) = [index for index, line in enumerate(lines) if line.startswith("error")]
    assert lines[first : first + 2] == ["error: it is wrong; mend it", "info: message 0; do it"]
    assert lines[first + 8] == "... 2 more findings: report.findings()"


def test_names_do_not_steer_the_terminal() -> None:
    layer = LayerReport("\x1b[2Ja\r", "<script>", (2, 2), 4, 0)
    report = kc.Report({"\x1b[2Ja\r": layer}, Whole(4), meta={"source": "file \x07"}, problems={"b\x1b": "c\x00"})
    for text in (repr(report), repr(layer)):
        assert text.replace("\n", "").isprintable()
        assert r"\x1b[2Ja\r" in text and "<script>" in text


def test_one_layer_is_a_number_a_line(report: kc.Report) -> None:
    text = repr(report["2"])
    assert text.splitlines()[0] == "2: linear 3 x 13, depth 1"
    assert "  spectrum.trace " in text and len(text.splitlines()) > 20


def test_a_wrong_layer_names_those_near(report: kc.Report) -> None:
    with pytest.raises(KeyError, match="no layer '3' among 2; did you mean"):
        report["3"]


def test_a_mapping(report: kc.Report) -> None:
    assert (len(report), list(report), "2" in report) == (2, ["0", "2"], True)


def test_without_examples_there_is_no_trace_of_one() -> None:
    assert LayerReport("a", "", (2, 2), 4, 0, counts=Counts()).trace_per_example is None


def test_plain_values() -> None:
    value = {"a": (1, 2.0), "b": Counts(uses=2), 3: torch.float32, "d": {"x"}}
    found = plain(value)
    assert found["a"] == [1, 2.0] and found["b"]["uses"] == 2
    assert (found["3"], found["d"]) == ("torch.float32", ["x"])


def test_finite_and_flat() -> None:
    assert finite({"a": [1.0, nan, {"b": inf}], "c": "x"}) == {"a": [1.0, None, {"b": None}], "c": "x"}
    assert flat({"a": {"b": {"c": 1}, "d": [1, 2]}, "shape": [2, 3]}) == {"a.b.c": 1, "shape": "2 x 3"}
