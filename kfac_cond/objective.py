"""The objective of a training step on one batch: its value here and elsewhere, and exact products with its Fisher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .checks import described
from .data import Data, leading_dimension, moved
from .errors import ArgumentError, LikelihoodError
from .guards import RandomState, random_state, repeated, undisturbed
from .heads import Distribution, Head, bound_to_batch, meaningful, picked, require_targets, split
from .likelihoods import as_likelihood
from .linearised import Called, Linearised, Point
from .options import Options, Request
from .output_fisher import OfLikelihood, root_transposed_times
from .quadratic import inner


@dataclass(frozen=True)
class Batch:
    """What a step is given.

    Args:
        inputs: a tensor, a packed sequence, or a mapping of the model's keyword arguments.
        targets: the data labels, as the loss takes them; None where the inputs name them.
    """

    inputs: Any
    targets: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Tensor | PackedSequence | Mapping):
            raise ArgumentError(
                f"step(inputs, targets) got {described(self.inputs)} for its inputs: expected a tensor, or a mapping of "
                f"keyword arguments where the model takes more than one"
            )

    @property
    def size(self) -> int | None:
        """The number of examples, along dimension 0; None of a packed sequence."""
        return None if isinstance(self.inputs, PackedSequence) else leading_dimension(self.inputs)

    def part(self, stride: int, offset: int) -> Batch:
        """Every so many-th of its examples, beginning at ``offset``."""
        size = self.size

        def taken(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: taken(one) for key, one in value.items()}
            if isinstance(value, list | tuple):
                return [taken(one) for one in value]
            fits = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size
            return value[offset % stride :: stride] if fits else value

        return self if stride == 1 or size is None else Batch(taken(self.inputs), taken(self.targets))

    def as_yielded(self) -> Any:
        """As a loader would yield it."""
        if isinstance(self.inputs, Mapping):
            return dict(self.inputs) if self.targets is None else {**self.inputs, "labels": self.targets}
        return self.inputs if self.targets is None else (self.inputs, self.targets)


class _CalledOn(Called):
    """A model as a function of a ``Batch``."""

    def forward(self, batch: Batch) -> tuple[Any, Any]:
        output, labels = super().forward(batch.inputs)
        return output, labels if batch.targets is None else moved(batch.targets, self.model)


@dataclass(frozen=True)
class Evaluated:
    """The objective at the parameters as they were.

    Args:
        loss: 0-d, without the l2 term, with its graph.
        heads: of the batch, with their graph.
        random: what the forward drew its random numbers from.
    """

    loss: Tensor
    heads: tuple[Head, ...]
    random: RandomState


class Objective(Linearised):
    """The mean loss of a model on the batch at hand, as a function of the parameters, plus l2/2 |theta|^2.

    Whatever runs the model again does so as the first forward did, with the same dropout masks, and leaves buffers, the
    random state and those who listen as they were. Nothing is read by the host, but once, where it is found out whether
    products with the Jacobian can go forward.

    Args:
        model: any module.
        given: a likelihood, its name, or the criterion that is called with (outputs, targets).
        data: where to find masks and outputs.
        l2: eta.
    """

    def __init__(
        self, model: nn.Module, given: Distribution | str | nn.Module, *, data: Data | None = None, l2: float = 0.0
    ) -> None:
        self.criterion = given if isinstance(given, nn.Module) else None
        likelihood = as_likelihood(given, heard=True)
        super().__init__(Request(model, [], likelihood, "exact", 1, {}, Options(data=data)))
        self._called = _CalledOn(self.model)
        self.l2 = l2
        self._random: RandomState | None = None

    @property
    def weights(self) -> dict[str, float]:
        """The loss weight w_h of each head."""
        return dict(zip(self.slots.names, self.slots.weights, strict=True))

    @property
    def tensors(self) -> list[nn.Parameter]:
        """The trainable parameters, in their order."""
        return list(self.parameters.values())

    def here(self, batch: Batch) -> Evaluated:
        """The forward of the training step: hooks fire, buffers and the random state go on."""
        self._random = random_state(self.device)
        with torch.enable_grad():
            output, targets = self._called(batch)
            heads = self._heads(output, targets)
            return Evaluated(self._loss(heads, targets), heads, self._random)

    def value(self, loss: Tensor) -> Tensor:
        """The objective, 0-d without a graph, from the loss at the parameters as they are."""
        loss = loss.detach()
        if self.l2 == 0.0:
            return loss
        tensors = [p.detach() for p in self.tensors]
        return loss + (self.l2 / 2) * inner(tensors, tensors).to(loss)

    def gradient(self, loss: Tensor) -> list[Tensor]:
        """The gradient of the objective; zero where the loss does not depend on a parameter."""
        found = self._filled(torch.autograd.grad(loss, self.tensors, allow_unused=True))
        pairs = zip(found.values(), self.tensors, strict=True)
        return [g if self.l2 == 0.0 else g + self.l2 * p.detach() for g, p in pairs]

    def again(self, batch: Batch) -> Tensor:
        """The objective at the parameters as they are now, 0-d, with the random numbers of ``here``."""
        with undisturbed(self.model), repeated(self._random), torch.no_grad():
            output, targets = self._called(batch)
            return self.value(self._loss(self._heads(output, targets), targets))

    def pushed(self, batch: Batch, directions: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """S^T J d / sqrt(M) of each direction d as one flat row, so that their inner products are d_i^T F d_j.

        Args:
            batch: all of the batch, or a part of it.
            directions: a tensor for each parameter.
        """
        rows = []
        with self._undisturbed():
            forward = self._goes_forward(batch)
            push = self._pushed_forward if forward else self._pushed_twice
            # Dual numbers need no graph.
            with torch.set_grad_enabled(not forward):
                for direction in directions:
                    point = push(batch, dict(zip(self.parameters, direction, strict=True)))
                    pairs = zip(point.heads, point.tangents, strict=True)
                    rows.append(torch.cat([self._rooted(*pair) for pair in pairs]))
        return rows

    def fisher_product(self, batch: Batch, direction: Mapping[str, Tensor]) -> tuple[list[dict[str, Tensor]], Tensor]:
        """J^T H J v head by head, not divided by M, and M of each."""
        with self._undisturbed():
            return super().fisher_product(batch, direction)

    def product(self, batch: Batch, direction: Sequence[Tensor]) -> list[Tensor]:
        """F d, a tensor for each parameter."""
        parts, divisors = self.fisher_product(batch, dict(zip(self.parameters, direction, strict=True)))
        total = [torch.zeros_like(p) for p in self.tensors]
        for part, weight, M in zip(parts, self.weights.values(), divisors, strict=True):
            total = [a + (weight / M).to(a) * b for a, b in zip(total, part.values(), strict=True)]
        return total

    # How -------------------------------------------------------------------------------------------------------------

    def _loss(self, heads: Sequence[Head], targets: Any) -> Tensor:
        """What the criterion says, or sum_h w_h / M_h sum kappa (-log p)."""
        if self.criterion is not None:
            loss = self.criterion(heads[0].outputs, targets)
            if not (isinstance(loss, Tensor) and loss.ndim == 0):
                raise ArgumentError(f"{type(self.criterion).__name__} gave {described(loss)}: expected a 0-d loss")
            return loss
        labels = split(self.likelihood, targets, "targets", partly=True)
        total: Tensor | None = None
        for head in heads:
            if labels.get(head.name) is None:
                raise LikelihoodError(f"{head.likelihood!r}: no targets for its loss: call step(inputs, targets)")
            terms = head.likelihood.log_prob(head.outputs, labels[head.name])
            kappa = head.likelihood.term_weight(head.outputs)
            loss = -(terms if kappa is None else terms * kappa.to(terms)).sum()
            loss = loss * (self.weights[head.name] / head.likelihood.terms(head.outputs)).to(loss)
            total = loss if total is None else total + loss
        assert total is not None
        return total

    def _heads(self, output: Any, targets: Any) -> tuple[Head, ...]:
        args, kwargs = self._called.call
        outputs = picked(self.likelihood, self.picks, args, kwargs, output)
        given = meaningful(self.likelihood, targets)
        heads = bound_to_batch(
            self.likelihood, self.picks, outputs, args=args, kwargs=kwargs, output=output, targets=given
        )
        require_targets(heads, "call step(inputs, targets)")
        return heads

    def _point(self, batch: Batch, output: Any, targets: Any) -> Point:
        heads = self._heads(output, targets)
        return Point(heads, tuple(OfLikelihood(head.likelihood, head.outputs.detach()) for head in heads))

    def _rooted(self, head: Head, tangent: Tensor) -> Tensor:
        outputs, weight = head.outputs.detach(), self.weights[head.name]
        root = root_transposed_times(head.likelihood, outputs, tangent)
        return (root * (weight / head.likelihood.terms(outputs)).sqrt().to(root)).reshape(-1)

    def _sow(self, number: int) -> None:
        if self._random is None:
            super()._sow(number)
            return
        _, general, own = self._random
        torch.set_rng_state(general)
        if own is not None:
            torch.get_device_module(self.device).set_rng_state(own, self.device)

