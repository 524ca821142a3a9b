"""Which models can be wrapped: plain ones with a layer to cover, once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .errors import ArgumentError, AttachError, CoverageError, ModelChangedError
from .hooks import hook_owners
from .layers.naming import named_modules
from .layers.survey import Layer, Survey, survey


def refuse_wrapped(model: nn.Module, kind: type) -> None:
    """Refuse what is no module, and a model that has hooks of a ``kind`` already.

    Raises:
        ArgumentError: not a module.
        AttachError: the model, or a part of it, is wrapped.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is {type(model).__name__}: expected a torch.nn.Module")
    if any(isinstance(owner, kind) for owner in hook_owners(model)):
        raise AttachError(
            f"this {type(model).__name__} is already wrapped by a {kind.__name__}: use that one, or call its remove() "
            f"first"
        )


def covering(model: nn.Module, rules: Mapping[str, Mapping[str, Any]]) -> Survey:
    """The layers of a model, at least one.

    Raises:
        CoverageError: none is covered, or the model is nn.DataParallel.
        ArgumentError: a rule that does not fit.
    """
    found = survey(model, rules)
    if not found.layers:
        reasons = "; ".join(f"{row.path}: {row.reason}" for row in found.rows[:5]) or "no trainable parameter"
        raise CoverageError(f"{type(model).__name__} has no layer that KFAC covers ({reasons})")
    for name, module in named_modules(model):
        if isinstance(module, nn.DataParallel):
            raise CoverageError(
                f"'{name or type(model).__name__}' is nn.DataParallel, whose replicas lose their hooks: use "
                f"DistributedDataParallel, or the plain module"
            )
    return found


def require_unchanged(model: nn.Module, rules: Mapping[str, Mapping[str, Any]], layers: Mapping[str, Layer]) -> None:
    """Refuse a model whose layers are no longer those that were wrapped: replaced, resized, frozen, unfrozen, added.

    It reads names and shapes on the host, never a tensor.

    Raises:
        ModelChangedError: with the names of what changed.
    """
    now = survey(model, rules).layers
    changed = sorted(name for name in now.keys() | layers.keys() if now.get(name) != layers.get(name))
    if changed:
        raise ModelChangedError(
            f"{len(changed)} layers of {type(model).__name__} are no longer what was wrapped (replaced, resized, "
            f"frozen, unfrozen, added or taken out): {', '.join(changed)}. Call kfac.refresh() after such a change; it "
            f"keeps what still fits."
        )
