"""Which parameters a forward uses otherwise than by calls of their modules, read from the graph it left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.autograd.graph import Node

from .calls import Call
from .layers.layer import Layer


def used_functionally(
    layers: Mapping[str, Layer], calls: Iterable[tuple[str, Call]], outputs: Iterable[Tensor]
) -> set[str]:
    """The layers whose weight or bias reaches the outputs otherwise than by calls of their modules.

    ``F.linear(x, module.weight)`` gives no call to listen to; beside calls of the module, what is captured at these
    would be a part of the gradient alone.

    Args:
        layers: by name.
        calls: the calls of their modules that are known, with the layer's name; of this and of other forwards.
        outputs: of the forward, with its graph.
    """
    edges, nodes = _walked(outputs)
    called = Counter(name for name, call in calls if any(edge.node in nodes for edge in call.edges))
    found = set()
    for name, layer in layers.items():
        each = layer.kind.edges if called[name] else 0
        if layer.modules and each is not None:
            used = max((edges[id(parameter)] for parameter in layer.parameters.values()), default=0)
            if used > called[name] * each:
                found.add(name)
    return found


def _walked(outputs: Iterable[Tensor]) -> tuple[Counter[int], set[Node]]:
    """By the identity of a leaf how many operations of a graph take it in; and these operations."""
    edges: Counter[int] = Counter()
    stack = [one.grad_fn for one in outputs if one.grad_fn is not None]
    seen = set(stack)
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                edges[id(leaf)] += 1
            elif node not in seen:
                seen.add(node)
                stack.append(node)
    return edges, seen
