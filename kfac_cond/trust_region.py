"""Rules that shorten an update so that its step stays where the quadratic model holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor

from .checks import described, is_number
from .errors import ArgumentError, StateError


@dataclass(frozen=True)
class LayerUpdate:
    """What a trust region sees of a layer.

    Args:
        gradient: the gradient of the mean loss, unscaled, as the layer's matrix.
        update: the preconditioned gradient u = (F + damping)^-1 gradient, as the layer's matrix.
        rate: the learning rate it will be multiplied with.
        name: of the layer.
    """

    gradient: Tensor
    update: Tensor
    rate: float | Tensor
    name: str = ""


class TrustRegion(Protocol):
    """Anything that turns the updates of one step into factors on the device, without a host sync.

    One with a state between steps has ``state_dict`` and ``load_state_dict`` as well, and is saved with the KFAC; one
    that does not look at learning rates says so with ``needs_rate = False``.

    One that needs no more than a number of each layer says so with ``by_layer = True``, and has ``measure(update)`` for
    that number, 0-d, and ``factors(numbers)`` for what ``scale`` gives: then no rank has the updates of all layers of a
    sharded model. Without it they are brought together on every rank.
    """

    def scale(self, updates: Sequence[LayerUpdate]) -> Tensor | Sequence[Tensor]:
        """The factor that all updates are multiplied with, 0-d; or one for each of them, in their order."""


@dataclass(frozen=True)
class KLClip:
    """Bound the KL divergence of an update: scale by nu = min(1, sqrt(2 max_kl / sum_l rate^2 u^T g)).

    KL(p_theta || p_{theta + delta}) = 1/2 delta^T F delta to second order, with delta = -nu rate u. With
    u = (F + damping)^-1 g the damped form u^T (F + damping) u is u^T g: it costs one inner product and is never less
    than u^T F u, so the bound holds. Widely used code leaves out the 1/2, and so clips at half of what it says.

    The update is what the optimizer is handed. Plain SGD steps by just that; momentum beta adds up to 1 / (1 - beta) of
    them, with up to the square of that as KL; an optimizer that rescales gradients, as Adam does, is not bounded.

    Args:
        max_kl: largest KL of one update, per loss term, in nats.

    Source: Ba, Grosse & Martens 2017 (Distributed second-order optimization using Kronecker-factored approximations),
    section 5; the 1/2 as in Martens 2020 (arXiv:1412.1193), section 6.
    """

    max_kl: float = 1e-3
    by_layer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (is_number(self.max_kl) and self.max_kl > 0):
            raise ArgumentError(f"KLClip(max_kl={self.max_kl!r}): expected a positive number of nats")

    def scale(self, updates: Iterable[LayerUpdate]) -> Tensor:
        """nu, 0-d."""
        return self.factors([self.measure(one) for one in updates])

    def measure(self, update: LayerUpdate) -> Tensor:
        """rate^2 u^T g of a layer, 0-d."""
        # A rate may be a tensor of one entry and any shape.
        return ((update.update * update.gradient).sum() * update.rate**2).reshape(())

    def factors(self, numbers: Sequence[Tensor]) -> Tensor:
        """nu, 0-d, from what was measured of all layers."""
        total: Tensor | None = None
        for product in numbers:
            total = product if total is None else total + product.to(total.device)
        if total is None:
            return torch.ones(())
        # A sum that is not positive is round-off around zero: nothing to shorten.
        return self.bound(total, total)

    def bound(self, quadratic: Tensor, square: Tensor) -> Tensor:
        """nu = min(1, sqrt(2 max_kl / delta^T F delta)), 0-d, where that product is known."""
        nu = (2 * self.max_kl / quadratic.clamp(min=torch.finfo(quadratic.dtype).tiny)).sqrt()
        return nu.clamp(max=1.0)


@dataclass(frozen=True)
class NormConstraint:
    """Bound the Euclidean length of an update: scale by nu = min(1, max_norm / |rate u|).

    Args:
        max_norm: largest length of one update over all layers, in the units of the parameters.

    Source: Pascanu et al. 2013 (arXiv:1211.5063) for gradients; here it is the step that is bounded.
    """

    max_norm: float
    by_layer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (is_number(self.max_norm) and self.max_norm > 0):
            raise ArgumentError(f"NormConstraint(max_norm={self.max_norm!r}): expected a positive number")

    def scale(self, updates: Iterable[LayerUpdate]) -> Tensor:
        """nu, 0-d."""
        return self.factors([self.measure(one) for one in updates])

    def measure(self, update: LayerUpdate) -> Tensor:
        """rate^2 u^T u of a layer, 0-d."""
        return (update.update.square().sum() * update.rate**2).reshape(())

    def factors(self, numbers: Sequence[Tensor]) -> Tensor:
        """nu, 0-d, from what was measured of all layers."""
        if not numbers:
            return torch.ones(())
        total = torch.stack([one.to(numbers[0].device) for one in numbers]).sum()
        return self.bound(total, total)

    def bound(self, quadratic: Tensor, square: Tensor) -> Tensor:
        """min(1, max_norm / sqrt(delta^T delta)), 0-d."""
        nu = self.max_norm / square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()
        return nu.clamp(max=1.0)


class Bound(Protocol):
    """A trust region that can be had from two numbers of the whole step: one for ``kc.NaturalGradient``."""

    def bound(self, quadratic: Tensor, square: Tensor) -> Tensor:
        """The factor, 0-d, of a step delta with delta^T F delta = ``quadratic`` and delta^T delta = ``square``."""


def as_bound(value: object) -> Bound | None:
    """A bound of a whole step, or None for none, from what a user passes for it.

    Raises:
        ArgumentError: anything without ``bound``.
    """
    if value is None or (not isinstance(value, type) and callable(getattr(value, "bound", None))):
        return cast("Bound | None", value)
    raise ArgumentError(
        f"trust_region is {described(value)}: expected kc.KLClip(max_kl), kc.NormConstraint(max_norm), or None; a step "
        f"of kc.NaturalGradient is one of all layers, so that what scales layers one by one has no place"
    )


class InOrder:
    """Several trust regions, one after another.

    Each sees the updates that those before it leave, and gradients by the same factor, so that u = (F + damping)^-1 g
    holds for what it sees.

    Args:
        regions: at least one.
    """

    def __init__(self, regions: Sequence[TrustRegion]) -> None:
        self.regions = tuple(regions)

    @property
    def needs_rate(self) -> bool:
        """Whether one of them looks at learning rates."""
        return any(getattr(one, "needs_rate", True) for one in self.regions)

    def scale(self, updates: Sequence[LayerUpdate]) -> list[Tensor]:
        """The product of their factors, for each update."""
        seen, factors = list(updates), [torch.ones((), device=one.update.device) for one in updates]
        for region in self.regions:
            found = region.scale(seen)
            scales = [found] * len(seen) if isinstance(found, Tensor) else list(found)
            seen = [
                replace(one, gradient=one.gradient * c.to(one.gradient), update=one.update * c.to(one.update))
                for one, c in zip(seen, scales, strict=True)
            ]
            factors = [before * c.to(before.device) for before, c in zip(factors, scales, strict=True)]
        return factors

    def state_dict(self) -> dict[str, Any]:
        """What each of them keeps between steps, in their order."""
        return {"regions": [one.state_dict() if hasattr(one, "state_dict") else {} for one in self.regions]}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave.

        Raises:
            StateError: it is of others.
        """
        parts = saved.get("regions") if isinstance(saved, Mapping) else None
        loads = [getattr(one, "load_state_dict", None) for one in self.regions]
        if not isinstance(parts, list) or [bool(part) for part in parts] != [load is not None for load in loads]:
            raise StateError(
                f"the state has another sequence of trust regions than {self.regions!r}: give KFAC the trust_region "
                f"that was saved"
            )
        for load, part in zip(loads, parts, strict=True):
            if load is not None:
                load(part)


def measures_layers(trust_region: TrustRegion | None) -> bool:
    """Whether a number of each layer is all that is needed: it says so, and its ``scale`` was not replaced since."""
    if trust_region is None:
        return True
    classes = [vars(one) for one in type(trust_region).__mro__]
    scaling = next((place for place, names in enumerate(classes) if "scale" in names), 0)
    measured = any("measure" in names or "factors" in names for names in classes[: scaling + 1])
    return bool(getattr(trust_region, "by_layer", False)) and measured


def as_trust_region(value: object) -> TrustRegion | None:
    """A trust region, or None for none, from what a user passes for it: one, or a sequence of them.

    Raises:
        ArgumentError: a number, which does not say what it bounds, a class, or anything else without ``scale``.
    """
    if isinstance(value, tuple | list) and value and all(one is not None for one in value):
        return InOrder([cast("TrustRegion", as_trust_region(one)) for one in value])
    if value is None or (not isinstance(value, type) and callable(getattr(value, "scale", None))):
        return cast("TrustRegion | None", value)
    remedy = (
        f"pass kc.KLClip({value!r})"
        if is_number(value)
        else "expected kc.KLClip(max_kl), kc.Graft(magnitude), a sequence of such, or None"
    )
    raise ArgumentError(f"trust_region is {described(value)}: {remedy}; any object with scale(updates) will do")
