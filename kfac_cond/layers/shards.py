"""Tensors of which this rank has a part: which they are, whole ones from them, and the way back.

Between calls a module that ``fully_shard`` cut holds its shard as a DTensor; for a call, and in the graph that it
leaves, it has the whole parameter, which is another tensor. A module that ``parallelize_module`` cut computes with
DTensors: its inputs, its outputs and the gradients of these are parts, or parts of sums, of what all ranks of the mesh
have together. Both may be: then the mesh of tensor parallelism comes last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import ArgumentError
from .regions import region_here

if dist.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Partial, Replicate

SHARDED: tuple[type[Tensor], ...] = (DTensor,) if dist.is_available() else ()


def is_sharded(x: Tensor | None) -> bool:
    """Whether a tensor is a DTensor, of which this rank may have a part alone."""
    return isinstance(x, SHARDED)


def gathering(modules: Iterable[nn.Module]) -> list[Any]:
    """Those of the modules that ``fully_shard`` was called on."""
    return [module for module in modules if isinstance(module, FSDPModule)] if dist.is_available() else []


def gathered_for_calls(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """The modules that have whole parameters whenever they are called: in one that ``fully_shard`` was called on."""
    return {inner for module in gathering(modules) for inner in module.modules()}


@dataclass(frozen=True)
class Cut:
    """Ranks that compute with parts of one weight, and so on the same data: along the last dimensions of a mesh.

    Args:
        mesh: that a parameter is on between calls.
        first: of these dimensions; those before are of ``fully_shard``, and the weight is whole along them for calls.
    """

    mesh: Any
    first: int = 0

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """These ranks, this one among them, as they are numbered among all processes; none where it is not on it."""
        here = self.mesh.get_coordinate()
        return () if here is None else tuple(self.mesh.mesh[tuple(here[: self.first])].flatten().tolist())

    def __str__(self) -> str:
        names = (self.mesh.mesh_dim_names or ())[self.first :]
        said = f" ({', '.join(map(repr, names))})" if names else ""
        return f"{len(self.ranks)} rank{'s' * (len(self.ranks) != 1)}{said}"


def cut_of(x: Tensor, *, gathered: bool) -> Cut | None:
    """Over which ranks a parameter is cut while its module computes; None where the module has it whole then.

    Args:
        x: the parameter as it is between calls.
        gathered: whether ``fully_shard`` has it whole along its own dimensions for calls.
    """
    if not is_sharded(x):
        return None
    mesh, placements = x.device_mesh, x.placements  # type: ignore[attr-defined]
    # Of a mesh of two dimensions ``fully_shard`` repeats along the first and cuts along the second.
    first = 1 + isinstance(placements[0], Replicate) if gathered else 0
    return Cut(mesh, first) if first < mesh.ndim else None


def cuts_of(model: nn.Module) -> tuple[Cut, ...]:
    """Over which ranks the modules of a model compute with parts of their weights; once for each set of ranks."""
    hold_shards(model)
    gathered = gathered_for_calls(model.modules())
    held = ((p, module in gathered) for module in model.modules() for p in module._parameters.values())
    found = (cut_of(p, gathered=whole_in_calls) for p, whole_in_calls in held if p is not None)
    return tuple({cut.ranks: cut for cut in found if cut is not None}.values())


def between_calls(x: Tensor, cuts: Iterable[Cut]) -> bool:
    """Whether a parameter is a DTensor that no module computes with: as ``fully_shard`` leaves it between calls."""
    return is_sharded(x) and _ranks(x.device_mesh) not in {cut.ranks for cut in cuts}  # type: ignore[attr-defined]


@lru_cache
def _ranks(mesh: Any) -> tuple[int, ...]:
    """All ranks of a mesh; asked for at every call of a layer."""
    return tuple(mesh.mesh.flatten().tolist())


def has_stand_ins(model: nn.Module) -> bool:
    """Whether the model trains plain tensors in place of DTensors, as DDP does on a part of a mesh.

    From its first forward on, modules hold the DTensors as attributes that are no parameters.
    """
    held = (one for module in model.modules() for one in vars(module).values() if isinstance(one, Tensor))
    return any(hasattr(p, "_st_info") for p in model.parameters()) or any(map(is_sharded, held))


def local(x: Tensor) -> Tensor:
    """A plain tensor itself; the part of a DTensor that is here."""
    return x.detach().to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def device_of(x: Tensor) -> torch.device:
    """Where a layer with this parameter computes: of a shard that is offloaded to the CPU, the device of its mesh."""
    if is_sharded(x) and local(x).device.type == "cpu":
        return torch.device(x.device_mesh.device_type)  # type: ignore[attr-defined]
    return x.device


def whole(x: Tensor) -> Tensor:
    """A plain tensor itself; a DTensor brought together where its mesh is, which all ranks of that call."""
    return x.to(device_of(x)).full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]


def brought_together(given: Any) -> Any:
    """The same arguments, with the DTensors among them brought together, which all ranks of their mesh call."""
    if isinstance(given, Tensor):
        return whole(given)
    if not any(is_sharded(one) for one in tree_leaves(given)):
        return given
    return tree_map(lambda one: whole(one) if isinstance(one, Tensor) else one, given)


def check_placements(name: str, gradient: Tensor) -> None:
    """Refuse a gradient that is a part of something else than a sum or a mean.

    Raises:
        ArgumentError: it has such placements.
    """
    if is_sharded(gradient):
        placements = gradient.placements  # type: ignore[attr-defined]
        if not all(type(one) is Partial and one.reduce_op in ("sum", "avg") for one in placements if one.is_partial()):
            raise ArgumentError(
                f"the gradient of '{name}' is a DTensor with placements {tuple(placements)}: expected shards, "
                f"repetitions, and parts of a sum or of a mean. Exclude the layer that it is of with a rule, or bring "
                f"the gradient together before the step."
            )


def write_into(gradient: Tensor, new: Tensor) -> None:
    """Write a whole tensor, the same on all ranks, into a gradient: into a DTensor the part that is here."""
    if is_sharded(gradient):
        region = region_here(gradient)
        new = gradient.to_local() if region is None else region.of(new)  # type: ignore[attr-defined]
    local(gradient).copy_(new)


def hold_shards(model: nn.Module) -> None:
    """Have the modules hold their shards again, which are what an optimizer steps, where a backward left them whole."""
    for module in gathering(model.modules()):
        module.reshard()


@contextmanager
def nothing_reduced(model: nn.Module) -> Iterator[None]:
    """Within it a backward brings no gradients of the ranks together.

    ``fully_shard`` does so at the end of any backward, with what earlier micro-batches left; the sum would be another
    in its last bits when what comes later is brought together by itself.
    """
    before = [(module, _reduces(module)) for module in gathering(model.modules())]
    for module, _ in before:
        module.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for module, reduces in before:
            module.set_requires_gradient_sync(reduces, recurse=False)


def _reduces(module: Any) -> bool:
    """Whether a backward now would reduce the gradients; torch lets it be set and not read."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return all(group.reduce_grads for group in groups if group is not None)
