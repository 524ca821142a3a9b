"""What forwards left at their layers: sums of their inputs, and where the gradients of their outputs come back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from .calls import Call
from .errors import CaptureError
from .layers.layer import Layer
from .layers.sharing import (
    chosen,
    expanded_input_moment,
    masked,
    one_example,
    pooled_inputs,
    reduced_input_moment,
    sampled_input_moment,
)
from .layers.summed import Bases
from .linalg.patches import unfolded
from .statistics import LayerSums, statistic_dtype

Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""By layer: a [..., N, positions, d_in], the feature 1 last where there is a bias, and g [..., N, positions, d_out]."""


@dataclass(frozen=True)
class Wanted:
    """What is asked of a capture where it is not A and G of every layer.

    Args:
        moments: layers whose A and G are summed; of others only what says whether they are finite.
        pairs: layers whose activations are kept until the scores come back.
        take: called with the pairs of one batch and score, and with the score's weight and slot.
        dtype: of the statistics, where they would be narrower.
        by_example: whether parameters in the universal form, and calls whose first dimension does not count examples,
            are asked for the gradient of each example, in place of that of all examples together.
    """

    moments: frozenset[str]
    pairs: frozenset[str]
    take: Callable[[Pairs, float, int], None]
    dtype: torch.dtype = torch.float32
    by_example: bool = False


def dtype_of(x: Tensor, wanted: Wanted | None) -> torch.dtype:
    """The dtype of statistics that are made of ``x``."""
    dtype = statistic_dtype(x.dtype)
    return dtype if wanted is None else torch.promote_types(dtype, wanted.dtype)


def in_form(layer: Layer, method: str, x: Tensor, features: int | None) -> Tensor:
    """What a method of the layer's kind gave, seen to be of the form that it should be in.

    Args:
        layer: whose kind it is.
        method: name of the method.
        x: what it gave.
        features: size of the last dimension; None for any.

    Raises:
        CaptureError: it is not.
    """
    groups = (layer.layout.groups,) if layer.layout.groups > 1 else ()
    if len(x.shape) < 3 or tuple(x.shape[:-3]) != groups or features not in (None, x.shape[-1]):
        expected = ", ".join(map(str, (*groups, "batch", "positions", "features" if features is None else features)))
        raise CaptureError(
            f"layer '{layer.name}': {method} of its kind {layer.kind.name!r} gave a tensor of shape {tuple(x.shape)}, "
            f"expected [{expected}]. Correct the kind, or take it back with kc.unregister_layer."
        )
    return x


@dataclass(frozen=True)
class Run:
    """What captures take of the training run that they are part of.

    Args:
        bases: the bases in use, of layers that are kept in one.
        generator: of a device, for choosing positions.
    """

    bases: Callable[[], Mapping[str, Bases]] = dict
    generator: Callable[[torch.device], torch.Generator | None] = lambda device: None

    def rows(self, layer: Layer, a: Tensor) -> Tensor:
        """The positions that factors are made of in one call of a layer with such activations."""
        return chosen(a.shape[-3:-1], layer.fraction, generator=self.generator(a.device), device=a.device)


@dataclass
class Use:
    """One call of a layer's module: where its output gradient comes from, how to read it, and what makes its a.

    ``batch`` is the size of the dimension of a that counts examples, unless they share what is looked up; ``numbers``
    how many there are in what was returned, none where an expert was given no row; ``rows`` the positions that factors
    are made of, None for all.
    """

    call: Call
    module: nn.Module
    keep: Tensor | None
    #: The activations in the form of ``linalg.pairs``, where they are wanted.
    a: Callable[[], Tensor] | None = None
    batch: int = 0
    numbers: int = 1
    rows: Tensor | None = None

    def gradients(self, layer: Layer, gradient: Tensor, wanted: Wanted | None) -> Tensor:
        """What arrived at its output as g [..., batch, positions, d_out], in the dtype of statistics."""
        g = layer.kind.output_gradients(self.module, gradient.to(dtype_of(gradient, wanted)))
        return in_form(layer, "output_gradients", g, layer.layout.d_out)

    def of_each(self, examples: int) -> Use:
        """Of inputs that are not told apart by example: as if each had all of them as its positions."""
        keep, make = self.keep, self.a
        return replace(
            self,
            keep=None if keep is None else one_example(keep),
            a=None if make is None else lambda: _repeated(one_example(make()), examples),
        )


@dataclass
class Entry:
    """A layer in one forward: its summed inputs and its uses.

    ``inputs`` and ``count`` are the moment and number of positions for 'expand', the pooled activations and their
    numbers for 'reduce'; a plain sum and one where no moments are wanted.
    """

    layer: Layer
    inputs: Tensor
    count: Tensor
    uses: list[Use]
    moments: bool = True


@dataclass
class Forward:
    """What one forward of the model left at its layers."""

    positions: Tensor | None = None
    entries: dict[str, Entry] = field(default_factory=dict)
    #: Where the gradients of the model's outputs arrive; noted where a forward must be known without any entry.
    ends: list[GradientEdge] = field(default_factory=list)
    #: Whether an explicit update may still take the place of what was heard of it.
    replaceable: bool = False
    #: What the last layer was given, where the next one may be given the same, as queries, keys and values are.
    last: Given | None = None

    def add(
        self,
        layer: Layer,
        use: Use,
        make: Callable[[], Tensor],
        wanted: Wanted | None = None,
        given: Tensor | None = None,
    ) -> None:
        """Add one call of a layer.

        Args:
            layer: the layer.
            use: the call.
            make: gives its activations [..., batch, positions, d_in].
            wanted: what is asked for where it is not A and G of every layer.
            given: the input that these are made of, where they depend on nothing else.
        """
        moments = wanted is None or layer.name in wanted.moments
        if wanted is not None and layer.name in wanted.pairs:
            # Made here, so that all draws share one tensor; of its own, whatever becomes of the input.
            pair = _homogeneous(layer, make().clone(), use.keep)
            use.a = lambda: pair
        elif layer.gradient_sums is not None:
            # From what autograd holds for the backward anyway, and no copy of it until then. Not by way of the use,
            # which would hold itself, and with it the graph, until a garbage collection.
            keep = use.keep
            use.a = lambda: _homogeneous(layer, make(), keep)
        inputs, count = self._inputs(
            layer, use, make, given if moments and layer.sums_every_position else None, moments
        )
        entry = self.entries.get(layer.name)
        if entry is None:
            self.entries[layer.name] = Entry(layer, inputs, count, [use], moments)
            return
        _same_examples(layer, entry.inputs, inputs)
        entry.inputs, entry.count = entry.inputs + inputs, entry.count + count
        entry.uses.append(use)

    def _inputs(
        self, layer: Layer, use: Use, make: Callable[[], Tensor], given: Tensor | None, moments: bool
    ) -> tuple[Tensor, Tensor]:
        """What one call adds to the inputs of an entry, and to their count; copies where the last had its input."""
        asked = (layer.ones, layer.layout.weight is None, make().dtype) if given is not None else ()
        if self.last is not None and given is not None and self.last.holds(given, asked):
            use.batch = self.last.batch
            return self.last.inputs.clone(), self.last.count.clone()
        inputs, count = _inputs(layer, use, make, moments=moments)
        self.last = None if given is None else Given(given, asked, use.batch, inputs, count)
        return inputs, count


class Given:
    """The input of a call, which is not kept alive for it, and the sums that were made of it.

    Args:
        given: the input.
        asked: what else the sums depend on.
        batch: the size of its dimension that counts examples.
        inputs: the sum over positions of a a^T.
        count: their number.
    """

    def __init__(self, given: Tensor, asked: tuple[Any, ...], batch: int, inputs: Tensor, count: Tensor) -> None:
        self.batch, self.inputs, self.count = batch, inputs, count
        self._given, self._asked = ref(given), asked
        self._versions = given._version, inputs._version

    def holds(self, given: Tensor, asked: tuple[Any, ...]) -> bool:
        """Whether another call had the same input, and neither it nor what was made of it was changed since."""
        same = self._given() is given and self._asked == asked
        return same and self._versions == (given._version, self.inputs._version)


def _inputs(layer: Layer, use: Use, make: Callable[[], Tensor], *, moments: bool) -> tuple[Tensor, Tensor]:
    """What one call adds to the inputs of an entry, and to their count."""
    if moments and not layer.sums_inputs:
        zero = torch.zeros((), dtype=statistic_dtype(layer.like.dtype), device=layer.device)
        present = torch.full_like(zero, min(use.numbers, 1))
        return zero, present if use.keep is None else present * use.keep.any()
    a = _weighted(layer, make())
    use.batch = a.shape[-3]
    if not moments:
        inputs = masked(a, use.keep).sum()
        return inputs, torch.ones_like(inputs)
    if use.rows is not None:
        return sampled_input_moment(a, use.keep, use.rows, bias=layer.ones, moment=layer.input_moment)
    if layer.sharing == "expand":
        return expanded_input_moment(a, use.keep, bias=layer.ones, moment=layer.input_moment)
    return pooled_inputs(a, use.keep)


def _weighted(layer: Layer, a: Tensor) -> Tensor:
    """The activations that meet a trainable weight."""
    return a if layer.layout.weight is not None else a.new_zeros((*a.shape[:-1], 0))


def _homogeneous(layer: Layer, a: Tensor, keep: Tensor | None) -> Tensor:
    """Activations in the form of ``linalg.pairs``: the feature 1 last where there is a bias, padded positions zero."""
    a = unfolded(_weighted(layer, a))
    if layer.layout.bias is not None:
        a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1)
    return masked(a, keep)


def _repeated(a: Tensor, examples: int) -> Tensor:
    """The positions of one example as those of each of several."""
    return a.expand(*a.shape[:-3], examples, -1, -1)


def add_inputs(sums: dict[str, LayerSums], heard: Sequence[Forward]) -> None:
    """Put the inputs of the forwards heard, as these have them, into the sums of the layers reached."""
    for name, mine in sums.items():
        entries = [forward.entries[name] for forward in heard if name in forward.entries]
        if not entries:
            # The universal form has no inputs: all is in G, and what is counted are the backwards.
            mine.A_count = torch.ones_like(mine.A)
            continue
        inputs, count = entries[0].inputs, entries[0].count
        for entry in entries[1:]:
            _same_examples(entry.layer, inputs, entry.inputs)
            inputs, count = inputs + entry.inputs, count + entry.count
        layer = entries[0].layer
        if layer.sharing == "reduce" and entries[0].moments:
            inputs, count = reduced_input_moment(inputs, count, bias=layer.ones, moment=layer.input_moment)
        mine.A, mine.A_count = inputs, count


def _same_examples(layer: Layer, mine: Tensor, theirs: Tensor) -> None:
    if layer.sharing == "reduce" and mine.shape != theirs.shape:
        raise CaptureError(
            f"layer '{layer.name}' with sharing='reduce' was used on {mine.shape[-2]} and on {theirs.shape[-2]} "
            f"examples in one forward: use sharing='expand' for it."
        )
