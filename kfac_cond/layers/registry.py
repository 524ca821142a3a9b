"""Layer kinds that users add."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from threading import Lock
from typing import TypeVar, overload

from torch import nn

from ..checks import described
from ..errors import ArgumentError
from .base import LayerKind

Kind = TypeVar("Kind", bound=type[LayerKind])

# Replaced as a whole and never changed in place, so that a survey in another thread sees all of a change or nothing.
_registered: dict[type[nn.Module], LayerKind] = {}
_lock = Lock()


@overload
def register_layer(module_type: type[nn.Module]) -> Callable[[Kind], Kind]: ...
@overload
def register_layer(module_type: type[nn.Module], kind: Kind) -> Kind: ...
def register_layer(module_type: type[nn.Module], kind: Kind | None = None) -> Kind | Callable[[Kind], Kind]:
    """Cover modules of a type by a layer kind, ``@register_layer(MyModule)`` over a ``LayerKind`` or called with both.

    It goes before the kinds of the library; a subclass of the type is of that kind as long as its ``forward`` is the
    same. ``name`` of the kind is that of the type where it has none. A model with such modules that is wrapped already
    takes it up with ``kfac.refresh()``, which its next capture asks for.

    Args:
        module_type: a class of modules whose parameters are called ``weight`` and, where there is one, ``bias``; or
            what ``parts`` and ``layout`` of the kind say.
        kind: a subclass of ``LayerKind``; left out for a decorator.

    Returns:
        The kind, as it was handed in.

    Raises:
        ArgumentError: what is no module type or no complete ``LayerKind``, or a type that was registered before.

    Examples:
        >>> import torch, kfac_cond as kc
        >>> class Scaled(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return torch.nn.functional.linear(0.1 * x, self.weight, self.bias)
        >>> @kc.register_layer(Scaled)
        ... class ScaledKind(kc.LayerKind):
        ...     def activations(self, module, inputs):
        ...         return 0.1 * inputs[:, None]
        ...     def output_gradients(self, module, gradient):
        ...         return gradient[:, None]
        >>> kc.coverage(Scaled(3, 2)).share
        1.0
        >>> kc.unregister_layer(Scaled)
    """
    _check_module_type(module_type)
    if kind is not None:
        return _register(module_type, kind)
    return lambda kind: _register(module_type, kind)


def unregister_layer(module_type: type[nn.Module]) -> None:
    """Take back ``register_layer(module_type)``; a model that is wrapped already needs ``kfac.refresh()`` then.

    Raises:
        ArgumentError: a type that is not registered.
    """
    global _registered
    with _lock:
        if module_type not in _registered:
            known = ", ".join(one.__name__ for one in _registered) or "none"
            raise ArgumentError(f"{described(module_type)} is not registered; registered are {known}")
        _registered = {one: kind for one, kind in _registered.items() if one is not module_type}


def registered(module: nn.Module) -> list[LayerKind]:
    """The registered kinds of a module's types, the nearest type first."""
    return [_registered[base] for base in type(module).__mro__ if base in _registered]


def _register(module_type: type[nn.Module], kind: Kind) -> Kind:
    global _registered
    if not (isinstance(kind, type) and issubclass(kind, LayerKind)):
        raise ArgumentError(
            f"register_layer({module_type.__name__}) got {described(kind)}: expected a subclass of kc.LayerKind"
        )
    if inspect.isabstract(kind):
        raise ArgumentError(
            f"register_layer({module_type.__name__}): {kind.__name__} does not define "
            f"{' and '.join(sorted(kind.__abstractmethods__))}; see kc.LayerKind for what each returns"
        )
    # A subclass of its own: one kind may serve several types, and the library's own stay as they are.
    name = getattr(kind, "name", module_type.__name__)
    of_type: LayerKind = type(kind.__name__, (kind,), {"modules": (module_type,), "name": name})()
    with _lock:
        if module_type in _registered:
            raise ArgumentError(
                f"{module_type.__name__} is registered already, as {type(_registered[module_type]).__name__}: call "
                f"kc.unregister_layer({module_type.__name__}) first"
            )
        _registered = {**_registered, module_type: of_type}
    return kind


def _check_module_type(module_type: object) -> None:
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise ArgumentError(
            f"register_layer got {described(module_type)}: expected a class of modules, a subclass of torch.nn.Module"
        )
    if module_type is nn.Module:
        raise ArgumentError("register_layer got nn.Module, which every module is: expected the class of one layer")
