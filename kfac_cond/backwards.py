"""The sampled backward: one score sent through the user's graph, to the outputs of layers and to parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from .calls import Call, Leaves, dense_gradient
from .errors import CaptureError
from .forwards import Entry, Use, Wanted
from .guards import kept_running_statistics, without_autocast
from .heads import Sent
from .layers.layer import Layer
from .layers.shards import nothing_reduced
from .layers.sharing import one_example
from .streams import Take, streamed
from .summing import Summing

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

    def send(
        self,
        sent: Sent,
        uses: Sequence[tuple[int, Entry, Use]],
        ends: Sequence[tuple[int, GradientEdge]],
        summing: Summing,
        examples: int,
    ) -> set[int]:
        """Send one score back, and add what arrives at layers and parameters up.

        What arrives at a module of one part is added up on the way, and let go: of all layers together it would be a
        copy of all that the forward left.

        Args:
            sent: the score.
            uses: the calls of layers, each with the number of its forward.
            ends: where the gradients of forwards' outputs arrive.
            summing: where it is added.
            examples: N.

        Returns:
            The numbers of the forwards that it got to.
        """
        of_call: dict[Call, list[tuple[int, Entry, Use]]] = {}
        for index, entry, use in uses:
            of_call.setdefault(use.call, []).append((index, entry, use))
        reached: set[int] = set()

        def take(call: Call, found: Iterator[Tensor | None]) -> None:
            gradients = call.output_gradients(found)
            for index, entry, use in of_call[call]:
                g = gradients.get(entry.layer.part.name)
                if g is not None:
                    reached.add(index)
                    summing.add(entry, *self._in_form(sent, entry, use, g, examples))

        # A backward within a backward would be needed where each example's own is asked for.
        passing = [call for call in of_call if call.of_one_part and not self._by_example]
        waiting = [call for call in of_call if call not in passing]
        edges = [*(edge for call in waiting for edge in call.edges), *(edge for _, edge in ends)]
        takes = [(call.edges[0], lambda g, call=call: take(call, iter([g]))) for call in passing]
        found, of_parameters = self._arrived(sent, edges, takes)
        at_edges = iter(found)
        with torch.no_grad():
            for call in waiting:
                take(call, at_edges)
            reached |= {index for (index, _), g in zip(ends, at_edges, strict=True) if g is not None}
            if reached:
                # Another model's outputs may depend on a parameter of ours too.
                summing.finish(of_parameters)
        return reached

    @property
    def _by_example(self) -> bool:
        return self.wanted is not None and self.wanted.by_example

    def _arrived(
        self, sent: Sent, edges: Sequence[GradientEdge], takes: Sequence[tuple[GradientEdge, Take]]
    ) -> tuple[Sequence[Tensor | None], list[tuple[Layer, Tensor]]]:
        """The gradients of one score at edges, and [n, *shape] of each parameter in the universal form that it reaches.

        Leaves give their gradient to the call alone: ``.grad`` and the hooks of accumulation see nothing of it.

        Args:
            sent: the score.
            edges: those whose gradients are given back.
            takes: others, with what their gradients are handed to on the way.
        """
        for layer in self.universal:
            layer.check_unchanged()
        parameters = [next(iter(self.leaves.of(layer).values())) for layer in self.universal]
        if not self._by_example:
            found = self.gradients(sent.outputs, [*edges, *parameters], sent.score, takes)
            pairs = zip(self.universal, found[len(edges) :], strict=True)
            return found[: len(edges)], [(layer, dense_gradient(layer, g)[None]) for layer, g in pairs if g is not None]
        found = self.gradients(sent.outputs, edges, sent.score)
        of_each: dict[str, list[Tensor]] = {}
        for score in sent.one_by_one() if parameters else ():
            for layer, g in zip(self.universal, self.gradients(sent.outputs, parameters, score), strict=True):
                if g is not None:
                    of_each.setdefault(layer.name, []).append(dense_gradient(layer, g))
        return found, [(layer, torch.stack(of_each[layer.name])) for layer in self.universal if layer.name in of_each]

    def _in_form(self, sent: Sent, entry: Entry, use: Use, gradient: Tensor, examples: int) -> tuple[Use, Tensor]:
        """A use with its g."""
        whole = use.gradients(entry.layer, gradient, self.wanted)
        if not self._by_example or whole.shape[-3] == examples:
            return use, whole
        return use.of_each(examples), self._of_each(sent, entry, use, whole)

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
        self,
        outputs: Tensor,
        edges: Sequence[GradientEdge] | Sequence[GradientEdge | Tensor],
        score: Tensor,
        takes: Sequence[tuple[GradientEdge, Take]] = (),
    ) -> Sequence[Tensor | None]:
        """One backward from a score to edges and leaves. Autocast would reach into it, hence off.

        Args:
            outputs: where it starts.
            edges: whose gradients are given back, None where none arrives; and leaves.
            score: at the outputs.
            takes: other edges, with what their gradients are handed to on the way.
        """
        found: list[Tensor | None] = []

        def send(last: list[GradientEdge]) -> Sequence[Tensor | None]:
            # Edges and leaves may come mixed, which the annotation does not know.
            inputs = cast("Sequence[GradientEdge]", [*edges, *last])
            if not inputs:
                return ()
            arrived = torch.autograd.grad(outputs, inputs, score, retain_graph=True, allow_unused=True)
            found.extend(arrived[: len(edges)])
            return arrived[len(edges) :]

        with without_autocast(outputs.device), kept_running_statistics(self.model), nothing_reduced(self.model):
            try:
                with torch.no_grad():
                    streamed(outputs, takes, send)
            except RuntimeError as error:
                if known := next((words for key, words in _REFUSALS.items() if key in str(error)), None):
                    raise CaptureError(known) from error
                raise
        return found
