"""The grid of likelihoods, shapes and masks, with what the tests need to know of each apart from the library."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Distribution, Independent, Normal

from kfac_cond.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood


def named(value: object) -> str:
    """What a test is called after: no values of tensors, nothing long."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, dict):
        return ",".join(f"{key}={named(entry)}" for key, entry in value.items())
    return str(getattr(value, "__name__", value)).replace("\n", " ")[:60]


@dataclass(frozen=True)
class Case:
    """A likelihood on one shape; ``axes`` are the event's dimensions, written by hand."""

    likelihood: Likelihood
    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.likelihood!r}-{'x'.join(map(str, self.shape))}".replace(", reduction='mean'", "")

    @property
    def terms(self) -> tuple[int, ...]:
        return tuple(size for axis, size in enumerate(self.shape) if axis not in self.axes)

    @property
    def event(self) -> int:
        return int(torch.tensor([self.shape[axis] for axis in self.axes]).prod())

    def outputs(self, seed: int = 0) -> Tensor:
        return 1.5 * torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))

    def mask(self) -> Tensor:
        keep = torch.rand(self.terms, generator=torch.Generator().manual_seed(3)) < 0.6
        keep.view(-1)[0], keep.view(-1)[-1] = True, False
        return keep

    def bound(self, masked: bool) -> Likelihood:
        return self.likelihood.bind(mask=self.mask()) if masked else self.likelihood

    def rows(self, values: Tensor) -> Tensor:
        """Values shaped as the outputs, as [number of terms, E]."""
        order = [axis for axis in range(len(self.shape)) if axis not in self.axes] + list(self.axes)
        return values.permute(order).reshape(-1, self.event)

    def unrows(self, rows: Tensor) -> Tensor:
        order = [axis for axis in range(len(self.shape)) if axis not in self.axes] + list(self.axes)
        back = [order.index(axis) for axis in range(len(self.shape))]
        return rows.reshape([self.shape[axis] for axis in order]).permute(back)

    def labels(self, per_term: Tensor) -> Tensor:
        """Labels from one row a term: classes [number of terms], or elements [number of terms, E]."""
        return per_term.reshape(self.terms) if isinstance(self.likelihood, Categorical) else self.unrows(per_term)

    def distribution(self, outputs: Tensor) -> Distribution:
        """The same p as torch has it, one entry a term."""
        rows = self.rows(outputs)
        if isinstance(self.likelihood, Categorical):
            return TorchCategorical(logits=rows)
        if isinstance(self.likelihood, Bernoulli):
            return Independent(TorchBernoulli(logits=rows), 1)
        assert isinstance(self.likelihood, Gaussian)
        return Independent(Normal(rows, self.likelihood.variance**0.5), 1)

    def label_rows(self, labels: Tensor) -> Tensor:
        return labels.reshape(-1) if isinstance(self.likelihood, Categorical) else self.rows(labels)

    def expectation(self, outputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Labels and their weights [number of terms], whose weighted sum is the exact expectation of a score's square.

        All labels of a discrete likelihood; of the Gaussian a cubature that is exact for polynomials of degree three.
        """
        rows = self.rows(outputs)
        count = len(rows)
        if isinstance(self.likelihood, Gaussian):
            reach = (self.likelihood.variance * self.event) ** 0.5
            for k, sign in itertools.product(range(self.event), (-1.0, 1.0)):
                point = rows.clone()
                point[:, k] += sign * reach
                yield self.labels(point), torch.full((count,), 0.5 / self.event)
            return
        if isinstance(self.likelihood, Categorical):
            per_term = [torch.full((count,), c) for c in range(self.event)]
        else:
            per_term = [
                torch.tensor(bits, dtype=rows.dtype).expand(count, -1)
                for bits in itertools.product((0.0, 1.0), repeat=self.event)
            ]
        for row in per_term:
            yield self.labels(row), self.distribution(outputs).log_prob(row).exp()


def _elementwise(make: type[Bernoulli] | type[Gaussian], *args: float) -> list[Case]:
    return [
        Case(make(*args), (5,), ()),
        Case(make(*args), (3, 4), (1,)),
        Case(make(*args, event_dims=()), (3, 4), ()),
        Case(make(*args, event_dims=(1, 2)), (2, 3, 2), (1, 2)),
        Case(make(*args, event_dims=(-1,)), (2, 3, 2), (2,)),
        Case(make(*args, event_dims=(1,)), (2, 3, 2), (1,)),
        Case(make(*args, event_dims=(-1, 1)), (2, 2, 2, 3), (1, 3)),
    ]


CASES = [
    Case(Categorical(), (5, 3), (1,)),
    Case(Categorical(dim=None), (5, 2), (1,)),
    Case(Categorical(dim=-1), (2, 3, 4), (2,)),
    Case(Categorical(dim=1), (2, 4, 3), (1,)),
    Case(Categorical(dim=1), (2, 3, 2, 2), (1,)),
    *_elementwise(Bernoulli),
    *_elementwise(Gaussian, 0.7),
]
NAMES = [case.name for case in CASES]
