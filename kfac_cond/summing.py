"""The sums of output gradients, layer by layer as they come back, and the pairs that are handed on of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .errors import CaptureError
from .forwards import Entry, Use, Wanted, dtype_of
from .layers.layer import Layer
from .layers.sharing import expanded_gradient_moment, joined, masked, one_example, picked
from .layers.summed import IDENTITIES, Bases
from .statistics import LayerSums


@dataclass(frozen=True)
class Place:
    """Where the second moment of one score is added: its weight, its slot, and how many slots there are."""

    weight: float
    slot: int
    slots: int


class Summing:
    """Adds one score's g g^T to the sums of the layers that it gets to, and hands on the pairs that are wanted.

    Args:
        sums: by layer name.
        place: where it is added.
        examples: N.
        wanted: what is asked for where it is not A and G of every layer.
        bases: those in use, of layers that are kept in one.
    """

    def __init__(
        self,
        sums: dict[str, LayerSums],
        place: Place,
        examples: int,
        *,
        wanted: Wanted | None,
        bases: Mapping[str, Bases],
    ) -> None:
        self._sums, self._place, self._examples, self._wanted, self._bases = sums, place, examples, wanted, bases
        self._pooled: dict[str, tuple[Layer, Tensor]] = {}
        self._uses: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._own: dict[str, tuple[Layer, list[tuple[Tensor, Tensor]]]] = {}

    def add(self, entry: Entry, use: Use, whole: Tensor) -> None:
        """Take in the g of one use of a layer."""
        layer, g, examples = entry.layer, masked(whole, use.keep), self._examples
        if self._wanted is not None and layer.name in self._wanted.pairs and use.a is not None:
            self._uses.setdefault(layer.name, []).append(_pair(layer, use.a(), g, examples))
        if entry.moments and layer.gradient_sums is not None and use.a is not None:
            self._own.setdefault(layer.name, (layer, []))[1].append(_own_pair(layer, use.a(), g, examples))
        elif not entry.moments:
            self._accumulate(layer, g.sum())
        elif use.rows is not None:
            some = expanded_gradient_moment(picked(g, use.rows), layer.gradient_moment)
            self._accumulate(layer, some * (prod(g.shape[-3:-1]) / len(use.rows)))
        elif layer.sharing == "expand":
            self._accumulate(layer, expanded_gradient_moment(g, layer.gradient_moment))
        else:
            self._pool(layer, use, g)

    def _pool(self, layer: Layer, use: Use, g: Tensor) -> None:
        """Add up an example's g over positions and uses, before any of it is squared."""
        if use.batch != self._examples and not (layer.kind.looks_up and use.batch == 1):
            raise CaptureError(
                f"layer '{layer.name}' with sharing='reduce' has {use.batch} entries along its first dimension, the "
                f"outputs have {self._examples} examples along theirs: keep examples along dimension 0 of both, or use "
                f"sharing='expand' for it."
            )
        total = g.sum(dim=-2)
        before = self._pooled.get(layer.name)
        self._pooled[layer.name] = layer, total if before is None else before[1] + total

    def finish(self, of_parameters: Iterable[tuple[Layer, Tensor]]) -> None:
        """Square what waited for all uses of its layer, and hand on the pairs.

        Args:
            of_parameters: layers in the universal form, with gradients [n, *shape of the parameter] that are squared
                one by one.
        """
        for layer, total in self._pooled.values():
            self._accumulate(layer, layer.gradient_moment(total))
        for layer, pairs in self._own.values():
            assert layer.gradient_sums is not None
            of = self._bases.get(layer.name, IDENTITIES)
            self._accumulate(
                layer, layer.gradient_sums.of_pairs(*_joined(pairs), layer.layout, layer.max_factor_dim, of)
            )
        for layer, gradients in of_parameters:
            self._add_parameter(layer, gradients)
        if self._wanted is not None and self._uses:
            joint = {name: _joined(pairs) for name, pairs in self._uses.items()}
            self._wanted.take(joint, self._place.weight, self._place.slot)

    def _add_parameter(self, layer: Layer, gradients: Tensor) -> None:
        assert layer.gradient_sums is not None
        wanted = self._wanted
        D = gradients.to(dtype_of(gradients, wanted)).reshape(-1, *layer.layout.matrix_shape)
        if wanted is None or layer.name in wanted.moments:
            of = self._bases.get(layer.name, IDENTITIES)
            self._accumulate(layer, layer.gradient_sums.of_gradients(D, layer.layout, layer.max_factor_dim, of))
        else:
            self._accumulate(layer, D.sum())
        if wanted is not None and layer.name in wanted.pairs:
            module, _ = layer.places[layer.name]
            self._uses[layer.name] = [(layer.kind.activations(module, D), layer.kind.output_gradients(module, D))]

    def _accumulate(self, layer: Layer, moment: Tensor) -> None:
        mine, place = self._sums.get(layer.name), self._place
        if mine is not None:
            mine.G[place.slot].add_(moment, alpha=place.weight)
            return
        moment = moment if place.weight == 1.0 else moment.mul_(place.weight)
        if place.slots == 1:
            G = moment.unsqueeze(0)
        else:
            G = moment.new_zeros(place.slots, *moment.shape)
            G[place.slot] = moment
        empty = moment.new_zeros(())
        self._sums[layer.name] = LayerSums(empty, empty, G)


def _pair(layer: Layer, a: Tensor, g: Tensor, examples: int) -> tuple[Tensor, Tensor]:
    """(a, g) with dimension -3 counting examples: a weight gradient is squared only when all of an example is in it."""
    # What all examples look up has the gradient of all of them, at drawn labels: as in the universal form, what is
    # squared with it is on average the sum of the squares of each.
    if examples == 1 or (layer.kind.looks_up and g.shape[-3] != examples):
        return one_example(a), one_example(g)
    if g.shape[-3] != examples:
        raise CaptureError(
            f"layer '{layer.name}' has {g.shape[-3]} entries along its first dimension, the outputs have {examples} "
            f"examples along theirs: keep examples along dimension 0 of both, or use structure='kfac' for it, which "
            f"takes no gradient of one example."
        )
    return a, g


def _own_pair(layer: Layer, a: Tensor, g: Tensor, examples: int) -> tuple[Tensor, Tensor]:
    """The pair that the sums of a layer's own form are made of."""
    return _pair(layer, a, g, examples) if layer.kind.looks_up else grouped_pair(a, g, examples)


def grouped_pair(a: Tensor, g: Tensor, examples: int) -> tuple[Tensor, Tensor]:
    """(a, g) with the entries that belong to one example as its positions, as far as their number tells.

    Examples are along dimension 0, or along that of positions; or several entries in a row are one example's, as tokens
    flattened batch-first or windows are. Entries of any other number, those that all examples share among them, are
    the positions of one. Whatever is grouped, labels are drawn independently, so that no product between two examples
    stays in expectation.
    """
    entries, positions = g.shape[-3:-1]
    if examples == 1:
        return one_example(a), one_example(g)
    if entries == examples:
        return a, g
    if positions == examples:
        return a.transpose(-3, -2), g.transpose(-3, -2)
    if examples and entries % examples == 0:
        runs = (examples, entries // examples)
        return tuple(torch.unflatten(x, -3, runs).flatten(-3, -2) for x in (a, g))  # type: ignore[return-value]
    return one_example(a), one_example(g)


def _joined(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The uses of a layer as positions of one."""
    if len(pairs) == 1:
        return pairs[0]
    if len({g.shape[-3] for _, g in pairs}) > 1:
        pairs = [(one_example(a), one_example(g)) for a, g in pairs]
    a, g = zip(*pairs, strict=True)
    return joined(*a), joined(*g)
