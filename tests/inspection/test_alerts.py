"""Each rule on either side of its threshold, and what of it is said aloud."""

from __future__ import annotations

import pytest

from kfac_cond.inspection.alerts import alerts, in_words
from kfac_cond.inspection.readings import Reading

#: (numbers that are found, numbers that are not) of one layer among five.
PLANTED = {
    "acts-as-sgd": ({"cosine": 0.995, "age": 3.0}, {"cosine": 0.98, "age": 3.0}),
    "stale": ({"stale_cosine": 0.85}, {"stale_cosine": 0.95}),
    "few-positions": ({"effective_positions": 60.0}, {"effective_positions": 70.0}),
    "failed": ({"failures": 2.0}, {"failures": 0.0}),
    "large-step": ({"step_to_weight": 0.4}, {"step_to_weight": 0.2}),
    "kl-concentrated": ({"kl_share": 0.95}, {"kl_share": 0.8}),
    "not-finite": ({"trace": float("inf")}, {"trace": 1e30}),
}


def found(
    numbers: dict[str, float], *, others: int = 4, whole: dict[str, float] | None = None
) -> list[tuple[str, str]]:
    layers = {"planted": numbers, **{f"other.{index}": {"cosine": 0.5} for index in range(others)}}
    return [(one.code, one.layer) for one in alerts(Reading(7, whole or {}, layers), {"planted": 64})]


@pytest.mark.parametrize("code", PLANTED)
def test_a_planted_fault_is_found_and_what_is_near_it_is_not(code):
    faulty, healthy = PLANTED[code]
    assert found(faulty) == [(code, "planted")]
    assert found(healthy) == []


def test_every_finding_says_what_was_found_and_what_to_do():
    for faulty, _ in PLANTED.values():
        (one,) = alerts(Reading(7, {}, {"planted": faulty, **{str(i): {} for i in range(4)}}), {"planted": 64})
        assert "`planted`" in one.message
        assert len(one.advice) > 20


def test_a_layer_that_is_not_preconditioned_may_act_as_sgd():
    assert found({"cosine": 1.0}) == []


def test_few_layers_may_share_the_kl_as_they_do():
    assert found({"kl_share": 0.95}, others=1) == []


def test_captures_left_out_since_the_last_reading_are_of_the_whole():
    assert found({}, whole={"new_skipped_captures": 2.0}) == [("skipped-captures", "")]
    assert found({}, whole={"skipped_captures": 2.0, "new_skipped_captures": 0.0}) == []


def test_a_line_for_each_code_and_once_for_each_layer():
    of_two = {name: {"cosine": 1.0, "age": 1.0} for name in ("a", "b")}
    findings, heard = list(alerts(Reading(0, {}, of_two), {})), set()
    (line,) = in_words(findings, heard)
    assert line.startswith("warning: `a`:")
    assert "and so in 1 more: b" in line
    assert list(in_words(findings, heard)) == []


def test_information_is_not_said_aloud():
    findings = list(alerts(Reading(0, {}, {"planted": {"effective_positions": 1.0}}), {"planted": 64}))
    assert [one.severity for one in findings] == ["info"]
    assert list(in_words(findings, set())) == []
