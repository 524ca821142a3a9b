"""Ranks that raise, are killed or lose their disk: the others end within the timeout, and go on from the last save."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond import factors
from kfac_cond.distributed.group import Group

from ..reference import assert_same
from . import cases, test_sharded
from .cases import CASES, pieces, shards
from .spawn import ended, run

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

TIMEOUT = 15.0
"""Of the process group, in seconds."""
LIMIT = 50.0
"""Seconds within which a rank that waits for one that is gone must have ended."""
SAVED, LAST = 2, 4
"""Steps before the save, and of the whole run."""


class Made:
    """A run under DDP or ``fully_shard``, saved by either kind of checkpoint.

    Args:
        way: 'ddp' or 'fsdp'.
        rank, world: of this process.
        strategy: of the plan.
    """

    def __init__(self, way: str, rank: int, world: int, strategy: Any = "shard") -> None:
        self.rank, self.world, self.way = rank, world, way
        self.own: Any = (
            test_sharded.Run(CASES["mixed"], "blocks") if way == "fsdp" else cases.Run(CASES["mixed"], distributed=True)
        )
        self.own.kfac.distribute(kc.Plan(strategy=strategy))

    def steps(self, numbers: range) -> None:
        for number in numbers:
            if self.way == "fsdp":
                self.own.gradients(number, self.rank)
                self.own.optimizer.step()
            else:
                self.own.step(number, pieces(shards(self.world)[self.rank], 1), world=self.world)

    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.own.model.named_parameters()}

    def save(self, folder: Path, name: str) -> None:
        """DDP's in one file by the first rank, that of ``fully_shard`` by all, in a folder for each save."""
        if self.way == "fsdp":
            dcp.save({"kfac": self.own.kfac, "model": self.own.model.state_dict()}, checkpoint_id=folder / name)
            return
        state = self.own.kfac.state_dict()
        if self.rank == 0:
            folder.mkdir(exist_ok=True)
            kc.save_checkpoint(folder / "run.pt", kfac=state, model=self.own.model)
        dist.barrier()


def die(*args: Any, **kwargs: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def killed(where: str, made: Made) -> Iterator[None]:
    """Within it this process is killed: in a forward, while it inverts, or while it writes a checkpoint."""
    if where == "a forward":
        made.own.model.inner.register_forward_pre_hook(die)
        yield
    elif where == "a refresh":
        with mock.patch.object(factors, "damped_inverses_of", die):
            yield
    else:
        with mock.patch.object(torch, "save", half), mock.patch.object(os, "fsync", die):
            yield


def half(state: Any, file: Any) -> None:
    """Half of what ``torch.save`` writes."""
    buffer = io.BytesIO()
    whole_save(state, buffer)
    content = buffer.getvalue()[: buffer.tell() // 2]
    if isinstance(file, Path):
        file.write_bytes(content)
        die()
    file.write(content)


whole_save = torch.save


def cut_short(rank: int, world: int, way: str, where: str, folder: str) -> tuple[str, float]:
    """A rank is killed after a save; what each of the others ends with, and after how many seconds."""
    made = Made(way, rank, world)
    made.steps(range(SAVED))
    made.save(Path(folder), "1")
    victim = 0 if where == "a save" else world - 1
    began, found = time.monotonic(), "nothing"
    try:
        with killed(where, made) if rank == victim else mock.MagicMock():
            if where == "a save":
                made.save(Path(folder), "2")
            made.steps(range(SAVED, LAST))
    except (RuntimeError, dcp.api.CheckpointException) as error:
        found = type(error).__name__
    return found, time.monotonic() - began


def resumed(way: str, folder: str) -> dict[str, Tensor]:
    """One process that goes on from the last checkpoint."""
    run = cases.Run(CASES["mixed"], distributed=False)
    if way == "fsdp":
        weights = run.model.state_dict()
        dcp.load({"kfac": run.kfac, "model": weights}, checkpoint_id=Path(folder) / "1")
    else:
        saved = kc.load_checkpoint(Path(folder) / "run.pt")
        run.kfac.load_state_dict(saved["kfac"])
        weights = saved["model"]
    run.model.load_state_dict(weights)
    for number in range(SAVED, LAST):
        run.step(number, [slice(0, cases.N)], world=1)
    return {name: p.detach() for name, p in run.model.named_parameters()}


@cache
def uninterrupted() -> dict[str, Tensor]:
    return cases.alone(CASES["mixed"], 2)["parameters"]


def same(found: dict[str, Tensor]) -> None:
    """As the run that nothing happened to."""
    for name, parameter in uninterrupted().items():
        assert_same(found[name], parameter, tolerance=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["a forward", "a refresh", "a save"])
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_rank_that_is_killed_ends_the_others_and_the_last_checkpoint_goes_on(way, where, tmp_path):
    folder = str(tmp_path / "checkpoint")
    survivors = [one for one in ended(cut_short, 2, way, where, folder, timeout=TIMEOUT) if one is not None]
    assert len(survivors) == 1
    for found, seconds in survivors:
        assert found != "nothing"
        assert seconds < LIMIT
    same(resumed(way, folder))


def raises_alone(rank: int, world: int, way: str, where: str) -> tuple[str, float]:
    """One rank raises in a forward, or in its own part of a step."""
    made = Made(way, rank, world)
    made.steps(range(SAVED))
    began, found = time.monotonic(), "nothing"
    if rank == world - 1:
        if where == "a forward":
            made.own.model.inner.register_forward_pre_hook(raising)
        else:
            made.own.optimizer.param_groups[0]["damping"] = -1.0
    try:
        made.steps(range(SAVED, LAST))
    except (RuntimeError, ValueError) as error:
        found = type(error).__name__
    return found, time.monotonic() - began


def raising(*args: Any) -> None:
    raise ValueError("of its own")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "own", "others"),
    [("a forward", "ValueError", {"RuntimeError", "RankError"}), ("a step", "ArgumentError", {"RankError"})],
)
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_an_exception_on_one_rank_ends_all_within_the_timeout(way, where, own, others):
    first, last = ended(raises_alone, 2, way, where, timeout=TIMEOUT)
    assert last[0] == own
    assert first[0] in others
    assert first[1] < LIMIT


def test_ranks_of_a_part_wait_as_long_as_all_do():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=TIMEOUT))
    try:
        part: Any = Group().part([0]).group
        assert part._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=TIMEOUT)
    finally:
        dist.destroy_process_group()


def full_disk(rank: int, world: int, folder: str) -> tuple[str, dict[str, Tensor]]:
    """The disk of the first rank is full at the second save; the run goes on."""
    made = Made("ddp", rank, world)
    made.steps(range(SAVED))
    made.save(Path(folder), "1")
    found = ""
    with mock.patch.object(torch, "save", full):
        try:
            made.save(Path(folder), "1")
        except OSError as error:
            found = str(error)
            dist.barrier()
    made.steps(range(SAVED, LAST))
    return found, made.parameters()


def full(state: Any, file: Any) -> None:
    Path(file).write_bytes(b"half")
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_the_run_and_the_checkpoint_before():
    (first, parameters), (second, _) = (result["full disk"] for result in results())
    assert "No space left" in first
    assert second == ""
    assert os.listdir(folder()) == ["run.pt"]
    same(parameters)
    same(resumed("ddp", folder()))


Spoiled = Callable[[dict[str, Any]], dict[str, Any]]
SPOILED: dict[str, Spoiled] = {
    "older": lambda state: state | {"version": 1},
    "foreign": lambda state: {"weights": 1},
    "of another model": lambda state: state | {"layers": tuple(one for one in state["layers"] if one[0] != "out")},
    "of another step": lambda state: state | {"step": 1},
    "torn": lambda state: {key: value for key, value in state.items() if key != "health"},
}


def refused(rank: int, world: int, spoiled: str, ranks: list[int]) -> tuple[str, str, dict[str, Tensor]]:
    """Some ranks are given a state that is not good; what each says, and with what all go on."""
    made = Made("ddp", rank, world)
    made.steps(range(SAVED))
    state, found = made.own.kfac.state_dict(), ("", "")
    try:
        made.own.kfac.load_state_dict(SPOILED[spoiled](state) if rank in ranks else state)
    except kc.KFACError as error:
        found = type(error).__name__, str(error)
    made.steps(range(SAVED, LAST))
    return *found, made.parameters()


@pytest.mark.parametrize(
    ("spoiled", "says"),
    [
        ("older", "a KFAC state of version 1"),
        ("foreign", "this is not a KFAC state"),
        ("of another model", r"layers missing in it ['out']"),
        ("torn", "a KFAC state without ['health']"),
    ],
)
@pytest.mark.parametrize("ranks", [[1], [0, 1]], ids=["on one rank", "on all"])
def test_a_state_that_is_refused_is_refused_by_name_on_all_ranks(spoiled, says, ranks):
    for rank, result in enumerate(results()):
        kind, message, parameters = result[(spoiled, *ranks)]
        assert kind == ("StateError" if rank in ranks else "RankError")
        assert says in message
        assert rank in ranks or "rank 1 refused the state" in message
        same(parameters)


def test_states_of_different_steps_are_refused_on_all_ranks():
    for result in results():
        kind, message, parameters = result["of another step", 1]
        assert kind == "RankError"
        assert "rank 0 has the state with {'step': 2" in message and "rank 1 with {'step': 1" in message
        same(parameters)


class Poisoned(nn.Module):
    """Its outputs are not finite at one step, where it is told so."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out, self.poison = nn.Linear(6, 4), nn.Linear(4, 3), False

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x * torch.nan if self.poison else x).tanh())


def scaled(rank: int, world: int, way: str) -> dict[str, Any]:
    """Under a gradient scaler: a batch that is not finite on one rank is a step that all skip."""
    torch.manual_seed(3)
    model = Poisoned()
    called: nn.Module = model
    if way == "fsdp":
        test_sharded.sharded(model, blocks=True, reshard=True)
    else:
        called = nn.parallel.DistributedDataParallel(model)
    kfac = kc.KFAC(called, nn.CrossEntropyLoss(), schedule=kc.Schedule(1, 1), damping=0.1)
    kfac.distribute(kc.Plan(strategy="shard"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    criterion = kfac._intake.listener.criterion
    assert criterion is not None
    for number in range(LAST):
        x, y, _ = cases.data(number)
        rows = shards(world)[rank]
        model.poison = number == 1 and rank == 1
        optimizer.zero_grad()
        scaler.scale(criterion(called(x[rows]), y[rows])).backward()
        scaler.step(optimizer)
        scaler.update()
    parameters = [p.full_tensor() if way == "fsdp" else p.detach() for p in model.parameters()]
    return {
        "parameters": parameters,
        "step": kfac.step,
        "skipped": kfac.metrics()["kfac/skipped_captures"],
        "scale": scaler.get_scale(),
    }


def work(rank: int, world: int, folder: str) -> dict[Any, Any]:
    found: dict[Any, Any] = {way: scaled(rank, world, way) for way in ("ddp", "fsdp")}
    found["full disk"] = full_disk(rank, world, folder)
    for spoiled in SPOILED:
        for ranks in ([1], [0, 1]):
            found[(spoiled, *ranks)] = refused(rank, world, spoiled, ranks)
    return found


@cache
def folder() -> str:
    return mkdtemp()


@cache
def results() -> list[dict[Any, Any]]:
    return run(work, 2, folder())


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_rank_whose_batch_is_not_finite_has_all_skip_the_step(way):
    first, second = (result[way] for result in results())
    assert (first["step"], first["skipped"], first["scale"]) == (LAST - 1, 1, 4.0)
    assert (second["step"], second["skipped"], second["scale"]) == (LAST - 1, 1, 4.0)
    for one, other in zip(first["parameters"], second["parameters"], strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)
