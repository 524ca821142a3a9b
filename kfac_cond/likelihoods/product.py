"""Several heads at once: outputs that parametrise more than one distribution, independent given the outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import LikelihoodError
from .base import Likelihood, is_positive

T = TypeVar("T")


class Product:
    """p(y | outputs) = prod_h p_h(y_h | outputs_h): heads of one model, each with a likelihood and a loss weight.

    The loss meant is sum_h w_h L_h, L_h the loss of head h with its own M_h; its Fisher is sum_h w_h F_h. Labels,
    masks, weights and drawn labels are mappings by head as well.

    Args:
        heads: name -> likelihood. The outputs of a head are found under its name in a mapping, as the attribute of
            that name (a dataclass, a named tuple), or, in a plain tuple or list, in the order given here.
        weights: name -> w_h, positive; 1 for a head that is not named.

    Raises:
        LikelihoodError: no head, a head that is no likelihood, or a weight that is not positive or of no head.

    Examples:
        >>> import torch, kfac_cond as kc
        >>> heads = kc.Product({"kind": kc.Categorical(), "size": kc.Gaussian()}, weights={"size": 0.1})
        >>> outputs = {"kind": torch.zeros(4, 3), "size": torch.zeros(4, 1)}
        >>> {name: tuple(labels.shape) for name, labels in heads.sample(outputs).items()}
        {'kind': (4,), 'size': (4, 1)}
    """

    def __init__(self, heads: Mapping[str, Likelihood], *, weights: Mapping[str, float] | None = None) -> None:
        if not isinstance(heads, Mapping) or not heads:
            raise LikelihoodError(f"Product({heads!r}): expected a mapping from each head's name to its likelihood.")
        for name, head in heads.items():
            if not isinstance(head, Likelihood):
                raise LikelihoodError(
                    f"Product: head {name!r} is {type(head).__name__}, expected a likelihood such as kc.Categorical()."
                )
        self.heads: dict[str, Likelihood] = dict(heads)
        given = dict(weights or {})
        for name, weight in given.items():
            if name not in self.heads or not is_positive(weight):
                raise LikelihoodError(
                    f"Product(weights={{{name!r}: {weight!r}}}): expected a positive number for one of the heads "
                    f"{', '.join(map(repr, self.heads))}."
                )
        self.weights: dict[str, float] = {name: float(given.get(name, 1.0)) for name in self.heads}

    # What a batch says -----------------------------------------------------------------------------------------------

    def bind(self, targets: Any = None, mask: Any = None, weight: Any = None) -> Product:
        """A copy whose heads know one batch's data labels, valid terms and term weights; each by head, or None."""
        targets, mask, weight = (
            self.split(given, what, partly=True) if given is not None else {}
            for what, given in (("targets", targets), ("mask", mask), ("weight", weight))
        )
        bound = {h: one.bind(targets.get(h), mask.get(h), weight.get(h)) for h, one in self.heads.items()}
        return Product(bound, weights=self.weights)

    def split(self, values: Any, what: str = "outputs", *, partly: bool = False) -> dict[str, Tensor]:
        """Values of the heads by name, from a mapping, an object with attributes, or a tuple in order.

        Args:
            values: one tensor a head.
            what: how messages call them.
            partly: whether a head may have none, or None.

        Raises:
            LikelihoodError: a head that has no tensor, or more tensors than heads in a tuple.
        """
        found = {name: _of_head(values, name, index) for index, name in enumerate(self.heads)}
        plain = isinstance(values, tuple | list) and not hasattr(values, "_fields")
        fits = {name: isinstance(value, Tensor) or (partly and value is None) for name, value in found.items()}
        missing = [name for name, fit in fits.items() if not fit]
        if missing or (plain and len(values) != len(self.heads)):
            raise LikelihoodError(
                f"{self!r}: the {what} are {_described(values)}, expected a tensor for each of the heads "
                f"{', '.join(map(repr, self.heads))}: a mapping or attributes of these names, or a tuple in this order."
            )
        return {name: value for name, value in found.items() if value is not None}

    @property
    def needs_targets(self) -> bool:
        """Whether some head needs data labels that are not bound."""
        return any(head.needs_targets for head in self.heads.values())

    def check(self, outputs: Any) -> None:
        """Refuse outputs that some head refuses, or heads of different numbers of examples."""
        self.examples(outputs)

    def examples(self, outputs: Any) -> int:
        """N, the same for all heads."""
        counts = self._each(outputs, lambda head, f: head.examples(f))
        if len(set(counts.values())) > 1:
            raise LikelihoodError(
                f"{self!r}: the heads have different numbers of examples along dimension 0, {counts}: expected the "
                f"same. Mask what a head does not say: Product.bind(mask=...) or kc.Data(mask=...)."
            )
        return next(iter(counts.values()))

    def terms(self, outputs: Any) -> Tensor:
        """M, the divisor that ``score`` and ``kl`` are scaled into: that of the first head, 0-d."""
        name, head = next(iter(self.heads.items()))
        return head.terms(self.split(outputs)[name])

    # The distribution ------------------------------------------------------------------------------------------------

    def sample(self, outputs: Any, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Labels drawn from p(y | outputs), by head."""
        return self._each(outputs, lambda head, f: head.sample(f, generator))

    def score(self, outputs: Any, labels: Any) -> dict[str, Tensor]:
        """The scores by head, each times sqrt(w_h M / M_h), so that (1/M) times their second moment is that of all."""
        drawn, scales = self.split(labels, "labels"), self._scales(outputs)
        return {
            name: self.heads[name].weighted_score(f, drawn[name]) * scales[name].sqrt().to(f)
            for name, f in self.split(outputs).items()
        }

    def log_prob(self, outputs: Any, labels: Any) -> dict[str, Tensor]:
        """log p of each term, by head, without weights."""
        drawn = self.split(labels, "labels")
        return {name: self.heads[name].log_prob(f, drawn[name]) for name, f in self.split(outputs).items()}

    def fisher(self, outputs: Any) -> dict[str, Tensor]:
        """E_y[s s^T] of each term, by head, without weights."""
        return self._each(outputs, lambda head, f: head.fisher(f))

    def fisher_sqrt(self, outputs: Any) -> dict[str, Tensor]:
        """S with S S^T = fisher of each term, by head."""
        return self._each(outputs, lambda head, f: head.fisher_sqrt(f))

    def kl(self, outputs: Any, other: Any) -> Tensor:
        """sum_h (w_h M / M_h) KL_h: 0-d; over M it is what half the quadratic form of F is to second order."""
        others, scales = self.split(other, "other outputs"), self._scales(outputs)
        parts = [self.heads[name].kl(f, others[name]) * scales[name].to(f) for name, f in self.split(outputs).items()]
        return torch.stack([part.to(parts[0]) for part in parts]).sum()

    def _scales(self, outputs: Any) -> dict[str, Tensor]:
        """w_h M / M_h; 0 for a head without a valid term."""
        M = self.terms(outputs)
        divisors = self._each(outputs, lambda head, f: head.terms(f).to(M))
        return {
            name: torch.where(own > 0, self.weights[name] * M / torch.where(own > 0, own, 1), 0)
            for name, own in divisors.items()
        }

    def _each(self, outputs: Any, function: Callable[[Likelihood, Tensor], T]) -> dict[str, T]:
        return {name: function(self.heads[name], f) for name, f in self.split(outputs).items()}

    def __repr__(self) -> str:
        weights = {name: weight for name, weight in self.weights.items() if weight != 1.0}
        return f"Product({self.heads!r}{f', weights={weights}' if weights else ''})"


def _of_head(values: Any, name: str, index: int) -> Any:
    if isinstance(values, Mapping):
        return values.get(name)
    if isinstance(values, tuple | list) and not hasattr(values, "_fields"):
        return values[index] if index < len(values) else None
    return getattr(values, name, None) if isinstance(name, str) else None


def _described(values: Any) -> str:
    if isinstance(values, Tensor):
        return f"one tensor of shape {tuple(values.shape)}"
    if isinstance(values, Mapping):
        return f"{type(values).__name__} with keys {list(values)[:8]}"
    if isinstance(values, tuple | list):
        return f"{type(values).__name__} of {[type(one).__name__ for one in values][:8]}"
    return type(values).__name__
