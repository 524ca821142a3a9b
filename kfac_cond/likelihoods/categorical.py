"""The categorical likelihood: one class a term, outputs are logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import LikelihoodError
from . import events
from .base import Likelihood, uniforms

#: What torch's cross entropy ignores unless told otherwise.
TORCH_IGNORE_INDEX = -100
# Probabilities are counted in units of 2^-30, so that their sum over the classes stays within int32.
_UNITS = 2**30


class Categorical(Likelihood):
    """Class labels with softmax probabilities; its 'mean' and weights are those of torch's cross entropy.

    Args:
        dim: the dimension of the classes, C >= 2. None: the last of two, and more are refused as ambiguous.
        weight: class weights (C,), floating, not negative. kappa of a term is w_y, or sum_c q_c w_c for a target
            distribution q, and 'mean' divides by the sum of w_y. Needs data labels.
        ignore_index: data label of terms that do not count; giving it makes data labels required. None ignores torch's
            -100 where labels are bound.
        label_smoothing: the loss's, in [0, 1]. It enters kappa of weighted classes alone.
        reduction: 'mean' or 'sum'.
        divisor: M, where it is neither.

    Data labels are integers shaped as the terms, or probabilities shaped as the outputs, to which ignore_index does not
    apply.

    Raises:
        LikelihoodError: an argument out of its range.

    Source: Martens 2020 (arXiv:1412.1193), section 9: for logits the Fisher is the Hessian diag(p) - p p^T of -log p at
        any label. Label smoothing: Szegedy et al. 2016 (arXiv:1512.00567), section 7.
    """

    def __init__(
        self,
        *,
        dim: int | None = -1,
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        divisor: float | None = None,
    ) -> None:
        super().__init__(reduction=reduction, divisor=divisor)
        for name, value in (("dim", dim), ("ignore_index", ignore_index)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise LikelihoodError(f"Categorical({name}={value!r}): expected an integer.")
        if dim == 0:
            raise LikelihoodError("Categorical(dim=0): dimension 0 counts examples; the classes lie along another.")
        if not 0.0 <= label_smoothing <= 1.0:
            raise LikelihoodError(f"Categorical(label_smoothing={label_smoothing!r}): expected a number in [0, 1].")
        if weight is not None:
            _check_class_weight(weight)
        self.dim = dim
        self.class_weight = None if weight is None else weight.detach()
        self.ignore_index = ignore_index
        self.label_smoothing = float(label_smoothing)
        # Shared by bound copies: one move to each device, not one a batch.
        self._moved: dict[torch.device, Tensor] = {}

    @property
    def needs_targets(self) -> bool:
        """Whether class weights or ignored labels were asked for and no data labels are bound."""
        return self.targets is None and (self.class_weight is not None or self.ignore_index is not None)

    def event_axes(self, outputs: Tensor) -> tuple[int, ...]:
        """The dimension of the classes."""
        shape = tuple(outputs.shape)
        if outputs.ndim == 1:
            raise LikelihoodError(
                f"{self!r}: outputs of shape {shape} have no dimension of classes beside that of examples: expected "
                f"(N, C) or more. One logit an example is kc.Bernoulli(); one unbatched example needs unsqueeze(0)."
            )
        if self.dim is None and outputs.ndim > 2:
            raise LikelihoodError(
                f"outputs of shape {shape}: a criterion alone does not say along which dimension the classes lie. Pass "
                f"kc.Categorical(dim=1) for torch's order (N, C, ...) or kc.Categorical(dim=-1) for the order of "
                f"language models, (N, ..., C)."
            )
        axes = events.event_axes((-1 if self.dim is None else self.dim,), outputs.ndim)
        if axes is None:
            raise LikelihoodError(
                f"{self!r}: outputs of shape {shape} have no dimension {self.dim} other than that of examples: "
                f"expected the classes along it."
            )
        return axes

    def check(self, outputs: Tensor) -> None:
        """Refuse outputs that cannot be logits of classes along ``dim``, and labels or weights that do not fit."""
        super().check(outputs)
        (axis,) = self.event_axes(outputs)
        shape, classes = tuple(outputs.shape), outputs.shape[axis]
        if classes < 2:
            raise LikelihoodError(
                f"{self!r}: outputs of shape {shape} have {classes} class along dimension {axis}, expected at least 2: "
                f"a single logit a term is kc.Bernoulli(event_dims=())."
            )
        if self.class_weight is not None and len(self.class_weight) != classes:
            raise LikelihoodError(
                f"{self!r}: {len(self.class_weight)} class weights for {classes} classes (outputs of shape {shape}, "
                f"classes along dimension {axis})."
            )
        if self.targets is not None:
            terms = self._without(outputs, (axis,))
            expected = shape if self.targets.is_floating_point() else terms
            if tuple(self.targets.shape) != expected or self.targets.dtype == torch.bool:
                raise LikelihoodError(
                    f"{self!r}: the targets have shape {tuple(self.targets.shape)} and dtype {self.targets.dtype}, "
                    f"expected integers of shape {terms} or probabilities of shape {shape}."
                )

    # What the data labels say ----------------------------------------------------------------------------------------

    def valid(self, outputs: Tensor) -> Tensor | None:
        """Terms neither masked nor ignored."""
        self.check(outputs)
        if self.targets is None:
            if self.ignore_index is not None:
                raise self._unbound(f"ignore_index={self.ignore_index}")
            return self.mask
        if self.targets.is_floating_point():
            return self.mask
        ignored = TORCH_IGNORE_INDEX if self.ignore_index is None else self.ignore_index
        kept = self.targets.long() != ignored
        return kept if self.mask is None else kept & self.mask

    def term_weight(self, outputs: Tensor) -> Tensor | None:
        """(1 - eps) w_y + eps mean(w) for label smoothing eps; w_y is sum_c q_c w_c of a target distribution."""
        bound = super().term_weight(outputs)
        kappa = self._target_weight(outputs)
        if kappa is None or bound is None:
            return bound if kappa is None else kappa
        return kappa * bound

    def _target_weight(self, outputs: Tensor) -> Tensor | None:
        weight, smoothing = self._class_weight(outputs), self.label_smoothing
        if self.targets is not None and self.targets.is_floating_point():
            q = events.to_events(events.widened(self.targets), self.event_axes(outputs))
            if weight is None:
                return (1 - smoothing) * q.sum(-1) + smoothing
            return (1 - smoothing) * (q * weight).sum(-1) + smoothing * weight.mean()
        if weight is None:
            return None
        return (1 - smoothing) * weight[self._hard_targets(outputs)] + smoothing * weight.mean()

    def _mean_divisor(self, outputs: Tensor) -> Tensor:
        """Torch's: the sum of w_y over valid labels where classes have weights; else the number of valid terms."""
        weight = self._class_weight(outputs)
        if weight is None or (self.targets is not None and self.targets.is_floating_point()):
            return super()._mean_divisor(outputs)
        w_y = self._zero_invalid(weight[self._hard_targets(outputs)], outputs)
        return w_y.sum(dtype=events.count_dtype(outputs.device))

    def _hard_targets(self, outputs: Tensor) -> Tensor:
        if self.targets is None:
            raise self._unbound("class weights")
        return self._clamped(outputs, self.targets)

    def _class_weight(self, outputs: Tensor) -> Tensor | None:
        if self.class_weight is None:
            return None
        weight = self.class_weight
        if weight.device != outputs.device:
            if outputs.device not in self._moved:
                self._moved[outputs.device] = weight.to(outputs.device)
            weight = self._moved[outputs.device]
        return weight.to(torch.promote_types(outputs.dtype, torch.float32))

    def _unbound(self, what: str) -> LikelihoodError:
        return LikelihoodError(
            f"{self!r}: {what} need the data labels, and none are bound: call kfac.update(outputs, targets=labels), or "
            f"bind(targets=labels)."
        )

    # The distribution ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Classes drawn by the inverse cdf, one uniform a term; int64, shaped as the terms.

        A class of probability 0 is never drawn.
        """
        self.check(outputs)
        axes = self.event_axes(outputs)
        p = events.to_events(events.widened(outputs), axes).softmax(-1)
        # Whole units: their cumulative sum is exact and monotone on every device, also where torch has no deterministic
        # cumulative sum of floats, and a class of probability 0 takes up no unit.
        cumulative = (p * _UNITS).round_().int().cumsum(-1, dtype=torch.int32).contiguous()
        u = uniforms(self._without(outputs, axes), outputs, generator)
        unit = ((u * 2**24).long() * cumulative[..., -1].long()) >> 24
        drawn = torch.searchsorted(cumulative, unit.int().unsqueeze(-1), right=True).squeeze(-1)
        # Logits that are not finite must not lead to an index out of bounds.
        return drawn.clamp(0, p.shape[-1] - 1)

    @torch.no_grad()
    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """p - e_y for each valid term, shaped as the outputs."""
        self._check_labels(outputs, labels)
        (axis,) = self.event_axes(outputs)
        score = events.widened(outputs).softmax(axis)
        at = self._clamped(outputs, labels).unsqueeze(axis)
        score.scatter_(axis, at, score.gather(axis, at) - 1)
        valid = self.valid(outputs)
        if valid is not None:
            score.masked_fill_(~valid.unsqueeze(axis), 0.0)
        return score.to(outputs.dtype)

    def log_prob(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """log p_y of each term, zero at invalid terms; differentiable in the outputs."""
        self._check_labels(outputs, labels)
        at = self._clamped(outputs, labels).unsqueeze(-1)
        log_p = self._events(outputs).log_softmax(-1).gather(-1, at).squeeze(-1)
        return self._zero_invalid(log_p, outputs)

    def fisher(self, outputs: Tensor) -> Tensor:
        """diag(p) - p p^T of each term: [*terms, C, C]."""
        p = self._probabilities(outputs)
        return self._zero_invalid(torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2), outputs)

    def fisher_sqrt(self, outputs: Tensor) -> Tensor:
        """diag(sqrt p) - p sqrt(p)^T of each term: [*terms, C, C]."""
        p = self._probabilities(outputs)
        root = p.sqrt()
        return self._zero_invalid(torch.diag_embed(root) - p.unsqueeze(-1) * root.unsqueeze(-2), outputs)

    def _term_columns(self, outputs: Tensor) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
        # From the probabilities of one position at a time: the whole square root would be C times the outputs.
        logits = events.to_events(events.widened(outputs), self.event_axes(outputs))
        for at in self._term_indices(outputs):
            p = logits[at].softmax(-1)
            for k in range(p.shape[-1]):
                root = p[:, k : k + 1].sqrt()
                column = -root * p
                column[:, k : k + 1] += root
                yield at, column

    def kl_terms(self, outputs: Tensor, other: Tensor) -> Tensor:
        """sum_c p_c (log p_c - log q_c) of each term, zero at invalid terms."""
        self.check(outputs)
        self._check_same("other outputs", other, tuple(outputs.shape))
        log_p, log_q = self._events(outputs).log_softmax(-1), self._events(other).log_softmax(-1)
        p = log_p.exp()
        return self._zero_invalid((p * (log_p - log_q)).masked_fill(p == 0, 0.0).sum(-1), outputs)

    def _probabilities(self, outputs: Tensor) -> Tensor:
        self.check(outputs)
        return self._events(outputs).softmax(-1)

    # Labels ----------------------------------------------------------------------------------------------------------

    def invalid_labels(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Whether some valid term's class is not one of 0 ... C-1."""
        self._check_labels(outputs, labels)
        classes = self._event_sizes(outputs)[0]
        labels = labels.long()
        return self._any_valid((labels < 0) | (labels >= classes), outputs)

    def invalid_targets(self, outputs: Tensor) -> Tensor:
        """The same of bound data labels; of probabilities, whether one is negative or not finite."""
        if self.targets is None or not self.targets.is_floating_point():
            return super().invalid_targets(outputs)
        self.check(outputs)
        q = events.to_events(self.targets, self.event_axes(outputs))
        return self._any_valid(~((q >= 0) & q.isfinite()).all(-1), outputs)

    def _check_labels(self, outputs: Tensor, labels: Tensor) -> None:
        self.check(outputs)
        terms = self._without(outputs, self.event_axes(outputs))
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise LikelihoodError(f"{self!r}: the labels are {labels.dtype}, expected integers of shape {terms}.")
        self._check_same("labels", labels, terms)

    def _clamped(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return labels.long().clamp(0, self._event_sizes(outputs)[0] - 1)

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"dim": self.dim}
        if self.class_weight is not None:
            settings["weight"] = f"{len(self.class_weight)} classes"
        if self.ignore_index is not None:
            settings["ignore_index"] = self.ignore_index
        if self.label_smoothing:
            settings["label_smoothing"] = self.label_smoothing
        return settings


def _check_class_weight(weight: Tensor) -> None:
    """Reads values: run when a likelihood is made, never in a step."""
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not weight.is_floating_point():
        found = (
            f"{weight.dtype} of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        )
        raise LikelihoodError(f"Categorical(weight=...): found {found}, expected a floating tensor (C,), one a class.")
    if weight.device.type != "meta" and not bool(((weight >= 0) & weight.isfinite()).all()):
        raise LikelihoodError("Categorical(weight=...): expected finite class weights, none of them negative.")
