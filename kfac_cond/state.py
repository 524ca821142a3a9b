"""What a bitwise resume needs, as plain tensors, numbers and strings by layer name, and the checks on the way back.

Saved are the averages with their weights and the inverses in use themselves: they need not be rebuilt, so that a
resume between two refreshes goes on with the very same numbers.

What has other keys in a new KFAC than in one that has run is a tuple: ``torch.distributed.checkpoint`` takes mappings
apart, and on the way back reads only the keys that the new object has. A tuple is one piece to it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .averages import MovingAverage
from .distributed import Ranks
from .draws import Draws
from .errors import KFACError, StateError
from .health import Flags, Health
from .layers.layer import Layer, draws_needed, storage_of
from .statistics import LayerSums, Slots, Statistics, count_dtype, statistic_dtype
from .structures import Block, CholeskyBlock, DiagonalBlock, EigenBlock, KroneckerBlock
from .trust_region import TrustRegion

FORMAT = "kfac_cond.KFAC"
VERSION = 6

_STORED: dict[type[Block], tuple[str, ...]] = {
    KroneckerBlock: ("A", "G"),
    CholeskyBlock: ("A", "G"),
    EigenBlock: ("basis_A", "basis_G", "values"),
    DiagonalBlock: ("values",),
}

#: What an average may hold: nothing, the weight of G of a layer that was not used yet, or all of it.
_AVERAGES: tuple[set[str], ...] = (set(), {"G_weight"}, {"A", "A_weight", "G", "G_weight"})
#: What there is beside it of a layer whose captures are counted.
_COUNTS = {"draws", "draws_squared"}


class Kept(Protocol):
    """What there is of all layers."""

    layers: Mapping[str, Layer]
    average: MovingAverage
    inverses: dict[str, Block]
    references: dict[str, tuple[Tensor, Tensor]]
    made: dict[str, int]
    health: Health


class Unmatched(NamedTuple):
    """The layers that a state and a model do not share, named as ``nn.Module.load_state_dict`` names keys.

    Args:
        missing_keys: layers of the model that the state has not; they stay as they are.
        unexpected_keys: layers of the state that the model has not; they are left out.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


@dataclass(frozen=True)
class Loaded:
    """A state that was checked, on the devices of the model."""

    unmatched: Unmatched
    average: MovingAverage
    inverses: dict[str, Block]
    references: dict[str, tuple[Tensor, Tensor]]
    made: dict[str, int]
    health: Health
    gathered: tuple[Statistics, Flags] | None
    draws: Draws
    step: int


def save(
    factors: Kept,
    *,
    gathered: tuple[Statistics, Flags] | None,
    draws: Draws,
    slots: Slots,
    step: int,
    functional: Iterable[str],
    ranks: Ranks,
    trust_region: TrustRegion | None = None,
) -> dict[str, Any]:
    """The state as ``torch.load(weights_only=True)`` reads it."""
    between = getattr(trust_region, "state_dict", None)
    return {
        **({} if between is None else {"trust_region": (between(),)}),
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "seed": draws.seed,
        "draws": tuple(draws.state().items()),
        "heads": list(slots.names),
        "functional": sorted(functional),
        "health": tuple(factors.health.state().items()),
        # Whose labels were drawn, and whose batch was gathered.
        "rank": [ranks.rank, ranks.size],
        "gathered": () if gathered is None else (_gathered_state(*gathered),),
        "layers": tuple((name, _layer_state(name, factors)) for name in factors.layers),
    }


@contextmanager
def _readable() -> Iterator[None]:
    """Within it what is not laid out as a state of ours is refused by name."""
    try:
        yield
    except KFACError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise StateError(f"a KFAC state that cannot be read ({error!r}): the file is damaged") from error


@_readable()
def load_trust_region(saved: Mapping[str, Any], trust_region: TrustRegion | None) -> None:
    """Take over what a trust region keeps between steps, where it keeps anything.

    Raises:
        StateError: the state has such a part and the trust region keeps nothing, or the other way around.
    """
    load = getattr(trust_region, "load_state_dict", None)
    if (load is None) == ("trust_region" in saved):
        found, expected = ("a", "none") if load is None else ("no", "one")
        raise StateError(
            f"the state has {found} trust region that keeps something between steps, as kc.Graft does, and this KFAC "
            f"has {expected}: give KFAC the trust_region that was saved"
        )
    if load is not None:
        load(saved["trust_region"][0])


def _layer_state(name: str, factors: Kept) -> dict[str, Any]:
    layer, reference = factors.layers[name], factors.references.get(name)
    return {
        "shape": list(layer.layout.matrix_shape),
        "parameters": list(layer.layout.names),
        # Copies: the averages are changed in place by the steps to come.
        "average": {key: tensor.clone() for key, tensor in factors.average.layer_state(name).items()},
        "inverse": inverse_state(factors.inverses.get(name)),
        **({} if reference is None else {"reference": dict(zip("AG", reference, strict=True))}),
        **({"made": factors.made[name]} if name in factors.made else {}),
    }


@_readable()
def functional_of(saved: Mapping[str, Any]) -> frozenset[str]:
    """The layers of a state whose weight was seen to be used without a call of their module.

    Raises:
        StateError: not a state of ours, or of another version.
    """
    _check_format(saved)
    return frozenset(map(str, saved["functional"]))


@_readable()
def load(
    saved: Mapping[str, Any], layers: Mapping[str, Layer], *, slots: Slots, patience: int, ranks: Ranks, strict: bool
) -> Loaded:
    """Check a state against the layers of a model and bring it to their devices; changes nothing.

    Raises:
        StateError: a state with other shapes, or with other layers where ``strict``.
    """
    entries = _paired(saved, "layers")
    unmatched = Unmatched(sorted(layers.keys() - entries.keys()), sorted(entries.keys() - layers.keys()))
    if strict:
        _require_matched(unmatched)
    _check_heads(saved, slots)
    shared = {name: layer for name, layer in layers.items() if name in entries}
    average = MovingAverage(layers, slots.weights, draws_needed(layers), storage_of(layers))
    inverses: dict[str, Block] = {}
    references: dict[str, tuple[Tensor, Tensor]] = {}
    made: dict[str, int] = {}
    for name, layer in shared.items():
        entry = _layer_entry(name, layer, entries[name])
        average.load_layer(
            name, _stored(layer, _placed(name, layer, _whole_average(name, layer, entry["average"]), slots))
        )
        if entry["inverse"] is not None:
            inverses[name] = loaded_inverse(name, layer, entry["inverse"])
        _require_finite(name, entry["average"], entry["inverse"] or {})
        if "reference" in entry:
            placed = _placed(name, layer, entry["reference"], Slots())
            references[name] = placed["A"], placed["G"]
        if "made" in entry:
            made[name] = int(entry["made"])
    health = Health(layers, patience=patience)
    health.load_state(_paired(saved, "health"), shared)
    step, draws = int(saved["step"]), Draws(int(saved["seed"]), rank=ranks.rank)
    if _is_own(saved, ranks):
        draws.load_state(_paired(saved, "draws"))
    gathered = _loaded_gathered(shared, saved["gathered"][0], slots) if len(saved["gathered"]) else None
    return Loaded(unmatched, average, inverses, references, made, health, gathered, draws, step)


def _is_own(saved: Mapping[str, Any], ranks: Ranks) -> bool:
    """Whether the state was saved by this very rank; what was gathered, and labels, are the rank's own.

    Raises:
        StateError: it was not, and holds a batch that was gathered for a step to come.
    """
    own = list(saved.get("rank", [0, 1])) == [ranks.rank, ranks.size]
    if not own and len(saved["gathered"]):
        raise StateError(
            f"the state was saved by rank {' of '.join(map(str, saved['rank']))} between a forward and its step, and "
            f"holds what that rank alone had gathered; this is rank {ranks.rank} of {ranks.size}. Save after the "
            f"optimizer's step, or let every rank load its own file at the same number of ranks."
        )
    return own


def _gathered_state(statistics: Statistics, flags: Flags) -> dict[str, Any]:
    """What forwards left that no step has taken yet: the half of a loop that runs after the step."""
    # A copy: what is gathered next is added in place.
    return {**copy.deepcopy(statistics.state()), "captures": flags.captures, "flags": dict(flags.counts)}


def _loaded_gathered(layers: Mapping[str, Layer], entry: Mapping[str, Any], slots: Slots) -> tuple[Statistics, Flags]:
    sums = {
        name: LayerSums(**_placed(name, layers[name], parts, slots))
        for name, parts in entry["layers"].items()
        if name in layers
    }
    device = next((one.A.device for one in sums.values()), torch.device("cpu"))

    def here(flags: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {str(key): flag.to(device) for key, flag in flags.items()}

    statistics = Statistics(
        sums,
        entry["divisor"].to(device),
        slots,
        int(entry["examples"]),
        entry["finite"].to(device),
        here(entry["nonfinite"]),
    )
    return statistics, Flags(int(entry["captures"]), here(entry["flags"]))


def inverse_state(inverse: Block | None) -> dict[str, Any] | None:
    """An inverse as plain tensors and strings."""
    if inverse is None:
        return None
    held = {key: tensor for key in _STORED[type(inverse)] if (tensor := getattr(inverse, key)) is not None}
    return {"structure": type(inverse).__name__, **held}


def _check_format(saved: object) -> None:
    if not isinstance(saved, Mapping) or saved.get("format") != FORMAT:
        found = list(saved)[:8] if isinstance(saved, Mapping) else type(saved).__name__
        raise StateError(f"this is not a KFAC state: found {found}, expected what KFAC.state_dict() returns")
    if saved.get("version") != VERSION:
        raise StateError(f"a KFAC state of version {saved.get('version')!r}; this library reads version {VERSION}")
    missing = {"step", "seed", "draws", "heads", "functional", "health", "gathered", "layers"} - set(saved)
    if missing:
        raise StateError(f"a KFAC state without {sorted(missing)}: the file is incomplete")


def _check_heads(saved: Mapping[str, Any], slots: Slots) -> None:
    if tuple(saved["heads"]) != slots.names:
        raise StateError(
            f"the state has the heads {list(saved['heads'])}, the likelihood {list(slots.names)}: pass the likelihood "
            f"that was saved"
        )


def _paired(saved: Mapping[str, Any], key: str) -> dict[str, Any]:
    """What is saved as pairs, (name, entry), by name."""
    try:
        return {str(name): entry for name, entry in saved[key]}
    except (TypeError, ValueError) as error:
        found = type(saved[key]).__name__
        raise StateError(
            f"a KFAC state whose {key} are {found}, expected pairs of a name and an entry: the file is damaged"
        ) from error


def _require_matched(unmatched: Unmatched) -> None:
    missing, unexpected = unmatched
    if missing or unexpected:
        raise StateError(
            f"the state is of another model: layers missing in it {missing}, layers it has and the model has not "
            f"{unexpected}. Wrap the model that was saved, with the same rules; or take over what fits with "
            f"load_state_dict(state, strict=False), which returns these names."
        )


def _layer_entry(name: str, layer: Layer, entry: object) -> Mapping[str, Any]:
    """One layer's part of a state, seen to be of this layer and whole."""
    expected = {"shape": list(layer.layout.matrix_shape), "parameters": list(layer.layout.names)}
    if not isinstance(entry, Mapping) or not {*expected, "average", "inverse"} <= set(entry):
        keys = sorted(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__
        raise StateError(f"layer '{name}': found {keys}, expected its shape, parameters, average and inverse")
    differing = {key: value for key, value in expected.items() if entry[key] != value}
    if differing:
        found = {key: entry[key] for key in differing}
        raise StateError(
            f"layer '{name}': the state has {found}, the model {differing}: load it into the model that was saved, "
            f"with the same parts frozen"
        )
    return entry


def _whole_average(name: str, layer: Layer, entry: object) -> Mapping[str, Tensor]:
    """An average with each factor beside its weight, and the counts of a layer that has them."""
    found = set(entry) if isinstance(entry, Mapping) else {type(entry).__name__}
    counts = _COUNTS if name in draws_needed({name: layer}) else set()
    # A layer that was never used has a weight of G, and no G.
    if not isinstance(entry, Mapping) or found not in [known | counts if known else known for known in _AVERAGES]:
        raise StateError(
            f"layer '{name}': its average has {sorted(map(str, found))}, expected "
            f"{', '.join(sorted(_AVERAGES[-1] | counts))}"
        )
    return entry


def _stored(layer: Layer, average: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An average in the dtype that the layer's is kept in: what was kept in it before is not changed by it."""
    storage = layer.rule.storage
    return {key: one.to(storage) if key in "AG" and storage is not None else one for key, one in average.items()}


def _require_finite(name: str, *entries: Mapping[str, object]) -> None:
    """Refuse numbers that no run saves: what is not finite never reaches an average or an inverse."""
    tensors = [(key, one) for entry in entries for key, one in entry.items() if isinstance(one, Tensor)]
    bad = [key for key, one in tensors if not (one.is_meta or one.isfinite().all())]
    if bad:
        raise StateError(f"layer '{name}': {', '.join(bad)} not finite, expected numbers: the file is damaged")


def loaded_inverse(name: str, layer: Layer, entry: object) -> Block:
    """The inverse of a layer from what ``inverse_state`` gave, where the layer is.

    Raises:
        StateError: it is not that.
    """
    if isinstance(entry, Mapping):
        # The basis of a side that is a diagonal is the identity, which is not stored.
        none = {f"basis_{side}" for side in layer.diagonal_sides}
        for structure, keys in _STORED.items():
            if entry.get("structure") == structure.__name__ and set(keys) <= set(entry) | none:
                sides = _placed(name, layer, {key: entry[key] for key in keys if key in entry})
                absent = {key: None for key in keys if key not in sides}
                return structure(layer.layout, **sides, **absent, name=name)  # type: ignore[call-arg]
    found = entry.get("structure") if isinstance(entry, Mapping) else type(entry).__name__
    raise StateError(
        f"layer '{name}': an inverse of structure {found!r}, expected one of "
        f"{[structure.__name__ for structure in _STORED]} with its tensors"
    )


def _placed(name: str, layer: Layer, tensors: Mapping[str, Tensor], slots: Slots | None = None) -> dict[str, Tensor]:
    """The tensors where the layer is, in the dtype of its statistics, after a look at their shapes.

    With ``slots`` G is that of sums and averages, which has a slot for each head.
    """
    heads = () if slots is None else (len(slots),)
    device, dtype = layer.device, statistic_dtype(layer.like.dtype)
    of_A, of_G = layer.layout.side_shapes(layer.max_factor_dim) if slots is None else layer.sum_shapes
    shapes = {
        "A": of_A,
        "G": (*heads, *of_G),
        "basis_A": of_A,
        "basis_G": of_G,
        "values": layer.layout.matrix_shape,
        "A_weight": (),
        "G_weight": heads,
        "A_count": (),
        "draws": (),
        "draws_squared": (),
    }
    placed = {}
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shapes[key]:
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise StateError(
                f"layer '{name}': {key} is {found}, expected a tensor of shape {shapes[key]}: load it into the "
                f"model that was saved, with the same structure and rules, max_factor_dim among them"
            )
        counts = key.endswith("_weight") or key in _COUNTS
        kind = tensor.dtype if key == "A_count" else count_dtype(device) if counts else dtype
        placed[key] = torch.empty_like(tensor, dtype=kind, device=device).copy_(tensor)
    return placed
