"""Two processes: the sums of all ranks are those of one process, and DDP's static graph is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import kfac_cond as kc
from kfac_cond.draws import Draws

from ..reference import assert_same
from .spawn import run

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
WORLD = 2


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batches() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, data labels and drawn labels of all ranks together."""
    torch.manual_seed(4)
    return torch.randn(8, 4), torch.randint(3, (8,)), torch.randint(3, (8,))


#: Uneven on purpose.
SHARDS = (slice(0, 3), slice(3, 8))


def one_step(model: nn.Module, likelihood: kc.Likelihood, rows: slice) -> kc.KFAC:
    x, y, drawn = (part[rows] for part in batches())
    kfac = kc.KFAC(model, likelihood, schedule=kc.Schedule(factors=1, inverses=1))
    outputs = model(x)
    kfac.update(outputs, draws=drawn)
    nn.functional.cross_entropy(outputs, y).backward()
    kfac.precondition()
    return kfac


def heads_step(rows: slice) -> kc.KFAC:
    """Two heads of one output, one of them a sum; most labels of the other are missing, and unevenly so."""
    x, y, drawn = (part[rows] for part in batches())
    known = torch.where(torch.arange(8)[rows] < 5, -100, y)
    heads = kc.Product(
        {"mean": kc.Categorical(ignore_index=-100), "sum": kc.Gaussian(reduction="sum")}, weights={"sum": 0.2}
    )
    model = network()
    kfac = kc.KFAC(model, heads, schedule=kc.Schedule(factors=1, inverses=1))
    outputs = model(x)
    kfac.update((outputs, outputs.tanh()), targets=(known, None), draws=[(drawn, outputs.detach().cos())])
    nn.functional.cross_entropy(outputs, y).backward()
    kfac.precondition()
    return kfac


class Sometimes(nn.Module):
    """One rank of the two uses all of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) if len(x) == 3 else self.first(x)


def diagonal_step(*shards: slice) -> kc.KFAC:
    """A step over micro-batches, with sides that are kept as diagonals."""
    model = Sometimes()
    rules = {"first": {"max_factor_dim": 4}, "second": {"max_factor_dim": 2}}
    kfac = kc.KFAC(model, "categorical", schedule=kc.Schedule(factors=1, inverses=1), rules=rules)
    for rows in shards:
        x, y, drawn = (part[rows] for part in batches())
        outputs = model(x)
        kfac.update(outputs, draws=drawn)
        nn.functional.cross_entropy(outputs, y).backward()
    kfac.precondition()
    return kfac


class Raw(nn.Module):
    """Nothing but raw parameters, one of which a rank of the two does not use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.scale, self.weight, self.late = (nn.Parameter(torch.randn(*size)) for size in ((4,), (3, 4), (3, 3)))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh((x * self.scale) @ self.weight.T)
        return h @ self.late if len(x) == 3 else h


def universal_step(*shards: slice) -> kc.KFAC:
    model = Raw()
    kfac = kc.KFAC(model, "categorical", schedule=kc.Schedule(factors=1, inverses=1))
    for rows in shards:
        x, y, drawn = (part[rows] for part in batches())
        outputs = model(x)
        kfac.update(outputs, draws=drawn)
        nn.functional.cross_entropy(outputs, y).backward()
    kfac.precondition()
    return kfac


def gradients_under_ddp(rank: int, strategy: str | None) -> list[Tensor]:
    """Of raw parameters, averaged over the ranks, with a capture before the backward or, of None, without."""
    model = Raw()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    kfac = kc.KFAC(wrapped, "categorical", schedule=kc.Schedule(factors=1, inverses=1))
    x, y, drawn = (part[SHARDS[rank]] for part in batches())
    kfac.distribute(kc.Plan(strategy=strategy or "replicate"))
    outputs = wrapped(x)
    if strategy is not None:
        kfac.update(outputs, draws=drawn)
    nn.functional.cross_entropy(outputs, y).backward()
    return [p.grad.clone() for p in model.parameters()]


def dense(kfac: kc.KFAC) -> dict[str, Tensor]:
    return {name: block.to_dense() for name, block in kfac.fisher().items()}


def factors(kfac: kc.KFAC) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (block.A, block.G) for name, block in kfac.fisher().items()}


def has_factors(kfac: kc.KFAC) -> bool:
    try:
        return bool(kfac.fisher())
    except kc.NotReadyError:
        return False


def static_graph_run(rank: int) -> dict[str, Any]:
    """Four steps under DDP with a static graph, each rank on data of its own."""
    model = network()
    wrapped = DistributedDataParallel(model, static_graph=True)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(wrapped, criterion, schedule=kc.Schedule(factors=1, inverses=1), data=kc.Data(seed=1))
    kfac.attach(optimizer)
    x, y, _ = (part[SHARDS[rank]] for part in batches())
    captured = []
    for _step in range(4):
        optimizer.zero_grad()
        criterion(wrapped(x), y).backward()
        optimizer.step()
        captured.append(has_factors(kfac))
    return {"parameters": [p.detach().clone() for p in model.parameters()], "captured": captured}


class Branching(nn.Module):
    """Takes the weight of a layer without a call of it, where it is told to."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layer, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.functional = functional

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.linear(x, self.layer.weight, self.layer.bias) if self.functional else self.layer(x)
        return self.head(self.norm(h).tanh())


def branching_steps(functional: list[bool], rows: list[slice]) -> kc.KFAC:
    """Two steps, of one micro-batch for each of the slices."""
    model = Branching(functional=False)
    rules = {"head": {"structure": "diagonal"}}
    kfac = kc.KFAC(model, "categorical", rules=rules, schedule=kc.Schedule(factors=1, inverses=1, decay=0.0))
    for _ in range(2):
        for model.functional, part in zip(functional, rows, strict=True):
            x, _, drawn = (one[part] for one in batches())
            outputs = model(x)
            kfac.update(outputs, draws=drawn)
            (0.0 * outputs.sum()).backward()
        kfac.precondition()
    return kfac


def corrected_steps(*shards: slice, stagger: bool = False) -> kc.KFAC:
    """Steps in eigenbases that turn meanwhile, each of one micro-batch for each of the slices."""
    model = network()
    schedule = kc.Schedule(factors=1, inverses=2, decay=0.5, stagger=stagger)
    kfac = kc.KFAC(model, "categorical", structure="ekfac", schedule=schedule)
    for _ in range(5):
        for part in shards:
            x, _, drawn = (one[part] for one in batches())
            outputs = model(x)
            kfac.update(outputs, draws=drawn)
            (0.0 * outputs.sum()).backward()
        kfac.precondition()
    return kfac


def work(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, likelihood in (("mean", kc.Categorical()), ("sum", kc.Categorical(reduction="sum"))):
        found[name] = factors(one_step(network(), likelihood, SHARDS[rank]))
    found["heads"] = factors(heads_step(SHARDS[rank]))
    # A rank whose batch is not finite adds nothing, and all ranks say so.
    poisoned = network()
    if rank == 1:
        poisoned[0].weight.data[0, 0] = torch.nan
    found["poisoned"] = factors(one_step(poisoned, kc.Categorical(), SHARDS[rank]))
    found["diagonal"] = factors(diagonal_step(SHARDS[rank]))
    found["universal"] = factors(universal_step(SHARDS[rank]))
    found["branching"] = dense(branching_steps([rank == 1], [SHARDS[rank]]))
    for stagger in (False, True):
        found["corrected", stagger] = dense(corrected_steps(SHARDS[rank], stagger=stagger))
    found["ddp"] = {strategy: gradients_under_ddp(rank, strategy) for strategy in (None, "replicate", "shard")}
    found["static_graph"] = static_graph_run(rank)
    generator = Draws(7).generators(step=0, count=1, device=torch.device("cpu"))[0]
    found["uniform"] = torch.rand(4, generator=generator)
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run(work, WORLD)


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("layer", ["0", "2"])
@pytest.mark.parametrize("side", [0, 1], ids=["A", "G"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_uneven_ranks_are_one_process(results, reduction, side, layer, rank):
    expected = factors(one_step(network(), kc.Categorical(reduction=reduction), slice(0, 8)))
    assert_same(results[rank][reduction][layer][side], expected[layer][side])


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("layer", ["0", "2"])
def test_heads_of_uneven_ranks_are_those_of_one_process(results, layer, rank):
    """The first rank has no valid term of one head."""
    expected = factors(heads_step(slice(0, 8)))
    for found, wanted in zip(results[rank]["heads"][layer], expected[layer], strict=True):
        assert_same(found, wanted)


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("side", [0, 1], ids=["A", "G"])
def test_a_rank_that_is_not_finite_adds_nothing(results, side, rank):
    expected = factors(one_step(network(), kc.Categorical(), SHARDS[0]))
    assert_same(results[rank]["poisoned"]["2"][side], expected["2"][side])


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("layer", ["first", "second"])
@pytest.mark.parametrize("side", [0, 1], ids=["A", "G"])
def test_sides_that_are_diagonals_add_up_also_where_a_rank_does_not_use_them(results, side, layer, rank):
    block = diagonal_step(*SHARDS).fisher()[layer]
    assert block.diagonal_sides == {"first": ("A",), "second": ("A", "G")}[layer]
    assert_same(results[rank]["diagonal"][layer][side], (block.A, block.G)[side])


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("layer", ["scale", "weight", "late"])
@pytest.mark.parametrize("side", [0, 1], ids=["A", "G"])
def test_ranks_add_the_squares_of_their_own_gradients(results, side, layer, rank):
    """As micro-batches of one process do; a square of the sum over ranks would be another matrix."""
    assert_same(results[rank]["universal"][layer][side], factors(universal_step(*SHARDS))[layer][side])


@pytest.mark.parametrize("rank", range(WORLD))
def test_a_weight_that_one_rank_uses_without_a_call_is_universal_on_all(results, rank):
    """The squares of examples add up as well: a norm's, and those of a diagonal."""
    expected = dense(branching_steps([False, True], [*SHARDS]))
    assert list(results[rank]["branching"]) == ["layer.weight", "layer.bias", "norm", "head"] == list(expected)
    for name, block in results[rank]["branching"].items():
        assert_same(block, expected[name])


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("rank", range(WORLD))
def test_eigenbases_turn_together(results, rank, stagger):
    expected = dense(corrected_steps(*SHARDS, stagger=stagger))
    for name, block in results[rank]["corrected", stagger].items():
        assert_same(block, expected[name], tolerance=1e-8)


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("strategy", ["replicate", "shard"])
def test_what_ddp_reduces_is_the_same_with_a_capture(results, rank, strategy):
    found, plain = (results[rank]["ddp"][key] for key in (strategy, None))
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


def test_static_graph_keeps_ranks_equal(results):
    first, second = (result["static_graph"]["parameters"] for result in results)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_static_graph_is_captured_from_the_second_step_on(results):
    assert results[0]["static_graph"]["captured"] == [False, True, True, True]


def test_ranks_draw_different_labels(results):
    assert not torch.equal(results[0]["uniform"], results[1]["uniform"])
