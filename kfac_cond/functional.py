"""Which parameters a forward uses otherwise than by calls of their modules, read from the graph it left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping

from torch import Tensor
from torch.autograd.graph import Node

from .calls import Call
from .layers.layer import Layer

#: What one operation may share with the next: autocast casts a leaf once, and a backward that is itself a part of a
#: forward takes the weight as the layer had it, transposed.
_STAND_INS = frozenset(f"{name}Backward" for name in ("ToCopy", "T", "Transpose", "Permute", "View", "Split"))


def used_functionally(
    layers: Mapping[str, Layer],
    calls: Iterable[tuple[str, Call]],
    outputs: Iterable[Tensor],
    leaves: Callable[[Layer], Mapping[str, Tensor]] = lambda layer: layer.parameters,
) -> set[str]:
    """The layers whose weight or bias reaches the outputs otherwise than by calls of their modules.

    ``F.linear(x, module.weight)`` gives no call to listen to; beside calls of the module, what is captured at these
    would be a part of the gradient alone.

    Args:
        layers: by name.
        calls: the calls of their modules that are known, with the layer's name; of this and of other forwards.
        outputs: of the forward, with its graph.
        leaves: what the graph has in place of a layer's parameters.
    """
    graph = _walked(one.grad_fn for one in outputs)
    inside: dict[str, Counter[int]] = {}
    of_call: dict[Call, Counter[int]] = {}
    for name, call in calls:
        if call not in of_call:
            own = _walked((edge.node for edge in call.edges), until=call.begins)
            of_call[call] = _takings(own & graph)
        inside.setdefault(name, Counter()).update(of_call[call])
    whole = _takings(graph)
    return {
        name
        for name, layer in layers.items()
        if layer.modules
        and any(whole[id(one)] > inside.get(name, Counter())[id(one)] for one in leaves(layer).values())
    }


def _walked(starts: Iterable[Node | None], until: Collection[Node] = ()) -> set[Node]:
    """The operations of a graph from some of them on, without those it is walked until."""
    stack = [node for node in starts if node is not None and node not in until]
    seen = set(stack)
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None and node not in seen and node not in until:
                seen.add(node)
                stack.append(node)
    return seen


def _takings(nodes: Iterable[Node]) -> Counter[int]:
    """By the identity of a leaf how often these operations take it in."""
    taken: Counter[int] = Counter()
    for node in nodes:
        if _leaf(node) is None:
            taken.update(id(leaf) for one, _ in node.next_functions if (leaf := _leaf(one)) is not None)
    return taken


def _leaf(node: Node | None) -> Tensor | None:
    """The leaf that a node stands for: its own, or that which it is a cast or a view of."""
    while node is not None and node.name().rstrip("0123456789") in _STAND_INS:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)
