"""Eigenbases, refreshes at steps of a layer's own and refreshes by need: the same update whoever owns what."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import kfac_cond as kc
from kfac_cond import factors
from kfac_cond.linalg.ladder import Rung

from ..reference import assert_same
from . import cases
from .cases import Case, Run, pieces, shards
from .spawn import run
from .test_together import counted, train

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

STEPS = 7
SAVED = 4
EKFAC = {"structure": "ekfac"}
STAGGERED = {"schedule": kc.Schedule(factors=2, inverses=4, decay=0.6, stagger=True)}
ADAPTIVE = {"schedule": kc.Schedule(factors=1, inverses=kc.Adaptive(0.3), decay=0.6)}
EXACT = {"damping": kc.Damping(0.1, rule="exact")}
CASES = {
    "ekfac": Case(cases.Mixed, options={**EKFAC, "schedule": kc.Schedule(factors=1, inverses=3, decay=0.6)}),
    "ekfac by rule": Case(cases.Mixed, options={"rules": {"inner": {**EKFAC, "max_factor_dim": 4}, "out": EKFAC}}),
    "ekfac of raw": Case(cases.Raw, options=EKFAC),
    "ekfac, unused": Case(cases.Sometimes, options=EKFAC, ddp={"find_unused_parameters": True}),
    "ekfac of heads": Case(cases.Mixed, likelihood=cases.heads, options=EKFAC),
    "ekfac, functional": Case(cases.Branching, options=EKFAC, ddp={"find_unused_parameters": True}),
    "ekfac, accumulated": Case(cases.Mixed, options=EKFAC, micro=2),
    "staggered": Case(cases.Mixed, options=STAGGERED),
    "staggered exact": Case(cases.Mixed, options=STAGGERED | EXACT),
    "staggered ekfac": Case(cases.Mixed, options=STAGGERED | EKFAC),
    "adaptive": Case(cases.Mixed, options=ADAPTIVE),
    "adaptive ekfac": Case(cases.Mixed, options=ADAPTIVE | EKFAC),
}
WORLDS: dict[int, tuple[Any, ...]] = {2: ("replicate", "shard"), 3: ("shard",), 4: ("shard", 0.5, "replicate")}
RUNS = [(world, strategy, name) for world, several in WORLDS.items() for strategy in several for name in CASES]
#: Steps with a capture, with a refresh, with both, and with nothing.
WHEN = {"both": (True, True), "capture": (True, False), "plain": (False, False), "refresh": (False, True)}
ON_TWO = ("replicate", "shard")


def traffic(options: dict[str, Any], strategy: Any, rank: int, world: int) -> dict[str, Any]:
    """What was sent and what was to be, by what a step does."""
    # In the first step a forward is heard before update() says that it is told of them.
    steps = [(True, True), *WHEN.values()]
    schedule = kc.Schedule(factors=lambda step: steps[step][0], inverses=lambda step: steps[step][1])
    run = Run(Case(cases.Mixed, options={**options, "schedule": schedule}), distributed=True)
    run.kfac.distribute(kc.Plan(strategy=strategy))
    run.step(0, pieces(shards(world)[rank], 1), world=world)
    table, found = run.kfac.plan(), {}
    for number, (name, (captures, refreshes)) in enumerate(WHEN.items(), 1):
        with counted() as seen:
            run.step(number, pieces(shards(world)[rank], 1), world=world)
        planned = [
            *(table.capture_messages if captures else []),
            *(table.refresh_messages(rank) if refreshes else []),
            *(table.rescale_messages(rank) if captures or refreshes else []),
            *table.step_messages,
        ]
        found[name] = seen, [(one.kind, one.nbytes) for one in planned]
    found["held"] = held(run.kfac), table.ranks[rank].inverse_bytes
    return found


def held(kfac: kc.KFAC) -> int:
    """Bytes of the inverses and bases of a rank, each tensor once."""
    kept = kfac._shared.factors
    blocks = [getattr(one, key, None) for one in kept.inverses.values() for key in ("basis_A", "basis_G", "values")]
    bases = [basis for pair in kept.bases.values() for basis in pair]
    return sum({one.data_ptr(): one.nbytes for one in [*blocks, *bases] if one is not None}.values())


def staggered_traffic(options: dict[str, Any], strategy: Any, rank: int, world: int) -> list[Any]:
    """The same of the steps at which layers are refreshed by themselves."""
    run = Run(Case(cases.Mixed, options=STAGGERED | options), distributed=True)
    run.kfac.distribute(kc.Plan(strategy=strategy))
    table, found = run.kfac.plan(), []
    for number in range(4):
        with counted() as seen:
            run.step(number, pieces(shards(world)[rank], 1), world=world)
        names = run.kfac._refreshes._at.get(number, [])
        if number in (1, 3):
            assert names
            planned = [*table.staggered_messages(rank, names), *table.step_messages]
            found.append((seen, [(one.kind, one.nbytes) for one in planned]))
    return found


def failing_bases(*args: Any) -> Any:
    """The bases of one layer are not found again."""
    bases, rungs = PLAIN["refreshed"](*args)
    previous = args[1]
    if "out" in previous and "out" in bases:
        bases["out"], rungs["out"] = previous["out"], Rung.PREVIOUS
    return bases, rungs


def failing_steps(blocks: Any, dampings: Any, *, rule: Any, previous: Any) -> Any:
    """One layer is not inverted at a step of its own."""
    inverses, failed = PLAIN["unread_inverses_of"](blocks, dampings, rule=rule, previous=previous)
    if "out" in inverses:
        inverses["out"], failed["out"] = previous["out"], torch.ones((), dtype=torch.bool)
    return inverses, failed


PLAIN = {"refreshed": factors.refreshed, "unread_inverses_of": factors.unread_inverses_of}
FAILING = {
    "bases": ("refreshed", failing_bases, CASES["ekfac"]),
    "steps": ("unread_inverses_of", failing_steps, CASES["staggered"]),
}


def failing(what: str, strategy: Any, rank: int, world: int) -> dict[str, Any]:
    """A run in which one layer fails, wherever it is owned; its counts, and its state before they were read."""
    name, patched, case = FAILING[what]
    run = Run(case, distributed=world > 1)
    if world > 1:
        run.kfac.distribute(kc.Plan(strategy=strategy))
    micro = [pieces(shards(2)[rank], 1)] if world > 1 else [[slice(0, cases.N)]]
    found: dict[str, Any] = {"metrics": []}
    with mock.patch.object(factors, name, patched):
        for number in range(6):
            run.step(number, micro[0], world=world)
            metrics = run.kfac.metrics()
            found["metrics"].append({key: metrics[f"kfac/{key}_layers"] for key in ("failed", "unsettled", "plain")})
            if number == 3:
                found["state"] = run.kfac.state_dict()
    return found | run.ended()


def saved_and_resumed(case: str, strategy: Any, folder: str, rank: int, world: int) -> dict[str, Any]:
    run = Run(CASES[case], distributed=True)
    run.kfac.distribute(kc.Plan(strategy=strategy))
    train(run, range(SAVED), rank, world)
    state = {"kfac": run.kfac.state_dict(), "model": run.model.state_dict()}
    path = f"{folder}/{case} {strategy} {rank}.pt"
    torch.save(state, path)
    dist.barrier()
    ended = train(run, range(SAVED, STEPS), rank, world)
    again = resumed(case, strategy, f"{folder}/{case} {strategy} 0.pt", rank, world)
    return {"ended": ended, "resumed": again, "state": state["kfac"]}


def resumed(case: str, strategy: Any, path: str, rank: int, world: int) -> dict[str, Tensor]:
    run = Run(CASES[case], distributed=world > 1)
    if world > 1:
        run.kfac.distribute(kc.Plan(strategy=strategy))
    state = torch.load(path, weights_only=True)
    run.model.load_state_dict(state["model"])
    run.kfac.load_state_dict(state["kfac"])
    if world == 1:
        for number in range(SAVED, STEPS):
            run.step(number, [slice(0, cases.N)], world=1)
        return {name: p.detach().clone() for name, p in run.model.named_parameters()}
    return train(run, range(SAVED, STEPS), rank, world)


def changing(rank: int, world: int) -> dict[str, Tensor]:
    """A run whose layers are shared out anew now and then."""
    run = Run(CASES["staggered ekfac"], distributed=True)
    for number, strategy in enumerate(("shard", "replicate", "shard", 0.5, "replicate", "shard", 0.5)):
        run.kfac.distribute(kc.Plan(strategy=strategy))
        train(run, range(number, number + 1), rank, world)
    return run.ended()


RESUMED = ("ekfac", "staggered ekfac", "adaptive")


def work(rank: int, world: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {"changing": changing(rank, world)} if world == 4 else {}
    for strategy in WORLDS[world]:
        for name, case in CASES.items():
            found[f"{name} {strategy}"] = cases.trained(case, strategy, rank, world, steps=STEPS)
        for name, options in (("ekfac", EKFAC), ("exact", EXACT)):
            found[f"traffic {name} {strategy}"] = traffic(options, strategy, rank, world)
            found[f"staggered traffic {name} {strategy}"] = staggered_traffic(options, strategy, rank, world)
        if world == 2:
            for what in FAILING:
                found[f"failing {what} {strategy}"] = failing(what, strategy, rank, world)
            for name in RESUMED:
                found[f"saved {name} {strategy}"] = saved_and_resumed(name, strategy, folder, rank, world)
        if world == 4:
            for name in RESUMED:
                path = f"{folder}/{name} shard 0.pt"
                found[f"saved {name} {strategy}"] = resumed(name, strategy, path, rank, world)
    return found


@cache
def folder() -> str:
    return mkdtemp()


@cache
def results(world: int) -> list[dict[str, Any]]:
    if world == 4:
        results(2)  # which saves what four go on from
    return run(work, world, folder())


@cache
def one_process(name: str, world: int) -> dict[str, Any]:
    return cases.alone(CASES[name], world, steps=STEPS)


@pytest.mark.parametrize(("world", "strategy", "name"), RUNS)
def test_ranks_train_as_one_process_does(world, strategy, name):
    expected = one_process(name, world)
    for rank in range(world):
        found = results(world)[rank][f"{name} {strategy}"]
        assert found["plain"] == expected["plain"]
        for layer, block in expected["fisher"].items():
            assert_same(found["fisher"][layer], block)
        for parameter, value in expected["parameters"].items():
            assert_same(found["parameters"][parameter], value)


@pytest.mark.parametrize(("world", "strategy", "name"), RUNS)
def test_ranks_stay_equal_to_the_last_bit(world, strategy, name):
    first, *others = (results(world)[rank][f"{name} {strategy}"]["parameters"] for rank in range(world))
    for other in others:
        assert all(torch.equal(first[parameter], other[parameter]) for parameter in first)


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("name", ["ekfac", "exact"])
@pytest.mark.parametrize(("world", "strategy"), [(world, one) for world, several in WORLDS.items() for one in several])
def test_the_bytes_sent_are_those_planned(world, strategy, name, when):
    for rank in range(world):
        sent, planned = results(world)[rank][f"traffic {name} {strategy}"][when]
        assert sent == planned


@pytest.mark.parametrize("name", ["ekfac", "exact"])
@pytest.mark.parametrize(("world", "strategy"), [(world, one) for world, several in WORLDS.items() for one in several])
def test_so_are_the_bytes_held(world, strategy, name):
    for rank in range(world):
        found, planned = results(world)[rank][f"traffic {name} {strategy}"]["held"]
        assert found == planned


@pytest.mark.parametrize("name", ["ekfac", "exact"])
@pytest.mark.parametrize(("world", "strategy"), [(world, one) for world, several in WORLDS.items() for one in several])
def test_so_are_those_of_steps_of_a_layers_own(world, strategy, name):
    for rank in range(world):
        for sent, planned in results(world)[rank][f"staggered traffic {name} {strategy}"]:
            assert sent == planned
            assert sent or strategy == "replicate"


@pytest.mark.parametrize("strategy", ON_TWO)
@pytest.mark.parametrize("what", FAILING)
def test_what_fails_at_its_owner_is_counted_alike_on_all(what, strategy):
    expected = failing(what, None, 0, 1)
    for result in results(2):
        found = result[f"failing {what} {strategy}"]
        assert found["metrics"] == expected["metrics"]
        for name, parameter in expected["parameters"].items():
            assert_same(found["parameters"][name], parameter)
    key = {"bases": "failed", "steps": "unsettled"}[what]
    assert any(one[key] == 1 for one in expected["metrics"])


@pytest.mark.parametrize("what", FAILING)
def test_a_state_does_not_depend_on_owners(what):
    """Nor on whether a failure that was not read yet happened here."""
    expected = results(2)[0][f"failing {what} replicate"]["state"]
    assert "unsettled out" in dict(dict(expected["health"])["unread"]) or what == "bases"
    for result in results(2):
        for strategy in ON_TWO:
            same_state(result[f"failing {what} {strategy}"]["state"], expected)


@pytest.mark.parametrize("strategy", ON_TWO)
@pytest.mark.parametrize("name", RESUMED)
def test_ranks_save_the_same_to_the_last_bit(name, strategy):
    first, second = (result[f"saved {name} {strategy}"]["state"] for result in results(2))
    same_state(first, second, exact=True)


@pytest.mark.parametrize("strategy", ON_TWO)
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_same_to_the_last_bit(name, strategy):
    for result in results(2):
        saved = result[f"saved {name} {strategy}"]
        assert all(torch.equal(saved["ended"][key], saved["resumed"][key]) for key in saved["ended"])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", WORLDS[4])
@pytest.mark.parametrize("name", RESUMED)
def test_a_state_of_two_ranks_goes_on_on_four(name, strategy):
    ended = results(2)[0][f"saved {name} shard"]["ended"]
    for result in results(4):
        for key, parameter in result[f"saved {name} {strategy}"].items():
            assert_same(parameter, ended[key])


@pytest.mark.parametrize("name", RESUMED)
def test_a_state_of_two_ranks_goes_on_in_one_process(name):
    saved = results(2)[0][f"saved {name} shard"]
    found = resumed(name, None, str(Path(folder()) / f"{name} shard 0.pt"), 0, 1)
    for key, parameter in found.items():
        assert_same(parameter, saved["ended"][key])


@pytest.mark.slow
def test_layers_may_be_shared_out_anew_between_steps():
    expected = one_process("staggered ekfac", 4)
    for result in results(4):
        for name, parameter in expected["parameters"].items():
            assert_same(result["changing"]["parameters"][name], parameter)


def same_state(one: Any, other: Any, *, exact: bool = False) -> None:
    """Two states with the same entries; tensors equal, or nearly so; without what is a rank's own."""
    own = ("rank", "draws")
    if isinstance(one, Tensor):
        assert torch.equal(one, other) if exact else torch.allclose(one, other, rtol=1e-8, atol=1e-10)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - set(own):
            same_state(one[key], other[key], exact=exact)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            same_state(first, second, exact=exact)
    else:
        assert one == other
