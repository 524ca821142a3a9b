"""Which models can be wrapped: plain ones with a layer to cover, once; and what is said of what is left out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from operator import is_
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .checks import check_module
from .errors import AttachError, CoverageError, ModelChangedError
from .hooks import hook_owners
from .layers import KINDS
from .layers.layer import Layer
from .layers.naming import named_modules
from .layers.registry import registered
from .layers.shards import has_stand_ins
from .layers.survey import Survey, survey

logger = logging.getLogger("kfac_cond")

PLAIN = (bool, int, float, str, tuple)
"""Types of attributes that say what a module computes: a stride, a mode of padding."""
METHODS = frozenset(name for kind in KINDS for name in kind.methods)
"""Whatever says what a module of some kind computes."""


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


def refuse_unfit(model: nn.Module) -> None:
    """Refuse a model with parts that hooks and gradients do not get through.

    Raises:
        CoverageError: it has a replicating or a quantised part.
    """
    for name, module in named_modules(model):
        said = f"'{name or type(model).__name__}'"
        if isinstance(module, nn.DataParallel):
            raise CoverageError(
                f"{said} is nn.DataParallel, whose replicas lose their hooks: use DistributedDataParallel, or the "
                f"plain module"
            )
        if any(one.__name__ == "FullyShardedDataParallel" for one in type(module).__mro__):
            raise CoverageError(
                f"{said} is FullyShardedDataParallel (FSDP1), which flattens the parameters of its layers into one: "
                f"use torch.distributed.fsdp.fully_shard (FSDP2), which leaves them as they are"
            )
        if isinstance(module, DistributedDataParallel) and has_stand_ins(module):
            raise CoverageError(
                f"{said} is DistributedDataParallel around a module that parallelize_module cut, in whose place it "
                f"trains plain tensors, each a part of a weight: use fully_shard(model, mesh=mesh['dp']), or average "
                f"the gradients of the plain model yourself"
            )
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise CoverageError(
                f"{said} is a quantised {type(module).__name__}, whose weight does not train and through which no "
                f"gradient goes back: expected layers in floating point. Quantise after training, or take the part of "
                f"the model that trains"
            )


def name_left_out(found: Survey) -> None:
    """Name the trainable parameters that are not covered, though no rule excludes them."""
    left = [row for row in found.rows if row.remedy and not row.covered and row.path not in found.excluded]
    if left:
        logger.warning(
            "%d of %d trainable parameters are not covered: %s. They have no block, and in training keep their plain "
            "gradient.",
            len(left),
            len(found.rows),
            "; ".join(f"{row.path} ({row.reason}: {row.remedy})" for row in left),
        )


def require_covering(model: nn.Module, found: Survey) -> None:
    """Refuse a model in which no layer was found, or whose calls cannot be listened to; name what is not covered.

    Raises:
        CoverageError: none is covered, or the model has a part that cannot be captured.
    """
    refuse_unfit(model)
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise CoverageError(
            f"this {type(model).__name__} was compiled by its own compile(), which compiles the very call that is "
            f"listened to: give KFAC what torch.compile(model) returns, and call that"
        )
    if not found.layers:
        reasons = "; ".join(f"{row.path}: {row.reason}" for row in found.rows[:5]) or "no trainable parameter"
        raise CoverageError(f"{type(model).__name__} has no layer that KFAC covers ({reasons})")
    name_left_out(found)


class Marks:
    """What a survey looks at, in a form that is soon compared: where two are equal, so is what is covered.

    Modules, their kinds, parameters and what says what their classes compute are compared by identity, plain attributes
    by value.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held: list[object] = []
        self._plain: list[object] = []
        for name, module in named_modules(model):
            parameters = module._parameters
            kinds, of = registered(module), type(module)
            methods = METHODS.union(*(one.methods for one in kinds))
            self._held += (module, of, *kinds, *(getattr(of, one, None) for one in sorted(methods)))
            self._held += parameters.values()
            kept = {key: (tuple(p.shape), p.requires_grad) for key, p in parameters.items() if p is not None}
            plain = {key: one if isinstance(one, PLAIN) else None for key, one in vars(module).items()}
            self._plain.append((name, kept, plain))

    def same(self, other: Marks) -> bool:
        """Whether nothing that a survey looks at differs."""
        if len(self._held) != len(other._held) or self._plain != other._plain:
            return False
        return all(map(is_, self._held, other._held))


class Wrapped:
    """A model with the settings it was wrapped with: its layers as they were then, and as they are now.

    Args:
        model: the module.
        rules: settings by pattern, seen to be such.
        structure: what training keeps a layer in where no rule says another.

    Raises:
        CoverageError: no layer is covered, or the model has a part that cannot be captured.
        ArgumentError: rules that do not fit.
    """

    def __init__(self, model: nn.Module, rules: Mapping[str, Mapping[str, Any]], structure: str) -> None:
        self.model, self.rules, self.structure = model, rules, structure
        #: Layers whose weight was seen to be used without a call of their module.
        self.functional: frozenset[str] = frozenset()
        self._survey = self.now()
        require_covering(model, self._survey)
        self._marks = Marks(model)

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The covered layers by name, as they were last looked at."""
        return self._survey.layers

    def now(self, functional: frozenset[str] | None = None) -> Survey:
        """The model as it is now; with other layers than those known to be used functionally, where they are given."""
        known = self.functional if functional is None else functional
        return survey(self.model, self.rules, training=self.structure, functional=known)

    def look_again(self, functional: frozenset[str] | None = None) -> list[str]:
        """Take the layers that there are now, and give the names of those that changed or are gone."""
        fresh = self.now(functional)
        require_covering(self.model, fresh)
        changed = [name for name, layer in self.layers.items() if fresh.layers.get(name) != layer]
        self.functional = self.functional if functional is None else functional
        self._survey, self._marks = fresh, Marks(self.model)
        return changed

    def without_a_form(self, functional: set[str]) -> list[str]:
        """``look_again`` after these layers' weights were seen to be used without a call of their modules."""
        logger.warning(
            "%d of %d layers have a weight that is used without a call of their module: %s. From the next capture on "
            "their parameters are in the universal form.",
            len(functional),
            len(self.layers),
            ", ".join(sorted(functional)),
        )
        return self.look_again(self.functional | functional)

    def require_unchanged(self) -> None:
        """Refuse layers that are no longer those that were wrapped: replaced, resized, frozen, unfrozen, added.

        It reads names and shapes on the host, never a tensor.

        Raises:
            ModelChangedError: with the names of what changed.
        """
        marks = Marks(self.model)
        if marks.same(self._marks):
            return
        now, layers = self.now().layers, self.layers
        changed = sorted(name for name in now.keys() | layers.keys() if now.get(name) != layers.get(name))
        if changed:
            raise ModelChangedError(
                f"{len(changed)} layers of {type(self.model).__name__} are no longer what was wrapped (replaced, "
                f"resized, frozen, unfrozen, added or taken out): {', '.join(changed)}. Call kfac.refresh() after such "
                f"a change; it keeps what still fits."
            )
        self._marks = marks
