"""What an argument must be, and what is said of one that is not."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

import kfac_cond as kc
from kfac_cond.checks import check_seed, check_update, described, is_damping, is_number, is_whole, settings_of


@pytest.mark.parametrize(
    ("value", "whole", "number", "damping"),
    [
        (3, True, True, True),
        (np.int64(3), True, True, True),
        (0.5, False, True, True),
        (np.float32(0.5), False, True, True),
        (Fraction(1, 2), False, True, True),
        (-1, True, True, False),
        (float("inf"), False, True, False),
        (float("nan"), False, False, False),
        (True, False, False, False),
        ("3", False, False, False),
        (torch.ones(()), False, False, False),
        (None, False, False, False),
    ],
)
def test_what_counts_as_a_number(value, whole, number, damping):
    assert (is_whole(value), is_number(value), is_damping(value)) == (whole, number, damping)


@pytest.mark.parametrize("value", [5, 0, False, "a", {"seed": 3}, kc.Data, kc.Schedule()])
def test_settings_of_another_type_are_refused(value):
    with pytest.raises(kc.ArgumentError, match=r"data is .*: expected kc\.Data\(\.\.\.\), or None"):
        settings_of(value, kc.Data, "data")


@pytest.mark.parametrize(("value", "expected"), [(None, kc.Data()), (kc.Data(seed=3), kc.Data(seed=3))])
def test_settings_are_taken_or_the_defaults(value, expected):
    assert settings_of(value, kc.Data, "data") == expected


@pytest.mark.parametrize("seed", [None, 0, -1, 2**63, np.int64(4)])
def test_a_seed_is_whole_or_none(seed):
    check_seed(seed, "Data")


@pytest.mark.parametrize("seed", ["a", 1.5, True, torch.tensor(3)])
def test_another_seed_is_refused(seed):
    with pytest.raises(kc.ArgumentError, match=r"Data\(seed=.*expected a whole number"):
        check_seed(seed, "Data")


X = torch.zeros(2, 3)


@pytest.mark.parametrize(("targets", "draws"), [(None, None), (X, X), (None, [X]), (X, (X, X))])
def test_tensors_may_be_handed_to_update(targets, draws):
    check_update(X, targets, draws)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, "3"),
        (kc.Data, "the class Data"),
        (X, r"a tensor of shape (2, 3)"),
        ([1, "a"], "list of ['int', 'str']"),
        ({"a": 1}, "dict"),
        (kc.Data(), "Data"),
    ],
)
def test_a_value_in_few_words(value, words):
    assert described(value) == words
