"""What travels is what was planned; states go from any number of ranks to any other; what fails fails for all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import kfac_cond as kc
from kfac_cond import factors
from kfac_cond.linalg.ladder import Rung

from ..reference import assert_same
from . import cases
from .cases import CASES, Run, pieces, shards
from .spawn import run

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

Sent = list[tuple[str, int]]
STRATEGIES: dict[int, tuple[Any, ...]] = {2: ("replicate", "shard"), 4: (0.5,)}
SAVED, LAST = 2, 4


@contextmanager
def counted() -> Iterator[Sent]:
    """Every collective with the bytes of its tensor."""
    seen: Sent = []

    def counting(name: str) -> Any:
        plain = getattr(dist, name)

        def collective(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append((name, tensor.nbytes))
            return plain(tensor, *args, **kwargs)

        return mock.patch.object(dist, name, collective)

    with counting("all_reduce"), counting("reduce"), counting("broadcast"):
        yield seen


def traffic(case: str, strategy: Any, rank: int, world: int) -> dict[str, tuple[Sent, Sent]]:
    """What was sent and what was to be: in a step with a capture, in one with nothing, in one that refreshes."""
    schedule = {"schedule": kc.Schedule(factors=lambda step: step == 1, inverses=lambda step: step in (1, 3))}
    run = Run(cases.Case(CASES[case].model, options={**CASES[case].options, **schedule}), distributed=True)
    run.kfac.distribute(kc.Plan(strategy=strategy))
    rows = pieces(shards(world)[rank], 1)
    sent = []
    for number in range(4):
        with counted() as seen:
            run.step(number, rows, world=world)
        sent.append(seen)
    table = run.kfac.plan()
    capture, step = (
        [(one.kind, one.nbytes) for one in messages] for messages in (table.capture_messages, table.step_messages)
    )
    refresh = [(one.kind, one.nbytes) for one in table.refresh_messages(rank)]
    return {"plain": (sent[2], step), "all": (sent[1], capture + refresh + step), "refresh": (sent[3], refresh + step)}


def train(run: Run, numbers: range, rank: int, world: int) -> dict[str, Tensor]:
    for number in numbers:
        run.step(number, pieces(shards(world)[rank], 1), world=world)
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def saved_and_resumed(strategy: Any, folder: str, rank: int, world: int) -> dict[str, Any]:
    """A run that saves in the middle, and one that goes on from there."""
    run = Run(CASES["mixed"], distributed=True)
    run.kfac.distribute(kc.Plan(strategy=strategy))
    train(run, range(SAVED), rank, world)
    with counted() as seen:
        state = {"kfac": run.kfac.state_dict(), "model": run.model.state_dict()}
    if rank == 0:
        torch.save(state, Path(folder) / f"{strategy}.pt")
    dist.barrier()
    ended = train(run, range(SAVED, LAST), rank, world)
    return {"ended": ended, "resumed": resumed(strategy, strategy, folder, rank, world), "sent": len(seen)}


def resumed(strategy: Any, saved: Any, folder: str, rank: int, world: int, *, first: int = SAVED) -> dict[str, Tensor]:
    run = Run(CASES["mixed"], distributed=world > 1)
    run.kfac.distribute(kc.Plan(strategy=strategy))
    state = torch.load(Path(folder) / f"{saved}.pt", weights_only=True)
    run.model.load_state_dict(state["model"])
    run.kfac.load_state_dict(state["kfac"])
    return train(run, range(first, LAST), rank, world)


def failing_owner(strategy: Any, rank: int, world: int) -> dict[str, Any]:
    """The owner of one layer cannot invert it from the second refresh on."""
    run = Run(cases.Case(cases.Mixed, options={"schedule": kc.Schedule(1, 1, patience=3)}), distributed=True)
    run.kfac.distribute(kc.Plan(strategy=strategy))
    plain = factors.damped_inverses_of

    def failing(blocks: Any, dampings: Any, *, previous: Any, **kept: Any) -> Any:
        inverses, rungs = plain(blocks, dampings, previous=previous, **kept)
        if "out" in previous and "out" in inverses:
            inverses["out"], rungs["out"] = previous["out"], Rung.PREVIOUS
        return inverses, rungs

    error = ""
    with mock.patch.object(factors, "damped_inverses_of", failing):
        parameters = train(run, range(3), rank, world)
        failed = run.kfac.metrics()["kfac/failed_layers"]
        try:
            train(run, range(3, 4), rank, world)
        except kc.NumericalError as found:
            error = str(found)
    return {"parameters": parameters, "failed": failed, "error": error}


def stopped_owner(strategy: Any, rank: int, world: int) -> str:
    """The second rank meets an error while it inverts; what each ends with."""
    run = Run(CASES["mixed"], distributed=True)
    run.kfac.distribute(kc.Plan(strategy=strategy))
    plain = factors.damped_inverses_of

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if rank == 1:
            raise torch.linalg.LinAlgError("of its own")
        return plain(*args, **kwargs)

    with mock.patch.object(factors, "damped_inverses_of", stopping), pytest.raises(kc.RankError) as found:
        train(run, range(1), rank, world)
    return str(found.value)


def poisoned(strategy: Any, rank: int) -> dict[str, Any]:
    """The second rank's inputs are not finite."""
    torch.manual_seed(3)
    model = cases.Mixed()
    kfac = kc.KFAC(model, "categorical", schedule=kc.Schedule(factors=1, inverses=1))
    kfac.distribute(kc.Plan(strategy=strategy))
    x, _, drawn = cases.data(0)
    rows = shards(2)[rank]
    outputs = model(x[rows] if rank == 0 else x[rows] * torch.nan)
    kfac.update(outputs, draws=drawn[rows])
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    kfac.precondition()
    return {
        "skipped": kfac.metrics()["kfac/skipped_captures"],
        "fisher": {name: block.to_dense() for name, block in kfac.fisher().items()},
        "gradients": [p.grad for p in model.parameters()],
    }


def leaves(rank: int) -> dict[str, int]:
    """How many messages have left when the scores of a forward have come back, before the main backward."""
    run = Run(CASES["mixed"], distributed=True)
    x, _, drawn = cases.data(0)
    found = {}
    for name, context in (("no_sync", run.called.no_sync), ("last", nullcontext)):
        with context():
            outputs = run.called(x)
            with counted() as seen:
                run.kfac.update(outputs, draws=drawn)
            outputs.sum().backward()
        found[name] = len(seen)
    run.optimizer.step()
    return found


def ragged(strategy: Any, rows: list[slice]) -> dict[str, Tensor]:
    """One step of micro-batches, which each rank has another number of, without DDP."""
    torch.manual_seed(3)
    model = cases.Mixed()
    kfac = kc.KFAC(model, "categorical", schedule=kc.Schedule(factors=1, inverses=1))
    kfac.distribute(kc.Plan(strategy=strategy))
    return one_step(model, kfac, rows)


def one_step(model: nn.Module, kfac: kc.KFAC, rows: list[slice]) -> dict[str, Tensor]:
    """The preconditioned gradients of a step, the plain ones of which are all one."""
    x, _, drawn = cases.data(0)
    for part in rows:
        kfac.update(model(x[part]), draws=drawn[part])
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    kfac.precondition()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def on_a_mesh(strategy: Any) -> dict[str, Any]:
    """Data differ along one dimension of a mesh, and are the same along the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    torch.manual_seed(3)
    model = cases.Mixed()
    kfac = kc.KFAC(model, "categorical", schedule=kc.Schedule(factors=1, inverses=1), data=kc.Data(seed=1))
    kfac.distribute(kc.Plan(mesh=mesh["data"], strategy=strategy))
    rank = mesh.get_local_rank("data")
    found = one_step(model, kfac, [shards(2)[rank]])
    x, _, _ = cases.data(0)
    kfac.update(model(x))
    return {"gradients": found, "drawn": next(iter(kfac._intake.draws._streams.values())).get_state(), "rank": rank}


def work(rank: int, world: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for strategy in STRATEGIES[world]:
        for case in ("mixed", "exact damping", "tkfac"):
            found[f"traffic {case} {strategy}"] = traffic(case, strategy, rank, world)
        if world == 2:
            found[f"state {strategy}"] = saved_and_resumed(strategy, folder, rank, world)
            found[f"state {strategy} one"] = resumed(strategy, "one", folder, rank, world, first=1)
            found[f"failing {strategy}"] = failing_owner(strategy, rank, world)
            found[f"ragged {strategy}"] = ragged(strategy, pieces(shards(2)[rank], 1 + rank))
            found[f"stopped {strategy}"] = stopped_owner(strategy, rank, world)
            found[f"poisoned {strategy}"] = poisoned(strategy, rank)
    if world == 2:
        found["leaves"] = leaves(rank)
    if world == 4:
        for strategy in ("replicate", "shard"):
            found[f"mesh {strategy}"] = on_a_mesh(strategy)
        for strategy, saved in (("shard", "replicate"), (0.5, "shard"), ("replicate", "shard")):
            found[f"state {strategy} {saved}"] = resumed(strategy, saved, folder, rank, world)
    return found


@cache
def folder() -> str:
    return mkdtemp()


@cache
def one_process() -> dict[str, Tensor]:
    """A run by itself, which saves what two ranks go on from between two refreshes."""
    run = Run(CASES["mixed"], distributed=False)
    for number in range(LAST):
        run.step(number, [slice(0, cases.N)], world=1)
        if number == 0:
            torch.save({"kfac": run.kfac.state_dict(), "model": run.model.state_dict()}, Path(folder()) / "one.pt")
    return {name: p.detach() for name, p in run.model.named_parameters()}


@cache
def results(world: int) -> list[dict[str, Any]]:
    if world == 4:
        results(2)  # which saves what four go on from
    else:
        one_process()
    return run(work, world, folder())


@pytest.mark.parametrize("when", ["plain", "all", "refresh"])
@pytest.mark.parametrize("case", ["mixed", "exact damping", "tkfac"])
@pytest.mark.parametrize(("world", "strategy"), [(2, "replicate"), (2, "shard"), (4, 0.5)])
def test_the_bytes_sent_are_those_planned(world, strategy, case, when):
    for rank in range(world):
        sent, planned = results(world)[rank][f"traffic {case} {strategy}"][when]
        assert sent == planned
    assert sent or (strategy == "replicate" and when == "plain")


@pytest.mark.parametrize("strategy", STRATEGIES[2])
def test_a_resumed_run_is_the_same_to_the_last_bit(strategy):
    for result in results(2):
        ended, resumed, _ = result[f"state {strategy}"].values()
        assert all(torch.equal(ended[name], resumed[name]) for name in ended)


def test_a_replicated_state_is_saved_without_the_others():
    sent = {strategy: results(2)[0][f"state {strategy}"]["sent"] for strategy in STRATEGIES[2]}
    assert sent == {"replicate": 0, "shard": 2}  # a buffer from each rank


@pytest.mark.parametrize("strategy", STRATEGIES[2])
def test_a_state_of_two_ranks_goes_on_in_one_process(strategy):
    ended = results(2)[0][f"state {strategy}"]["ended"]
    run = Run(CASES["mixed"], distributed=False)
    state = torch.load(Path(folder()) / f"{strategy}.pt", weights_only=True)
    run.model.load_state_dict(state["model"])
    run.kfac.load_state_dict(state["kfac"])
    for number in range(SAVED, LAST):
        run.step(number, [slice(0, cases.N)], world=1)
    for name, parameter in run.model.named_parameters():
        assert_same(parameter.detach(), ended[name], tolerance=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES[2])
def test_a_state_of_one_process_goes_on_on_two_ranks(strategy):
    """It solves with factors, and ranks send each other inverses."""
    ended = one_process()
    state = dict(torch.load(Path(folder()) / "one.pt", weights_only=True)["kfac"]["layers"])
    assert "CholeskyBlock" in {one["inverse"]["structure"] for one in state.values()}
    for result in results(2):
        for name, parameter in result[f"state {strategy} one"].items():
            assert_same(parameter, ended[name], tolerance=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "saved"), [("shard", "replicate"), (0.5, "shard"), ("replicate", "shard")])
def test_a_state_of_two_ranks_goes_on_on_four(strategy, saved):
    ended = results(2)[0][f"state {saved}"]["ended"]
    for result in results(4):
        for name, parameter in result[f"state {strategy} {saved}"].items():
            assert_same(parameter, ended[name], tolerance=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES[2])
def test_a_factorisation_that_fails_on_its_owner_is_counted_on_all(strategy):
    first, second = (result[f"failing {strategy}"] for result in results(2))
    assert first["failed"] == second["failed"] == 1
    assert first["error"] == second["error"] != ""
    assert all(torch.equal(first["parameters"][name], second["parameters"][name]) for name in first["parameters"])


def test_the_previous_inverse_serves_alike_whoever_has_it():
    replicated, sharded = (results(2)[0][f"failing {strategy}"]["parameters"] for strategy in STRATEGIES[2])
    for name, parameter in replicated.items():
        assert_same(sharded[name], parameter)


def test_sums_leave_before_the_backward_of_the_last_micro_batch():
    assert all(result["leaves"] == {"no_sync": 0, "last": 1} for result in results(2))


@pytest.mark.parametrize("strategy", STRATEGIES[2])
def test_ranks_may_have_different_numbers_of_micro_batches(strategy):
    expected = ragged("replicate", [slice(0, cases.N)])
    for result in results(2):
        for name, gradient in result[f"ragged {strategy}"].items():
            assert_same(gradient, expected[name])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["replicate", "shard"])
def test_one_dimension_of_a_mesh_has_the_ranks(strategy):
    expected = ragged("replicate", [slice(0, cases.N)])
    for result in results(4):
        for name, gradient in result[f"mesh {strategy}"]["gradients"].items():
            assert_same(gradient, expected[name])


@pytest.mark.slow
def test_labels_differ_along_one_dimension_alone():
    drawn = {(result["mesh shard"]["rank"], bytes(result["mesh shard"]["drawn"].tolist())) for result in results(4)}
    assert len(drawn) == len({labels for _, labels in drawn}) == 2


def test_what_another_rank_gathered_is_not_taken_for_ones_own():
    run = Run(CASES["mixed"], distributed=False)
    x, _, drawn = cases.data(0)
    run.kfac.update(run.called(x), draws=drawn)
    state = run.kfac.state_dict()
    state["rank"] = [1, 2]
    with pytest.raises(kc.StateError, match="rank 1 of 2"):
        Run(CASES["mixed"], distributed=False).kfac.load_state_dict(state)


@pytest.mark.parametrize("strategy", STRATEGIES[2])
def test_an_error_of_an_owner_ends_all_at_once(strategy):
    assert all("rank 1 could not invert" in result[f"stopped {strategy}"] for result in results(2))


@pytest.mark.parametrize("strategy", STRATEGIES[2])
def test_a_rank_that_is_not_finite_adds_nothing_and_all_say_so(strategy):
    torch.manual_seed(3)
    model = cases.Mixed()
    kfac = kc.KFAC(model, "categorical", schedule=kc.Schedule(factors=1, inverses=1))
    x, _, drawn = cases.data(0)
    kfac.update(model(x[:3]), draws=drawn[:3])
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    kfac.precondition()
    for result in results(2):
        found = result[f"poisoned {strategy}"]
        assert found["skipped"] == 1
        for name, block in kfac.fisher().items():
            assert_same(found["fisher"][name], block.to_dense())
        for gradient, p in zip(found["gradients"], model.parameters(), strict=True):
            assert gradient is p.grad is None or torch.allclose(gradient, p.grad, rtol=1e-10, atol=1e-12)


class Raising(nn.Linear):
    raises = False

    def forward(self, x: Tensor) -> Tensor:
        if self.raises:
            raise ValueError("of its own")
        return super().forward(x)


def one_raises(rank: int, world: int) -> tuple[str, float]:
    """The last rank raises in its second forward; what each ends with, and after how many seconds."""
    model = nn.Sequential(Raising(6, 4), nn.Tanh(), nn.Linear(4, 3))
    kfac = kc.KFAC(model, "categorical", schedule=kc.Schedule(factors=1, inverses=1))
    kfac.distribute(kc.Plan(strategy="shard"))
    x, y, _ = cases.data(0)
    ended = ""
    began = time.monotonic()
    for number in range(2):
        model[0].raises = number == 1 and rank == world - 1
        try:
            outputs = model(x)
            kfac.update(outputs)
            nn.functional.cross_entropy(outputs, y).backward()
            kfac.precondition()
        except (kc.RankError, ValueError) as error:
            ended = type(error).__name__
            break
    time.sleep(max(0.0, 8 - (time.monotonic() - began)) if rank == world - 1 else 0)
    dist.destroy_process_group()
    return ended, time.monotonic() - began


def test_an_exception_in_one_forward_ends_all_within_the_timeout():
    *others, (own, _) = run(one_raises, 3, timeout=3.0)
    assert own == "ValueError"
    for ended, seconds in others:
        assert ended == "RankError"
        assert seconds < 20
