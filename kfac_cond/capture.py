"""Hooks on an unchanged module, and the sampled backward: a at each layer in the forward, g from scores sent back.

The scores go back through the user's own graph by ``torch.autograd.grad`` to the layers' outputs only, so that weight
gradients are not computed and nothing the user sees changes. A is formed in the forward: no activation is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .backwards import Backwards
from .calls import Call, Leaves, OwnTensors, Replays, ends_of, refuse_part
from .errors import CaptureError
from .forwards import Forward, Run, Use, Wanted, add_inputs, dtype_of, in_form
from .functional import used_functionally
from .guards import EagerForwards, without_autocast
from .heads import Sent
from .hooks import Hook, Owner, hidden, in_custom_function, leaves_graph
from .layers import CompoundKind, kind_of
from .layers.layer import Layer, layers_by_module
from .layers.shards import brought_together, cuts_of, gathering
from .layers.sharing import both, kept
from .statistics import LayerSums
from .summing import Place, Summing

logger = logging.getLogger("kfac_cond")

#: Forwards that may wait for their loss, and forwards heard that are remembered. Beyond it the oldest are let go: each
#: holds its graph, and a validation loop with gradients enabled must not fill the memory.
MAX_WAITING = 8
MAX_SPENT = 4

Positions = Callable[[tuple[Any, ...], dict[str, Any]], Tensor | None]
Heard = Callable[[tuple[Any, ...], dict[str, Any], Any], None]


class Capture:
    """Listens to the layers of a model and sends scores back to them.

    Args:
        model: the module whose calls delimit forwards.
        layers: the layers to listen to, by name.
        due: whether this moment's forward is to be captured; asked at every call of a layer, so it must be cheap.
        owner: whose hooks these are.
        positions: of (args, kwargs) of the model's call: a bool mask (B, T) of real positions, or None.
        heard: called with (args, kwargs, outputs) after each captured call of the model.
        wanted: what is asked for where it is not A and G of every layer.
        run: what the training run gives that they are part of.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        *,
        due: Callable[[], bool],
        owner: Owner | None,
        positions: Positions | None = None,
        heard: Heard | None = None,
        wanted: Wanted | None = None,
        run: Run | None = None,
    ) -> None:
        self.model = model
        self.layers = layers
        self.waiting: list[Forward] = []
        self.spent: list[Forward] = []
        self.fired: set[str] = set()
        #: Whether a mask of real positions was found, and whether a layer took it.
        self.masks = (False, False)
        self._warned = False
        self._due = due
        self._owner = owner
        self._positions = positions
        self._heard = heard
        self._wanted = wanted
        self._run = run or Run()
        self._handles: list[RemovableHandle] = []
        self._replays = Replays()
        self._eager = EagerForwards(model)
        #: The layers that are known by the gradient of their parameter.
        self._universal = [layer for layer in layers.values() if not layer.modules]
        self._leaves = Leaves(cuts_of(model))
        self._backwards = Backwards(model, self._universal, wanted, self._leaves)
        self._own = OwnTensors(model, layers)
        #: Of the model's call under way: whether it is captured, and whether it is on tensors that are not its own.
        self._recording = self._foreign = False

    def install(self) -> None:
        """Put the hooks on; a layer's is the first of its hooks, to see the output as the layer made it."""

        def hook(call: Callable[..., Any]) -> Hook:
            return Hook(call, self._owner)

        root = self.model
        self._handles = [root.register_forward_pre_hook(hook(self._begin), with_kwargs=True)]
        for module in gathering(root.modules()):
            # Between its own hooks and its children's calls: what it holds is whole, whoever takes it.
            inner = set(module.modules())
            held = [one for one in self.layers.values() if any(at in inner for at, _ in one.places.values())]
            self._handles.append(module.register_forward_pre_hook(hook(partial(self._gathered, held))))
        for module, parts in layers_by_module(self.layers).items():
            listen = self._layer
            if isinstance(kind_of(module), CompoundKind):
                listen = self._compound
                self._handles.append(module.register_forward_pre_hook(hook(self._before)))
            after = hook(partial(listen, parts))
            self._handles.append(module.register_forward_hook(after, with_kwargs=True, prepend=True))
        for layer in self._universal:
            for module, _ in layer.places.values():
                self._handles.append(module.register_forward_pre_hook(hook(partial(self._called, layer))))
        if self._heard is not None:
            self._handles.append(root.register_forward_hook(hook(self._end), with_kwargs=True))
        self._handles.append(root.register_forward_hook(hook(self._close), always_call=True))

    def remove(self) -> None:
        """Take the hooks off; nothing of them remains on the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.forget()

    def forget(self) -> None:
        """Let go of all forwards; called once their step is over."""
        self.waiting.clear()
        self.spent.clear()

    def listening(self) -> bool:
        """Whether a forward at this moment is captured: due, with an ordinary graph, on the model's own parameters."""
        return leaves_graph() and not self._foreign and self._due()

    def _hears(self, layer: Layer) -> bool:
        """Whether a call of this layer at this moment is captured."""
        self._called(layer)
        if not (self.listening() and self._own.at(layer)):
            return False
        self._leaves.refuse_shards(layer)
        return True

    def _called(self, layer: Layer, *_: object) -> None:
        """Note a call of a module that holds a parameter of the layer; refuse it where the graph leads past it."""
        self._leaves.note(layer)
        if self._recording and in_custom_function():
            raise hidden(layer.name)

    def _gathered(self, layers: Iterable[Layer], *_: object) -> None:
        """Note what the graph will have of layers whose module may not be called itself."""
        if self._recording:
            for layer in layers:
                self._leaves.note(layer)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._foreign = False
        self._foreign = self.listening() and not self._own.everywhere()
        self._recording = self.listening()
        if self._recording:
            self._eager.enter()
            del self.spent[:-MAX_SPENT]
            self._open(None if self._positions is None else brought_together(self._positions(args, kwargs)))

    def _close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the model's call, and after an exception in it too."""
        self._eager.leave()
        for forward in self.waiting[-1:]:
            forward.last = None
        self._recording = self._foreign = False

    def _open(self, positions: Tensor | None) -> Forward:
        self.waiting = [forward for forward in self.waiting if forward.entries or forward.ends]
        if len(self.waiting) >= MAX_WAITING:
            self.waiting.pop(0)
            self._warn()
        self.waiting.append(Forward(positions))
        return self.waiting[-1]

    def _warn(self) -> None:
        if not self._warned:
            logger.warning(
                "more than %d forwards of %s with gradients enabled wait for their loss; the oldest are let go. "
                "Evaluate under torch.no_grad() or kfac.paused(); where one loss joins more forwards, give the model "
                "larger batches.",
                MAX_WAITING,
                type(self.model).__name__,
            )
        self._warned = True

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        if self._heard is not None and self.listening():
            if self._universal and self.waiting:
                self.waiting[-1].ends = ends_of(outputs)
            self._heard(args, kwargs, outputs)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.listening():
            self._replays.before(module)

    def _compound(
        self, parts: dict[str, Layer], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Run a module of several parts again, and note what each of them was given."""
        if not all(self._hears(layer) for layer in parts.values()):
            return
        for layer in parts.values():
            layer.check_unchanged()
        gathered = any(map(self._own.gathered, parts.values()))
        found = self._replays.after(module, parts, args, kwargs, output, gathered=gathered)
        if found is None:
            return
        call, replay = found
        forward = self.waiting[-1] if self.waiting else self._open(None)
        for name, layer in parts.items():
            self.fired.add(layer.name)
            with torch.no_grad():
                given, keep = replay.inputs(name, forward.positions)
                with without_autocast(given.device):
                    a = given.to(dtype_of(given, self._wanted))
                    self._note(forward, layer, Use(call, module, keep), partial(_itself, a))

    def _note(
        self, forward: Forward, layer: Layer, use: Use, make: Callable[[], Tensor], given: Tensor | None = None
    ) -> None:
        self.masks = (self.masks[0] or forward.positions is not None, self.masks[1] or use.keep is not None)
        if layer.fraction < 1:
            use.rows = self._run.rows(layer, make())
        forward.add(layer, use, make, self._wanted, given)

    def _layer(
        self, parts: dict[str, Layer], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        layer = parts[""]
        if not self._hears(layer) or (isinstance(output, Tensor) and not output.requires_grad):
            return
        layer.check_unchanged()
        self.fired.add(layer.name)
        forward = self.waiting[-1] if self.waiting else self._open(None)
        make = partial(self._activations, layer, module, args, kwargs, output)
        with torch.no_grad(), without_autocast(layer.device):
            if layer.gradient_sums is None:
                make = partial(_itself, make())
            use = Use(Call([output], (args, kwargs)), module, None, numbers=output.numel())
            if forward.positions is not None or layer.kind.looks_up:
                a = make()
                use.keep = both(kept(forward.positions, *a.shape[-3:-1]), layer.kind.present(module, a))
                use.batch = a.shape[-3]
            given = next(iter((*args, *kwargs.values())), None) if layer.kind.of_input_alone else None
            # Changes of an inference tensor are not counted.
            given = None if isinstance(given, Tensor) and given.is_inference() else given
            self._note(forward, layer, use, make, given)

    def _activations(
        self, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor:
        """What a call gave its layer."""
        if isinstance(output, Tensor):
            args, kwargs = brought_together((args, kwargs))
            a = layer.kind.of_call(module, args, kwargs, dtype_of(output, self._wanted))
            if a is not None:
                return in_form(layer, "activations", a, layer.layout.columns)
        given = [type(one).__name__ for one in (*args, *kwargs.values())]
        raise CaptureError(
            f"layer '{layer.name}' ({layer.kind.name}) was called with {given} and returned {type(output).__name__}: "
            f"not what a layer of its kind takes and gives. Exclude it with "
            f"rules={{'{layer.name}': dict(exclude=True)}}."
        )

    def send_back(
        self,
        scores: Iterable[Sent],
        *,
        slots: int,
        examples: int,
        again: bool = False,
        replaceable: bool = False,
    ) -> dict[str, LayerSums] | None:
        """Send scores back from outputs to the layers of the forwards they were computed by.

        Args:
            scores: one by one, each with the outputs that it is the gradient of -log p with respect to.
            slots: how many slots there are.
            examples: N, along dimension 0 of the outputs; 'reduce' needs it.
            again: use the replaceable forwards that were sent back to before.
            replaceable: whether those reached may be sent back to again.

        Returns:
            The sums of the layers reached, by name; None where the outputs do not come from any forward held.

        Raises:
            CaptureError: the graph was freed already, or a layer's examples do not match.
        """
        forwards = [forward for forward in self.spent if forward.replaceable] if again else self.waiting
        uses = [
            (index, entry, use)
            for index, forward in enumerate(forwards)
            for entry in forward.entries.values()
            for use in entry.uses
        ]
        ends = [(index, edge) for index, forward in enumerate(forwards) for edge in forward.ends]
        if not (uses or ends):
            return None
        found: dict[str, LayerSums] = {}
        touched: set[int] = set()
        for sent in scores:
            if not sent.outputs.requires_grad:
                continue
            place = Place(sent.weight, sent.slot, slots)
            summing = Summing(found, place, examples, wanted=self._wanted, bases=self._run.bases())
            now = self._backwards.send(sent, uses, ends, summing, examples)
            if now:
                refuse_part(sent.outputs)
            touched |= now
        if not touched:
            return None
        heard = [forwards[index] for index in sorted(touched)]
        # In the order of the forward, not of the backward.
        order = dict.fromkeys([*(entry.layer.name for _, entry, _ in uses), *found])
        sums = {name: found[name] for name in order if name in found}
        with torch.no_grad():
            add_inputs(sums, heard)
        for forward in heard:
            forward.replaceable = replaceable
        if not again:
            self.waiting = [forward for forward in self.waiting if not any(forward is one for one in heard)]
            self.spent += heard
        return sums

    def used_functionally(self, outputs: Iterable[Tensor]) -> set[str]:
        """The layers that the forwards held use otherwise than by calls of their modules."""
        entries = [pair for forward in (*self.waiting, *self.spent) for pair in forward.entries.items()]
        calls = [(name, use.call) for name, one in entries for use in one.uses]
        return used_functionally(self.layers, calls, outputs, self._leaves.of)

    def inputs(self) -> dict[str, LayerSums]:
        """The sums of the inputs of all forwards that wait, with a zero for G: nothing is sent back."""
        sums: dict[str, LayerSums] = {}
        for forward in self.waiting:
            for name, entry in forward.entries.items():
                zero = entry.inputs.new_zeros(())
                sums.setdefault(name, LayerSums(zero, zero, zero.unsqueeze(0)))
        with torch.no_grad():
            add_inputs(sums, self.waiting)
        return sums

    def computed(self, outputs: Tensor, *, spent: bool) -> bool:
        """Whether a forward held computed these outputs: one that was sent back to already, or one that waits."""
        forwards = self.spent if spent else self.waiting
        uses = [use for forward in forwards for entry in forward.entries.values() for use in entry.uses]
        edges = [edge for call in dict.fromkeys(use.call for use in uses) for edge in call.edges]
        edges += [edge for forward in forwards for edge in forward.ends]
        if not edges:
            return False
        try:
            found = self._backwards.gradients(outputs, edges, torch.zeros_like(outputs))
        except CaptureError:
            # The way to our edges was freed by a backward; a graph that does not lead to them is never entered.
            return True
        return any(gradient is not None for gradient in found)


def _itself(x: Tensor) -> Tensor:
    return x
