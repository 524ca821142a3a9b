"""Where a step of the natural gradient goes: a preconditioner, conjugate gradients, or the Gram kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from .adaptive import FactorDamping
from .batches import Batch
from .checks import checked_rules, described, is_number, is_whole
from .damping import Damping, DampingNow
from .data import Data
from .errors import ArgumentError
from .gradients import preconditioned
from .guards import without_autocast
from .heads import Head
from .implicit import gram
from .layers.summed import TRAINED
from .linalg.iterative import conjugate_gradients
from .objective import Objective
from .preconditioner import KFAC
from .schedules import Schedule
from .structures import Iteration

Tensors = list[Tensor]

WORDS = (*TRAINED, "exact", "gram")


@dataclass(frozen=True)
class Direction:
    """Where steps go, where the word alone does not say enough.

    Args:
        name: 'kfac', 'ekfac', 'tkfac' or 'diagonal': the gradient preconditioned with that structure. 'exact': the
            solution with the exact Fisher by conjugate gradients, preconditioned with 'kfac' (Hessian-free). 'gram':
            the same in closed form through the Gram kernel, for few examples.
        share: of the batch's examples in products with the exact Fisher, at least 128 of them; 1 for all.
        burn_in: calls of ``step`` at the start that only take factors in, and leave the parameters as they are.
        average: rho of the average of gradients that directions are of, once batches disagree on where to go; the
            parameters are the average of their iterates then. 0 for neither.
        factor_damping: ``kc.FactorDamping`` for a gamma found by trying; None ties it, gamma^2 = lambda + eta.
        rules: settings by layer-name pattern, as of ``kc.KFAC``.
        iteration: tolerance and steps of conjugate gradients.

    Raises:
        ArgumentError: another word, or a number out of range.
    """

    name: str = "kfac"
    share: float = 0.25
    burn_in: int = 0
    average: float = 0.7
    factor_damping: FactorDamping | None = None
    rules: Mapping[str, Mapping[str, Any]] | None = None
    iteration: Iteration = field(default_factory=partial(Iteration, tolerance=1e-4, limit=50))

    def __post_init__(self) -> None:
        if self.name not in WORDS:
            raise ArgumentError(f"direction={self.name!r}: expected one of {', '.join(WORDS)}")
        if not (is_number(self.share) and 0 < self.share <= 1):
            raise ArgumentError(f"Direction(share={self.share!r}): expected a number in (0, 1]")
        if not (is_whole(self.burn_in) and self.burn_in >= 0):
            raise ArgumentError(f"Direction(burn_in={self.burn_in!r}): expected a whole number >= 0")
        if not (is_number(self.average) and 0 <= self.average < 1):
            raise ArgumentError(f"Direction(average={self.average!r}): expected a number in [0, 1)")
        if not (self.factor_damping is None or isinstance(self.factor_damping, FactorDamping)):
            raise ArgumentError(
                f"Direction(factor_damping={described(self.factor_damping)}): expected kc.FactorDamping(...), or None"
            )
        if not isinstance(self.iteration, Iteration):
            raise ArgumentError(f"Direction(iteration={described(self.iteration)}): expected kc.Iteration(...)")

    @property
    def structure(self) -> str:
        """What the preconditioner keeps of a layer."""
        return self.name if self.name in TRAINED else "kfac"


class Preconditioner(KFAC):
    """A KFAC that is told what to capture and when to invert, and hands preconditioned gradients out.

    Args:
        objective: of the model to train.
        direction: for the structure and the rules.
        schedule: when factors are captured and inverted.
        data: for the seed.
    """

    def __init__(self, objective: Objective, direction: Direction, schedule: Schedule, data: Data | None) -> None:
        #: gamma^2, what damps the next inversion.
        self.square = 0.0
        super().__init__(
            objective.model,
            objective.likelihood,
            damping=Damping(lambda step: self.square),
            schedule=schedule,
            structure=direction.structure,
            rules=checked_rules(direction.rules),
            data=data,
        )

    def hear(self, heads: Sequence[Head]) -> None:
        """Capture the factors of the forward that gave these outputs, where due; before its graph is freed."""
        self._intake.take_heads(heads)

    @torch.no_grad()
    def take_in(self) -> None:
        """Bring what was captured into the averages, and invert them anew where due."""
        with without_autocast(next(iter(self.layers.values())).device):
            self._take_in()

    @torch.no_grad()
    def invert(self) -> None:
        """Invert all averages anew with the damping of now."""
        with without_autocast(next(iter(self.layers.values())).device):
            self._shared.refresh(DampingNow(self.damping, self._clock.at_most))

    @torch.no_grad()
    def solved(self, gradient: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """(F + gamma^2)^-1 times the gradient, by the parameter's identity; of layers that have an inverse."""
        gradients = {
            name: {key: gradient[id(p)] for key, p in layer.parameters.items()} for name, layer in self.layers.items()
        }
        with without_autocast(next(iter(self.layers.values())).device):
            updates = preconditioned(self.layers, list(self.layers), gradients, self._shared)
        found: dict[int, Tensor] = {}
        for name, update in updates.items():
            new = self.layers[name].layout.from_matrix(update)
            found |= {id(p): new[key].to(p.dtype) for key, p in self.layers[name].parameters.items()}
        return found


class Solver(Protocol):
    """What turns a gradient into directions."""

    def directions(self, gradient: Tensors, batch: Batch, damping: float) -> list[Tensors]:
        """One or more directions downhill, a tensor for each parameter.

        Args:
            gradient: of the objective.
            batch: whose Fisher it is, where the direction is of the batch at hand.
            damping: lambda + eta.
        """


class Preconditioned:
    """-(F + gamma^2)^-1 g with the factors of a preconditioner; what it does not cover goes along its plain gradient.

    That is a direction of its own, so that it has a step length of its own.
    """

    def __init__(self, objective: Objective, kfac: Preconditioner) -> None:
        self._objective, self._kfac = objective, kfac

    def directions(self, gradient: Tensors, batch: Batch, damping: float) -> list[Tensors]:
        tensors = self._objective.tensors
        solved = self._kfac.solved({id(p): g for p, g in zip(tensors, gradient, strict=True)})
        main = [-solved[id(p)] if id(p) in solved else torch.zeros_like(p) for p in tensors]
        if all(id(p) in solved for p in tensors):
            return [main]
        rest = [torch.zeros_like(p) if id(p) in solved else -g for p, g in zip(tensors, gradient, strict=True)]
        return [main, rest]


class Exact:
    """-(F + (lambda + eta) I)^-1 g by conjugate gradients on products with the exact Fisher of the batch.

    Each of its steps is a product (a forward with tangents, a forward and a backward) and a preconditioning, and waits
    for the device.

    Source: Martens 2010 (Deep learning via Hessian-free optimization); its preconditioner is Martens & Grosse 2015's.
    """

    def __init__(self, objective: Objective, kfac: Preconditioner, iteration: Iteration) -> None:
        self._objective, self._kfac, self._iteration = objective, kfac, iteration

    def directions(self, gradient: Tensors, batch: Batch, damping: float) -> list[Tensors]:
        tensors = self._objective.tensors

        def product(rows: Tensor) -> Tensor:
            found = [_flat(self._objective.product(batch, _parts(row, tensors))) for row in rows]
            return torch.stack(found) + damping * rows

        def precondition(row: Tensor) -> Tensor:
            parts = {id(p): one for p, one in zip(tensors, _parts(row, tensors), strict=True)}
            solved = parts | self._kfac.solved(parts)
            return _flat([solved[id(p)] for p in tensors])

        found, _ = conjugate_gradients(
            product,
            -_flat(gradient),
            tolerance=self._iteration.tolerance_for(self._objective.dtype),
            limit=self._iteration.limit,
            precondition=precondition,
        )
        return [_parts(found, tensors)]


class Kernel:
    """-(F + (lambda + eta) I)^-1 g in closed form through the Gram kernel of the batch.

    Source: Ren & Goldfarb 2019 (arXiv:1906.02353).
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def directions(self, gradient: Tensors, batch: Batch, damping: float) -> list[Tensors]:
        objective = self._objective
        kernel = gram(objective.model, [batch.as_yielded()], objective.likelihood, picks=objective.picks)
        named = dict(zip(objective.parameters, gradient, strict=True))
        found = kernel.solve(named, damping=damping)
        return [[-found[name] for name in objective.parameters]]


def solver_of(direction: Direction, objective: Objective, kfac: Preconditioner | None) -> Solver:
    """What a direction asks for; without a preconditioner the Gram kernel."""
    if kfac is None:
        return Kernel(objective)
    return Exact(objective, kfac, direction.iteration) if direction.name == "exact" else Preconditioned(objective, kfac)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([one.reshape(-1) for one in tensors])


def _parts(row: Tensor, like: Sequence[Tensor]) -> Tensors:
    pieces = torch.split(row, [one.numel() for one in like])
    return [piece.reshape(one.shape).to(one.dtype) for piece, one in zip(pieces, like, strict=True)]
