"""Generators of label draws: numbers alone decide, and the global generator is left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_cond.draws import Draws

CPU = torch.device("cpu")


def numbers(draws: Draws, *, step: int, count: int = 1, size: int = 4) -> list[torch.Tensor]:
    return [torch.rand(size, generator=g) for g in draws.generators(step=step, count=count, device=CPU)]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(-(2**63), 2**64 - 1), step=st.integers(0, 2**40))
def test_the_same_numbers_whenever_a_step_comes(seed, step):
    fresh, used = Draws(seed), Draws(seed)
    numbers(used, step=step + 1)
    assert torch.equal(numbers(used, step=step)[0], numbers(fresh, step=step)[0])


@pytest.mark.parametrize(("one", "other"), [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((-1, 0), (1, 0)), ((0, 1), (1, 0))])
def test_other_seeds_and_steps_give_other_numbers(one, other):
    found = [numbers(Draws(seed), step=step)[0] for seed, step in (one, other)]
    assert not torch.equal(*found)


@pytest.mark.parametrize("kind", [np.int64, np.uint8])
def test_a_seed_of_numpy_is_a_seed(kind):
    assert torch.equal(numbers(Draws(kind(4)), step=0)[0], numbers(Draws(4), step=0)[0])


def test_draws_of_one_step_differ():
    first, second = numbers(Draws(0), step=0, count=2)
    assert not torch.equal(first, second)


def test_the_first_draw_does_not_depend_on_how_many_there_are():
    assert torch.equal(numbers(Draws(0), step=0, count=1)[0], numbers(Draws(0), step=0, count=5)[0])


@pytest.mark.parametrize("split", [(1, 6), (3, 4), (7, 0)])
def test_micro_batches_of_a_step_go_on_in_one_stream(split):
    draws = Draws(0)
    parts = [numbers(draws, step=3, size=size)[0] for size in split]
    assert torch.equal(torch.cat(parts), numbers(Draws(0), step=3, size=7)[0])


def test_the_global_generator_is_neither_read_nor_advanced():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    draws = Draws()
    first = numbers(draws, step=0)[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(numbers(Draws(), step=0)[0], first)


def test_the_default_seed_is_that_of_torch():
    torch.manual_seed(5)
    assert Draws().seed == 5


def test_nothing_is_drawn_on_the_meta_device():
    assert Draws(0).generators(step=0, count=2, device=torch.device("meta")) == [None, None]


@pytest.mark.parametrize("rank", [1, 2])
def test_ranks_differ(rank, monkeypatch):
    here = numbers(Draws(0), step=0)[0]
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
    assert not torch.equal(numbers(Draws(0), step=0)[0], here)
