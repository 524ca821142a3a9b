"""Progress in passes over the data, with a bar and without."""

from __future__ import annotations

import sys

import pytest

import kfac_cond as kc
from kfac_cond.inspection import meter as meters
from kfac_cond.inspection.meter import Meter, Watched


def test_each_batch_moves_a_stage_on_and_its_end_is_where_it_said() -> None:
    data, meter = Watched([1, 2, 3, 4]), Meter(5.0, show=False)
    data.meter = meter
    with meter.stage("a", 2.0):
        seen = []
        for _ in data:
            seen.append(meter.done)
        assert seen == [0.0, 0.25, 0.5, 0.75]
        assert meter.done == 1.0
    assert meter.done == 2.0
    with meter.stage("b", 0.5):
        list(data)
        assert meter.done == 2.5


def test_data_that_do_not_say_how_many_they_are() -> None:
    data, meter = Watched(lambda: iter([1, 2])), Meter(2.0, show=False)
    data.meter = meter
    with meter.stage("a", 1.0):
        list(data)
        assert meter.done == 0.0
    with meter.stage("b", 1.0):
        iterator = iter(data)
        next(iterator), next(iterator)
        assert meter.done == 1.5


def test_the_first_batch_is_kept() -> None:
    data = Watched(iter([7, 8]))
    assert data.once
    assert (data.first, list(data), data.first, data.number) == (None, [7, 8], 7, 2)


def test_without_rich_a_line_says_what_is_done_and_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    now = iter([0.0, 10.0])
    monkeypatch.setattr(meters, "monotonic", lambda: next(now))
    meter = Meter(6.0, show=True)
    with meter.running():
        with meter.stage("estimate", 2.0):
            pass
        with meter.stage("kl", 4.0):
            pass
    assert capsys.readouterr().err.splitlines() == [
        "estimate: 0 of 6 passes done",
        "kl: 2 of 6 passes done, about 20 s left",
    ]


def test_with_rich_there_is_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    meter = Meter(2.0, show=True)
    with meter.running(), meter.stage("estimate", 2.0):
        assert list(meter.each(["a", "b"], "layers")) == ["a", "b"]
    assert "2.0 of 2.0 passes" in capsys.readouterr().err


@pytest.mark.parametrize("show", [False, None])
def test_where_nobody_looks_nothing_is_shown(show: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    meter = Meter(1.0, show=show)
    meter.say("hello")
    with meter.running(), meter.stage("estimate", 1.0):
        pass
    assert capsys.readouterr() == ("", "")


def test_the_cost_is_shown_where_progress_is(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    data = [torch.randn(4, 3)]
    kc.inspect(torch.nn.Linear(3, 2), data, "categorical", level="quick", options=kc.Options(progress=True))
    assert "level 'quick': about 3 passes over the data" in capsys.readouterr().err
