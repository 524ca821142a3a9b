"""The objective of a training step on one batch: its value here and elsewhere, and exact products with its Fisher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch, CalledOn
from .checks import described
from .data import Data
from .errors import ArgumentError, LikelihoodError
from .guards import RandomState, random_state, repeated, undisturbed
from .heads import Distribution, Head, bound_to_batch, meaningful, picked, require_targets, split
from .likelihoods import as_likelihood
from .linearised import Linearised, Point
from .options import Options, Request
from .output_fisher import OfLikelihood, root_transposed_times
from .quadratic import inner


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
        self._called = CalledOn(self.model)
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

    def here(self, batch: Batch) -> tuple[Tensor, tuple[Head, ...]]:
        """The forward of the training step, where hooks fire: the loss without the l2 term, and the heads."""
        self.begin()
        with torch.enable_grad():
            output, targets = self._called(batch)
            heads = self._heads(output, targets)
            return self._loss(heads, targets), heads

    def begin(self) -> None:
        """From here on random numbers are those of the step's forward."""
        self._random = random_state(self.device)

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

    def left_behind(self) -> list[Tensor]:
        """The gradient of the objective from what a closure left in ``.grad``."""
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.tensors]
        return [
            g.clone() if self.l2 == 0.0 else g + self.l2 * p.detach() for g, p in zip(found, self.tensors, strict=True)
        ]

    def called_again(self, closure: Callable[[], Tensor]) -> Tensor:
        """The objective at the parameters as they are now from a closure that was heard; its gradients are kept out."""
        gradients = [p.grad for p in self.tensors]
        for p in self.tensors:
            p.grad = None
        try:
            with undisturbed(self.model), repeated(self._random), torch.enable_grad():
                return self.value(closure())
        finally:
            for p, gradient in zip(self.tensors, gradients, strict=True):
                p.grad = gradient

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
            if targets is None:
                raise LikelihoodError(f"{type(self.criterion).__name__}: no targets for it: call step(inputs, targets)")
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
        return self.heads_of(*self._called.call, output, targets)

    def heads_of(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, targets: Any) -> tuple[Head, ...]:
        """The heads of one call of the model, bound to its data labels.

        Raises:
            LikelihoodError: outputs or labels that do not fit, or labels that are needed and not there.
        """
        if targets is None:
            targets = self.picks.pick_targets(args, kwargs, output)
        outputs = picked(self.likelihood, self.picks, args, kwargs, output)
        given = meaningful(self.likelihood, targets)
        heads = bound_to_batch(
            self.likelihood, self.picks, outputs, args=args, kwargs=kwargs, output=output, targets=given
        )
        require_targets(heads, "call step(inputs, targets), or pick them with data=kc.Data(targets=...)")
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
