"""What every likelihood p(y | outputs) answers: terms, valid terms and weights, draws, scores and its Fisher."""

from __future__ import annotations

import copy
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from ..errors import LikelihoodError
from . import events

L = TypeVar("L", bound="Likelihood")


class Likelihood(ABC):
    """A conditional distribution p(y | outputs), with the scale of the loss it stands for.

    One term is one random y; its parameters are the entries of the outputs along the event's dimensions, and all other
    dimensions count terms. Dimension 0 counts examples and is never part of an event. The loss meant is the sum over
    valid terms of kappa times -log p, divided by M.

    A class of one's own needs ``sample`` and ``score``; ``log_prob``, ``fisher_sqrt`` and ``kl_terms`` are needed for
    what stands on them. It may set ``event_dims`` as a class attribute.

    Args:
        reduction: 'mean' (M is the number of valid terms) or 'sum' (M is 1), as the loss reduces. 'none' needs
            a divisor.
        divisor: M of one call, where it is neither.

    Raises:
        LikelihoodError: an unknown reduction, 'none' without a divisor, or a divisor that is not a positive number.

    Examples:
        >>> class Exponential(Likelihood):
        ...     "Waiting times; outputs are log rates, -log p = rate y - log rate."
        ...
        ...     def sample(self, outputs, generator=None):
        ...         u = torch.rand(outputs.shape, generator=generator, device=outputs.device)
        ...         return -torch.log1p(-u) / outputs.exp()
        ...
        ...     def score(self, outputs, labels):
        ...         return outputs.exp() * labels - 1
    """

    # Class attributes, so that a class of one's own that never calls this constructor has them as well.
    reduction: str = "mean"
    divisor: float | None = None
    #: The dimensions of the outputs that make one event; None: none of (N,), the vector of C of (N, C).
    event_dims: tuple[int, ...] | None = None
    #: Data labels, valid terms and term weights of one batch: see ``bind``.
    targets: Tensor | None = None
    mask: Tensor | None = None
    weights: Tensor | None = None

    def __init__(self, *, reduction: str = "mean", divisor: float | None = None) -> None:
        if reduction not in ("mean", "sum", "none"):
            raise LikelihoodError(f"{self._name}(reduction={reduction!r}): expected 'mean' or 'sum'.")
        if divisor is not None and not is_positive(divisor):
            raise LikelihoodError(
                f"{self._name}(divisor={divisor!r}): expected a positive number, the loss's divisor M."
            )
        if reduction == "none" and divisor is None:
            raise LikelihoodError(
                f"reduction='none' does not say what the loss divides its terms by: give {self._name}("
                f"reduction='mean') or 'sum' as you reduce them, or divisor=M where you divide by another number."
            )
        self.reduction = reduction
        self.divisor = divisor

    # What a batch says -----------------------------------------------------------------------------------------------

    def bind(self: L, targets: Tensor | None = None, mask: Tensor | None = None, weight: Tensor | None = None) -> L:
        """A copy that knows one batch's data labels, valid terms and term weights; those bound before are dropped.

        Args:
            targets: data labels. They serve valid terms, weights and M alone, never the score.
            mask: bool, shaped as the terms; False leaves a term out of everything, M included.
            weight: kappa of each term, shaped as the terms, not negative. It does not enter M.
        """
        bound = copy.copy(self)
        bound.targets = None if targets is None else targets.detach()
        bound.mask = None if mask is None else mask.detach()
        bound.weights = None if weight is None else weight.detach()
        return bound

    @property
    def needs_targets(self) -> bool:
        """Whether data labels are required (by class weights, say) and none are bound."""
        return False

    def check(self, outputs: Tensor) -> None:
        """Refuse what cannot be outputs of this likelihood; reads shapes and dtypes alone, never values.

        Raises:
            LikelihoodError: not a floating tensor, too few or ambiguous dimensions, or bound labels, mask or weights
                that do not fit the outputs.
        """
        if not isinstance(outputs, Tensor):
            raise LikelihoodError(
                f"{self!r}: the outputs are {type(outputs).__name__}, expected one tensor; where the model returns "
                f"several, pass the one that parametrises p."
            )
        if not outputs.is_floating_point():
            raise LikelihoodError(
                f"{self!r}: the outputs are {outputs.dtype}, expected floating point: the parameters of p, not labels."
            )
        if outputs.ndim == 0:
            raise LikelihoodError(
                f"{self!r}: the outputs are 0-dimensional, expected examples along dimension 0: the loss's value is "
                f"not what parametrises p."
            )
        terms = self._without(outputs, self.event_axes(outputs))
        for name, bound in (("mask", self.mask), ("weight", self.weights)):
            if bound is not None and tuple(bound.shape) != terms:
                raise LikelihoodError(
                    f"{self!r}: the {name} has shape {tuple(bound.shape)}, expected that of the terms, {terms}, for "
                    f"outputs of shape {tuple(outputs.shape)}."
                )
        if self.mask is not None and self.mask.dtype != torch.bool:
            raise LikelihoodError(f"{self!r}: the mask is {self.mask.dtype}, expected torch.bool: pass mask.bool().")

    def event_axes(self, outputs: Tensor) -> tuple[int, ...]:
        """The dimensions of the outputs that make one event, ascending, never 0.

        Raises:
            LikelihoodError: more than two dimensions without ``event_dims``, or dimensions that do not exist.
        """
        shape = tuple(outputs.shape)
        if self.event_dims is None:
            if outputs.ndim <= 2:
                return tuple(range(1, outputs.ndim))
            raise LikelihoodError(
                f"{self!r}: outputs of shape {shape} have more than two dimensions, and it must be said which of them "
                f"make one event: event_dims={tuple(range(1, outputs.ndim))} for one event an example, "
                f"event_dims=(-1,) for one a position, event_dims=() for a term an element."
            )
        axes = events.event_axes(self.event_dims, outputs.ndim)
        if axes is None:
            raise LikelihoodError(
                f"{self!r}: event_dims={self.event_dims} does not fit outputs of shape {shape}: expected different "
                f"dimensions that exist, none of them 0, which counts examples."
            )
        return axes

    def event_shape(self, outputs: Tensor) -> tuple[int, ...]:
        """The sizes of the event's dimensions; () where every element is a term."""
        self.check(outputs)
        return self._event_sizes(outputs)

    def term_shape(self, outputs: Tensor) -> tuple[int, ...]:
        """The sizes of all other dimensions, examples first."""
        self.check(outputs)
        return self._without(outputs, self.event_axes(outputs))

    def spread(self, values: Tensor, outputs: Tensor) -> Tensor:
        """A tensor shaped as the terms, made broadcastable to the outputs."""
        self.check(outputs)
        return events.spread(values, self.event_axes(outputs))

    def examples(self, outputs: Tensor) -> int:
        """N, the number of examples."""
        self.check(outputs)
        return outputs.shape[0]

    def terms(self, outputs: Tensor) -> Tensor:
        """M, what the loss divides the sum over terms by: 0-d, float64 where the device has it."""
        self.check(outputs)
        options: dict[str, Any] = {"dtype": events.count_dtype(outputs.device), "device": outputs.device}
        if self.divisor is not None:
            return torch.full((), float(self.divisor), **options)
        if self.reduction == "sum":
            return torch.ones((), **options)
        return self._mean_divisor(outputs).to(**options)

    def _mean_divisor(self, outputs: Tensor) -> Tensor:
        """M of 'mean': the number of valid terms."""
        valid = self.valid(outputs)
        dtype = events.count_dtype(outputs.device)
        if valid is None:
            count = math.prod(self._without(outputs, self.event_axes(outputs)))
            return torch.full((), float(count), dtype=dtype, device=outputs.device)
        return valid.sum(dtype=dtype)

    def valid(self, outputs: Tensor) -> Tensor | None:
        """Which terms count, as a bool tensor shaped as the terms; None where all do."""
        self.check(outputs)
        return self.mask

    def term_weight(self, outputs: Tensor) -> Tensor | None:
        """kappa, a tensor shaped as the terms; None where all are 1. What it says at invalid terms has no meaning."""
        self.check(outputs)
        return None if self.weights is None else events.widened(self.weights)

    # The distribution ------------------------------------------------------------------------------------------------

    @abstractmethod
    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Labels drawn from p(y | outputs), at masked terms too, so that the stream does not depend on the mask.

        Drawn from uniforms with examples as the slowest dimension: on CPU the draw of an example then does not depend
        on how the data are batched.
        """

    @abstractmethod
    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The gradient of the sum over valid terms of -log p(labels | outputs), without kappa.

        Returns:
            Tensor of the outputs' shape and dtype, zero at invalid terms.
        """

    @final
    def weighted_score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The score times sqrt(kappa), zero at invalid terms whatever ``score`` says there."""
        score = self.score(outputs, labels)
        if score.shape != outputs.shape:
            raise LikelihoodError(
                f"{self!r}: score returned shape {tuple(score.shape)}, expected that of the outputs, "
                f"{tuple(outputs.shape)}."
            )
        return self.weighted(score, outputs)

    @final
    def weighted(self, values: Tensor, outputs: Tensor) -> Tensor:
        """Values shaped as the outputs times sqrt(kappa), zero at invalid terms."""
        kappa, valid = self.term_weight(outputs), self.valid(outputs)
        if kappa is not None:
            values = (values * self.spread(kappa.sqrt(), outputs)).to(values.dtype)
        # Filled, not multiplied: what is left out may be infinite.
        return values if valid is None else values.masked_fill(~self.spread(valid, outputs), 0.0)

    def log_prob(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """log p(labels | outputs) of each term, zero at invalid terms, without kappa; differentiable in the outputs."""
        raise self._missing("log_prob", "log p of each term, shaped as the terms")

    def fisher(self, outputs: Tensor) -> Tensor:
        """E_y[s s^T] of each term: [*terms, E, E], zero at invalid terms, without kappa; E is the event's size."""
        root = self.fisher_sqrt(outputs)
        return root @ root.mT

    def fisher_sqrt(self, outputs: Tensor) -> Tensor:
        """S with S S^T = fisher of each term: [*terms, E, K]."""
        raise self._missing("fisher_sqrt", "[*terms, E, K] whose product with its transpose is the Fisher of each term")

    def fisher_columns(self, outputs: Tensor) -> Iterator[Tensor]:
        """The columns of ``fisher_sqrt`` one at a time, each shaped as the outputs: what type-2 sends back.

        A column is that of one term within the example, for all examples together; terms of an example go one after
        another, since positions may mix on the way back and merged columns would be wrong there.
        """
        self.check(outputs)
        return self._columns(outputs.detach())

    def _columns(self, outputs: Tensor) -> Iterator[Tensor]:
        axes, sizes, valid = self.event_axes(outputs), self._event_sizes(outputs), self.valid(outputs)
        shape = (*self._without(outputs, axes), math.prod(sizes))
        for at, column in self._term_columns(outputs):
            column = column if valid is None else column.masked_fill(~valid[at].unsqueeze(-1), 0.0)
            full = outputs.new_zeros(shape)
            full[at] = column.to(outputs.dtype)
            yield events.from_events(full, axes, sizes)

    def _term_columns(self, outputs: Tensor) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
        """(index of a term within the example, one column [N, E]), in order."""
        root = self.fisher_sqrt(outputs)
        for at in self._term_indices(outputs):
            for column in root[at].unbind(-1):
                yield at, column

    def kl(self, outputs: Tensor, other: Tensor) -> Tensor:
        """KL(p(. | outputs) || p(. | other)) summed over valid terms: 0-d."""
        return self.kl_terms(outputs, other).sum()

    def kl_terms(self, outputs: Tensor, other: Tensor) -> Tensor:
        """KL(p(. | outputs) || p(. | other)) of each term, zero at invalid terms."""
        raise self._missing("kl_terms", "the KL divergence of each term, shaped as the terms")

    # Labels ----------------------------------------------------------------------------------------------------------

    def invalid_labels(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Whether some valid term's label lies outside the support of p: 0-d bool, on the outputs' device."""
        self.check(outputs)
        return torch.zeros((), dtype=torch.bool, device=outputs.device)

    def invalid_targets(self, outputs: Tensor) -> Tensor:
        """Whether some valid term's bound data label cannot be one: 0-d bool, False where none are bound."""
        self.check(outputs)
        if self.targets is None:
            return torch.zeros((), dtype=torch.bool, device=outputs.device)
        return self.invalid_labels(outputs, self.targets)

    def _any_valid(self, flags: Tensor, outputs: Tensor) -> Tensor:
        """Whether a flag shaped as the terms is up at a valid term."""
        valid = self.valid(outputs)
        return (flags if valid is None else flags & valid).any()

    # Shared by the classes below -------------------------------------------------------------------------------------

    def _events(self, outputs: Tensor) -> Tensor:
        """Outputs as [*terms, E], in float32 at least, 0 at invalid terms so that no gradient there is NaN."""
        values = events.to_events(events.widened(outputs), self.event_axes(outputs))
        valid = self.valid(outputs)
        return values if valid is None else values.masked_fill(~valid.unsqueeze(-1), 0.0)

    def _zero_invalid(self, values: Tensor, outputs: Tensor) -> Tensor:
        """Values [*terms, ...] with zeros at invalid terms."""
        valid = self.valid(outputs)
        if valid is None:
            return values
        return values.masked_fill(~valid.reshape(*valid.shape, *(1,) * (values.ndim - valid.ndim)), 0.0)

    def _term_indices(self, outputs: Tensor) -> Iterator[tuple[Any, ...]]:
        """Indices of the terms within the example, each with all examples."""
        sizes = self._without(outputs, self.event_axes(outputs))[1:]
        return ((slice(None), *index) for index in itertools.product(*map(range, sizes)))

    def _check_same(self, name: str, values: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(values.shape) != shape:
            raise LikelihoodError(f"{self!r}: the {name} have shape {tuple(values.shape)}, expected {shape}.")

    def _event_sizes(self, outputs: Tensor) -> tuple[int, ...]:
        return tuple(outputs.shape[axis] for axis in self.event_axes(outputs))

    @staticmethod
    def _without(outputs: Tensor, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(size for axis, size in enumerate(outputs.shape) if axis not in axes)

    def _missing(self, method: str, returns: str) -> LikelihoodError:
        return LikelihoodError(
            f"{self._name} has no {method}, which is needed for this: define {method} on it, returning {returns}."
        )

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _settings(self) -> dict[str, Any]:
        """What ``repr`` shows before the reduction."""
        return {}

    def __repr__(self) -> str:
        settings = {**self._settings(), "reduction": self.reduction}
        if self.divisor is not None:
            settings["divisor"] = self.divisor
        return f"{self._name}({', '.join(f'{key}={value!r}' for key, value in settings.items())})"


def is_positive(value: object) -> bool:
    """Whether it is a finite number above 0 (no bool, no tensor)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def uniforms(shape: tuple[int, ...], outputs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniforms on [0, 1), float32, a multiple of 2^-24 each.

    The one draw on CPU whose stream does not depend on how its shape is split along dimension 0 (torch.randn and
    torch.multinomial change with the number of elements).
    """
    return torch.rand(shape, generator=generator, device=outputs.device, dtype=torch.float32)
