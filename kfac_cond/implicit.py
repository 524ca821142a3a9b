"""The Fisher of a whole model over data: as products alone, its largest eigenpairs, or through its Gram kernel."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checks import described
from .data import Data
from .errors import ArgumentError
from .heads import Distribution
from .kinds import facts
from .layers.layout import JointLayout
from .likelihoods import as_likelihood
from .linearised import Linearised
from .options import Batches, Options, Request, Structure
from .structures.base import MAX_DENSE, checked_damping
from .structures.fisher import AnyForm, Fisher
from .structures.implicit import ImplicitBlock
from .structures.iterative import Iteration
from .structures.low_rank import LowRankBlock

WHOLE = "model"
"""The name of the one block of a Fisher that is not block-diagonal."""

WORDS = ("implicit", "low_rank")
"""Structures of the whole model, whose data are gone through again for every product."""

RANK = 10
"""Of 'low_rank' where none is given."""


def implicit(
    model: nn.Module,
    data: Batches,
    likelihood: Distribution | str | nn.Module,
    *,
    picks: Data | None = None,
    iteration: Iteration | None = None,
) -> Fisher:
    """The exact Fisher of ``model`` over ``data`` in all trainable parameters, as products alone: no storage.

    Every product goes through the data once: a forward with tangents and a backward for each vector. The result is a
    ``Fisher`` of one block, an ``ImplicitBlock``, whose docstring says how each verb is answered. It follows the
    model's parameters as they change.

    Args:
        model: any module, whatever it is made of; in the mode it is in.
        data: batches, or a function that yields them; an iterator that can be used once is refused.
        likelihood: a likelihood with an exact Fisher (``fisher`` or ``fisher_sqrt``), its name, or a criterion.
        picks: where to find masks and outputs in a batch; its seed is that of dropout.
        iteration: tolerance, steps and random probes of the iterative verbs.

    Returns:
        A ``Fisher`` with the one block "model".

    Raises:
        ArgumentError: data that can be gone through only once.
        CoverageError: nothing trainable, or sharded, complex, sparse or quantised weights.
        LikelihoodError: at a product, where the outputs or labels do not fit the likelihood.

    Examples:
        >>> import torch, kfac_cond as kc
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> fisher = kc.implicit(model, [torch.randn(8, 3)], "categorical")
        >>> fisher.shape
        (26, 26)

    Source: Martens 2020 (arXiv:1412.1193), sections 8 and 9.
    """
    linear = Linearised(_exact(model, data, likelihood, picks))
    meta = {"likelihood": repr(linear.likelihood), "kind": "exact", "structure": "implicit"}
    return Fisher({WHOLE: _block(linear, iteration or Iteration())}, meta=meta)


def low_rank(
    model: nn.Module,
    data: Batches,
    likelihood: Distribution | str | nn.Module,
    rank: int,
    *,
    via: Literal["lanczos", "gram"] = "lanczos",
    picks: Data | None = None,
    iteration: Iteration | None = None,
) -> Fisher:
    """The best approximation of rank k of the exact Fisher: its largest eigenpairs.

    Args:
        model: any module.
        data: batches, or a function that yields them.
        likelihood: as for ``implicit``.
        rank: k.
        via: 'lanczos' (a few passes over the data for each pair; any size) or 'gram' (where N R C is small).
        picks: where to find masks and outputs in a batch.
        iteration: tolerance and steps of 'lanczos'.

    Returns:
        A ``Fisher`` with the one block "model", a ``LowRankBlock``.

    Raises:
        ArgumentError: a rank above the number of parameters or, through the Gram kernel, above that of F.
        NumericalError: where Lanczos did not converge.
    """
    if via == "gram":
        return gram(model, data, likelihood, picks=picks).low_rank(rank)
    if via != "lanczos":
        raise ArgumentError(f"via={via!r}: expected 'lanczos' or 'gram'")
    linear = Linearised(_exact(model, data, likelihood, picks))
    found = _top(linear, rank, iteration or Iteration())
    meta = {"likelihood": repr(linear.likelihood), "kind": "exact", "structure": "low_rank", "rank": rank}
    return Fisher({WHOLE: found}, meta={**meta, "counts": linear.counts})


class Whole:
    """What the words 'implicit' and 'low_rank' of ``kc.estimate`` stand for: one Fisher of all data, of any kind.

    Nothing is gone through before a word is asked for.

    Args:
        request: with data that can be gone through many times, and any kind but 'forward_only'.
        names: of the parameters wanted.

    Raises:
        ArgumentError: data or labels that can be gone through only once, or a kind without a backward.
        CoverageError: no such parameter, or sharded, complex, sparse or quantised ones.
    """

    def __init__(self, request: Request, names: Collection[str]) -> None:
        if request.kind == "forward_only":
            raise ArgumentError(
                "kind='forward_only' sends nothing back, so that there is no product for 'implicit' and 'low_rank': "
                "take another structure, or another kind"
            )
        draws = request.options.draws
        if isinstance(draws, Iterator):
            raise ArgumentError(
                f"Options(draws=...) is {described(draws)}, which can be gone through once, and every product "
                "of 'implicit' and 'low_rank' goes through the labels: pass a list"
            )
        self.facts = partial(facts, request.likelihood, request.kind, samples=request.samples)
        self.linear = Linearised(request, names)

    def fisher(self, structure: Structure) -> Fisher:
        """The Fisher in one of ``WORDS``."""
        return self._low_rank(structure.rank) if structure.name == "low_rank" else self._implicit()

    def _implicit(self) -> Fisher:
        if not self.linear.counts:
            # One pass of forwards, so that what is wrong with the data or the labels is said here.
            self.linear.count()
        block = _block(self.linear, Iteration())
        return Fisher({WHOLE: block}, meta={**self.facts("implicit"), "counts": self.linear.counts})

    def _low_rank(self, rank: int | None) -> Fisher:
        size = sum(map(prod, self.linear.shapes.values()))
        rank = min(RANK, size) if rank is None else rank
        block = _top(self.linear, rank, Iteration())
        return Fisher({WHOLE: block}, meta={**self.facts("low_rank"), "rank": rank, "counts": self.linear.counts})


def _block(linear: Linearised, iteration: Iteration) -> ImplicitBlock:
    return ImplicitBlock(JointLayout.of(linear.shapes), _Products(linear), iteration)


def _top(linear: Linearised, rank: int, iteration: Iteration) -> LowRankBlock:
    """The largest eigenpairs, by block Lanczos."""
    block = _block(linear, iteration)
    return LowRankBlock(block.layout, *block.top_eigenpairs(rank))


class _Products:
    """Products with the Fisher of a linearised model."""

    def __init__(self, linear: Linearised) -> None:
        self.linear = linear
        self.layout = JointLayout.of(linear.shapes)

    @property
    def dtype(self) -> torch.dtype:
        return self.linear.dtype

    @property
    def device(self) -> torch.device:
        return self.linear.device

    def fisher_rows(self, rows: Tensor) -> Tensor:
        directions = [self.layout.from_matrix(row.detach()) for row in rows]
        totals = [torch.zeros_like(rows) for _ in self.linear.slots.names]

        def visitor(batch: Any) -> Tensor:
            divisor = torch.zeros(len(totals))
            for index, direction in enumerate(directions):
                products, divisor = self.linear.fisher_product(batch, direction)
                for total, product in zip(totals, products, strict=True):
                    total[index] += self.linear.flat(product)
            return divisor

        scales = self._scales(self.linear.visit(visitor))
        return reduce(torch.add, [total * scale for total, scale in zip(totals, scales, strict=True)])

    def sample_rows(self, n: int, generator: torch.Generator | None) -> Tensor:
        zeros = torch.zeros(n, self.layout.numel, dtype=self.dtype, device=self.device)
        totals = [zeros.clone() for _ in self.linear.slots.names]

        def visitor(batch: Any) -> Tensor:
            point = self.linear.at(batch)
            for index in range(n):
                for head, fisher, total in zip(point.heads, point.fishers, totals, strict=True):
                    pulled = self.linear.pulled_back(head, fisher.times_noise(generator), keep=True)
                    total[index] += self.linear.flat(pulled)
            return point.divisor

        if n == 0:
            return zeros
        scales = self._scales(self.linear.visit(visitor))
        return reduce(torch.add, [total * scale.sqrt() for total, scale in zip(totals, scales, strict=True)])

    def _scales(self, divisor: Tensor) -> list[Tensor]:
        """w_h / M_h of each head."""
        pairs = zip(self.linear.slots.weights, divisor.unbind(), strict=True)
        return [(weight / M).to(self.device, self.dtype) for weight, M in pairs]


@dataclass(frozen=True, eq=False)
class Gram:
    """The kernel K = B B^T of the square root F = B^T B: side N R C, the same non-zero spectrum as F.

    B = (1 / sqrt M) S^T J: a row for each example, term and column of the output Fisher's root, in that order.

    Args:
        rows: B, [N R C, P]; columns in the order of ``layout``.
        layout: of the parameters.
        meta: what ``Fisher.meta`` will hold.

    Source: Ren & Goldfarb 2019 (arXiv:1906.02353) for the natural gradient through it.
    """

    rows: Tensor
    layout: JointLayout
    meta: dict[str, Any]

    @cached_property
    def matrix(self) -> Tensor:
        """K, [N R C, N R C]; it carries 1/M."""
        return self.rows @ self.rows.mT

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The parameters, in the order of a flat vector."""
        return self.layout.names

    def eigenvalues(self) -> Tensor:
        """Those of K, descending: the eigenvalues of F, but for zeros."""
        values: Tensor = torch.linalg.eigvalsh(self.matrix).flip(0)
        return values

    def fisher(self) -> Fisher:
        """F itself, exactly, through the eigenpairs that are not zero: every verb in closed form."""
        return self._fisher

    def low_rank(self, k: int) -> Fisher:
        """The best approximation of F of rank k."""
        values, vectors = self._fisher[WHOLE].top_eigenpairs(k)
        return self._of(LowRankBlock(self.layout, values, vectors))

    def solve(self, v: AnyForm, *, damping: float = 0.0) -> Any:
        """(F + damping I)^-1 v, exactly: the natural gradient where v is a gradient.

        In the eigenbasis of K, which is Woodbury's identity (v - B^T (K + damping I)^-1 B v) / damping without its
        cancellation. Without damping: the shortest x with F x = v.

        Args:
            v: in any form that ``Fisher`` takes.
            damping: lambda >= 0, in the units of F.

        Returns:
            In the form of v.

        Raises:
            NumericalError: without damping, where v is not in the range of F.
        """
        if checked_damping(damping) > 0.0 or self._block.rank == self.layout.numel:
            return self._fisher.solve(v, damping=damping)  # type: ignore[type-var]
        block = self._block

        def shortest(_: object, part: Any) -> Any:
            return self.layout.from_matrix(block.pseudo_solve(self.layout.to_matrix(part)))

        return self._fisher._in_form(v, shortest)  # type: ignore[type-var]

    @cached_property
    def _block(self) -> LowRankBlock:
        _, sizes, vectors = torch.linalg.svd(self.rows, full_matrices=False)
        # What is zero but for round-off in B is no direction of F.
        kept = max(1, int((sizes > sizes[0] * max(self.rows.shape) * torch.finfo(sizes.dtype).eps).sum()))
        return LowRankBlock(self.layout, sizes[:kept].square(), vectors[:kept].contiguous())

    @cached_property
    def _fisher(self) -> Fisher:
        return self._of(self._block)

    def _of(self, block: LowRankBlock) -> Fisher:
        return Fisher({WHOLE: block}, meta={**self.meta, "structure": "low_rank", "rank": block.rank})

    def __repr__(self) -> str:
        side, size = self.rows.shape
        return f"Gram({side} x {side}, of a Fisher of {size} parameters)"


def gram(
    model: nn.Module, data: Batches, likelihood: Distribution | str | nn.Module, *, picks: Data | None = None
) -> Gram:
    """The Gram kernel of the exact Fisher, for when N R C is smaller than the number of parameters P.

    One backward for each of the N R C rows; keeps N R C x P numbers. Arguments and errors are those of ``implicit``.

    Args:
        model: any module.
        data: batches, or a function that yields them.
        likelihood: one with a square root of its Fisher.
        picks: where to find masks and outputs in a batch.

    Raises:
        ArgumentError: more than ``MAX_DENSE`` rows.

    Examples:
        >>> import torch, kfac_cond as kc
        >>> model = torch.nn.Linear(10, 2)
        >>> kernel = kc.gram(model, [torch.randn(4, 10)], kc.Gaussian())
        >>> kernel.matrix.shape
        torch.Size([8, 8])
    """
    linear = Linearised(_exact(model, data, likelihood, picks))
    rows: list[tuple[int, Tensor]] = []

    def visitor(batch: Any) -> Tensor:
        point = linear.at(batch)
        for index, head in enumerate(point.heads):
            columns, values = [], head.outputs.detach()
            for column in head.likelihood.fisher_columns(values):
                columns.append(head.likelihood.weighted(column, values))
                side = sum(len(some) for _, some in rows) + len(columns) * len(values)
                if side > MAX_DENSE:
                    raise ArgumentError(
                        f"the Gram kernel would have a side of {side} or more (examples, terms of an example and "
                        f"outputs of a term, multiplied), the most is {MAX_DENSE}: use kc.implicit, or fewer data"
                    )
            stacked = torch.stack(columns)
            rows.extend((index, linear.rows(head, _alone(stacked, n))) for n in range(len(values)))
        return point.divisor

    divisor, weights = linear.visit(visitor), linear.slots.weights
    scales = [(weight / M).sqrt() for weight, M in zip(weights, divisor.unbind(), strict=True)]
    scaled = torch.cat([some * scales[head].to(some) for head, some in rows])
    return Gram(scaled, JointLayout.of(linear.shapes), {"likelihood": repr(linear.likelihood), "kind": "exact"})


def _exact(model: nn.Module, data: Batches, likelihood: Distribution | str | nn.Module, picks: Data | None) -> Request:
    """The exact Fisher over data, asked for directly."""
    return Request(model, data, as_likelihood(likelihood, heard=False), "exact", 1, {}, Options(data=picks))


def _alone(columns: Tensor, example: int) -> Tensor:
    """Columns [RC, N, ...] with zeros at all examples but one."""
    alone = torch.zeros_like(columns)
    alone[:, example] = columns[:, example]
    return alone
