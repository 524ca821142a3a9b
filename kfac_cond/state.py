"""What a bitwise resume needs, as plain tensors, numbers and strings by layer name, and the checks on the way back.

Saved are the averages with their weights and the inverses in use themselves: they need not be rebuilt, so that a
resume between two refreshes goes on with the very same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import StateError
from .health import Health
from .layers.survey import Layer
from .statistics import MovingAverage, statistic_dtype
from .structures import Block, EigenBlock, KroneckerBlock

FORMAT = "kfac_cond.KFAC"
VERSION = 1

_STORED: dict[type[Block], tuple[str, ...]] = {
    KroneckerBlock: ("A", "G"),
    EigenBlock: ("basis_A", "basis_G", "values"),
}


@dataclass(frozen=True)
class Loaded:
    """A state that was checked, on the devices of the model."""

    average: MovingAverage
    inverses: dict[str, Block]
    health: Health
    step: int
    seed: int


def save(
    layers: Mapping[str, Layer],
    *,
    average: MovingAverage,
    inverses: Mapping[str, Block],
    health: Health,
    numbers: Mapping[str, int],
) -> dict[str, Any]:
    """The state as ``torch.load(weights_only=True)`` reads it."""
    return {
        "format": FORMAT,
        "version": VERSION,
        **numbers,
        "health": {
            "skipped_captures": health.skipped_captures,
            "barren_intervals": health.barren_intervals,
            "started": health.started,
        },
        "layers": {
            name: {
                "shape": list(layer.layout.matrix_shape),
                "parameters": list(layer.layout.names),
                "failures": health.failures.get(name, 0),
                "average": average.layer_state(name),
                "inverse": _inverse_state(inverses.get(name)),
            }
            for name, layer in layers.items()
        },
    }


def load(saved: Mapping[str, Any], layers: Mapping[str, Layer], *, patience: int) -> Loaded:
    """Check a state against the layers of a model and bring it to their devices; changes nothing.

    Raises:
        StateError: not a state of ours, of another version, of other layers, or with other shapes.
    """
    _check_format(saved)
    _check_names(saved["layers"], layers)
    average = MovingAverage(layers)
    health = Health(layers, patience=patience)
    inverses: dict[str, Block] = {}
    for name, layer in layers.items():
        entry = saved["layers"][name]
        expected = {"shape": list(layer.layout.matrix_shape), "parameters": list(layer.layout.names)}
        found = {key: entry.get(key) for key in expected}
        if found != expected:
            raise StateError(f"layer '{name}': the state is of {found}, the model has {expected}")
        average.load_layer(name, _placed(name, layer, entry["average"]))
        if entry["inverse"] is not None:
            inverses[name] = _loaded_inverse(name, layer, entry["inverse"])
        health.failures[name] = int(entry["failures"])
    for key, value in saved["health"].items():
        setattr(health, key, value)
    return Loaded(average, inverses, health, int(saved["step"]), int(saved["seed"]))


def _inverse_state(inverse: Block | None) -> dict[str, Any] | None:
    if inverse is None:
        return None
    return {"structure": type(inverse).__name__, **{key: getattr(inverse, key) for key in _STORED[type(inverse)]}}


def _check_format(saved: Mapping[str, Any]) -> None:
    keys = sorted(saved) if isinstance(saved, Mapping) else type(saved).__name__
    if not isinstance(saved, Mapping) or saved.get("format") != FORMAT:
        raise StateError(f"this is not a KFAC state: found {keys}, expected what KFAC.state_dict() returns")
    if saved.get("version") != VERSION:
        raise StateError(f"a KFAC state of version {saved.get('version')!r}; this library reads version {VERSION}")
    missing = {"step", "seed", "health", "layers"} - set(saved)
    if missing:
        raise StateError(f"a KFAC state without {sorted(missing)}: the file is incomplete")


def _check_names(saved: Mapping[str, Any], layers: Mapping[str, Layer]) -> None:
    missing, unexpected = sorted(layers.keys() - saved.keys()), sorted(saved.keys() - layers.keys())
    if missing or unexpected:
        raise StateError(
            f"the state is of another model: layers missing in it {missing}, layers it has and the model has not "
            f"{unexpected}. Wrap the model that was saved, with the same rules."
        )


def _loaded_inverse(name: str, layer: Layer, entry: Mapping[str, Any]) -> Block:
    for structure, keys in _STORED.items():
        if entry.get("structure") == structure.__name__ and set(keys) <= set(entry):
            sides = _placed(name, layer, {key: entry[key] for key in keys})
            return structure(layer.layout, **sides, name=name)  # type: ignore[call-arg]
    raise StateError(f"layer '{name}': an inverse of unknown structure {entry.get('structure')!r}")


def _placed(name: str, layer: Layer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors where the layer is, in the dtype of its statistics, after a look at their shapes."""
    device, dtype = layer.weight.device, statistic_dtype(layer.weight.dtype)
    *groups, d_out, d_in = layer.layout.matrix_shape
    shapes = {
        "A": (*groups, d_in, d_in),
        "G": (*groups, d_out, d_out),
        "basis_A": (*groups, d_in, d_in),
        "basis_G": (*groups, d_out, d_out),
        "values": layer.layout.matrix_shape,
        "A_weight": (),
        "G_weight": (),
    }
    placed = {}
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shapes[key]:
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise StateError(f"layer '{name}': {key} is {found}, expected a tensor of shape {shapes[key]}")
        kind = tensor.dtype if key.endswith("_weight") else dtype
        placed[key] = torch.empty_like(tensor, dtype=kind, device=device).copy_(tensor)
    return placed
