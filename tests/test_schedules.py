"""What is due at which step, and a count that may be taken back on the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kfac_cond as kc
from kfac_cond.schedules import Clock

from .training import HostReads


def due_steps(due, steps: int = 12) -> list[int]:
    return [step for step in range(steps) if due(step)]


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        (1, list(range(12))),
        (5, [0, 5, 10]),
        (100, [0]),
        (None, []),
        (lambda step: step in (1, 7), [1, 7]),
        (lambda step: torch.tensor(step == 3), [3]),
    ],
    ids=["every", "fifth", "rare", "never", "callable", "callable of tensors"],
)
@pytest.mark.parametrize("what", ["factors", "inverses"])
def test_due_steps(what, when, expected):
    schedule = kc.Schedule(**{what: when})
    assert due_steps(getattr(schedule, f"{what}_due")) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"factors": 1, "inverses": 100, "warmup": 10}, [0, 1, 2, 4, 8]),
        ({"factors": 2, "inverses": 100, "warmup": 9}, [0, 2, 4, 8]),
        ({"factors": 2, "inverses": 100, "warmup": 8}, [0, 2, 4]),
        ({"factors": np.int64(1), "inverses": np.int64(100), "warmup": 10}, [0, 1, 2, 4, 8]),
        ({"factors": 1, "inverses": 3, "warmup": 3}, [0, 1, 2, 3, 6, 9]),
        ({"factors": 1, "inverses": None, "warmup": 10}, []),
        ({"factors": None, "inverses": 6, "warmup": 10}, [0, 6]),
        ({"factors": lambda step: True, "inverses": 6, "warmup": 10}, [0, 6]),
    ],
)
def test_warmup_refreshes_at_powers_of_two(options, expected):
    assert due_steps(kc.Schedule(**options).inverses_due) == expected


@pytest.mark.parametrize(("decay", "expected"), [(0.5, 0.5), (lambda step: 1 - 1 / (step + 1), 0.75)])
def test_the_decay_is_a_number_or_a_callable(decay, expected):
    assert kc.Schedule(decay=decay).decay_at(3) == expected


@pytest.mark.parametrize("given_decay", [1.0, -0.1, float("nan")])
def test_a_callable_decay_out_of_range_is_refused_with_its_step(given_decay):
    with pytest.raises(kc.ArgumentError, match="at step 3"):
        kc.Schedule(decay=lambda step: given_decay).decay_at(3)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"factors": 0}, "factors=0"),
        ({"factors": -1}, "factors=-1"),
        ({"factors": 1.5}, r"factors=1\.5"),
        ({"factors": True}, "factors=True"),
        ({"inverses": 0}, "inverses=0"),
        ({"inverses": "10"}, "inverses='10'"),
        ({"decay": 1.0}, r"decay=1\.0"),
        ({"decay": -0.5}, r"decay=-0\.5"),
        ({"decay": "0.9"}, r"decay='0\.9'"),
        ({"decay": float("nan")}, "decay=nan"),
        ({"warmup": 1.5}, r"warmup=1\.5"),
        ({"warmup": -1}, "warmup=-1"),
        ({"patience": 0}, "patience=0"),
    ],
)
def test_what_makes_no_schedule_is_refused_by_name(options, name):
    with pytest.raises(kc.ArgumentError, match=name):
        kc.Schedule(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"factors": 1, "inverses": 20}, "factors every step, inverses every 20 steps"),
        ({"factors": None, "inverses": lambda step: True}, "factors never, inverses when its callable says"),
    ],
)
def test_it_reads_as_words(options, words):
    assert str(kc.Schedule(**options)) == words


# -- the clock ------------------------------------------------------------------------------------------------------


def test_it_counts_steps():
    clock = Clock(kc.Schedule())
    clock.advance()
    clock.advance()
    assert clock.step == 2


@pytest.mark.parametrize("start", [0, 7])
@pytest.mark.parametrize("skipped", [True, False])
def test_a_skipped_step_is_taken_back(start, skipped):
    clock = Clock(kc.Schedule(), start)
    clock.advance(torch.tensor(skipped))
    assert clock.step == start + (not skipped)


def test_what_was_skipped_is_settled_once():
    clock = Clock(kc.Schedule())
    clock.advance()
    clock.advance(torch.tensor(True))
    assert [clock.step, clock.step, clock.at_most] == [1, 1, 1]


def test_between_due_steps_nothing_is_read():
    clock = Clock(kc.Schedule(factors=10, inverses=10), 3)
    clock.advance(torch.tensor(True))
    with HostReads() as reads:
        clock.factors_due()
        clock.inverses_due()
    assert reads.count == 0


def test_a_new_step_has_taken_nothing_in():
    clock = Clock(kc.Schedule())
    clock.taken_in = True
    clock.advance()
    assert not clock.taken_in


@given(st.lists(st.booleans(), max_size=30), st.integers(1, 5))
def test_every_due_step_is_captured_once_whatever_is_skipped(skips, period):
    """A due step that is skipped is not counted, since the host then knows; others are taken back on the device."""
    clock, due = Clock(kc.Schedule(factors=period)), []
    for skip in skips:
        is_due = clock.factors_due()
        if is_due and not skip:
            due.append(clock.step)
        if not (is_due and skip):
            clock.advance(torch.tensor(skip))
    done = len(skips) - sum(skips)
    assert due == list(range(0, done, period))
