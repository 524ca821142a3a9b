"""What a model is made of: layers with an (a, g) form, other parameters by themselves, and what is left out and why."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import checked_rules
from ..errors import ArgumentError
from . import UNIVERSAL, overridden
from .compound import CompoundKind
from .layer import Layer
from .naming import join, named_modules
from .places import Role, Use, owners_of, roles_in, uses_in, uses_of
from .rules import LayerRule, settings_of_rules
from .shards import cut_of, is_sharded
from .summed import TRAINED, trained_sums
from .universal import MIN_DRAWS, universal_layout

Form = Literal["kronecker", "universal", "none"]


@dataclass(frozen=True)
class Row:
    """One trainable parameter of a coverage table.

    ``form`` says by what it is covered: its layer's own 'kronecker' form, the 'universal' one, or 'none'. One that is
    covered has a reason where the form is universal, a side too large, or its kind has a remark.
    """

    path: str
    kind: str
    parameters: int
    covered: bool
    reason: str = ""
    remedy: str = ""
    form: Form = "none"


@dataclass(frozen=True)
class Survey:
    """The layers found, by name, a row for every trainable parameter, and the paths of those that a rule excludes."""

    layers: dict[str, Layer]
    rows: tuple[Row, ...]
    excluded: frozenset[str]


_FUNCTIONAL = "its weight is used without a call of its module", "call the module, for a form of its own"
_OWN_KIND = "a LayerKind of your own (kc.register_layer)"


def survey(
    model: nn.Module,
    rules: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    training: str | None = None,
    functional: Container[str] = frozenset(),
) -> Survey:
    """Find the layers of ``model`` and say of every trainable parameter what covers it.

    Args:
        model: any module, wrapped (DDP, compiled, checkpointed) or not.
        rules: settings by pattern (``fnmatch`` on module names, and on the full names of parameters in the universal
            form); the later of two matching patterns wins, key by key.
        training: the structure that training keeps a layer in where no rule says another; None for an estimate, whose
            structures store what they take in by themselves.
        functional: layers whose weight is known to be used without a call of their module; they have no form of their
            own.

    Raises:
        ArgumentError: a pattern that matches nothing, an unknown setting, or a structure that training does not have.
    """
    modules = list(named_modules(model))
    uses = uses_in(modules)
    found, why = _with_a_form(modules, uses, functional)
    layer_of = {id(p): layer for layer in found for p in layer.parameters.values()}
    refused: dict[int, tuple[str, str]] = {}
    for key, (parameter, places) in uses.items():
        if not parameter.requires_grad or key in layer_of:
            continue
        why.setdefault(key, _without_form(places, parameter))
        if refusal := _refusal(parameter, places):
            refused[key] = refusal
        else:
            layer_of[key] = _universal(places[0], parameter)
    settings = settings_of_rules(checked_rules(rules), _names(uses, layer_of))
    layers: dict[str, Layer] = {}
    excluded: set[str] = set()
    for key, (_, places) in uses.items():
        layer = layer_of.get(key)
        named = owners_of(places) if layer is None else (layer.name, *owners_of(places))
        if any(settings[name].exclude for name in named):
            refused[key] = "excluded by a rule", "remove the rule to cover it"
            excluded.add(join(places[0].owner, places[0].attribute))
        elif layer is not None:
            layers.setdefault(layer.name, _ruled(layer, settings[layer.name], training))
    rows = tuple(
        _left_out(parameter, places, *refused[key])
        if key in refused
        else _row(parameter, places, layers[layer_of[key].name], why.get(key, ("", "")))
        for key, (parameter, places) in uses.items()
        if parameter.requires_grad
    )
    return Survey(layers, rows, frozenset(excluded))


def _with_a_form(
    modules: list[tuple[str, nn.Module]],
    uses: dict[int, tuple[nn.Parameter, list[Use]]],
    functional: Container[str],
) -> tuple[list[Layer], dict[int, tuple[str, str]]]:
    """The layers with an (a, g) form; by parameter why a module of a kind is none, with the remedy."""
    layers: list[Layer] = []
    why: dict[int, tuple[str, str]] = {}
    roles = roles_in(modules)
    taken: set[Role] = set()
    for role in dict.fromkeys(roles.values()):
        if role in taken:
            continue
        found = _layer(role, roles, uses)
        if isinstance(found, Layer):
            taken.update(roles[id(use.module), use.attribute] for use in uses_of(role.weight, uses))
        if isinstance(found, Layer) and found.name not in functional:
            layers.append(found)
        else:
            found = _FUNCTIONAL if isinstance(found, Layer) else found
            for parameter in (role.weight, role.bias):
                why.setdefault(id(parameter), found)
    return layers, why


def _names(
    uses: Mapping[int, tuple[nn.Parameter, list[Use]]], layer_of: Mapping[int, Layer]
) -> dict[str, tuple[str, ...]]:
    """What settings are kept for, and the names by which a pattern reaches it.

    A module that holds parameters has its own name; a parameter in the universal form its own and its modules', a part
    of a module its own and the module's.
    """
    names: dict[str, tuple[str, ...]] = {owner: (owner,) for _, places in uses.values() for owner in owners_of(places)}
    for key, layer in layer_of.items():
        if not layer.modules or layer.part.name:
            names[layer.name] = (layer.name, layer.owner, *owners_of(uses[key][1]))
    return names


def _layer(
    role: Role, roles: Mapping[tuple[int, str], Role], uses: Mapping[int, tuple[nn.Parameter, list[Use]]]
) -> Layer | tuple[str, str]:
    """The layer of a part of a module, or (reason, remedy) where it cannot be one."""
    weight, bias, part = role.weight, role.bias, role.part
    if weight is None:
        return (
            "its weight is computed from other parameters (a parametrization)",
            "torch.nn.utils.parametrize.remove_parametrizations, where it is not needed",
        )
    places = uses_of(weight, uses)
    if refusal := _refusal(weight, places):
        return refusal
    if isinstance(role.kind, CompoundKind) and (cut := cut_of(weight, gathered=places[0].gathered)) is not None:
        return (
            f"a part of a module of several parts, which computes with a DTensor on {cut}",
            "for a form of its own linear layers of their own in its place",
        )
    sharers = []
    for use in places:
        other = roles.get((id(use.module), use.attribute))
        if other is None or not role.same_as(other):
            return f"{_pair(role, part.weight, use)} are one weight in two roles", "untie them"
        if other.bias is not bias:
            pair = _pair(role, part.weight, use)
            return f"{pair} are one weight with two biases", "tie the biases too, or leave both out (bias=False)"
        sharers.append(other)
    if len(uses_of(bias, uses)) not in (0, len(sharers)):
        own = [other.places[join(other.owner, str(part.bias))] for other in sharers]
        stranger = next(use for use in uses_of(bias, uses) if (use.module, use.attribute) not in own)
        return f"{_pair(role, str(part.bias), stranger)} are one bias of two weights", "give each its own bias"
    trains_weight = weight.requires_grad
    trains_bias = bias is not None and bias.requires_grad
    if not (trains_weight or trains_bias):
        return "frozen", ""
    layout = role.kind.part_layout(
        role.module,
        part,
        weight=join(role.owner, part.weight) if trains_weight else None,
        bias=join(role.owner, str(part.bias)) if trains_bias else None,
    )
    return Layer(
        role.name,
        role.kind,
        tuple(other.module for other in sharers),
        layout,
        role.places,
        part=part,
        gradient_sums=role.kind.gradient_sums,
    )


def _universal(place: Use, parameter: nn.Parameter) -> Layer:
    """A parameter by itself."""
    name = join(place.owner, place.attribute)
    layout = universal_layout(name, tuple(parameter.shape))
    places = {name: (place.module, place.attribute)}
    return Layer(name, UNIVERSAL, (), layout, places, gradient_sums=UNIVERSAL.gradient_sums)


def _ruled(layer: Layer, rule: LayerRule, training: str | None) -> Layer:
    """The layer with its settings."""
    if training is not None:
        structure = rule.structure or training
        if structure not in TRAINED:
            raise ArgumentError(
                f"rules: layer '{layer.name}' has structure={structure!r}, expected one of {', '.join(TRAINED)} for "
                f"training: others are for kc.estimate(structure='mixed')"
            )
        own = trained_sums(structure, layer.gradient_sums, rule.sharing or "expand")
        layer = replace(layer, gradient_sums=own, triangles=True)
    if rule.storage is not None and (training is None or layer.gradient_sums is not None):
        raise ArgumentError(
            f"rules: layer '{layer.name}' has storage={rule.storage}: it is for the moving averages of training in "
            f"'kfac'. A later pattern takes it back, {{'{layer.name}': dict(storage=None)}}"
        )
    _require_positions(layer, rule, training)
    if not layer.modules and layer.layout.d_in == 1:
        # Of a vector the diagonal: a whole side would be its block from a few draws, of as low a rank.
        rule = replace(rule, max_factor_dim=1)
    return replace(layer, rule=rule)


def _require_positions(layer: Layer, rule: LayerRule, training: str | None) -> None:
    """Refuse a share of the positions where they are not all there is to what is summed."""
    if rule.fraction is None:
        return
    why = "its positions are averaged first (sharing='reduce')" if rule.sharing == "reduce" else ""
    if layer.gradient_sums is not None:
        why = "it is made of gradients of whole examples, of which a share of the positions tells nothing"
    if training is None:
        why = "an estimate takes all positions of its data"
    if why:
        raise ArgumentError(
            f"rules: layer '{layer.name}' has fraction={rule.fraction}, and {why}: it is for training in 'kfac' with "
            f"sharing='expand'. A later pattern takes it back, {{'{layer.name}': dict(fraction=None)}}"
        )


def _pair(role: Role, attribute: str, use: Use) -> str:
    """The two places of one parameter, which a row of either may name."""
    return f"'{join(role.owner, attribute)}' and '{join(use.owner, use.attribute)}'"


def _refusal(weight: Tensor, places: list[Use]) -> tuple[str, str] | None:
    """Why a parameter of this storage cannot be covered, with the remedy."""
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "a lazy module that is not initialised yet", "run one forward before wrapping the model"
    if weight.layout is not torch.strided:
        return f"its weight is {weight.layout}", "use a dense weight"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}", "use a real floating-point weight"
    if not weight.numel():
        return "it has no entries", ""
    if any(getattr(use.module, "sparse", False) is True for use in places):
        return "its gradient is sparse", "sparse=False"
    return None


def _row(parameter: nn.Parameter, places: list[Use], layer: Layer, why: tuple[str, str]) -> Row:
    """The row of a parameter that is covered; ``why`` says (reason, remedy) where its form is universal."""
    path = join(places[0].owner, places[0].attribute)
    reason, remedy = _as_diagonals(layer)
    if layer.modules:
        remarks = dict.fromkeys(layer.kind.remark(module, layer.sharing) for module in layer.modules)
        tied = _tied(places, "their uses count as positions of one layer")
        reason = "; ".join(filter(None, (*tied, *remarks, reason, _as_shards(parameter, places[0]))))
        return Row(path, layer.kind.name, parameter.numel(), True, reason, remedy, "kronecker")
    said = f"universal form, from {MIN_DRAWS} effective draws on in training: {why[0]}"
    reason = "; ".join(filter(None, (said, reason, _as_shards(parameter, places[0]))))
    remedy = "; ".join(filter(None, (why[1], remedy)))
    return Row(path, type(places[0].module).__name__, parameter.numel(), True, reason, remedy, "universal")


def _tied(places: list[Use], meaning: str) -> list[str]:
    """The other places that hold a parameter, and what that means; nothing where there are none."""
    others = [f"'{join(use.owner, use.attribute)}'" for use in places[1:]]
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return [f"tied to {', '.join(others[:3])}{more}: {meaning}"] if others else []


def _as_shards(parameter: Tensor, place: Use) -> str:
    """How a parameter of which each rank has a part is covered; empty for a plain one."""
    if not is_sharded(parameter):
        return ""
    cut = cut_of(parameter, gathered=place.gathered)
    if cut is None:
        return "sharded: its gradient is brought together for the step"
    return (
        f"on a tensor-parallel mesh of {cut}: what its module is given, and what comes back, is brought together at "
        f"captures, its gradient for the step"
    )


def _left_out(parameter: nn.Parameter, places: list[Use], reason: str, remedy: str) -> Row:
    """The row of a parameter that is not covered."""
    size = 0 if isinstance(parameter, nn.parameter.UninitializedParameter) else parameter.numel()
    path = join(places[0].owner, places[0].attribute)
    return Row(path, type(places[0].module).__name__, size, False, reason, remedy)


def _as_diagonals(layer: Layer) -> tuple[str, str]:
    """Which sides of a layer are too large to be kept whole, with the remedy; two empty texts where none is."""
    always = layer.layout.diagonal_sides(layer.layout.numel)
    sides = {side: size for side, size in layer.diagonal_sides.items() if side not in always}
    if not sides or layer.max_factor_dim == 1:
        return "", ""
    said = " and ".join(f"side {side} of {size:,}" for side, size in sides.items())
    return (
        f"{said} as diagonal: more than max_factor_dim={layer.max_factor_dim:,}",
        f"max_factor_dim={max(sides.values())} in a rule, to keep it whole",
    )


def _without_form(places: list[Use], parameter: nn.Parameter) -> tuple[str, str]:
    """Why no kind takes the module that holds a parameter, with the remedy."""
    module = places[0].module
    if (found := overridden(module)) is not None:
        where = "on this instance" if found.method in vars(module) else f"by {type(module).__name__}"
        return (
            f"{found.base.__name__} with its {found.method} replaced {where}",
            f"put what it adds into a module around a plain {found.base.__name__}, or write {_OWN_KIND}",
        )
    reason = "; ".join(("no Kronecker form for this module type", *_tied(places, "one parameter")))
    if isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.ndim < 2:
        return reason, ""
    return reason, f"for a form of its own nn.Linear or nn.Conv modules in its place, or {_OWN_KIND}"
