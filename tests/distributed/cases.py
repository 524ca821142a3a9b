"""Models, data that differ from rank to rank in size as well, and a training run on one process or on several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import kfac_cond as kc

N = 14
STEPS = 4
RATE = 0.05
EVERY_STEP = kc.Schedule(factors=1, inverses=1, decay=0.6)


class Mixed(nn.Module):
    """A convolution in groups, a norm, linear layers, one of them frozen in part."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 2, groups=2)
        self.norm = nn.LayerNorm(4)
        self.inner = nn.Linear(4, 5)
        self.frozen = nn.Linear(5, 5)
        self.partly = nn.Linear(5, 4)
        self.out = nn.Linear(4, 3)
        self.frozen.requires_grad_(False)
        self.partly.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x.unflatten(-1, (2, 3))).mT.tanh()
        h = self.inner(self.norm(h)).tanh().mean(1)
        return self.out(self.partly(self.frozen(h)).tanh())


class Sometimes(nn.Module):
    """Part of it is used where there are three examples or fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.never = nn.Linear(6, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) if len(x) <= 3 else self.first(x)


class Raw(nn.Module):
    """Raw parameters beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.weight = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(4, 6))
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh((x * self.scale) @ self.weight.T))


class Branching(nn.Module):
    """Takes a weight without a call of its layer where there are three examples or fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.out = nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.linear(x, self.layer.weight, self.layer.bias) if len(x) <= 3 else self.layer(x)
        return self.out(self.norm(h).tanh())


class Tokens(nn.Module):
    """A table whose inputs are indices, kept as a diagonal."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(7, 4), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.table((x.abs() * 10).long() % 7).flatten(1))


@dataclass(frozen=True)
class Case:
    """A model and how it is trained.

    ``micro`` is the number of micro-batches that each rank cuts its examples into; with ``waits`` all but the last are
    not synchronised.
    """

    model: Callable[[], nn.Module]
    likelihood: Callable[[], Any] = kc.Categorical
    options: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    micro: int = 1
    waits: bool = True


def heads() -> kc.Product:
    return kc.Product(
        {"mean": kc.Categorical(ignore_index=-100), "sum": kc.Gaussian(reduction="sum")}, weights={"sum": 0.2}
    )


CASES = {
    "mixed": Case(Mixed),
    "tkfac": Case(Mixed, options={"structure": "tkfac"}),
    "diagonal": Case(Mixed, options={"rules": {"out": {"structure": "diagonal"}, "inner": {"max_factor_dim": 4}}}),
    "exact damping": Case(Mixed, options={"damping": kc.Damping(0.1, rule="exact")}),
    "clipped": Case(Mixed, options={"trust_region": kc.KLClip(1e-5)}),
    "sum": Case(Mixed, likelihood=lambda: kc.Categorical(reduction="sum")),
    "heads": Case(Mixed, likelihood=heads),
    "raw": Case(Raw),
    "tokens": Case(Tokens),
    "unused": Case(Sometimes, ddp={"find_unused_parameters": True}),
    "functional": Case(Branching, ddp={"find_unused_parameters": True}),
    "static graph": Case(Mixed, ddp={"static_graph": True}, options={"schedule": EVERY_STEP}),
    "accumulated": Case(Mixed, micro=2),
    "synchronised twice": Case(Mixed, micro=2, waits=False),
}


def data(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, data labels and drawn labels of all ranks together."""
    generator = torch.Generator().manual_seed(100 + step)
    return (
        torch.randn(N, 6, generator=generator),
        torch.randint(3, (N,), generator=generator),
        torch.randint(3, (N,), generator=generator),
    )


def shards(world: int) -> list[slice]:
    """Uneven on purpose: three examples for each rank but the last, which has the rest."""
    ends = [*range(3, 3 * world, 3), N]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def pieces(rows: slice, micro: int) -> list[slice]:
    """The micro-batches of a rank: one example, and all others."""
    return [rows] if micro == 1 else [slice(rows.start, rows.start + 1), slice(rows.start + 1, rows.stop)]


class Run:
    """A model in training, with its K-FAC attached."""

    def __init__(self, case: Case, *, distributed: bool) -> None:
        torch.manual_seed(3)
        self.case, self.model = case, case.model()
        self.called: nn.Module = DistributedDataParallel(self.model, **case.ddp) if distributed else self.model
        options = {"damping": 0.1, "schedule": kc.Schedule(factors=1, inverses=2, decay=0.6), **case.options}
        self.kfac = kc.KFAC(self.called, case.likelihood(), data=kc.Data(seed=5), **options)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE)
        self.kfac.attach(self.optimizer)

    def step(self, number: int, micro: Sequence[slice], *, world: int) -> None:
        """One step; gradients are those of the mean loss of all ranks' examples together."""
        x, y, drawn = data(number)
        self.optimizer.zero_grad()
        for index, rows in enumerate(micro):
            ddp = self.called if isinstance(self.called, DistributedDataParallel) else None
            with ddp.no_sync() if ddp and self.case.waits and index < len(micro) - 1 else nullcontext():
                outputs = self.called(x[rows])
                tell(self.case, self.kfac, outputs, y[rows], drawn[rows], torch.arange(N)[rows])
                # Gradients are averaged over ranks whatever their number of examples: hence times that of ranks.
                (functional.cross_entropy(outputs, y[rows], reduction="sum") / N * world).backward()
        self.optimizer.step()

    def ended(self) -> dict[str, Any]:
        return {
            "parameters": {name: p.detach().clone() for name, p in self.model.named_parameters()},
            "fisher": {name: block.to_dense() for name, block in self.kfac.fisher().items()},
            "plain": self.kfac.metrics()["kfac/plain_layers"],
        }


def tell(case: Case, kfac: kc.KFAC, outputs: Tensor, y: Tensor, drawn: Tensor, rows: Tensor) -> None:
    if case.likelihood is not heads:
        kfac.update(outputs, draws=drawn)
        return
    known = torch.where(rows < 5, -100, y)
    kfac.update((outputs, outputs.tanh()), targets=(known, None), draws=[(drawn, outputs.detach().cos())])


def trained(case: Case, strategy: Any, rank: int, world: int, *, steps: int = STEPS) -> dict[str, Any]:
    """A run of one rank, with what it ends with."""
    run = Run(case, distributed=True)
    run.kfac.distribute(kc.Plan(strategy=strategy))
    for number in range(steps):
        run.step(number, pieces(shards(world)[rank], case.micro), world=world)
    return run.ended()


def alone(case: Case, world: int, *, steps: int = STEPS) -> dict[str, Any]:
    """The same on one process, with the ranks' batches one after another.

    Weight gradients that are squared once a batch, in the universal form, are those of a rank.
    """
    run = Run(case, distributed=False)
    for number in range(steps):
        # Nothing is captured while a static graph is recorded.
        with run.kfac.paused() if number == 0 and case.ddp.get("static_graph") else nullcontext():
            micro = [part for rows in shards(world) for part in pieces(rows, case.micro)]
            run.step(number, micro, world=1)
    return run.ended()
