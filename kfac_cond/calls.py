"""Calls of modules: where the gradients of what they returned arrive, and what these are for the parts of a module."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from .errors import CaptureError, ModelChangedError
from .guards import RandomState, random_state, repeated, unpacked_graph
from .layers import CompoundKind, kind_of
from .layers.layer import Layer
from .layers.replay import Replay
from .layers.shards import Cut, between_calls, gathered_for_calls, is_sharded, whole


class OwnTensors:
    """Tells the calls of layers on their own parameters from those on tensors that stand in for them.

    ``torch.func.functional_call`` puts others in their places for one call: those of another model, or computed ones.
    ``fully_shard`` puts its own there at each call, over whatever else there is.

    Args:
        model: whose layers they are.
        layers: as they were wrapped, by name.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Layer]) -> None:
        self._model, self._layers = model, layers
        self._own = {name: _identities(layer) for name, layer in layers.items()}
        self._parts = {name for name, layer in layers.items() if any(map(is_sharded, layer.held))}
        self._gathered = gathered_for_calls(model.modules())

    def at(self, layer: Layer) -> bool:
        """Whether this layer has its own parameters now."""
        return _identities(layer) == self._own[layer.name] or self.gathered(layer)

    def gathered(self, layer: Layer) -> bool:
        """Whether this layer has its parameters whole for its calls alone."""
        return all(module in self._gathered for module, _ in layer.places.values())

    def everywhere(self) -> bool:
        """Whether all layers have.

        Raises:
            ModelChangedError: one has other parameters, which may be there for good.
            CaptureError: one is whole for calls of a module that is not this one.
        """
        replaced = [layer for layer in self._layers.values() if not self.at(layer)]
        if replaced:
            self._gathered = gathered_for_calls(self._model.modules())
            replaced = [layer for layer in replaced if not self.at(layer)]
        for layer in replaced:
            if all(isinstance(one, nn.Parameter) for one in layer.held):
                layer.check_unchanged()
                if layer.name in self._parts and not any(map(is_sharded, layer.held)):
                    raise CaptureError(
                        f"layer '{layer.name}' is whole in a call, where it was a part on a mesh when it was wrapped: "
                        f"fully_shard holds it in a module around the {type(self._model).__name__} that was given to "
                        f"KFAC. Give it the module that fully_shard was called on."
                    )
                raise ModelChangedError(
                    f"layer '{layer.name}' has other parameters than when it was wrapped. Call kfac.refresh() after "
                    f"replacing parameters, as load_state_dict(assign=True) does; put a functional_call on the "
                    f"parameters of another model under kfac.paused()."
                )
        return not replaced


def _identities(layer: Layer) -> tuple[int, ...]:
    return tuple(map(id, layer.held))


class Leaves:
    """What the graph has in place of layers' parameters: these, or of sharded ones those that the last call had.

    Args:
        cuts: what modules compute on with parts of their weights.
    """

    def __init__(self, cuts: Sequence[Cut] = ()) -> None:
        self._cuts = cuts
        self._called: dict[str, Mapping[str, Tensor]] = {}

    def note(self, layer: Layer) -> None:
        """Keep what the layer has now, where that is what its module computes with; called while its module is."""
        now = layer.parameters
        if not self._resting(now.values()):
            self._called[layer.name] = now

    def of(self, layer: Layer) -> Mapping[str, Tensor]:
        """The leaves by the names of the parameters."""
        now = layer.parameters
        return self._called.get(layer.name, now) if self._resting(now.values()) else now

    def refuse_shards(self, layer: Layer) -> None:
        """Refuse a call of a layer with what ``fully_shard`` keeps between calls.

        Raises:
            CaptureError: it was called so.
        """
        if self._resting(layer.held):
            raise CaptureError(
                f"layer '{layer.name}' was called with the shards of its parameters that fully_shard keeps between "
                f"calls, or on another mesh than when it was wrapped: expected a layer that fully_shard has whole in "
                f"every call, or parts on the mesh of parallelize_module. Call the module that fully_shard was called "
                f"on, and kfac.refresh() after either; or exclude the layer with "
                f"rules={{'{layer.name}': dict(exclude=True)}}."
            )

    def _resting(self, held: Iterable[Tensor]) -> bool:
        return any(between_calls(one, self._cuts) for one in held)


class Arrival:
    """Where the gradient of a tensor arrives, and how to read it.

    A view's own edge is useless once the view is changed in place (a linear layer with bias returns a view of a
    two-dimensional product); its base's edge is not.

    Args:
        output: that has a gradient.
    """

    def __init__(self, output: Tensor) -> None:
        base = output._base
        self._shape, self._view = output.shape, None
        if base is None or not base.requires_grad or base.numel() != output.numel():
            self.edge = get_gradient_edge(output)
            return
        self.edge = get_gradient_edge(base)
        offset = output.storage_offset() - base.storage_offset()
        self._base, self._view = (base.shape, base.stride()), (output.shape, output.stride(), offset)

    def read(self, gradient: Tensor) -> Tensor:
        """The gradient of the tensor, from the one at the edge; whole, where that is a DTensor."""
        gradient = whole(gradient)
        if self._view is None:
            return gradient.reshape(self._shape)
        if gradient.stride() != self._base[1] or gradient.storage_offset():
            gradient = torch.empty_strided(*self._base, dtype=gradient.dtype, device=gradient.device).copy_(gradient)
        return gradient.as_strided(*self._view)


class Call:
    """One call of a module: where the gradients of what it returned arrive, and what they are for its parts.

    Args:
        outputs: what it returned; None, and what has no gradient, are passed over.
        given: what it was called with, tensors anywhere in it.
        nested: pairs (i, j) where the j-th output may lie on the way to the i-th.
        replay: of a module of several parts; None where the module is its only part, with one output.
    """

    def __init__(
        self,
        outputs: Sequence[Tensor | None],
        given: Any,
        replay: Replay | None = None,
        nested: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._nested = nested
        self._arrivals = [Arrival(one) if one is not None and one.requires_grad else None for one in outputs]
        self._replay = replay
        #: The operations that gave what it was called with: those of the call itself come after.
        self.begins = frozenset(one.grad_fn for one in tree_leaves(given) if isinstance(one, Tensor) and one.grad_fn)

    @property
    def edges(self) -> list[GradientEdge]:
        """Those of the outputs that have a gradient."""
        return [one.edge for one in self._arrivals if one is not None]

    @property
    def of_one_part(self) -> bool:
        """Whether its only gradient is that of the module's only part."""
        return self._replay is None and len(self.edges) == 1

    def output_gradients(self, found: Iterator[Tensor | None]) -> Mapping[str, Tensor]:
        """The gradients of its parts' outputs, by part, of those reached; one is taken from ``found`` for each edge."""
        at_edges = [None if one is None else next(found) for one in self._arrivals]
        for outer, inner in self._nested:
            if inner < len(at_edges):
                at_edges[inner] = self._without(at_edges, outer, inner)
        pairs = zip(self._arrivals, at_edges, strict=True)
        gradients = [None if one is None or g is None else one.read(g) for one, g in pairs]
        if self._replay is not None:
            return self._replay.output_gradients(gradients)
        (gradient,) = gradients
        return {} if gradient is None else {"": gradient}

    def _without(self, at_edges: Sequence[Tensor | None], whole: int, inner: int) -> Tensor | None:
        """What came to the inner output by itself, without what came to it from the whole."""
        outer, mine = self._arrivals[whole], self._arrivals[inner]
        g, total = at_edges[whole], at_edges[inner]
        if outer is None or mine is None or g is None or total is None:
            return total
        (through,) = torch.autograd.grad([outer.edge], [mine.edge], [g], retain_graph=True, allow_unused=True)
        return total if through is None else total - through


def ends_of(outputs: Any) -> list[GradientEdge]:
    """Where the gradients of a model's outputs arrive, of those that have a graph behind them."""
    tensors = (one for one in tree_leaves(outputs) if isinstance(one, Tensor))
    return [Arrival(one).edge for one in tensors if one.grad_fn is not None]


def dense_gradient(layer: Layer, gradient: Tensor) -> Tensor:
    """The gradient of a parameter in the universal form, whole, and seen to be one that can be squared."""
    gradient = whole(gradient)
    if gradient.layout is not torch.strided:
        raise CaptureError(
            f"the gradient of '{layer.name}' has layout {gradient.layout}: expected a dense tensor. Exclude the "
            f"parameter with rules={{'{layer.name}': dict(exclude=True)}}."
        )
    return gradient


#: Steps by which a tensor is still all of what it was before.
_RESHAPED = ("View", "UnsafeView", "Reshape", "ToCopy", "Transpose", "Permute", "T", "Unsqueeze", "Squeeze", "Alias")


def refuse_part(outputs: Tensor) -> None:
    """Refuse outputs that are this rank's part of a DTensor, taken out of it by ``to_local``, as far as that is seen.

    Raises:
        CaptureError: they are.
    """
    node = outputs.grad_fn
    while node is not None and node.name().rstrip("0123456789") in {f"{name}Backward" for name in _RESHAPED}:
        node = node.next_functions[0][0]
    placements = getattr(getattr(node, "dtensor_spec", None), "placements", ())
    if not all(one.is_replicate() for one in placements):
        raise CaptureError(
            f"the outputs of shape {tuple(outputs.shape)} are this rank's part of a DTensor with placements "
            f"{tuple(placements)}: expected all of what parametrises p, on every rank. Give the last layer "
            f"ColwiseParallel(output_layouts=Replicate()), or keep the DTensor with use_local_output=False, which is "
            f"brought together at captures."
        )


class Replays:
    """Runs calls of modules of several parts again, with the random numbers that the call itself drew."""

    def __init__(self) -> None:
        self._states: dict[nn.Module, RandomState] = {}

    def before(self, module: nn.Module) -> None:
        """Note the random state that a call starts from."""
        kind = kind_of(module)
        if isinstance(kind, CompoundKind) and kind.draws_numbers(module):
            self._states[module] = random_state(next(module.parameters()).device)

    def after(
        self,
        module: nn.Module,
        parts: Container[str],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
        *,
        gathered: bool = False,
    ) -> tuple[Call, Replay] | None:
        """The call, run again once it is over; None where nothing that it returned has a gradient.

        Args:
            module: what was called.
            parts: the parts of it that are layers.
            args, kwargs, output: of the call.
            gathered: whether its parameters are whole for the call alone.
        """
        kind, state = kind_of(module), self._states.pop(module, None)
        assert isinstance(kind, CompoundKind)
        outputs = kind.outputs(output)
        if not any(one is not None and one.requires_grad for one in outputs):
            return None
        replay = Replay(module, parts)
        freed = [p.detach() for p in module.parameters()] if gathered else []
        with repeated(state), unpacked_graph(freed):
            replay.outputs = kind.replay(replay, module, *args, **kwargs)
        return Call(outputs, (args, kwargs), replay, kind.nested), replay
