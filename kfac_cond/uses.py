"""What one forward of a model uses: how often each layer is called, and on how many rows."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from .calls import Call
from .costs import moment_flops
from .data import call_model
from .errors import CaptureError
from .functional import used_functionally
from .guards import undisturbed
from .layers import CompoundKind, kind_of
from .layers.layer import Layer, layers_by_module
from .layers.replay import Replay
from .statistics import statistic_dtype


@dataclass
class Used:
    """A layer in one forward.

    Args:
        calls: of its modules.
        rows: that these add to A and to G: examples times positions, or examples for 'reduce'.
        examples: of the batch, in the largest call.
        saved: operations of the outer products of these rows that are not done for A.
        refused: why it could not be captured; empty where it could.
    """

    calls: int = 0
    rows: int = 0
    examples: int = 0
    saved: int = 0
    refused: str = ""

    def add(self, layer: Layer, shape: torch.Size, of_inputs: int | None) -> None:
        """Count one call on activations, or gradients, of shape [..., batch, positions, features].

        Args:
            layer: the layer.
            shape: of either.
            of_inputs: operations of summing the outer products of the inputs, where not row by row.
        """
        *_, batch, positions, _ = shape
        self.examples = max(self.examples, batch)
        if of_inputs is not None and layer.sums_every_position:
            of_A, _ = layer.kind.sum_shapes(layer.layout, layer.max_factor_dim)
            self.saved += moment_flops(layer, batch * positions, of_A) - of_inputs
        # For 'reduce' all calls are pooled before anything is multiplied.
        self.rows = self.rows + batch * positions if layer.sharing == "expand" else max(self.rows, batch)


def uses_in_forward(
    model: nn.Module, layers: Mapping[str, Layer], batch: Any
) -> tuple[dict[str, Used], frozenset[str]]:
    """Run ``model`` on ``batch`` once and count what each layer with modules is used for.

    Args:
        model: the module; its buffers and the random state are the same afterwards.
        layers: its layers by name.
        batch: what a loader yields.

    Returns:
        The uses by name, and the layers whose weight is used otherwise than by calls of their modules.
    """
    calls: list[tuple[str, Call]] = []
    used = {name: Used() for name, layer in layers.items() if layer.modules}

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        parts = by_module[module]
        try:
            with torch.no_grad():
                shapes = _shapes(module, parts, args, kwargs, output)
                flops = _moment_flops(module, args, kwargs, output)
        except CaptureError as error:
            shapes, flops = {}, None
            for layer in parts.values():
                used[layer.name].refused = str(error)
        outputs = [one for one in tree_leaves(output) if isinstance(one, Tensor)]
        call = Call(outputs, (args, kwargs))
        for part, layer in parts.items():
            calls.append((layer.name, call))
            used[layer.name].calls += 1
            if part in shapes:
                used[layer.name].add(layer, shapes[part], flops)

    by_module = layers_by_module(layers)
    with ExitStack() as stack:
        for module in by_module:
            # In front of the hooks of others, which may put something else in the place of the output.
            handle = module.register_forward_hook(called, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        outputs = [one for one in tree_leaves(_forward(model, batch)) if isinstance(one, Tensor)]
    return used, frozenset(used_functionally(layers, calls, outputs))


def _forward(model: nn.Module, batch: Any) -> Any:
    """The outputs of one forward as in training, with gradients enabled and compiled parts run eagerly."""
    # DDP's own forward synchronises buffers over ranks, which need not all be here.
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    with undisturbed(model), torch.enable_grad():
        outputs, _ = call_model(plain, batch)
    return outputs


def _shapes(
    module: nn.Module, parts: Mapping[str, Layer], args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> dict[str, torch.Size]:
    """[..., batch, positions, features] of what one call gives to each part; of nothing that cannot be captured."""
    kind = kind_of(module)
    if isinstance(kind, CompoundKind):
        replay = Replay(module, parts)
        kind.replay(replay, module, *args, **kwargs)
        return {part: replay.inputs(part, None)[0].shape for part in parts}
    if kind is None or not isinstance(output, Tensor):
        return {}
    # On the meta device, where rearranging copies nothing; of a DTensor all of it.
    return {"": kind.output_gradients(module, torch.empty(output.shape, dtype=output.dtype, device="meta")).shape}


def _moment_flops(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> int | None:
    """Operations of summing the outer products of what one call gives, where not row by row."""
    kind = kind_of(module)
    if kind is None or not isinstance(output, Tensor):
        return None
    return kind.moment_flops(module, args, kwargs, statistic_dtype(output.dtype))
