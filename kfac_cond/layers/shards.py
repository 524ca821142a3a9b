"""Parameters that ``fully_shard`` cut into shards: which they are, whole ones from them, and the way back.

Between calls a module holds its shard as a DTensor; for a call, and in the graph that it leaves, it has the whole
parameter, which is another tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ArgumentError

if dist.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Replicate, Shard


def is_sharded(x: Tensor | None) -> bool:
    """Whether a tensor is a DTensor, of which this rank may have a part alone."""
    return dist.is_available() and isinstance(x, DTensor)


def gathering(modules: Iterable[nn.Module]) -> list[Any]:
    """Those of the modules that ``fully_shard`` was called on."""
    return [module for module in modules if isinstance(module, FSDPModule)] if dist.is_available() else []


def gathered_for_calls(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """The modules that have whole parameters whenever they are called: in one that ``fully_shard`` was called on."""
    return {inner for module in gathering(modules) for inner in module.modules()}


def of_data_parallel(x: Tensor) -> bool:
    """Whether a DTensor is as ``fully_shard`` makes one of a plain parameter: cut once, and repeated at most."""
    names = [type(placement) for placement in x.placements]  # type: ignore[attr-defined]
    return names in ([Shard], [Replicate, Shard])


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


def check_placements(name: str, gradient: Tensor) -> None:
    """Refuse a gradient that cannot be written back shard by shard.

    Raises:
        ArgumentError: it has placements other than whole shards and repetitions of them.
    """
    if is_sharded(gradient):
        placements = gradient.placements  # type: ignore[attr-defined]
        if not all(type(one) in (Shard, Replicate) for one in placements):
            raise ArgumentError(
                f"the gradient of '{name}' is a DTensor with placements {tuple(placements)}: expected Shard(dim) and "
                f"Replicate() alone, as fully_shard gives them. Exclude the layer that it is of with a rule, or bring "
                f"the gradient together before the step."
            )


def write_into(gradient: Tensor, new: Tensor) -> None:
    """Write a whole tensor, the same on all ranks, into a gradient: into a DTensor the part that is here."""
    if is_sharded(gradient):
        mesh, placements = gradient.device_mesh, gradient.placements  # type: ignore[attr-defined]
        # Each rank has all of it: nothing is sent.
        repeated = DTensor.from_local(new.contiguous(), mesh, [Replicate()] * mesh.ndim, run_check=False)
        new = repeated.redistribute(placements=placements).to_local()
        gradient = gradient.to_local()  # type: ignore[attr-defined]
    gradient.copy_(new)


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
