"""Gradients of which ranks have parts: whole where they are preconditioned, once each, in two messages."""

from __future__ import annotations

import weakref
from collections import Counter
from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import kfac_cond as kc
from kfac_cond.costs import Costing
from kfac_cond.distributed import shuffle as shuffling
from kfac_cond.distributed.group import Group
from kfac_cond.distributed.shuffle import Shuffles
from kfac_cond.layers.regions import region_here
from kfac_cond.layers.survey import survey

from ..layers.test_regions import as_torch_cuts
from ..reference import assert_same
from . import cases
from .spawn import run

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
if dist.is_available():
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    #: Placements on a mesh of two by two.
    PLACEMENTS: dict[str, tuple[Any, ...]] = {
        "rows twice": (Shard(0), Shard(0)),
        "rows and columns": (Shard(0), Shard(1)),
        "columns and rows": (Shard(1), Shard(0)),
        "repeated": (Replicate(), Shard(0)),
        "repeated after": (Shard(0), Replicate()),
        "everywhere": (Replicate(), Replicate()),
        "strided": (_StridedShard(0, split_factor=2), Shard(0)),
        "stripes": (_StridedShard(0, split_factor=2), Replicate()),
        "sum": (Partial(), Shard(0)),
        "mean": (Shard(0), Partial("avg")),
        "sum of means": (Partial("avg"), Partial()),
    }
else:
    PLACEMENTS = {}


class OfItsOwn:
    """A trust region that needs all updates at once."""

    def scale(self, updates: Any) -> Tensor:
        largest = torch.stack([one.update.abs().amax() * one.rate for one in updates]).amax()
        return (0.01 / largest).clamp(max=1.0)


class Whole:
    """None at all, but of which that is not known: gradients are brought together on every rank."""

    needs_rate = False

    def scale(self, updates: Any) -> Tensor:
        return torch.ones(())


REGIONS: dict[str, Any] = {
    "none": lambda: None,
    "KLClip": lambda: kc.KLClip(1e-5),
    "Graft": lambda: kc.Graft("sgd"),
    "Graft of Adam": lambda: kc.Graft("adam"),
    "of its own": OfItsOwn,
}
WAYS = ("rows", "columns", "some layers")


# -- parts alone ----------------------------------------------------------------------------------------------------


def mixed_dtypes() -> nn.Module:
    """Layers with parameters of several dtypes, fewer rows than ranks, and a diagonal among them."""
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3), nn.Linear(3, 2, bias=False))
    model[0].weight.data, model[0].bias.data = model[0].weight.data.bfloat16(), model[0].bias.data.float()
    model[3].float()
    return model


def laid_out(tensor: Tensor, mesh: Any, placements: Any) -> Tensor:
    """A gradient that all ranks have, as they have it in parts."""
    placements = [one if not hasattr(one, "dim") or one.dim < tensor.ndim else Replicate() for one in placements]
    addends = [place for place, one in enumerate(placements) if one.is_partial()]
    for place in addends:
        # What is added is another thing on each rank.
        index, size = mesh.get_coordinate()[place], mesh.size(place)
        share = 1.0 if placements[place].reduce_op == "avg" else 1 / size
        tensor = tensor * share * (0.5 + index)
    there = [Replicate() if place in addends else one for place, one in enumerate(placements)]
    part = as_torch_cuts(tensor, tuple(mesh.mesh.shape), mesh.get_coordinate(), there).clone()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def parameters_of(layers: Any) -> dict[str, dict[str, Tensor]]:
    return {name: {key: p.detach() for key, p in layer.parameters.items()} for name, layer in layers.items()}


def each(change: Any, tensors: Any) -> dict[str, dict[str, Tensor]]:
    return {name: {key: change(one) for key, one in of_layer.items()} for name, of_layer in tensors.items()}


def shuffled(placements: str, mesh: Any, group: Group) -> dict[str, Any]:
    """What was whole here, and what comes back of its double, brought together by torch."""
    torch.manual_seed(7)
    layers = survey(mixed_dtypes(), {}).layers
    # Halves are exact in every dtype.
    plain = each(lambda p: (8 * torch.randn(p.shape)).round().to(p.dtype) / 4, parameters_of(layers))
    gradients = each(lambda g: laid_out(g, mesh, PLACEMENTS[placements]), plain)
    shuffle = Shuffles(group).of(layers, gradients, Costing(), list(layers))
    wide = dict.fromkeys(layers, torch.float64)
    whole = shuffle.collected(gradients, wide)
    with Counting() as seen:
        parts = shuffle.returned(each(lambda g: 2 * g, whole))
    differ = []
    for name, one in gradients.items():
        for key, gradient in one.items():
            expected = plain[name][key].double()
            if name in whole and not torch.equal(whole[name][key], expected):
                differ.append(("there", key))
            if key in parts:
                gradient.to_local().copy_(parts[key])
            if parts.get(key, gradient.to_local()).shape != gradient.to_local().shape:
                differ.append(("shape", key))
            if not torch.equal(gradient.full_tensor().double(), 2 * expected):
                differ.append(("back", key))
    return {"here": list(whole), "differ": differ, "messages": seen.messages()}


def in_groups(rank: int) -> dict[str, Any]:
    """Parts on one dimension of a mesh, data on the other; and both on a part of the ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    data, model = Group(mesh["data"].get_group()), Group(mesh["model"].get_group())
    torch.manual_seed(7)
    layers = survey(mixed_dtypes(), {}).layers
    ones = each(torch.ones_like, parameters_of(layers))
    found = {}
    for name, group, of in (("crossed", data, mesh["model"]), ("larger", data, mesh), ("same", model, mesh["model"])):
        gradients = each(partial(laid_out, mesh=of, placements=[Shard(0)] * of.ndim), ones)
        works = [n for place, n in enumerate(layers) if place % 2 == group.rank]
        shuffle = Shuffles(group).of(layers, gradients, Costing(), works)
        whole = shuffle.collected(gradients, dict.fromkeys(layers, torch.float64))
        same = all(bool((g == 1).all()) for one in whole.values() for g in one.values())
        found[name] = {"ranks": shuffle._group.size, "here": list(whole), "works": works, "ones": same}
    return found


class Counting(TorchDispatchMode):
    """Counts collectives and host syncs, and the bytes of what lives at once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def messages(self) -> dict[str, int]:
        return {name: n for name, n in self.seen.items() if "c10d" in name}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.seen[f"{func.namespace}.{func._opname}"] += 1
        for one in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(one, Tensor) and not isinstance(one, DTensor):
                self._note(one.untyped_storage())
        return found

    def _note(self, storage: Any) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes


# -- training -------------------------------------------------------------------------------------------------------


def last_dimension(p: Tensor) -> Any:
    """The last dimension, where it can be cut evenly: fully_shard asks for that of all but the first."""
    return Shard(p.ndim - 1 if p.shape[-1] % 2 == 0 else 0)


def sharded_model(way: str, mesh: Any = None) -> nn.Module:
    torch.manual_seed(3)
    model = cases.Mixed()
    options = {} if mesh is None else {"mesh": mesh}
    if way == "some layers":
        fully_shard(model.inner, **options)
        fully_shard(model.out, **options)
        return model
    by_column = {"shard_placement_fn": last_dimension} if way == "columns" else {}
    for child in model.children():
        fully_shard(child, **options, **by_column)
    fully_shard(model, **options, **by_column)
    return model


class Training:
    """Steps by hand, on one process or on parts of a model."""

    def __init__(self, model: nn.Module, region: Any, strategy: Any = "replicate") -> None:
        self.model = model
        schedule = kc.Schedule(factors=1, inverses=2, decay=0.6)
        self.kfac = kc.KFAC(model, "categorical", damping=0.1, schedule=schedule, trust_region=region)
        self.kfac.distribute(kc.Plan(strategy=strategy))

    def gradients(self, number: int, rows: slice, world: int) -> None:
        x, y, drawn = cases.data(number)
        outputs = self.model(x[rows])
        self.kfac.update(outputs, draws=drawn[rows])
        self.model.zero_grad()
        (nn.functional.cross_entropy(outputs, y[rows], reduction="sum") / cases.N * world).backward()
        for p in self.model.parameters():
            if world > 1 and p.grad is not None and not isinstance(p, DTensor):
                dist.all_reduce(p.grad.div_(world))

    def step(self) -> None:
        self.kfac.precondition(lr=cases.RATE)
        with torch.no_grad():
            for p in self.model.parameters():
                if p.grad is not None:
                    local, gradient = (one.to_local() if isinstance(one, DTensor) else one for one in (p.data, p.grad))
                    local.sub_(cases.RATE * gradient)

    def ended(self) -> dict[str, Tensor]:
        held = {name: p.detach() for name, p in self.model.named_parameters()}
        scale = self.kfac.metrics().get("kfac/trust_region_scale", torch.ones(()))
        return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in held.items()} | {"scale": scale}


def trained(model: nn.Module, region: str, strategy: Any, rank: int, world: int) -> dict[str, Tensor]:
    own = Training(model, REGIONS[region](), strategy)
    for number in range(3):
        own.gradients(number, cases.shards(world)[rank], world)
        own.step()
    return own.ended()


@cache
def one_process(region: str) -> dict[str, Tensor]:
    torch.manual_seed(3)
    own = Training(cases.Mixed(), REGIONS[region]())
    for number in range(3):
        own.gradients(number, slice(0, cases.N), 1)
        own.step()
    return own.ended()


def watched(strategy: Any, region: Any, rank: int, world: int, mesh: Any = None) -> dict[str, Any]:
    """A step without a capture: what it sends, syncs, holds, and preconditions."""
    torch.manual_seed(3)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(2 * world)), nn.Linear(32, 3))
    for child in model:
        fully_shard(child, **({} if mesh is None else {"mesh": mesh}))
    fully_shard(model, **({} if mesh is None else {"mesh": mesh}))
    schedule = kc.Schedule(factors=lambda step: step == 0, inverses=lambda step: step == 0)
    kfac = kc.KFAC(model, "categorical", schedule=schedule, trust_region=region)
    kfac.distribute(kc.Plan(strategy=strategy))
    sent: list[tuple[int, int]] = []
    plain = dist.all_to_all_single

    def counting(received: Tensor, buffer: Tensor, there: Any, sizes: list[int], **kwargs: Any) -> Any:
        sent.append((buffer.nbytes, sizes[rank]))
        return plain(received, buffer, there, sizes, **kwargs)

    for number in range(3):
        outputs = model(torch.randn(4, 32))
        if number == 0:
            kfac.update(outputs)
        outputs.square().sum().backward()
        sent.clear()
        with Counting() as seen, mock.patch.object(dist, "all_to_all_single", counting):
            kfac.precondition(lr=0.1)
    planned = [(one.kind, one.nbytes, one.stays, one.ranks) for one in kfac.plan().step_messages]
    return {
        "messages": seen.messages(),
        "syncs": seen.seen["aten._local_scalar_dense"],
        "peak": seen.peak,
        "sent": list(sent),
        "planned": planned,
        "flops": [row.update_flops for row in kfac.plan().ranks],
    }


def with_missing_gradients(rank: int, world: int) -> dict[str, Any]:
    """A gradient that one rank has not; one that none has; and none of a layer's bias."""
    own = Training(sharded_model("rows"), None)
    own.gradients(0, cases.shards(world)[rank], world)
    kept = own.model.conv.weight.grad.full_tensor()
    own.model.inner.weight.grad = own.model.inner.bias.grad = None
    own.model.out.bias.grad = None
    if rank == 1:
        own.model.conv.bias.grad = None
    own.kfac.precondition(lr=cases.RATE)
    none = [name for name, p in own.model.named_parameters() if p.requires_grad and p.grad is None]
    moved = own.model.conv.weight.grad.full_tensor() != kept
    return {"none": none, "out": own.model.out.weight.grad.full_tensor(), "moved": bool(moved.any())}


def waiting(rank: int, world: int) -> bool:
    """Whether layers that have no inverse yet keep their plain gradients to the last bit."""
    torch.manual_seed(3)
    model = cases.Raw()
    fully_shard(model)
    own = Training(model, kc.KLClip(1e-6))
    own.gradients(0, cases.shards(world)[rank], world)
    before = {name: p.grad.to_local().clone() for name, p in model.named_parameters()}
    own.kfac.precondition(lr=cases.RATE)
    same = {name: torch.equal(p.grad.to_local(), before[name]) for name, p in model.named_parameters()}
    return same["scale"] and same["weight"] and not same["out.weight"]


def cut_otherwise(rank: int, world: int) -> str:
    """One rank has a part that is none of its placements; what each says."""
    own = Training(sharded_model("rows"), None)
    own.gradients(0, cases.shards(world)[rank], world)

    def wrong(tensor: Any) -> Any:
        found = region_here(tensor)
        return type(found)((range(0), *found.where[1:])) if rank == 1 and tensor.shape == (3, 4) else found

    with mock.patch.object(shuffling, "region_here", wrong), pytest.raises(kc.ArgumentError) as error:
        own.kfac.precondition(lr=cases.RATE)
    return str(error.value)


STRATEGIES: dict[int, tuple[Any, ...]] = {2: ("replicate", "shard"), 3: ("shard",), 4: (0.5,)}
#: Ranks, how the model is cut, trust region and strategy.
RUNS = [
    *((2, "rows", region, "replicate") for region in REGIONS),
    *((2, "rows", region, "shard") for region in ("KLClip", "Graft", "of its own")),
    *((2, "columns", region, "shard") for region in ("none", "of its own")),
    *((2, "some layers", region, "shard") for region in ("none", "KLClip", "Graft")),
    (3, "rows", "KLClip", "shard"),
    (4, "rows", "Graft", 0.5),
]


def in_parts(rank: int, world: int) -> dict[Any, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("first", "second"))
    found = {placements: shuffled(placements, mesh, Group()) for placements in PLACEMENTS}
    return found | {"groups": in_groups(rank)}


def in_training(rank: int, world: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for of, way, region, strategy in RUNS:
        if of == world:
            found[way, region, strategy] = trained(sharded_model(way), region, strategy, rank, world)
    if world == 2:
        found["missing"] = with_missing_gradients(rank, world)
        found["waiting"] = waiting(rank, world)
        found["otherwise"] = cut_otherwise(rank, world)
    return found


def while_watched(rank: int, world: int) -> dict[Any, Any]:
    found = {strategy: watched(strategy, None, rank, world) for strategy in STRATEGIES[world]}
    found["clipped"] = watched("shard", kc.KLClip(1e-3), rank, world)
    found["whole"] = watched("replicate", Whole(), rank, world)
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("first", "second"))
        found["mesh"] = watched(0.5, None, rank, world, mesh)
    return found


@cache
def results(work: Any, world: int) -> list[dict[Any, Any]]:
    return run(work, world)


@pytest.mark.parametrize("placements", PLACEMENTS)
def test_parts_are_whole_on_one_rank_and_parts_again_on_all(placements):
    found = [result[placements] for result in results(in_parts, 4)]
    assert all(one["differ"] == [] for one in found)
    assert sorted(name for one in found for name in one["here"]) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("placements", PLACEMENTS)
def test_all_dtypes_go_in_one_message(placements):
    assert all(list(result[placements]["messages"].values()) == [1] for result in results(in_parts, 4))


@pytest.mark.parametrize(("name", "ranks"), [("crossed", 4), ("larger", 4), ("same", 2)])
def test_parts_go_to_a_rank_with_the_inverse_within_the_fewest_ranks_that_have_them(name, ranks):
    found = [result["groups"][name] for result in results(in_parts, 4)]
    assert all(one["ranks"] == ranks and one["ones"] for one in found)
    assert all(set(one["here"]) <= set(one["works"]) for one in found)
    preconditioned = Counter(layer for one in found for layer in one["here"])
    assert preconditioned == dict.fromkeys("0123", 4 // ranks)


@pytest.mark.parametrize(("world", "way", "region", "strategy"), RUNS)
def test_parts_train_as_one_process_does(world, way, region, strategy):
    for result in results(in_training, world):
        for name, expected in one_process(region).items():
            assert_same(result[way, region, strategy][name], expected, tolerance=1e-12)


@pytest.mark.parametrize(("world", "strategy"), [(2, "replicate"), (2, "shard"), (3, "shard"), (4, 0.5), (4, "mesh")])
def test_a_step_sends_two_messages_and_waits_for_no_host(world, strategy):
    for result in results(while_watched, world):
        assert result[strategy]["messages"] == {"c10d.alltoall_base_": 2}
        assert result[strategy]["syncs"] == 0


@pytest.mark.parametrize("world", STRATEGIES)
def test_a_trust_region_adds_a_number_of_each_layer(world):
    for result in results(while_watched, world):
        assert result["clipped"]["messages"] == {"c10d.alltoall_base_": 2, "c10d.allreduce_": 1}


@pytest.mark.parametrize(("world", "strategy"), [(2, "replicate"), (2, "shard"), (3, "shard"), (4, 0.5), (4, "mesh")])
def test_the_bytes_sent_are_those_planned(world, strategy):
    found = [result[strategy] for result in results(while_watched, world)]
    together = [tuple(map(sum, zip(*sent, strict=True))) for sent in zip(*(one["sent"] for one in found), strict=True)]
    expected = [("all_to_all", nbytes, stays, world) for nbytes, stays in together]
    assert len(expected) == 2
    assert all(one["planned"] == expected for one in found)


@pytest.mark.parametrize("world", [3, 4])
def test_a_rank_holds_its_share_of_the_gradients(world):
    """Whole ones are as many as ranks; beside them there are buffers, and updates."""
    strategy = STRATEGIES[world][0]
    parted, whole = (
        max(result[key]["peak"] for result in results(while_watched, world)) for key in (strategy, "whole")
    )
    assert parted < 2.2 / world * whole


@pytest.mark.parametrize("world", STRATEGIES)
def test_preconditioning_is_shared_out_whoever_has_inverses(world):
    flops = results(while_watched, world)[0][STRATEGIES[world][0]]["flops"]
    assert max(flops) < 1.5 * sum(flops) / world


def test_a_missing_gradient_counts_as_zero_and_stays_missing():
    first, second = (result["missing"] for result in results(in_training, 2))
    assert first["none"] == ["inner.weight", "inner.bias", "out.bias"]
    assert second["none"] == ["conv.bias", "inner.weight", "inner.bias", "out.bias"]
    torch.manual_seed(3)
    own = Training(cases.Mixed(), None)
    own.gradients(0, slice(0, cases.N), 1)
    own.model.out.bias.grad = None
    own.kfac.precondition(lr=cases.RATE)
    for found in (first, second):
        assert found["moved"]
        assert_same(found["out"], own.model.out.weight.grad)


def test_layers_without_an_inverse_keep_their_gradients_to_the_last_bit():
    assert all(result["waiting"] for result in results(in_training, 2))


def test_parts_that_do_not_make_up_a_gradient_are_refused_on_all_ranks():
    said = {result["otherwise"] for result in results(in_training, 2)}
    assert len(said) == 1
    assert "the gradient of 'out.weight' in layer 'out', of shape (3, 4)" in said.pop()
