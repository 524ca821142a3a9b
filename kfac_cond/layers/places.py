"""Where the parameters of a model are held, and what each place is to a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from . import kind_of
from .base import LayerKind, Part
from .naming import join
from .shards import gathered_for_calls


@dataclass(frozen=True)
class Use:
    """One place a parameter is held at; ``gathered`` where its module has it whole in every call, if it is sharded."""

    owner: str
    module: nn.Module
    attribute: str
    gathered: bool = False


@dataclass(frozen=True, eq=False)
class Role:
    """A part of a module, which may be a layer by itself or one use of it."""

    owner: str
    module: nn.Module
    kind: LayerKind
    part: Part

    @property
    def name(self) -> str:
        """Of the layer."""
        return join(self.owner, self.part.name) if self.part.name else self.owner

    @property
    def places(self) -> dict[str, tuple[nn.Module, str]]:
        """By canonical name the module that holds a parameter, and the attribute; weight first."""
        attributes = [attribute for attribute in (self.part.weight, self.part.bias) if attribute is not None]
        return {join(self.owner, attribute): _held(self.module, attribute) for attribute in attributes}

    @property
    def weight(self) -> nn.Parameter | None:
        """The weight, or None where it is computed from others."""
        return self._parameter(self.part.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, or None."""
        return None if self.part.bias is None else self._parameter(self.part.bias)

    def same_as(self, other: Role) -> bool:
        """Whether two parts multiply by one weight in one way."""
        of_one_kind = other.kind is self.kind and other.part == self.part and other.weight is self.weight
        # Two convolutions may hold one weight and group it differently.
        return of_one_kind and other._matrix_shape == self._matrix_shape

    @property
    def _matrix_shape(self) -> tuple[int, ...]:
        """Of the weight, as its module uses it."""
        return self.kind.part_layout(self.module, self.part, weight=self.part.weight, bias=None).matrix_shape

    def _parameter(self, attribute: str) -> nn.Parameter | None:
        holder, last = _held(self.module, attribute)
        return holder._parameters.get(last)


def _held(module: nn.Module, attribute: str) -> tuple[nn.Module, str]:
    """The module itself or its child that has an attribute, and its name there."""
    path, _, last = attribute.rpartition(".")
    return module.get_submodule(path), last


def uses_in(modules: list[tuple[str, nn.Module]]) -> dict[int, tuple[nn.Parameter, list[Use]]]:
    """Every parameter with all the places that hold it; two paths to one module count once."""
    uses: dict[int, tuple[nn.Parameter, list[Use]]] = {}
    seen: set[int] = set()
    gathered = gathered_for_calls(module for _, module in modules)
    for owner, module in modules:
        if id(module) in seen:
            continue
        seen.add(id(module))
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                uses.setdefault(id(parameter), (parameter, []))[1].append(
                    Use(owner, module, attribute, module in gathered)
                )
    return uses


def uses_of(parameter: Tensor | None, uses: Mapping[int, tuple[nn.Parameter, list[Use]]]) -> list[Use]:
    """The places that hold a parameter; none where there is no parameter."""
    return [] if parameter is None else uses[id(parameter)][1]


def owners_of(places: list[Use]) -> list[str]:
    """The modules that hold a parameter."""
    return [use.owner for use in places]


def roles_in(modules: list[tuple[str, nn.Module]]) -> dict[tuple[int, str], Role]:
    """What each place of a parameter is to a layer, by the module that holds it and the attribute."""
    roles: dict[tuple[int, str], Role] = {}
    seen: set[int] = set()
    for owner, module in modules:
        kind = kind_of(module)
        if kind is None or id(module) in seen:
            continue
        seen.add(id(module))
        for part in kind.parts(module):
            role = Role(owner, module, kind, part)
            for holder, attribute in role.places.values():
                roles.setdefault((id(holder), attribute), role)
    return roles
