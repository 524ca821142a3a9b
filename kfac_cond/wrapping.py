"""Which models can be wrapped: plain ones with a layer to cover, once."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .checks import check_module
from .errors import AttachError, CoverageError, ModelChangedError
from .hooks import hook_owners
from .layers.naming import named_modules
from .layers.survey import Layer, Survey


def refuse_wrapped(model: nn.Module, kind: type) -> None:
    """Refuse what is no module, and a model that has hooks of a ``kind`` already.

    Raises:
        ArgumentError: not a module.
        AttachError: the model, or a part of it, is wrapped.
    """
    check_module(model)
    if any(isinstance(owner, kind) for owner in hook_owners(model)):
        raise AttachError(
            f"this {type(model).__name__} is already wrapped by a {kind.__name__}: use that one, or call its remove() "
            f"first. Where it is lost, as after a notebook cell that ran twice, kc.detach(model) takes it off."
        )


def detach(model: nn.Module) -> None:
    """Take whatever KFAC there is off ``model``, for when the object itself is lost; where there is none, do nothing.

    It is what the ``remove()`` of that KFAC does: its hooks on the model, the criterion and the optimizers are gone.

    Args:
        model: the wrapped module, or one that a wrapped module contains or is part of.

    Raises:
        ArgumentError: not a module.

    Examples:
        >>> import torch, kfac_cond as kc
        >>> model = torch.nn.Linear(3, 2)
        >>> kfac = kc.KFAC(model, "categorical")
        >>> del kfac
        >>> kc.detach(model)
        >>> kfac = kc.KFAC(model, "categorical")
    """
    check_module(model)
    for owner in list(hook_owners(model)):
        owner.remove()


def require_covering(model: nn.Module, found: Survey) -> None:
    """Refuse a model in which no layer was found, or whose hooks would be lost.

    Raises:
        CoverageError: none is covered, or the model is nn.DataParallel.
    """
    if not found.layers:
        reasons = "; ".join(f"{row.path}: {row.reason}" for row in found.rows[:5]) or "no trainable parameter"
        raise CoverageError(f"{type(model).__name__} has no layer that KFAC covers ({reasons})")
    for name, module in named_modules(model):
        if isinstance(module, nn.DataParallel):
            raise CoverageError(
                f"'{name or type(model).__name__}' is nn.DataParallel, whose replicas lose their hooks: use "
                f"DistributedDataParallel, or the plain module"
            )


def require_unchanged(model: nn.Module, now: Mapping[str, Layer], layers: Mapping[str, Layer]) -> None:
    """Refuse a model whose layers are no longer those that were wrapped: replaced, resized, frozen, unfrozen, added.

    It reads names and shapes on the host, never a tensor.

    Raises:
        ModelChangedError: with the names of what changed.
    """
    changed = sorted(name for name in now.keys() | layers.keys() if now.get(name) != layers.get(name))
    if changed:
        raise ModelChangedError(
            f"{len(changed)} layers of {type(model).__name__} are no longer what was wrapped (replaced, resized, "
            f"frozen, unfrozen, added or taken out): {', '.join(changed)}. Call kfac.refresh() after such a change; it "
            f"keeps what still fits."
        )
