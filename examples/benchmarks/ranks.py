"""What K-FAC costs a rank of a large run, for each strategy: memory, bytes sent, operations on the critical path.

    python examples/benchmarks/ranks.py [--ranks 1 8 64 512 4096] [--models resnet-50 ...] [--out FILE.json]
    python examples/benchmarks/ranks.py --check

The numbers are those of ``kc.Plan``, the planner that training shares layers out by; models are on the meta device and
nothing is computed. ``--check`` trains a small network on two ranks under gloo and compares what they send with it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from large_models import CASES
from ranks_check import check
from torch.utils.flop_counter import FlopCounterMode

import kfac_cond as kc
from kfac_cond.tables import fitted, in_bytes, in_flops, table

STRATEGIES = ("replicate", 0.25, "shard")
RANKS = (1, 8, 64, 512, 4096)
FACTORS, INVERSES = 10, 100
"""Steps between two captures, and between two refreshes, of ``kc.Schedule()``."""


@dataclass(frozen=True)
class Network:
    """What is counted of a network whatever the ranks.

    Args:
        name: of it.
        network: on the meta device.
        capture_flops: operations of adding one draw of labels of a rank's batch to the sums.
        plain_flops: of a forward and a backward of that batch, which takes twice a forward.
    """

    name: str
    network: torch.nn.Module
    capture_flops: int
    plain_flops: int


@dataclass(frozen=True)
class Cost:
    """A row: the most that any rank has, sends and does.

    Args:
        model: its name.
        strategy: of the plan.
        ranks: how many.
        workers: ranks that precondition a layer.
        factor_bytes: of the averages on the rank with most averages and inverses.
        inverse_bytes: of the inverses on that rank.
        capturing_bytes: of the sums on every rank during a capture, and the buffer that they are sent in.
        capture_bytes: sent for a capture.
        refresh_bytes: for a refresh.
        step_bytes: at every step.
        mean_bytes: sent a step on average.
        capture_flops: operations of a capture.
        refresh_flops: of a refresh, on the rank that inverts longest.
        update_flops: of preconditioning all gradients, on the rank that has most to do.
        mean_flops: a step on average; ranks wait for one another in each of the three.
    """

    model: str
    strategy: str | float
    ranks: int
    workers: int
    factor_bytes: int
    inverse_bytes: int
    capturing_bytes: int
    capture_bytes: int
    refresh_bytes: int
    step_bytes: int
    mean_bytes: int
    capture_flops: int
    refresh_flops: int
    update_flops: int
    mean_flops: int


def network(name: str) -> Network:
    """One of the networks by name."""
    with torch.device("meta"):
        model, batch = CASES[name].network(), CASES[name].batch()
    with FlopCounterMode(display=False) as counter:
        model(batch)
    return Network(name, model, kc.coverage(model, batch).capture_flops, 3 * counter.get_total_flops())


def cost(one: Network, strategy: Any, ranks: int) -> Cost:
    """What a rank has, sends and does."""
    plan = kc.Plan(strategy=strategy).of(one.network, world=ranks, every=INVERSES)
    rows = plan.ranks
    fullest = max(rows, key=lambda row: row.factor_bytes + row.inverse_bytes)
    sent = [max(getattr(row, name) for row in rows) for name in ("capture_bytes", "refresh_bytes", "step_bytes")]
    done = [one.capture_flops, *(max(getattr(row, name) for row in rows) for name in ("refresh_flops", "update_flops"))]
    sums = sum(row.factor_bytes for row in plan.layers)
    return Cost(
        one.name,
        strategy,
        ranks,
        plan.layout.grid.workers,
        fullest.factor_bytes,
        fullest.inverse_bytes,
        sums + sum(message.nbytes for message in plan.capture_messages),
        *sent,
        a_step(*sent),
        *done,
        a_step(*done),
    )


def a_step(capture: int, refresh: int, step: int) -> int:
    """The average over the steps of the default schedule."""
    return round(capture / FACTORS + refresh / INVERSES + step)


LEGEND = f"""\
Of the rank that has most: memory of its averages and inverses; what it sends for a capture, for a refresh, at every
step, and a step on average; operations of a refresh, of preconditioning at every step, and a step on average, captures
included. A capture is every {FACTORS} steps, a refresh every {INVERSES}.
"""


def printed(one: Network, costs: Sequence[Cost]) -> str:
    """The rows of a network under what is the same for all of them."""
    head = ("strategy", "ranks", "memory", "capture", "refresh", "step", "average", "refresh", "step", "average")
    rows = [
        (
            str(row.strategy),
            str(row.ranks),
            in_bytes(row.factor_bytes + row.inverse_bytes),
            *map(in_bytes, (row.capture_bytes, row.refresh_bytes, row.step_bytes, row.mean_bytes)),
            *map(in_flops, (row.refresh_flops, row.update_flops, row.mean_flops)),
        )
        for row in costs
    ]
    capturing = max(row.capturing_bytes for row in costs)
    said = (
        f"{one.name}, {CASES[one.name].said} a rank: forward and backward {in_flops(one.plain_flops)}, a capture "
        f"{in_flops(one.capture_flops)}; its sums and the buffer they are sent in take {in_bytes(capturing)} on every "
        f"rank"
    )
    return f"{fitted(said)}\n{table(head, rows, [''] * len(rows), right=range(1, len(head)))}"


def main(given: Sequence[str] | None = None) -> int:
    """Print a table for each network, or compare with what two ranks send."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, help="the rows as JSON")
    parser.add_argument("--check", action="store_true", help="compare with two ranks under gloo instead")
    options = parser.parse_args(given)
    if options.check:
        return check()
    found = []
    print(LEGEND)
    for name in options.models:
        one = network(name)
        costs = [cost(one, strategy, ranks) for strategy in STRATEGIES for ranks in options.ranks]
        print(f"{printed(one, costs)}\n")
        found += costs
    if options.out:
        options.out.write_text(json.dumps([asdict(row) for row in found], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
