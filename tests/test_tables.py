"""Tables and numbers as text."""

from __future__ import annotations

import pytest

from kfac_cond.tables import in_bytes, in_flops, table

PATH = "encoder.layers.11.attention.self.query.weight"


@pytest.mark.parametrize(("number", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB")])
def test_bytes(number, text):
    assert in_bytes(number) == text


@pytest.mark.parametrize(("number", "text"), [(999, "999 FLOP"), (1500, "1.5 kFLOP"), (10**19, "10000.0 PFLOP")])
def test_operations(number, text):
    assert in_flops(number) == text


def test_a_long_name_goes_on_below_at_a_dot(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = table(("name", "size"), [(PATH, "1"), ("short", "22")], ["", ""], right={1})
    assert all(len(line) <= 40 for line in text.splitlines())
    assert "".join(text.split()).count(PATH) == 0
    first = text.splitlines()[2:4]
    assert (first[0].split()[0] + first[1].strip()) == PATH
    assert first[0].endswith(" 1")


def test_equal_notes_are_written_once(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    text = table(("name",), [("a",), ("b",), ("c",)], ["one " * 20, "", "one " * 20])
    assert text.count("[1]") == 3
    assert all(len(line) <= 60 for line in text.splitlines())
