"""What forwards left at their layers, and the sums that are made of it once gradients come back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from .errors import CaptureError
from .layers.sharing import (
    expanded_gradient_moment,
    expanded_input_moment,
    masked,
    pooled_inputs,
    reduced_input_moment,
)
from .layers.survey import Layer
from .linalg.moments import second_moment
from .statistics import LayerSums, statistic_dtype


@dataclass
class Use:
    """One call of a layer's module: where its output gradient arrives, and how to read it."""

    edge: GradientEdge
    shape: torch.Size
    module: nn.Module
    keep: Tensor | None


@dataclass
class Entry:
    """A layer in one forward: its summed inputs and its uses.

    ``inputs`` and ``count`` are the moment and number of positions for 'expand', the pooled activations and their
    numbers for 'reduce'.
    """

    layer: Layer
    inputs: Tensor
    count: Tensor
    uses: list[Use]


@dataclass
class Forward:
    """What one forward of the model left at its layers."""

    positions: Tensor | None = None
    entries: dict[str, Entry] = field(default_factory=dict)
    #: Whether an explicit update may still take the place of what was heard of it.
    replaceable: bool = False

    def add(self, layer: Layer, use: Use, a: Tensor) -> None:
        """Add one call of a layer on activations [..., batch, positions, d_in]."""
        if layer.layout.weight is None:
            a = a[..., :0]
        if layer.sharing == "expand":
            inputs, count = expanded_input_moment(a, use.keep, bias=layer.layout.bias is not None)
        else:
            inputs, count = pooled_inputs(a, use.keep)
        entry = self.entries.get(layer.name)
        if entry is None:
            self.entries[layer.name] = Entry(layer, inputs, count, [use])
            return
        _same_examples(layer, entry.inputs, inputs)
        entry.inputs, entry.count = entry.inputs + inputs, entry.count + count
        entry.uses.append(use)


def add_gradients(
    sums: dict[str, LayerSums], reached: Iterable[tuple[Entry, Use, Tensor]], weight: float, examples: int
) -> None:
    """Add one draw's g g^T to the sums of the layers reached."""
    pooled: dict[str, tuple[Layer, Tensor]] = {}
    for entry, use, gradient in reached:
        layer = entry.layer
        g = gradient.to(statistic_dtype(gradient.dtype)).reshape(use.shape)
        g = masked(layer.kind.output_gradients(use.module, g), use.keep)
        if layer.sharing == "expand":
            _accumulate(sums, layer, expanded_gradient_moment(g), weight)
            continue
        if g.shape[-3] != examples:
            raise CaptureError(
                f"layer '{layer.name}' with sharing='reduce' has {g.shape[-3]} entries along its first dimension, the "
                f"outputs have {examples} examples along theirs: keep examples along dimension 0 of both, or use "
                f"sharing='expand' for it."
            )
        total = g.sum(dim=-2)
        pooled[layer.name] = (layer, pooled[layer.name][1] + total if layer.name in pooled else total)
    for layer, total in pooled.values():
        _accumulate(sums, layer, second_moment(total), weight)


def _accumulate(sums: dict[str, LayerSums], layer: Layer, moment: Tensor, weight: float) -> None:
    moment = moment if weight == 1.0 else moment.mul_(weight)
    mine = sums.get(layer.name)
    if mine is None:
        empty = moment.new_zeros(())
        sums[layer.name] = LayerSums(empty, empty, moment)
    else:
        mine.G.add_(moment)


def add_inputs(sums: dict[str, LayerSums], heard: Sequence[Forward]) -> None:
    """Put the inputs of the forwards heard into the sums of the layers that a gradient reached."""
    for name, mine in sums.items():
        entries = [forward.entries[name] for forward in heard if name in forward.entries]
        inputs, count = entries[0].inputs, entries[0].count
        for entry in entries[1:]:
            _same_examples(entry.layer, inputs, entry.inputs)
            inputs, count = inputs + entry.inputs, count + entry.count
        layer = entries[0].layer
        if layer.sharing == "reduce":
            inputs, count = reduced_input_moment(inputs, count, bias=layer.layout.bias is not None)
        mine.A, mine.A_count = inputs, count


def _same_examples(layer: Layer, mine: Tensor, theirs: Tensor) -> None:
    if layer.sharing == "reduce" and mine.shape != theirs.shape:
        raise CaptureError(
            f"layer '{layer.name}' with sharing='reduce' was used on {mine.shape[-2]} and on {theirs.shape[-2]} "
            f"examples in one forward: use sharing='expand' for it."
        )
