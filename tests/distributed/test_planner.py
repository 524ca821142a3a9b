"""Owners, memory and messages from shapes alone, for any number of ranks; no process group anywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.distributed.layout import Grid, Message, longest_first
from kfac_cond.distributed.packing import Piece, from_limbs, limbs

from .cases import Mixed, Raw, Tokens


def deep(number: int = 12) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(8 + index % 5, 8 + (index + 1) % 5) for index in range(number)))


# -- who ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "fraction", "workers"),
    [(1, 0.0, 1), (4, 1.0, 4), (4, 0.0, 1), (4, 0.5, 2), (6, 0.5, 3), (6, 0.4, 2), (7, 0.5, 1), (64, 1 / 8, 8)],
)
def test_columns_are_the_nearest_divisor_of_the_ranks(world, fraction, workers):
    assert Grid.of(world, fraction).workers == workers


def test_every_row_meets_every_column_once():
    grid = Grid(12, 3)
    for rank in range(12):
        shared = set(grid.ranks_of_row(rank)) & set(grid.ranks_of_column(grid.column(rank)))
        assert shared == {rank}


def test_the_longest_job_goes_first():
    assert longest_first({"a": 3.0, "b": 3.0, "c": 2.0, "d": 2.0, "e": 2.0}, 2) == {
        "a": 0,
        "b": 1,
        "c": 0,
        "d": 1,
        "e": 0,
    }


def test_equal_jobs_go_round_in_the_order_of_layers():
    assert list(longest_first(dict.fromkeys("zyx", 1.0), 3).values()) == [0, 1, 2]


def test_owners_do_not_depend_on_the_order_of_hashes():
    code = (
        "import kfac_cond as kc; from tests.distributed.test_planner import deep\n"
        "for strategy in ('replicate', 'shard', 0.5):\n"
        "    print(kc.Plan(strategy=strategy).of(deep(), world=4).owners)"
    )
    root = Path(__file__).parents[2]
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, cwd=root, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_work_is_shared_out_evenly():
    table = kc.Plan(strategy="shard").of(deep(40), world=4)
    loads = [row.refresh_flops for row in table.ranks]
    assert max(loads) <= 4 / 3 * sum(loads) / 4


# -- what they keep -------------------------------------------------------------------------------------------------


def test_shards_keep_each_layer_once():
    model = deep()
    whole, shared = (kc.Plan(strategy=strategy).of(model, world=4) for strategy in ("replicate", "shard"))
    alone = kc.KFAC(model, "categorical").coverage()
    assert sum(row.factor_bytes for row in shared.ranks) == alone.factor_bytes
    assert sum(row.inverse_bytes for row in shared.ranks) == alone.inverse_bytes
    assert {row.factor_bytes for row in whole.ranks} == {alone.factor_bytes}
    assert {row.inverse_bytes for row in whole.ranks} == {alone.inverse_bytes}
    assert max(row.factor_bytes for row in shared.ranks) < 0.4 * alone.factor_bytes


def test_a_fraction_is_between():
    model = deep()
    least, between, most = (
        max(row.inverse_bytes for row in kc.Plan(strategy=strategy).of(model, world=8).ranks)
        for strategy in ("shard", 0.5, "replicate")
    )
    assert least < between < most


# -- what they send -------------------------------------------------------------------------------------------------


def test_messages_by_hand():
    """Two layers without biases, of 3 x 2 and 2 x 4, on two ranks: triangles of 6, 3, 3 and 10 numbers."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 4, bias=False)).float()
    counts = 3 * (1 + 5 + 3 * 2)
    shard = kc.Plan(strategy="shard").of(model, world=2)
    assert shard.owners == {"0": 1, "1": 0}
    assert [(one.kind, one.nbytes) for one in shard.capture_messages] == [
        ("reduce", 4 * (3 + 10)),
        ("reduce", 4 * (6 + 3)),
        ("all_reduce", 4 * counts),
    ]
    assert [(one.kind, one.nbytes) for one in shard.refresh_messages(0)] == [("all_reduce", 4 * 3)]
    assert [(one.kind, one.nbytes) for one in shard.step_messages] == [("broadcast", 4 * 8), ("broadcast", 4 * 6)]
    whole = kc.Plan().of(model, world=2)
    assert [(one.kind, one.nbytes) for one in whole.capture_messages] == [("all_reduce", 4 * (22 + counts))]
    assert whole.step_messages == []


def test_a_ring_sends_each_byte_once_to_reduce_and_twice_to_reduce_to_all():
    assert Message("reduce", 400, 4).sent == Message("broadcast", 400, 4).sent == 300
    assert Message("all_reduce", 400, 4).sent == 600


@pytest.mark.parametrize("model", [Mixed, Raw, Tokens])
@pytest.mark.parametrize("world", [1, 64, 512])
def test_any_world_on_the_meta_device(model, world):
    with torch.device("meta"):
        table = kc.Plan(strategy=0.25).of(model(), world=world)
    assert len(table.ranks) == world
    assert all(row.owner < world for row in table.layers)


def test_the_table_is_text_and_plain_numbers():
    table = kc.KFAC(deep(3), "categorical").plan(world=8)
    assert "owner" in str(table)
    assert str(table).count("\n") < 20
    assert table.to_dict()["layers"][0]["name"] == "0"
    assert table.to_dict()["world"] == 8


def test_one_process_sends_nothing():
    table = kc.KFAC(deep(3), "categorical").plan()
    assert table.capture_messages == table.step_messages == table.refresh_messages(0) == []


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["both", 1.5, -0.1, True, None])
def test_a_strategy_that_is_none_is_refused(strategy):
    with pytest.raises(kc.ArgumentError, match="strategy="):
        kc.Plan(strategy=strategy)


def test_a_mesh_that_is_none_is_refused():
    with pytest.raises(kc.ArgumentError, match="expected a process group"):
        kc.Plan(mesh="data")


def test_only_a_plan_distributes():
    with pytest.raises(kc.ArgumentError, match=r"expected kc\.Plan"):
        kc.KFAC(deep(2), "categorical").distribute("shard")


# -- how it travels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
@pytest.mark.parametrize("d", range(1, 8))
def test_a_triangle_is_the_whole_matrix(d, leading):
    half: Tensor = torch.randn(*leading, d, d)
    matrix = half + half.mT
    piece = Piece(tuple(matrix.shape), symmetric=True)
    packed = piece.packed(matrix)
    assert packed.shape == (piece.numel,)
    assert torch.equal(piece.unpacked(packed), matrix)


def test_counts_are_exact_in_single_precision_over_many_ranks():
    counts = torch.tensor([0.0, 1.0, 2.0**24 + 1, 2.0**36 - 1])
    three = limbs(counts, torch.float32)
    total = sum(three for _ in range(4096))
    assert torch.equal(from_limbs(total, torch.float64), 4096 * counts)
