"""What DistributedDataParallel is doing at the moment, where a model is wrapped in it."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def synchronises(model: nn.Module) -> bool:
    """Whether a forward now is one whose gradients DDP brings together, and so the last of its step.

    Every rank has as many of these, since DDP's own collectives are among them; of other models, and within
    ``no_sync``, that is not known.
    """
    return isinstance(model, DistributedDataParallel) and bool(model.require_backward_grad_sync)


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
