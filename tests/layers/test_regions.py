"""Regions of tensors on a mesh: those that torch gives a rank, from placements alone, and tensors again from them."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kfac_cond.layers.regions import Region, missing_entries, region_of

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
if dist.is_available():
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

#: Sizes of a mesh, and placements on it.
ONE: list[tuple[tuple[int, ...], tuple[Any, ...]]] = (
    [
        ((1,), (Shard(0),)),
        ((3,), (Shard(0),)),
        ((4,), (Shard(1),)),
        ((2,), (Shard(-1),)),
        ((2,), (Replicate(),)),
        ((2, 2), (Replicate(), Shard(0))),
        ((2, 2), (Shard(0), Replicate())),
        ((2, 2), (Shard(0), Shard(1))),
        ((2, 3), (Shard(1), Shard(0))),
        ((2, 2), (Shard(0), Shard(0))),
        ((3, 2), (Shard(1), Shard(1))),
        ((2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
        ((2, 2), (_StridedShard(1, split_factor=2), Shard(1))),
        ((2, 2), (_StridedShard(0, split_factor=2), Replicate())),
        ((2, 2), (_StridedShard(0, split_factor=2), Shard(1))),
        ((2, 2, 2), (Replicate(), _StridedShard(0, split_factor=2), Shard(0))),
    ]
    if dist.is_available()
    else []
)
SHAPES = [(8, 6), (7, 5), (3, 1), (1, 4), (5, 3, 2)]


def ranks(sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(product(*map(range, sizes)))


def as_torch_cuts(tensor: Tensor, sizes: tuple[int, ...], place: tuple[int, ...], placements: Any) -> Tensor:
    """A rank's part, by torch's own splitting of a tensor, mesh dimension by mesh dimension."""
    for size, index, one in zip(sizes, place, placements, strict=True):
        if not one.is_replicate():
            dim = one.dim % tensor.ndim
            stride = getattr(one, "split_factor", 1)
            empty = tensor.narrow(dim, 0, 0)
            parts = [*tensor.chunk(stride, dim), *[empty] * stride][:stride]
            found = [[*part.chunk(size, dim), *[part.narrow(dim, 0, 0)] * size][index] for part in parts]
            tensor = torch.cat(found, dim)
    return tensor


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("sizes", "placements"), ONE)
def test_a_piece_is_what_torch_gives_a_rank(sizes, placements, shape):
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for place in ranks(sizes):
        region = region_of(shape, sizes, place, placements)
        expected = as_torch_cuts(tensor, sizes, place, placements)
        assert region.shape == tuple(expected.shape) and region.numel == expected.numel()
        assert torch.equal(region.of(tensor), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("sizes", "placements"), ONE)
def test_different_pieces_are_the_tensor_together(sizes, placements, shape):
    tensor = torch.randn(shape)
    regions = {place: region_of(shape, sizes, place, placements) for place in ranks(sizes)}
    assert missing_entries(shape, regions) == 0
    found = torch.zeros(shape)
    for region in set(regions.values()):
        region.add_to(found, region.of(tensor))
    assert torch.equal(found, tensor)


@pytest.mark.parametrize("n", range(1, 14))
@pytest.mark.parametrize(("data", "model"), [(2, 2), (3, 2), (2, 3), (4, 4)])
def test_fully_shard_cuts_what_parallelize_module_left_also_unevenly(data, model, n):
    placements = (_StridedShard(0, split_factor=model), Shard(0))
    for d, m in ranks((data, model)):
        part = [*torch.arange(n).chunk(model), *[torch.arange(0)] * model][m]
        expected = [*part.chunk(data), *[part[:0]] * data][d]
        assert torch.equal(region_of((n,), (data, model), (d, m), placements).of(torch.arange(n)), expected)


@pytest.mark.parametrize("op", ["sum", "avg"])
@pytest.mark.parametrize("other", ["Shard(0)", "Replicate()"])
def test_parts_of_a_sum_are_added_and_add_up_again(op, other):
    placements, sizes, shape = (Partial(op), eval(other)), (3, 2), (5, 2)
    regions = {place: region_of(shape, sizes, place, placements) for place in ranks(sizes)}
    addends = torch.randn(3, *shape)
    found, again = torch.zeros(shape), torch.zeros(3, *shape)
    for place, region in regions.items():
        if other == "Shard(0)" or place[1] == 0:
            region.add_to(found, Region(region.where).of(addends[place[0]]))
    expected = addends.sum(0) if op == "sum" else addends.mean(0)
    assert torch.allclose(found, expected, rtol=0, atol=1e-15)
    for place, region in regions.items():
        Region(region.where).of(again[place[0]]).copy_(region.of(found))
    assert torch.allclose(again.sum(0) if op == "sum" else again.mean(0), expected, rtol=0, atol=1e-15)


def test_what_no_rank_has_is_counted():
    regions = {0: Region((range(2), range(3))), 1: Region((range(2), range(3)), addend=(1,))}
    assert missing_entries((4, 3), regions) == 6
    assert missing_entries((4, 3), regions | {2: Region.whole((4, 3))}) < 0
