"""What a model is made of: the layers with an (a, g) form, and every other trainable parameter with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..checks import checked_rules, is_damping, is_size
from ..errors import ArgumentError, ModelChangedError
from ..linalg.moments import second_moment, second_moment_diagonal
from . import kind_of, overridden
from .base import LayerKind
from .layout import MAX_FACTOR_DIM, WeightLayout
from .naming import join, named_modules
from .sharing import Moment

Sharing = Literal["expand", "reduce"]


@dataclass(frozen=True)
class LayerRule:
    """What may be said of the layers that a pattern names; None leaves the default.

    Args:
        structure: name of the block's storage; training takes 'kfac', ``estimate`` others as well.
        sharing: 'expand' or 'reduce', how positions enter the factors (Eschenhagen et al. 2023, arXiv:2311.00636).
        damping: this layer's damping in place of the preconditioner's.
        exclude: leave the layer's gradient as it is.
        max_factor_dim: size of the largest side that is kept whole; a larger one is kept as its diagonal.
    """

    structure: str | None = None
    sharing: Sharing | None = None
    damping: float | None = None
    exclude: bool = False
    max_factor_dim: int | None = None


@dataclass(frozen=True)
class Layer:
    """A layer with an (a, g) form: a name, where it is, and how its parameters form a matrix.

    Args:
        name: canonical name of the first module that holds the weight.
        kind: how inputs and output gradients become [batch, positions, features].
        modules: the modules that apply the weight; their uses count as positions of one layer.
        layout: the layer's matrix.
        rule: the settings that hold for it.
    """

    name: str
    kind: LayerKind
    modules: tuple[nn.Module, ...]
    layout: WeightLayout
    rule: LayerRule = LayerRule()

    @property
    def sharing(self) -> Sharing:
        """How positions enter the factors."""
        return self.rule.sharing or "expand"

    @property
    def max_factor_dim(self) -> int:
        """Size of the largest side that is kept whole."""
        return MAX_FACTOR_DIM if self.rule.max_factor_dim is None else self.rule.max_factor_dim

    @property
    def diagonal_sides(self) -> dict[str, int]:
        """The sides that are kept as their diagonals, 'A' or 'G', with their sizes."""
        sides = {"A": self.layout.d_in, "G": self.layout.d_out}
        return {side: size for side, size in sides.items() if size > self.max_factor_dim}

    @property
    def input_moment(self) -> Moment:
        """How the outer products of its inputs are summed."""
        return second_moment_diagonal if "A" in self.diagonal_sides else second_moment

    @property
    def gradient_moment(self) -> Moment:
        """How the outer products of its output gradients are summed."""
        return second_moment_diagonal if "G" in self.diagonal_sides else second_moment

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by canonical name, weight first."""
        found = {self.layout.weight: self.weight, self.layout.bias: self.bias}
        return {name: parameter for name, parameter in found.items() if name is not None and parameter is not None}

    @property
    def weight(self) -> nn.Parameter:
        """The weight, frozen or not."""
        return cast(nn.Parameter, self.modules[0].weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, frozen or not, or None."""
        return cast("nn.Parameter | None", getattr(self.modules[0], "bias", None))

    def check_unchanged(self) -> None:
        """Raise ModelChangedError where the layer's shape or what is frozen differs from when it was wrapped."""
        weight, bias = self.weight, self.bias
        now = (tuple(weight.shape), weight.requires_grad, bias is not None and bias.requires_grad)
        then = (self.layout.weight_shape, self.layout.weight is not None, self.layout.bias is not None)
        if now != then:
            raise ModelChangedError(
                f"layer '{self.name}' is no longer what was wrapped: found (shape, weight trainable, bias trainable) = "
                f"{now}, expected {then}. Call kfac.refresh() after changing or freezing layers; it keeps what still "
                f"fits."
            )


@dataclass(frozen=True)
class Row:
    """One trainable parameter of a coverage table; one that is covered has a reason where a side is a diagonal."""

    path: str
    kind: str
    parameters: int
    covered: bool
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Survey:
    """The layers found, by name, a row for every trainable parameter, and the paths of those that a rule excludes."""

    layers: dict[str, Layer]
    rows: tuple[Row, ...]
    excluded: frozenset[str]


@dataclass(frozen=True)
class _Use:
    """One place a parameter is held at."""

    owner: str
    module: nn.Module
    attribute: str


_OWN_KIND = "a LayerKind of your own in kfac_cond.layers.KINDS"


def survey(model: nn.Module, rules: Mapping[str, Mapping[str, Any]] | None = None) -> Survey:
    """Find the layers of ``model`` and say of every trainable parameter whether a layer covers it.

    Args:
        model: any module, wrapped (DDP, compiled, checkpointed) or not.
        rules: settings by pattern (``fnmatch`` on module names); the later of two matching patterns wins, key by key.

    Raises:
        ArgumentError: a pattern that matches nothing, or an unknown setting.
    """
    modules = list(named_modules(model))
    uses = _uses(modules)
    settings = _settings(checked_rules(rules), [use.owner for of_one in uses.values() for use in of_one[1]])
    layers: dict[str, Layer] = {}
    refused: dict[int, tuple[str, str]] = {}
    taken: set[int] = set()
    for name, module in modules:
        kind = kind_of(module)
        if kind is None or id(module) in taken:
            continue
        taken.add(id(module))
        found = _layer(name, module, kind, uses, settings)
        if isinstance(found, Layer):
            layers[found.name] = found
            taken.update(id(sharer) for sharer in found.modules)
        else:
            for parameter in module._parameters.values():
                refused.setdefault(id(parameter), found)
    covered = {id(p): layer for layer in layers.values() for p in layer.parameters.values()}
    rows = tuple(
        _row(parameter, places, covered.get(key), refused.get(key))
        for key, (parameter, places) in uses.items()
        if parameter.requires_grad
    )
    excluded = {
        join(places[0].owner, places[0].attribute)
        for _, places in uses.values()
        if any(settings[place.owner].exclude for place in places)
    }
    return Survey(layers, rows, frozenset(excluded))


def _uses(modules: list[tuple[str, nn.Module]]) -> dict[int, tuple[nn.Parameter, list[_Use]]]:
    """Every parameter with all the places that hold it; two paths to one module count once."""
    uses: dict[int, tuple[nn.Parameter, list[_Use]]] = {}
    seen: set[int] = set()
    for owner, module in modules:
        if id(module) in seen:
            continue
        seen.add(id(module))
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                uses.setdefault(id(parameter), (parameter, []))[1].append(_Use(owner, module, attribute))
    return uses


def _settings(rules: Mapping[str, Mapping[str, Any]], names: list[str]) -> dict[str, LayerRule]:
    known = {field.name for field in fields(LayerRule)}
    settings = {name: LayerRule() for name in names}
    for pattern, rule in rules.items():
        matched = [name for name in settings if fnmatchcase(name, pattern)]
        if not matched:
            raise ArgumentError(
                f"rules: the pattern '{pattern}' matches no module with parameters. The modules are: "
                f"{', '.join(sorted(settings)[:20])}{' ...' if len(settings) > 20 else ''}"
            )
        unknown = sorted(set(rule) - known)
        if unknown:
            raise ArgumentError(f"rules['{pattern}']: unknown setting {unknown}; known are {sorted(known)}")
        _check_values(pattern, rule)
        settings.update({name: replace(settings[name], **rule) for name in matched})
    return settings


def _check_values(pattern: str, rule: Mapping[str, Any]) -> None:
    """Refuse a value that a setting of a rule cannot have."""
    fits: dict[str, tuple[Callable[[Any], bool], str]] = {
        "sharing": (lambda value: value in (None, "expand", "reduce"), "'expand' or 'reduce'"),
        "damping": (lambda value: value is None or is_damping(value), "a finite number >= 0"),
        "structure": (lambda value: value is None or isinstance(value, str), "the name of a structure"),
        "exclude": (lambda value: isinstance(value, bool), "True or False"),
        "max_factor_dim": (lambda value: value is None or is_size(value), "a whole number >= 1"),
    }
    for key, value in rule.items():
        allowed, expected = fits[key]
        if not allowed(value):
            raise ArgumentError(f"rules['{pattern}']: {key}={value!r}, expected {expected}")


def _layer(
    name: str,
    module: nn.Module,
    kind: LayerKind,
    uses: dict[int, tuple[nn.Parameter, list[_Use]]],
    settings: dict[str, LayerRule],
) -> Layer | tuple[str, str]:
    """The layer at ``module``, or (reason, remedy) where it cannot be one."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None:
        return (
            "its weight is computed from other parameters (a parametrization)",
            "torch.nn.utils.parametrize.remove_parametrizations, where it is not needed",
        )
    sharers = uses[id(weight)][1]
    if any(settings[use.owner].exclude for use in sharers):
        return "excluded by a rule", "remove the rule to cover it"
    if refusal := _refusal(weight):
        return refusal
    for use in sharers:
        if (
            use.attribute != "weight"
            or kind_of(use.module) is not kind
            or use.module._parameters.get("bias") is not bias
        ):
            pair = _pair(name, "weight", use)
            if use.attribute == "weight" and kind_of(use.module) is kind:
                return f"{pair} are one weight with two biases", "tie the biases too, or leave both out (bias=False)"
            return f"{pair} are one weight in two roles", "untie them"
    if bias is not None and len(uses[id(bias)][1]) != len(sharers):
        other = next(use for use in uses[id(bias)][1] if use.module is not module)
        return f"{_pair(name, 'bias', other)} are one bias of two weights", "give each its own bias"
    trains_weight = weight.requires_grad
    trains_bias = bias is not None and bias.requires_grad
    if not (trains_weight or trains_bias):
        return "frozen", ""
    layout = kind.layout(
        module,
        weight=join(name, "weight") if trains_weight else None,
        bias=join(name, "bias") if trains_bias else None,
    )
    return Layer(name, kind, tuple(use.module for use in sharers), layout, settings[name])


def _pair(name: str, attribute: str, use: _Use) -> str:
    """The two places of one parameter, which a row of either may name."""
    return f"'{join(name, attribute)}' and '{join(use.owner, use.attribute)}'"


def _refusal(weight: Tensor) -> tuple[str, str] | None:
    """Why a weight of this storage cannot be covered, with the remedy."""
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "a lazy module that is not initialised yet", "run one forward before wrapping the model"
    if weight.layout is not torch.strided:
        return f"its weight is {weight.layout}", "use a dense weight"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}", "use a real floating-point weight"
    if hasattr(weight, "full_tensor"):
        return "its weight is a sharded DTensor", "wrap the model before sharding it, or train it with DDP"
    return None


def _row(parameter: nn.Parameter, places: list[_Use], layer: Layer | None, refused: tuple[str, str] | None) -> Row:
    first = places[0]
    path = join(first.owner, first.attribute)
    size = 0 if isinstance(parameter, nn.parameter.UninitializedParameter) else parameter.numel()
    if layer is not None:
        return Row(path, layer.kind.name, size, True, *_as_diagonals(layer))
    reason, remedy = refused or _without_form(first.module, parameter)
    return Row(path, type(first.module).__name__, size, False, reason, remedy)


def _as_diagonals(layer: Layer) -> tuple[str, str]:
    """Which sides of a layer are kept as their diagonals, with the remedy; two empty texts where none is."""
    sides = layer.diagonal_sides
    if not sides:
        return "", ""
    said = " and ".join(f"side {side} of {size:,}" for side, size in sides.items())
    return (
        f"{said} as diagonal: more than max_factor_dim={layer.max_factor_dim:,}",
        f"max_factor_dim={max(sides.values())} in a rule, to keep it whole",
    )


def _without_form(module: nn.Module, parameter: nn.Parameter) -> tuple[str, str]:
    """Why no kind takes the module that holds a parameter, with the remedy."""
    if (base := overridden(module)) is not None:
        where = "on this instance" if "forward" in vars(module) else f"by {type(module).__name__}"
        return (
            f"{base.__name__} with its forward replaced {where}",
            f"put what it adds into a module around a plain {base.__name__}, or write {_OWN_KIND}",
        )
    reason = "no Kronecker form for this module type"
    if isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.ndim < 2:
        return reason, "none needed: a scale or a bias trains well with its plain gradient"
    return reason, f"nn.Linear or nn.Conv modules in its place, or {_OWN_KIND}"
