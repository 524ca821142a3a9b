"""The statistics of all ranks together: sums and counts are added before anything is divided or averaged.

Every rank then holds the same factors and, as its inverses are made of them alone, the same inverses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .health import Flags
from .layers.layer import Layer
from .statistics import LayerSums, Statistics, count_dtype, statistic_dtype


def ranks() -> int:
    """How many ranks share the work; 1 where no process group exists."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(statistics: Statistics, flags: Flags, layers: Mapping[str, Layer]) -> tuple[Statistics, Flags]:
    """The statistics and flags of all ranks, added; every rank must call it at the same capture.

    A rank whose own batch is not finite adds nothing. Ranks may differ in batch size, and in which layers were used.

    Args:
        statistics: this rank's.
        flags: this rank's.
        layers: all layers, in the order that every rank has.
    """
    mine = statistics.or_zero()
    heads = len(mine.slots)
    matrices = {name: _matrices(layer, mine.layers.get(name), heads) for name, layer in layers.items()}
    for dtype in dict.fromkeys(A.dtype for A, _ in matrices.values()):
        _add_up([side for pair in matrices.values() for side in pair if side.dtype == dtype])
    counts = _counts(mine, flags, layers)
    _add_up(list(counts.values()))
    sums = {name: LayerSums(A, counts[f"A {name}"], G) for name, (A, G) in matrices.items()}
    finite = counts["finite"] > 0
    # A loss that is a sum has M = 1 however many ranks add to it.
    usable = counts["finite"].clamp(min=1)
    Ms = zip(mine.slots.adds, counts["divisor"].unbind(), strict=True)
    divisor = torch.stack([M if adds else M / usable for adds, M in Ms])
    together = Flags(flags.captures * ranks(), {key: counts[f"flag {key}"].long() for key in _flag_keys(layers)})
    return Statistics(sums, divisor, mine.slots, statistics.examples * ranks(), finite), together


def of_any_rank(names: Iterable[str], layers: Iterable[str]) -> set[str]:
    """The layers that some rank names, the same on all; every rank must call it at the same capture.

    Args:
        names: those of this rank.
        layers: all layers, in the order that every rank has.
    """
    mine, everything = set(names), list(layers)
    found: list[set[str]] = [set()] * ranks()
    dist.all_gather_object(found, mine)
    return set(everything) & set().union(*found)


class StaticGraph:
    """Holds captures back while DDP records its static graph.

    With ``static_graph`` DDP learns in the first iteration how gradients arrive. Scores sent back from outside at that
    time make the gradients of the ranks differ, silently and for good.

    Args:
        model: what was wrapped; anything but DDP is never held back.
    """

    def __init__(self, model: nn.Module) -> None:
        self._ddp = model if isinstance(model, DistributedDataParallel) else None
        self._held: int | None = None

    def holds(self, step: int) -> bool:
        """Whether nothing is captured at ``step``; the answer stays the same throughout the step."""
        ddp = self._ddp
        if ddp is not None and ddp.static_graph and not ddp._static_graph_delay_allreduce_enqueued:
            self._held = step
        return self._held == step

    @property
    def held(self) -> bool:
        """Whether a step was held back, so that the next is due."""
        return self._held is not None


def _matrices(layer: Layer, sums: LayerSums | None, heads: int) -> tuple[Tensor, Tensor]:
    """(A, G) sums as tensors of their own; zeros where the layer was not used here."""
    if sums is not None:
        return sums.A, sums.G
    like = layer.like.new_zeros((), dtype=statistic_dtype(layer.like.dtype))
    of_A, of_G = layer.sum_shapes
    return like.new_zeros(of_A), like.new_zeros((heads, *of_G))


def _counts(mine: Statistics, flags: Flags, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """Everything that is a number, by name, the same names on every rank."""
    device = mine.divisor.device
    zero = torch.zeros((), dtype=count_dtype(device), device=device)
    counts = {"divisor": mine.divisor, "finite": mine.finite}
    counts |= {f"A {name}": mine.layers[name].A_count if name in mine.layers else zero for name in layers}
    counts |= {f"flag {key}": flags.counts.get(key, zero) for key in _flag_keys(layers)}
    return {name: count.to(zero, copy=True) for name, count in counts.items()}


def _flag_keys(layers: Mapping[str, Layer]) -> list[str]:
    return ["captures", "usable", "labels", *(f"layer {name}" for name in layers)]


def _add_up(tensors: list[Tensor]) -> None:
    """Add tensors of one dtype over all ranks, in place, packed into one buffer."""
    buffer = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(buffer)
    for tensor, part in zip(tensors, torch.split(buffer, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.reshape(tensor.shape))
