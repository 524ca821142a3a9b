"""The sampled backward: one score sent through the user's graph, to the outputs of layers and to parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from .calls import Leaves, dense_gradient
from .errors import CaptureError
from .forwards import Entry, Use, Wanted
from .guards import kept_running_statistics, without_autocast
from .heads import Sent
from .layers.layer import Layer
from .layers.shards import nothing_reduced
from .layers.sharing import one_example

#: What autograd refuses, by words of its message, and what that means here.
_REFUSALS = {
    "second time": (
        "the graph of these outputs was freed by a backward already: call kfac.update(outputs) before loss.backward()."
    ),
    "use_reentrant": (
        "the model uses reentrant activation checkpointing, through which no scores can be sent back: checkpoint with "
        "use_reentrant=False."
    ),
}


class Backwards:
    """Sends scores back by ``torch.autograd.grad``, so that no weight gradient is computed that is not asked for.

    Args:
        model: whose graph it is.
        universal: the layers that are known by the gradient of their parameter.
        wanted: what is asked for where it is not A and G of every layer.
        leaves: what the graph has in place of the layers' parameters.
    """

    def __init__(self, model: nn.Module, universal: Sequence[Layer], wanted: Wanted | None, leaves: Leaves) -> None:
        self.model, self.universal, self.wanted, self.leaves = model, universal, wanted, leaves

    def arrived(
        self, sent: Sent, edges: Sequence[GradientEdge]
    ) -> tuple[Sequence[Tensor | None], list[tuple[Layer, Tensor]]]:
        """The gradients of one score at edges, and [n, *shape] of each parameter in the universal form that it reaches.

        Leaves give their gradient to the call alone: ``.grad`` and the hooks of accumulation see nothing of it.
        """
        for layer in self.universal:
            layer.check_unchanged()
        parameters = [next(iter(self.leaves.of(layer).values())) for layer in self.universal]
        if not parameters:
            return self.gradients(sent.outputs, edges, sent.score), []
        if self.wanted is None or not self.wanted.by_example:
            found = self.gradients(sent.outputs, [*edges, *parameters], sent.score)
            pairs = zip(self.universal, found[len(edges) :], strict=True)
            return found[: len(edges)], [(layer, dense_gradient(layer, g)[None]) for layer, g in pairs if g is not None]
        found = self.gradients(sent.outputs, edges, sent.score)
        of_each: dict[str, list[Tensor]] = {}
        for score in sent.one_by_one():
            for layer, g in zip(self.universal, self.gradients(sent.outputs, parameters, score), strict=True):
                if g is not None:
                    of_each.setdefault(layer.name, []).append(dense_gradient(layer, g))
        return found, [(layer, torch.stack(of_each[layer.name])) for layer in self.universal if layer.name in of_each]

    def in_form(
        self, sent: Sent, reached: Iterable[tuple[int, tuple[Entry, Use, Tensor]]], examples: int
    ) -> Iterator[tuple[Entry, Use, Tensor]]:
        """Uses with their g, one at a time: those of all layers together would be a copy of all gradients."""
        for _, (entry, use, gradient) in reached:
            whole = use.gradients(entry.layer, gradient, self.wanted)
            if self.wanted is None or not self.wanted.by_example or whole.shape[-3] == examples:
                yield entry, use, whole
            else:
                yield entry, use.of_each(examples), self._of_each(sent, entry, use, whole)

    def _of_each(self, sent: Sent, entry: Entry, use: Use, whole: Tensor) -> Tensor:
        """The g of a use whose inputs are not told apart by example, as of one of each with its own score alone."""
        each = []
        for score in sent.one_by_one():
            found = self.gradients(sent.outputs, use.call.edges, score)
            g = use.call.output_gradients(iter(found)).get(entry.layer.part.name)
            own = torch.zeros_like(whole) if g is None else use.gradients(entry.layer, g, self.wanted)
            each.append(one_example(own))
        return torch.cat(each, dim=-3)

    def gradients(
        self, outputs: Tensor, edges: Sequence[GradientEdge] | Sequence[GradientEdge | Tensor], score: Tensor
    ) -> Sequence[Tensor | None]:
        """One backward from a score to edges and leaves. Autocast would reach into it, hence off."""
        with without_autocast(outputs.device), kept_running_statistics(self.model), nothing_reduced(self.model):
            try:
                # Edges and leaves may come mixed, which the annotation does not know.
                inputs = cast("Sequence[GradientEdge]", edges)
                return torch.autograd.grad(outputs, inputs, score, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                if known := next((words for key, words in _REFUSALS.items() if key in str(error)), None):
                    raise CaptureError(known) from error
                raise
