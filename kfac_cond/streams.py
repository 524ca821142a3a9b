"""Gradients of one backward handed on one by one as they arrive, so that none is held until all have."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Take = Callable[[Tensor], None]
"""What a gradient is handed to."""


def streamed(
    outputs: Tensor,
    takes: Sequence[tuple[GradientEdge, Take]],
    send: Callable[[list[GradientEdge]], Sequence[Tensor | None]],
) -> None:
    """Run a backward that hands on the gradients at edges in the order of the graph.

    ``torch.autograd.grad`` holds the gradients at all edges that it is given until it returns. It is given the last
    ones alone, those that no other lies behind; the others are passed on the way there.

    Args:
        outputs: where it starts.
        takes: the edges, each with what its gradient is handed to; one that is not reached is passed over.
        send: runs it to some edges, and gives their gradients.
    """
    last = _last(get_gradient_edge(outputs).node, {edge.node for edge, _ in takes}) if takes else set()
    passed: set[int] = set()

    def noted(index: int, gradient: Tensor | None) -> None:
        passed.add(index)
        if gradient is not None:
            takes[index][1](gradient)

    def hook(index: int, number: int) -> Callable[[tuple[Tensor | None, ...]], None]:
        return lambda gradients: noted(index, gradients[number])

    handles = [edge.node.register_prehook(hook(index, edge.output_nr)) for index, (edge, _) in enumerate(takes)]
    try:
        ends = [index for index, (edge, _) in enumerate(takes) if edge.node in last]
        found = send([takes[index][0] for index in ends])
    finally:
        for handle in handles:
            handle.remove()
    for index, gradient in zip(ends, found, strict=False):
        # What other edges lie behind was passed as well.
        if index not in passed:
            noted(index, gradient)


def _last(root: Node, nodes: Collection[Node]) -> set[Node]:
    """Those of some operations that no other of them lies behind, as seen from the root."""
    leads: dict[Node, bool] = {}
    last: set[Node] = set()
    stack = [(root, False)]
    while stack:
        node, behind = stack.pop()
        if node in leads and not behind:
            continue
        following = [one for one, _ in node.next_functions if one is not None]
        if not behind:
            leads[node] = False
            stack.append((node, True))
            stack += [(one, False) for one in following if one not in leads]
            continue
        leads[node] = any(one in nodes or leads[one] for one in following)
        if node in nodes and not leads[node]:
            last.add(node)
    return last
