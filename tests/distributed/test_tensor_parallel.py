"""Models that ``parallelize_module`` cuts have the factors of the whole layers, and train as one process does."""

from __future__ import annotations

from functools import cache
from tempfile import TemporaryDirectory
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
KINDS = ["functional", "frozen", "uneven"]
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


def kinds(name: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """Blocks of other expectations than at drawn labels, and of an estimate that notes how far it got."""
    case, found = CASES[name], {}
    x, y, _ = parallel.data(case, 0)
    for kind in ("exact", "empirical", "forward_only"):
        found[kind] = kc.estimate(model, [(x, y)], case.likelihood(), kind=kind)
    with TemporaryDirectory() as folder:
        options = kc.Options(seed=5, partial=f"{folder}/partial")
        found["noted"] = kc.estimate(model, [(x, y)], case.likelihood(), options=options)
    return {f"{kind} {layer}": block.to_dense() for kind, of in found.items() for layer, block in of.items()}


def solved(mesh: Any) -> dict[str, torch.Tensor]:
    """Gradients that are on a mesh through the inverse of an estimate; and the rows that a forward adds to factors."""
    case = CASES["sequence"]
    model = parallel.built(case, mesh)
    x, _, draws = parallel.data(case, 0)
    fisher = kc.estimate(model, [x], case.likelihood(), options=kc.Options(draws=[draws[:1]]))
    parallel.gradients(case, model, None, 0, ALL)
    found = fisher.solve({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, damping=0.1)
    costs = [row.capture_flops or 0 for row in kc.coverage(model, x).rows]
    return {**found, "costs": torch.tensor(costs, dtype=torch.float64)}


def untouched(name: str, mesh: Any, along: Any = None) -> bool:
    """Whether the gradients of a step with a capture in it are those without one, to the last bit."""
    found = []
    for with_kfac in (True, False):
        model = parallel.built(CASES[name], mesh)
        if along is not None:
            sharded(model, mesh=along)
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
    for name in KINDS:
        found["kinds", name] = kinds(name, parallel.built(CASES[name], mesh))
    found["solved"] = solved(mesh)
    found["heard"] = {how: heard(how, mesh) for how in ("forward", "criterion")}
    found["state"], found["wrapped before"] = saved(mesh), wrapped_before(mesh)
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
    case = CASES["sum"]
    model = parallel.built(case)
    kfac = parallel.wrapped(case, model)
    parallel.cut(model, mesh, case.plan())
    said = parallel.refusal(parallel.gradients, case, model, kfac, 0, ALL)
    kfac.refresh()
    return said, parallel.trained(case, model, kfac, [ALL])


def in_parts(layout: str, mesh: Any) -> str:
    """What is said of outputs of which each rank keeps its own part."""
    from torch.distributed.tensor.parallel import ColwiseParallel

    head = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    parallel.cut(head, mesh, [{"2": ColwiseParallel()}])
    kfac = kc.KFAC(head, kc.Categorical())
    x = torch.ones(4, 3, 6)
    return parallel.refusal(kfac.update, head(x) if layout == "vocabulary" else head(x).flatten(0, 1).float())


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


@pytest.mark.parametrize("name", KINDS)
def test_other_expectations_are_those_of_the_whole_layers(name):
    expected = kinds(name, parallel.built(CASES[name]))
    for result in results():
        assert result["kinds", name].keys() == expected.keys()
        for key, value in expected.items():
            assert_same(result["kinds", name][key], value, tolerance=1e-12)


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


def test_gradients_on_a_mesh_are_vectors_of_an_estimate():
    expected = solved(None)
    for result in results():
        assert result["solved"].keys() == expected.keys()
        for name, value in expected.items():
            assert_same(result["solved"][name], value)


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
    expected = parallel.alone(CASES["sum"], [ALL])
    for said, ended in (result["wrapped before"] for result in results()):
        assert said.startswith("ModelChangedError: layer 'up' has other parameters than when it was wrapped")
        assert "kfac.refresh()" in said
        compare(ended, expected)


@pytest.mark.parametrize(("index", "shape"), [(0, "(4, 3, 2)"), (1, "(12, 2)")])
def test_outputs_of_which_a_rank_has_a_part_are_refused(index, shape):
    said = results()[1]["local"][index]
    assert said.startswith(f"CaptureError: the outputs of shape {shape} are this rank's part of a DTensor")
    assert "output_layouts=Replicate()" in said and "use_local_output=False" in said


# -- with data parallelism ---------------------------------------------------------------------------------------------


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
    *(("sequence", way, "shard") for way in ("fully_shard", "by hand")),
    ("language", "fully_shard", "replicate"),
    ("tied", "fully_shard", "shard"),
    ("uneven", "by hand", "shard"),
]


def four(rank: int, world: int) -> dict[Any, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    found: dict[Any, Any] = {
        (name, way, strategy): on_a_plane(name, mesh, way, strategy=strategy) for name, way, strategy in PLANES
    }
    found["default"] = on_a_plane("sum", mesh, "by hand")
    cube = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("repeated", "cut", "tp"))
    found["hybrid"] = on_a_plane("sequence", cube, "fully_shard")
    found["said"] = on_a_plane("perceptron", mesh, "by hand", mesh=mesh["dp"])
    found["untouched"] = untouched("sequence", mesh["tp"], mesh["dp"])
    return found


@cache
def planes() -> list[dict[Any, Any]]:
    return run(four, 4)


@pytest.mark.slow
@pytest.mark.parametrize("key", [*PLANES, "default", "hybrid", "said"])
def test_on_two_dimensions_it_trains_as_one_process_with_all_the_data(key):
    name = key[0] if isinstance(key, tuple) else {"default": "sum", "hybrid": "sequence", "said": "perceptron"}[key]
    expected = parallel.alone(CASES[name], HALVES)
    for result in planes():
        compare(result[key], expected)


@pytest.mark.slow
def test_a_capture_of_a_sharded_one_leaves_the_gradients_to_the_last_bit():
    assert all(result["untouched"] for result in planes())
