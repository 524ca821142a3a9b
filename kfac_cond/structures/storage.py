"""A Fisher in a file: safetensors, with a header in JSON that says what it is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, KFACError, StateError
from ..files import replaced
from ..layers.layout import JointLayout, WeightLayout
from ..layers.naming import join, named_modules
from .base import Block
from .dense import DenseBlock
from .diagonal import DiagonalBlock
from .eigen import EigenBlock
from .iterative import Iteration, IterativeBlock
from .kronecker import KroneckerBlock
from .low_rank import LowRankBlock
from .sums import SumBlock
from .unit_wise import UnitWiseBlock

VERSION = 1
KEY = "kfac_cond"


@dataclass(frozen=True)
class Stored:
    """How one type of block is written.

    Args:
        type: a dataclass with ``layout`` and ``name``, made from its fields.
        arrays: names of the fields that are tensors.
        numbers: names of the fields that JSON can hold.
        optional: names of the fields that are tensors or None; of those that are None nothing is written.
        blocks: names of the fields that are tuples of blocks, each written as a block of the same name is.
    """

    type: type[Any]
    arrays: tuple[str, ...]
    numbers: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()


STORED: dict[str, Stored] = {}


def register_stored(tag: str, stored: Stored) -> None:
    """Let blocks of a type be saved, under a name that files will hold for good."""
    if tag in STORED and STORED[tag] != stored:
        raise ArgumentError(f"'{tag}' is {STORED[tag].type.__name__} already: choose another name")
    STORED[tag] = stored


register_stored("kronecker", Stored(KroneckerBlock, ("A", "G")))
register_stored("eigen", Stored(EigenBlock, ("values",), optional=("basis_A", "basis_G", "values_A", "values_G")))
register_stored("diagonal", Stored(DiagonalBlock, ("values",)))
register_stored("unit_wise", Stored(UnitWiseBlock, ("matrices",)))
register_stored("dense", Stored(DenseBlock, ("matrix",)))
register_stored("low_rank", Stored(LowRankBlock, ("values", "vectors"), ("rest",)))
register_stored("sum", Stored(SumBlock, (), blocks=("terms",)))


def save_blocks(path: str | os.PathLike[str], blocks: Mapping[str, Block], meta: Mapping[str, Any]) -> None:
    """Write blocks and meta, all or nothing; see ``Fisher.save``."""
    torch_files = _safetensors()
    tensors: dict[str, Tensor] = {}
    layers = [_described(f"{index}", block, tensors, name) for index, (name, block) in enumerate(blocks.items())]
    header: dict[str, Any] = {
        "format": "kfac_cond.Fisher",
        "version": VERSION,
        "meta": _plain(meta),
        "layers": layers,
        "fingerprint": _fingerprint(layers),
    }
    header["digest"] = _digest(header, tensors)
    try:
        with replaced(path) as file:
            torch_files.save_file(tensors, file, metadata={KEY: json.dumps(header)})
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise OSError(f"{path} could not be written ({error}): what was there is as it was") from error
        raise


def load_blocks(
    path: str | os.PathLike[str], model: nn.Module | None = None
) -> tuple[dict[str, Block], dict[str, Any]]:
    """(blocks, meta) of a file, on the CPU; see ``Fisher.load``."""
    header, tensors = _read(Path(path))
    _check_header(path, header, tensors)
    if model is not None:
        _check_model(path, header["layers"], model)
    blocks: dict[str, Block] = {}
    for index, layer in enumerate(header["layers"]):
        blocks[layer["name"]] = _made(path, str(index), layer, tensors)
    meta = dict(header["meta"])
    if "derived" in meta:
        meta["derived"] = tuple(meta["derived"])
    return blocks, meta


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("saving and loading a Fisher needs safetensors: pip install 'kfac-cond[files]'") from error
    return safetensors.torch


def _described(prefix: str, block: Block, tensors: dict[str, Tensor], name: str) -> dict[str, Any]:
    """One block's entry in the header; its tensors go to ``tensors``."""
    found = next(((tag, stored) for tag, stored in STORED.items() if type(block) is stored.type), None)
    if found is None:
        raise ArgumentError(
            f"{block.label}: a {type(block).__name__} holds nothing that can be saved; expected one of "
            f"{', '.join(stored.type.__name__ for stored in STORED.values())}, or a type given to register_stored. "
            "What is known by its products alone is made again from the saved model and the data; its largest "
            "eigenpairs (structure='low_rank') can be saved, and block.to_dense() in a DenseBlock"
        )
    if block.device.type == "meta":
        raise ArgumentError(f"{block.label} is on the meta device, which holds no values to save")
    tag, stored = found
    for array in (*stored.arrays, *stored.optional):
        if getattr(block, array) is not None:
            # A copy: safetensors refuses tensors that share memory, and a block may use one tensor twice.
            value = getattr(block, array).detach()
            tensors[f"{prefix}.{array}"] = torch.empty(value.shape, dtype=value.dtype).copy_(value)
    entry = {
        "name": name,
        "block": tag,
        "dtype": str(block.dtype).removeprefix("torch."),
        "layout": _written(block.layout),
        "numbers": {number: getattr(block, number) for number in stored.numbers},
        "blocks": {
            field: [
                _described(f"{prefix}.{field}.{index}", part, tensors, part.name)
                for index, part in enumerate(getattr(block, field))
            ]
            for field in stored.blocks
        },
    }
    return {**entry, "iteration": asdict(block.iteration)} if isinstance(block, IterativeBlock) else entry


def _written(layout: WeightLayout) -> dict[str, Any]:
    """A layout as JSON holds it."""
    if isinstance(layout, JointLayout):
        return {"kind": "joint", "parts": [_written(part) for part in layout.parts]}
    return {"kind": "weight", **asdict(layout)}


def _plain(value: Any) -> Any:
    """A value of meta as JSON holds it: tensors as numbers, what is neither as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        return value.tolist()
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _fingerprint(layers: list[dict[str, Any]]) -> str:
    """A digest of the layers' names and layouts, in order."""
    text = json.dumps([[layer["name"], layer["layout"]] for layer in layers], sort_keys=True)
    return sha256(text.encode()).hexdigest()


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """A digest of the rest of the header, and of all values with their names, dtypes and shapes."""
    rest = {key: value for key, value in header.items() if key != "digest"}
    total = sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    torch_files = _safetensors()
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as opened:
            header = (opened.metadata() or {}).get(KEY)
        tensors = torch_files.load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise StateError(
            f"{path} is no safetensors file, or is truncated ({error}): save the Fisher again; a checkpoint is loaded "
            "into the KFAC of its run first, and kfac.fisher() is saved"
        ) from error
    if header is None:
        raise StateError(f"{path} is a safetensors file, but not a Fisher that Fisher.save wrote")
    try:
        return dict(json.loads(header)), tensors
    except (ValueError, TypeError) as error:
        raise StateError(f"{path}: its header is not JSON ({error}): save the Fisher again") from error


def _check_header(path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    if header.get("format") != "kfac_cond.Fisher":
        raise StateError(f"{path} holds a {header.get('format')!r}, expected a Fisher")
    if header.get("version") != VERSION:
        raise StateError(
            f"{path} has format version {header.get('version')!r}, this library reads {VERSION}: use the version of "
            "kfac-cond that wrote it"
        )
    absent = [key for key in ("meta", "layers", "fingerprint", "digest") if key not in header]
    if absent:
        raise StateError(f"{path}: its header lacks {', '.join(absent)}: save the Fisher again")
    if _digest(header, tensors) != header["digest"]:
        raise StateError(f"{path} does not hold what was saved, so it is damaged or was changed: save the Fisher again")
    try:
        found = _fingerprint(header["layers"])
        for layer in header["layers"]:
            _layout(layer["layout"])
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(f"{path}: its list of layers is damaged ({error!r}): save the Fisher again") from error
    if found != header["fingerprint"]:
        raise StateError(f"{path}: its layers are not those of its fingerprint, so its header was changed")


def _check_model(path: str | os.PathLike[str], layers: list[dict[str, Any]], model: nn.Module) -> None:
    """Refuse layers whose parameters the model does not have in these shapes."""
    shapes = {
        join(owner, attribute): tuple(parameter.shape)
        for owner, module in named_modules(model)
        for attribute, parameter in module._parameters.items()
        if parameter is not None
    }
    wrong = []
    for layer in layers:
        for name, shape in _layout(layer["layout"]).shapes.items():
            if name not in shapes:
                wrong.append(f"'{name}' is not in the model")
            elif shapes[name] != shape:
                wrong.append(f"'{name}' has shape {shapes[name]} in the model, {shape} in the file")
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise StateError(f"{path} is of another model than {type(model).__name__}: {'; '.join(wrong[:4])}{more}")


def _made(path: str | os.PathLike[str], prefix: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Block:
    stored = STORED.get(entry.get("block", ""))
    if stored is None:
        raise StateError(
            f"{path}: layer '{entry['name']}' is stored as {entry.get('block')!r}, which is not among "
            f"{', '.join(STORED)}: register its type with register_stored before loading"
        )
    try:
        fields: dict[str, Any] = {array: tensors[f"{prefix}.{array}"] for array in stored.arrays}
        fields |= {array: tensors.get(f"{prefix}.{array}") for array in stored.optional}
        for field in stored.blocks:
            parts = enumerate(entry["blocks"][field])
            fields[field] = tuple(_made(path, f"{prefix}.{field}.{index}", part, tensors) for index, part in parts)
        if "iteration" in entry:
            fields["iteration"] = Iteration(**entry["iteration"])
        block: Block = stored.type(layout=_layout(entry["layout"]), name=entry["name"], **fields, **entry["numbers"])
    except (KeyError, TypeError, KFACError) as error:
        raise StateError(f"{path}: layer '{entry['name']}' does not fit together ({error})") from error
    if str(block.dtype) != f"torch.{entry['dtype']}":
        raise StateError(f"{path}: layer '{entry['name']}' is {block.dtype}, its header says {entry['dtype']}")
    return block


def _layout(fields: Mapping[str, Any]) -> WeightLayout:
    values = dict(fields)
    kind = values.pop("kind")
    if kind == "joint":
        return JointLayout(parts=tuple(_layout(part) for part in values["parts"]))
    if kind != "weight":
        raise ValueError(f"a layout of kind {kind!r}")
    return WeightLayout(**{**values, "weight_shape": tuple(values["weight_shape"])})
