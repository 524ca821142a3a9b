"""Models that ``parallelize_module`` cuts have the factors of the whole layers, and train as one process does."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import kfac_cond as kc

from ..reference import assert_same
from . import cases
from . import parallel_cases as parallel
from .parallel_cases import CASES
from .spawn import run

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
ALL = slice(0, cases.N)
HALVES = [slice(0, 5), slice(5, cases.N)]
STRUCTURES = ["kfac", "ekfac", "tkfac", "diagonal"]


def estimated(name: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """A, G and blocks of other structures, of one batch at given labels."""
    case = CASES[name]
    x, _, draws = parallel.data(case, 0)
    options = kc.Options(draws=[draws])
    found = kc.estimate(model, [x], case.likelihood(), structure=STRUCTURES, samples=len(draws), options=options)
    tensors = {
        f"{word} {layer}": block.to_dense()
        for word, of in zip(STRUCTURES, found, strict=True)
        for layer, block in of.items()
    }
    for layer, block in found[0].items():
        tensors |= {f"A {layer}": block.A, f"G {layer}": block.G}
    return tensors


def untouched(name: str, mesh: Any) -> bool:
    """Whether the gradients of a step with a capture in it are those without one, to the last bit."""
    found = []
    for with_kfac in (True, False):
        model = parallel.built(CASES[name], mesh)
        kfac = parallel.wrapped(CASES[name], model) if with_kfac else None
        parallel.gradients(CASES[name], model, kfac, 0, ALL)
        found.append([None if p.grad is None else p.grad for p in model.parameters()])
    return all(
        a is b is None or (a.placements == b.placements and torch.equal(a.to_local(), b.to_local()))
        if hasattr(a, "placements")
        else a is b is None or torch.equal(a, b)
        for a, b in zip(*found, strict=True)
    )


def two(rank: int, world: int) -> dict[Any, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    found: dict[Any, Any] = {}
    for name, case in CASES.items():
        model = parallel.built(case, mesh)
        found["estimated", name] = estimated(name, model)
        kfac = parallel.wrapped(case, model)
        found["rows", name] = {row.path: row.reason for row in kfac.coverage().rows}
        found["trained", name] = parallel.trained(case, model, kfac, [ALL])
        found["untouched", name] = untouched(name, mesh)
    found["heard"] = {how: heard(how, mesh) for how in ("forward", "criterion")}
    found["state"], found["wrapped before"] = saved(mesh), wrapped_before(mesh)
    adapted = parallel.built(CASES["perceptron"], mesh)
    adapted.up.requires_grad_(False)
    adapted.down.requires_grad_(False)
    found["adapted"] = labels_of(adapted, update=True)
    found["local"] = [in_parts(layout, mesh) for layout in ("vocabulary", "flattened")]
    return found


def heard(how: str, mesh: Any) -> dict[str, torch.Tensor]:
    """Factors of a step with outputs that are DTensors, listened to at the forward or at the criterion's call."""
    from torch.distributed.tensor.parallel import loss_parallel

    x, y, _ = parallel.data(CASES["uneven"], 0)
    model = parallel.built(CASES["uneven"], mesh)
    criterion = nn.CrossEntropyLoss()
    kfac = kc.KFAC(model, criterion if how == "criterion" else "categorical", data=kc.Data(seed=5))
    optimizer = torch.optim.SGD(model.parameters(), lr=cases.RATE)
    kfac.attach(optimizer)
    if mesh is None:
        criterion(model(x), y).backward()
    else:
        with loss_parallel():
            criterion(model(x), y).backward()
    optimizer.step()
    return {name: block.to_dense() for name, block in kfac.fisher().items()}


def saved(mesh: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    model = parallel.built(CASES["language"], mesh)
    kfac = parallel.wrapped(CASES["language"], model)
    parallel.trained(CASES["language"], model, kfac, [ALL])
    return kfac.state_dict(), {name: block.to_dense() for name, block in kfac.fisher().items()}


def wrapped_before(mesh: Any) -> tuple[str, dict[str, Any]]:
    """What is said when a wrapped model is cut, and its run after a refresh."""
    case = CASES["perceptron"]
    model = parallel.built(case)
    kfac = parallel.wrapped(case, model)
    parallel.cut(model, mesh, case.plan())
    said = refusal(parallel.gradients, case, model, kfac, 0, ALL)
    kfac.refresh()
    return said, parallel.trained(case, model, kfac, [ALL])


def in_parts(layout: str, mesh: Any) -> str:
    """What is said of outputs of which each rank keeps its own part."""
    from torch.distributed.tensor.parallel import ColwiseParallel

    head = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    parallel.cut(head, mesh, [{"2": ColwiseParallel()}])
    kfac = kc.KFAC(head, kc.Categorical())
    x = torch.ones(4, 3, 6)
    return refusal(kfac.update, head(x) if layout == "vocabulary" else head(x).flatten(0, 1).float())


@cache
def results() -> list[dict[Any, Any]]:
    return run(two, 2)


def compare(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-10) -> None:
    assert found["plain"] == expected["plain"]
    for what in ("fisher", "parameters"):
        assert found[what].keys() == expected[what].keys()
        for name, value in expected[what].items():
            assert_same(found[what][name], value, tolerance=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_factors_are_those_of_the_whole_layers(name):
    expected = estimated(name, parallel.built(CASES[name]))
    for result in results():
        assert result["estimated", name].keys() == expected.keys()
        for key, value in expected.items():
            assert_same(result["estimated", name][key], value, tolerance=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_it_trains_as_one_process_does(name):
    expected = parallel.alone(CASES[name], [ALL])
    for result in results():
        compare(result["trained", name], expected)


@pytest.mark.parametrize("name", CASES)
def test_a_capture_leaves_the_gradients_to_the_last_bit(name):
    assert all(result["untouched", name] for result in results())


def test_the_table_says_how_a_layer_is_covered():
    rows = results()[0]["rows", "tied"]
    assert rows["q.weight"] == (
        "on a tensor-parallel mesh of 2 ranks ('tp'): what its module is given, and what comes back, is brought "
        "together at captures, its gradient for the step"
    )
    assert rows["norm.weight"] == ""
    assert rows["tokens.weight"].startswith("universal form") and rows["q.weight"] in rows["tokens.weight"]


@pytest.mark.parametrize("how", ["forward", "criterion"])
def test_outputs_that_are_tensors_on_a_mesh_are_heard(how):
    expected = heard(how, None)
    for result in results():
        assert result["heard"][how].keys() == expected.keys()
        for name, block in expected.items():
            assert_same(result["heard"][how][name], block)


def test_a_state_knows_nothing_of_the_mesh():
    (state, fisher), case = results()[0]["state"], CASES["language"]
    kfac = parallel.wrapped(case, parallel.built(case))
    kfac.load_state_dict(state)
    for name, block in kfac.fisher().items():
        assert_same(block.to_dense(), fisher[name])


def test_a_model_that_is_cut_after_it_was_wrapped_asks_for_a_refresh():
    expected = parallel.alone(CASES["perceptron"], [ALL])
    for said, ended in (result["wrapped before"] for result in results()):
        assert said.startswith("ModelChangedError: layer 'up' has other parameters than when it was wrapped")
        assert "kfac.refresh()" in said
        compare(ended, expected)


@pytest.mark.parametrize(("index", "shape"), [(0, "(4, 3, 2)"), (1, "(12, 2)")])
def test_outputs_of_which_a_rank_has_a_part_are_refused(index, shape):
    said = results()[1]["local"][index]
    assert said.startswith(f"CaptureError: the outputs of shape {shape} are this rank's part of a DTensor")
    assert "output_layouts=Replicate()" in said and "use_local_output=False" in said


# -- who has the same data ---------------------------------------------------------------------------------------------


class Recording(kc.Categorical):
    """Keeps the labels that it draws."""

    drawn: list[torch.Tensor]

    def sample(self, outputs: torch.Tensor, generator: Any = None) -> torch.Tensor:
        labels = super().sample(outputs, generator)
        self.drawn.append(labels)
        return labels


def labels_of(model: nn.Module, *, update: bool) -> torch.Tensor:
    """Labels drawn for one batch, the same on all ranks."""
    Recording.drawn = []
    x, _, _ = parallel.data(CASES["perceptron"], 0)
    if update:
        kfac = kc.KFAC(model, Recording(), data=kc.Data(seed=5))
        kfac.update(model(x))
        kfac.remove()
    else:
        kc.estimate(model, [x], Recording(), options=kc.Options(seed=5))
    return torch.cat(Recording.drawn)


def refusal(call: Any, *args: Any, **kwargs: Any) -> str:
    """What an error says, with its type."""
    try:
        call(*args, **kwargs)
    except kc.KFACError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def by_itself(model: nn.Module, plan: kc.Plan | None) -> str:
    """What is said at the first capture of a model with this plan, or without one."""
    kfac = parallel.wrapped(CASES["perceptron"], model)
    try:
        if plan is not None:
            return refusal(kfac.distribute, plan)
        return refusal(parallel.gradients, CASES["perceptron"], model, kfac, 0, ALL)
    finally:
        kfac.remove()


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    # What modules share is cut with the module that holds them all.
    for child in () if hasattr(model, "tie") else model.children():
        fully_shard(child, **options)
    return fully_shard(model, **options)


def on_a_plane(name: str, plane: Any, way: str, **plan: Any) -> dict[str, Any]:
    """A run where pairs of ranks have the same rows."""
    case, names = CASES[name], plane.mesh_dim_names
    of_data, of_weights = plane[names[0]], plane[names[-1]]
    model = parallel.built(case, of_weights)
    if way == "fully_shard":
        sharded(model, mesh=plane[names[:-1]])
        with torch.no_grad():
            # It leaves parameters of the root whole.
            model(parallel.data(case, 0)[0])
    kfac = parallel.wrapped(case, model)
    if way == "wrapped first":
        sharded(model, mesh=of_data)
    if plan:
        kfac.distribute(kc.Plan(**plan))
    group = of_data.get_group() if way == "by hand" else None
    rows = [HALVES[of_data.get_local_rank()]]
    found = parallel.trained(case, model, kfac, rows, ranks=2, group=group)
    return {**found, "rows": {row.path: row.reason for row in kfac.coverage().rows}}


PLANES = [
    *(("perceptron", way, "replicate") for way in ("fully_shard", "wrapped first", "by hand")),
    *(("perceptron", way, "shard") for way in ("fully_shard", "by hand")),
    *(
        (name, "fully_shard", strategy)
        for name in ("language", "sequence", "tied")
        for strategy in ("replicate", "shard")
    ),
    *((name, "by hand", "shard") for name in ("sequence", "uneven")),
]


def four(rank: int, world: int) -> dict[Any, Any]:
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel
    from torch.nn.parallel import DistributedDataParallel

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    perceptron = CASES["perceptron"]
    found: dict[Any, Any] = {
        (name, way, strategy): on_a_plane(name, mesh, way, strategy=strategy) for name, way, strategy in PLANES
    }
    found["default"] = on_a_plane("sum", mesh, "by hand")
    cube = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("repeated", "cut", "tp"))
    found["hybrid"] = on_a_plane("sequence", cube, "fully_shard")
    found["said"] = on_a_plane("perceptron", mesh, "by hand", mesh=mesh["dp"])
    for update in (True, False):
        found["labels", update] = labels_of(parallel.built(perceptron, mesh["tp"]), update=update)
    found["along tp"] = by_itself(parallel.built(perceptron, mesh["tp"]), kc.Plan(mesh=mesh["tp"]))
    found["everybody"] = by_itself(parallel.built(perceptron, mesh["tp"]), kc.Plan(mesh=dist.group.WORLD))
    # Pairs that no mesh of all processes has.
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = DeviceMesh.from_group(pairs[rank // 2], "cpu")
    found["unknown"] = by_itself(parallel.built(perceptron, pair), None)
    found["then said"] = by_itself(parallel.built(perceptron, pair), kc.Plan(mesh=mesh["dp"]))
    crossed = parallel.cut(nn.Linear(3, 4), mesh["dp"], [ColwiseParallel(output_layouts=Replicate())])
    found["both"] = by_itself(nn.Sequential(parallel.built(perceptron, mesh["tp"]), crossed), None)
    wide = parallel.Case(partial(parallel.Perceptron, 8), parallel.by_columns_and_rows)
    found["all four"] = by_itself(parallel.built(wide, init_device_mesh("cpu", (4,))), None)
    one = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("a", "b", "tp"))
    found["of one"] = labels_of(parallel.built(perceptron, one["tp"]), update=True)

    ddp = DistributedDataParallel(parallel.built(perceptron, mesh["tp"]), device_mesh=mesh["dp"])
    found["ddp"] = refusal(kc.KFAC, ddp, "categorical")
    ddp(torch.ones(2, 6))
    found["ddp after a forward"] = refusal(kc.KFAC, ddp, "categorical")
    return found


@cache
def planes() -> list[dict[Any, Any]]:
    return run(four, 4)


@pytest.mark.parametrize("key", [*PLANES, "default", "hybrid", "said"])
def test_on_two_dimensions_it_trains_as_one_process_with_all_the_data(key):
    name = key[0] if isinstance(key, tuple) else {"default": "sum", "hybrid": "sequence", "said": "perceptron"}[key]
    expected = parallel.alone(CASES[name], HALVES)
    for result in planes():
        compare(result[key], expected)


@pytest.mark.parametrize("update", [True, False])
def test_labels_differ_along_the_data_and_agree_along_the_weights(update):
    first, same, other, too = (result["labels", update] for result in planes())
    assert torch.equal(first, same) and torch.equal(other, too)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("key", "twice"), [("along tp", "[0, 1]"), ("everybody", "[0, 1]")])
def test_ranks_with_the_same_data_never_count_twice(key, twice):
    said = planes()[0][key]
    assert said.startswith("ArgumentError: kc.Plan(mesh=...) has the ranks [0, 1")
    assert f"of which {twice} compute with parts of one weight" in said and "would count 2 times" in said


def test_what_a_mesh_does_not_tell_is_asked_for():
    result = planes()[2]
    assert result["unknown"].startswith("ArgumentError: weights are cut over the ranks [2, 3] of 2 ranks")
    assert "kfac.distribute(kc.Plan(mesh=...))" in result["unknown"]
    assert result["then said"] == "nothing"
    assert "weights are cut over different sets of ranks, [2, 3] of 2 ranks ('tp') and [0, 2] of" in result["both"]


def test_where_all_ranks_share_one_weight_each_is_by_itself():
    assert all(result["all four"] == "nothing" for result in planes())


def test_labels_agree_where_no_weight_that_is_cut_trains():
    first, second = (result["adapted"] for result in results())
    assert torch.equal(first, second)


def test_a_mesh_of_one_rank_shares_nothing():
    drawn = [result["of one"] for result in planes()]
    assert all(not torch.equal(drawn[0], other) for other in drawn[1:])


@pytest.mark.parametrize("key", ["ddp", "ddp after a forward"])
def test_plain_tensors_in_place_of_parts_are_refused(key):
    said = planes()[0][key]
    assert said.startswith("CoverageError: 'DistributedDataParallel'")
    assert "use fully_shard(model, mesh=mesh['dp'])" in said
