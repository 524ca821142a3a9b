"""What large runs cost by `examples/benchmarks/ranks.py`: small cases by hand, and what two ranks really send."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch import nn

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    # Sizes of parameters are those of single precision, as in a script.
    torch.set_default_dtype(torch.float32)
    yield importlib.import_module("ranks")
    for name in ("ranks", "ranks_check", "large_models"):
        sys.modules.pop(name)


def small() -> nn.Module:
    """Sides of 3 and 2, and of 2 and 4."""
    return nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 4, bias=False))


def equal(number: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(32, 32) for _ in range(number)))


# Counts and flags are 3 * (1 + 5 + 3 * 2) = 36 numbers; triangles of sums and averages are 6 + 3 and 3 + 10.
SHARD = {
    "factor_bytes": 4 * (3 + 10) + 2 * 8,
    "inverse_bytes": 4 * (4 + 16),
    "capturing_bytes": 4 * 22 + 4 * 8 + 4 * (22 + 36),
    "capture_bytes": 4 * 22 // 2 + 4 * 36,
    "refresh_bytes": 4 * 3,
    "step_bytes": 4 * (6 + 8) // 2,
    "mean_bytes": 47,
    "refresh_flops": 2**3 + 4**3,
    "update_flops": 2 * 8 * (2 + 4),
    "mean_flops": 197,
}
REPLICATE = {
    "factor_bytes": 4 * 22 + 4 * 8,
    "inverse_bytes": 4 * (9 + 4 + 4 + 16),
    "capturing_bytes": 4 * 22 + 4 * 8 + 4 * (22 + 36),
    "capture_bytes": 4 * (22 + 36),
    "refresh_bytes": 4 * 3 + 4 * 22 // 2,
    "step_bytes": 0,
    "mean_bytes": 24,
    "refresh_flops": 2**3 + 4**3,
    "update_flops": 2 * 8 * (2 + 4) + 2 * 6 * (3 + 2),
    "mean_flops": 257,
}


@pytest.mark.parametrize(("strategy", "expected"), [("shard", SHARD), ("replicate", REPLICATE)])
def test_two_ranks_by_hand(ranks, strategy, expected):
    cost = asdict(ranks.cost(ranks.Network("small", small(), 1000, 0), strategy, 2))
    assert {name: cost[name] for name in expected} == expected


@pytest.mark.parametrize("world", [8, 64])
def test_shards_of_equal_layers_take_the_ranks_th_part(ranks, world):
    network = ranks.Network("equal", equal(64), 0, 0)
    shard, whole = (ranks.cost(network, strategy, world) for strategy in ("shard", "replicate"))
    for name in ("factor_bytes", "inverse_bytes", "update_flops"):
        assert world * getattr(shard, name) == getattr(whole, name)


@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet-50", 25_557_032), ("gpt-2-xl", 1_557_611_200), ("llama-2-7b", 6_738_415_616)]
)
def test_networks_have_their_published_numbers_of_parameters(ranks, name, parameters):
    with torch.device("meta"):
        network = ranks.CASES[name].network()
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_the_schedule_is_the_default_one(ranks):
    schedule = ranks.kc.Schedule()
    assert (schedule.factors, schedule.inverses) == (ranks.FACTORS, ranks.INVERSES)


def test_the_table_of_a_residual_network(ranks, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    out = tmp_path / "ranks.json"
    assert ranks.main(["--ranks", "1", "8", "--models", "resnet-50", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [(row["strategy"], row["ranks"]) for row in rows] == [(s, n) for s in ranks.STRATEGIES for n in (1, 8)]
    assert capsys.readouterr().out.count("\nshard ") == 2
    memory = [row["inverse_bytes"] for row in rows if row["ranks"] == 8]
    assert memory == sorted(memory, reverse=True)


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_two_ranks_send_what_was_planned(ranks, capfd):
    assert ranks.main(["--check"]) == 0
    assert "sockets sent" in capfd.readouterr().out
