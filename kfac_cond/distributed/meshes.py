"""Which ranks have different data where weights are cut over a mesh: those that compute on one weight have the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from ..errors import ArgumentError
from ..layers.shards import Cut
from .group import Group, is_initialised

_REMEDY = (
    "say which ranks have different data with kfac.distribute(kc.Plan(mesh=...)): a process group, or one dimension of "
    "a DeviceMesh, say mesh['dp']; a rank that has them to itself passes a group of its own"
)


def with_different_data(cuts: Sequence[Cut]) -> Group:
    """The ranks with different data: all there are, or where weights are cut over some those along the other dimension.

    Args:
        cuts: over which ranks weights are cut.

    Raises:
        ArgumentError: the mesh does not tell.
    """
    cut = only(cuts, f"Before the first step, {_REMEDY}") if is_initialised() else None
    if cut is None:
        return Group()
    if len(cut.ranks) == dist.get_world_size():
        return Group.alone()
    # Where fully_shard put a parameter on a larger mesh than its modules compute on, that is the root itself.
    root = _root(cut.mesh)
    others = [dim for dim in range(root.ndim) if root.size(dim) > 1 and not _along(root, dim, cut)]
    if root.mesh.numel() != dist.get_world_size() or len(others) != 1:
        raise ArgumentError(
            f"weights are cut over the ranks {_said(cut)}, which have the same data, on a mesh {root} of "
            f"{dist.get_world_size()} processes: of that it cannot be told which have different data. Before the first "
            f"step, {_REMEDY}"
        )
    return Group(root.get_group(others[0]))


def refuse_same_data(group: Group, cuts: Sequence[Cut]) -> None:
    """Refuse a group with ranks that have the same data, whose sums would count twice.

    Raises:
        ArgumentError: it has.
    """
    for cut in cuts:
        if group.size > 1 and len(twice := sorted({*cut.ranks} & {*group.ranks})) > 1:
            raise ArgumentError(
                f"kc.Plan(mesh=...) has the ranks {_few(group.ranks)}, of which {_few(twice)} compute with parts "
                f"of one weight and so on the same data, which would count {len(twice)} times. Expected ranks with "
                f"different data: {_REMEDY}"
            )


def only(cuts: Sequence[Cut], remedy: str) -> Cut | None:
    """The one set of several ranks that weights are cut over, or None.

    Args:
        cuts: over which ranks weights are cut.
        remedy: what to do where there are more sets.

    Raises:
        ArgumentError: there are more.
    """
    cuts = [cut for cut in cuts if len(cut.ranks) > 1]
    if len(cuts) > 1:
        raise ArgumentError(
            f"weights are cut over different sets of ranks, {' and '.join(map(_said, cuts))}: it cannot be told which "
            f"ranks have the same data. {remedy}"
        )
    return cuts[0] if cuts else None


def number_of(cuts: Sequence[Cut]) -> int | None:
    """A number that ranks with the same data share, for streams of labels; None where all ranks have different data.

    Raises:
        ArgumentError: it cannot be told which have the same.
    """
    cut = only(cuts, "Hand in the labels that all of them are to take, kc.Options(draws=...)")
    return None if cut is None else min(cut.ranks)


def _root(mesh: Any) -> Any:
    """The mesh that one was sliced out of; itself where it was not."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    from torch.distributed.device_mesh import _mesh_resources

    return _mesh_resources.get_root_mesh(mesh)


def _along(root: Any, dim: int, cut: Cut) -> bool:
    """Whether ranks of a cut differ along a dimension of the mesh, or are not all on it."""
    places = [(root.mesh == rank).nonzero().flatten().tolist() for rank in cut.ranks]
    return not all(places) or len({place[dim] for place in places}) > 1


def _said(cut: Cut) -> str:
    return f"{_few(cut.ranks)} of {cut}"


def _few(ranks: Sequence[int]) -> str:
    """The first of these ranks."""
    return f"{[*ranks[:8]]}{'...' if len(ranks) > 8 else ''}"
