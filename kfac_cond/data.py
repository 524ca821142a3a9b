"""What the library reads from a batch and from a model's call: outputs, data labels, valid terms, real positions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .checks import check_seed
from .errors import ArgumentError, CaptureError

Pick = Callable[[tuple[Any, ...], dict[str, Any], Any], Any]


@dataclass(frozen=True)
class Data:
    """Where in a call of the model to find what the likelihood and the layers need.

    Each is a callable of ``(args, kwargs, outputs)`` of the root module's forward. None takes a sensible pick.

    Args:
        mask: bool tensor of valid loss terms, shaped as the terms. Default: ``attention_mask`` among the kwargs where
            it has that shape, else all terms.
        positions: bool tensor (batch, length) of real positions, left out of A, G and the counts where False. It is
            called before the forward, with None for the outputs. Default: a two-dimensional ``attention_mask`` among
            the kwargs, else all positions.
        outputs: the tensor that parametrises p. Default: the output itself where it is a tensor, else its ``logits``.
        targets: the data labels, for class weights and ignored terms alone. Default: ``labels`` among the kwargs, where
            the likelihood asks for labels and there is one per example. Labels per position must be picked by hand,
            since many language models shift them inside.
        seed: seed of the label draws. Default: ``torch.initial_seed()``, which is not advanced.
    """

    mask: Pick | None = None
    positions: Pick | None = None
    outputs: Pick | None = None
    targets: Pick | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("mask", "positions", "outputs", "targets"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise ArgumentError(
                    f"Data({name}=...): found {type(value).__name__}, expected a callable of (args, kwargs, outputs)"
                )
        check_seed(self.seed, "Data")

    def pick_outputs(self, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Tensor:
        """The tensor that parametrises p."""
        found = self.outputs(args, kwargs, outputs) if self.outputs is not None else _logits(outputs)
        if isinstance(found, Tensor):
            return found
        raise CaptureError(
            f"found no tensor that parametrises p in the model's output ({_described(outputs)}): pass "
            f"data=kc.Data(outputs=lambda args, kwargs, outputs: ...) that returns it"
        )

    def pick_positions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The mask of real positions (batch, length) as bool, or None."""
        if self.positions is not None:
            found = self.positions(args, kwargs, None)
        else:
            found = kwargs.get("attention_mask")
            if not (isinstance(found, Tensor) and found.ndim == 2):
                return None
        if found is None:
            return None
        if not (isinstance(found, Tensor) and found.ndim == 2):
            raise CaptureError(f"Data(positions=...) gave {_described(found)}, expected a bool tensor (batch, length)")
        return found.detach().bool()

    def pick_mask(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any, terms: tuple[int, ...]
    ) -> Tensor | None:
        """The mask of valid terms as bool, or None; ``terms`` is its shape."""
        if self.mask is not None:
            found = self.mask(args, kwargs, outputs)
            return None if found is None else found.detach().bool()
        found = kwargs.get("attention_mask")
        return found.detach().bool() if isinstance(found, Tensor) and tuple(found.shape) == terms else None

    def pick_targets(self, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Tensor | None:
        """The data labels, or None."""
        if self.targets is not None:
            found: Tensor | None = self.targets(args, kwargs, outputs)
            return found
        labels = kwargs.get("labels")
        return labels if isinstance(labels, Tensor) and labels.ndim == 1 else None


def _logits(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]
    return getattr(outputs, "logits", None)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with keys {list(value)[:8]}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {[type(item).__name__ for item in value][:8]}"
    return type(value).__name__


def call_model(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """Run ``model`` on a batch as loaders yield them; returns (outputs, data labels or None).

    A tensor is the input; of a tuple or list the first entry, a tensor or a packed sequence, is the input and the
    second the labels; a mapping is passed by keyword, without ``labels`` where the model's forward has no such
    argument.
    """
    device = _device(model)
    if isinstance(batch, Tensor):
        return model(_moved(batch, device)), None
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor | PackedSequence):
        if len(batch) > 2:
            raise ArgumentError(
                f"a batch is {_described(batch)}: expected (inputs, labels). Yield those two, or a mapping of keyword "
                f"arguments where the model takes more than one input."
            )
        return model(_moved(batch[0], device)), _moved(batch[1], device) if len(batch) > 1 else None
    if isinstance(batch, Mapping):
        inputs = {key: _moved(value, device) for key, value in batch.items()}
        labels = inputs.get("labels")
        return model(**{key: inputs[key] for key in inputs if key != "labels" or _takes_labels(model)}), labels
    raise ArgumentError(
        f"a batch is {_described(batch)}: expected a tensor, a tuple (inputs, labels) or a mapping of keyword arguments"
    )


def leading_dimension(batch: Any) -> int | None:
    """The size of dimension 0 of a batch's first input, where it has one."""
    first = batch if isinstance(batch, Tensor) else next(iter(batch.values() if isinstance(batch, Mapping) else batch))
    return first.shape[0] if isinstance(first, Tensor) and first.ndim else None


def _takes_labels(model: nn.Module) -> bool:
    arguments = inspect.signature(model.forward).parameters.values()
    return any(one.name == "labels" or one.kind is inspect.Parameter.VAR_KEYWORD for one in arguments)


def _moved(value: Any, device: torch.device | None) -> Any:
    """A tensor, or a mapping or tuple of some, on the device; anything else as it is."""
    if isinstance(value, Tensor | PackedSequence):
        return value if device is None else value.to(device)  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    return [_moved(item, device) for item in value] if isinstance(value, list | tuple) else value


def _device(model: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in model.parameters()), None)


def moved(value: Any, model: nn.Module) -> Any:
    """A tensor, or a mapping or tuple of some, where the model's parameters are; anything else as it is."""
    return _moved(value, _device(model))
