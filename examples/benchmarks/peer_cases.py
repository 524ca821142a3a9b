"""Small models with data and labels, as matrices over all parameters: what ``peers.py`` compares with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import kfac_cond as kc


class Attention(nn.Module):
    """One attention layer of linear layers; logits (N, C, T), or (N, C) where pooled."""

    def __init__(self, *, pooled: bool) -> None:
        super().__init__()
        self.query, self.value, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.query(x) @ x.transpose(1, 2)).softmax(-1)
        h = self.head(torch.tanh(weights @ self.value(x)))
        return h.mean(1) if self.pooled else h.transpose(1, 2)


class ClassesSecond(nn.Module):
    """(N, T, C) to the order of torch's losses, (N, C, T)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def perceptron() -> nn.Module:
    """Two layers."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def deep_linear() -> nn.Module:
    """Where K-FAC with a Gaussian is exact."""
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3))


def convolutional() -> nn.Module:
    """Two convolutions and a linear layer."""
    first, second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 2, stride=2)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))


def over_tokens() -> nn.Module:
    """Linear layers that take each token by itself."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), ClassesSecond())


@dataclass(frozen=True)
class Setting:
    """A model, the shape of its inputs, and the loss in torch's words."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    criterion: nn.Module


SETTINGS = (
    Setting("perceptron, classes", perceptron, (8, 4), nn.CrossEntropyLoss()),
    Setting("perceptron, squared error", perceptron, (8, 4), nn.MSELoss()),
    Setting("deep linear, squared error", deep_linear, (12, 4), nn.MSELoss()),
    Setting("convolutions", convolutional, (24, 2, 4, 4), nn.CrossEntropyLoss()),
    Setting("linear layers over tokens", over_tokens, (8, 3, 3), nn.CrossEntropyLoss()),
    Setting("attention, a class a token", lambda: Attention(pooled=False), (8, 3, 3), nn.CrossEntropyLoss()),
    Setting("attention, pooled", lambda: Attention(pooled=True), (8, 3, 3), nn.CrossEntropyLoss()),
)


class Merged(kc.Likelihood):
    """Classes whose 'draw' c is the column c of the output Fisher's root, of all terms at once."""

    event_dims = (1,)

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        raise NotImplementedError

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """diag(sqrt p) - p sqrt p^T, times the root of the number of columns over which is averaged."""
        p, c = outputs.softmax(1), int(labels.flatten()[0])
        column = -p * p[:, c : c + 1].sqrt()
        column[:, c] += p[:, c].sqrt()
        return outputs.shape[1] ** 0.5 * column


class Case:
    """A setting with data and labels, and what this library says of it, as matrices over parameters in order."""

    def __init__(self, setting: Setting) -> None:
        torch.manual_seed(0)
        self.criterion = setting.criterion
        self.model, self.inputs = setting.make().double(), torch.randn(setting.shape, dtype=torch.float64)
        self.classes = isinstance(self.criterion, nn.CrossEntropyLoss)
        self.likelihood = kc.Categorical(dim=1) if self.classes else kc.Gaussian(0.5, event_dims=())
        outputs = self.model(self.inputs).detach()
        self.labels, self.draw = (self.likelihood.sample(outputs) for _ in range(2))
        self.size = outputs.shape[1]
        self.positions = outputs.shape[2] if outputs.ndim > 2 else 1
        self.shared = self.inputs.ndim > 2
        self.vector = torch.randn(sum(p.numel() for p in self.model.parameters()), dtype=torch.float64)

    def batches(self, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Two, of unequal size."""
        return [(self.inputs[:3], labels[:3]), (self.inputs[3:], labels[3:])]

    def estimate(self, structure: str, kind: str, likelihood: kc.Likelihood | None = None, **options: Any) -> kc.Fisher:
        """kc.estimate on the case; 'sampled' has the labels ``draw``, which are handed in."""
        rules = options.pop("rules", None)
        if kind == "sampled":
            options.setdefault("draws", [[self.draw[:3]], [self.draw[3:]]])
        return kc.estimate(
            self.model,
            self.batches(self.labels),
            likelihood or self.likelihood,
            structure=structure,
            kind=kind,
            rules=rules,
            options=kc.Options(progress=False, **options),
        )

    def matrix(self, structure: str, kind: str, sharing: str = "expand", **options: Any) -> Tensor:
        """An estimate as a dense matrix in the order of the parameters."""
        return dense(self.estimate(structure, kind, rules={"*": {"sharing": sharing}}, **options))

    def merged(self, sharing: str) -> Tensor:
        """K-FAC with one backward a column for all terms of an example together."""
        sizes = (3, len(self.inputs) - 3)
        draws = [[torch.full((n, self.positions), c) for c in range(self.size)] for n in sizes]
        return self.matrix("kfac", "sampled", sharing, likelihood=Merged(), draws=draws)

    def by_term(self, kind: str) -> Tensor:
        """The Fisher of given labels where each term is an example of its own."""
        total = torch.zeros(())
        for position in range(self.positions):

            def only(args: Any, kwargs: Any, outputs: Tensor, position: int = position) -> Tensor:
                mask = torch.zeros(outputs.shape[0], self.positions, dtype=torch.bool)
                mask[:, position] = True
                return mask

            alone = kc.Categorical(dim=1, reduction="sum")
            total = total + dense(self.estimate("dense", kind, alone, data=kc.Data(mask=only)))
        return total / (len(self.inputs) * self.positions)


def dense(fisher: kc.Fisher) -> Tensor:
    """[P, P] in the order of the parameters."""
    return torch.stack([fisher @ unit for unit in torch.eye(fisher.shape[0], dtype=torch.float64)])


def apart(matrix: Tensor, model: nn.Module) -> Tensor:
    """The entries within each parameter: no coupling of a weight with its bias."""
    number = torch.cat([torch.full((p.numel(),), i) for i, p in enumerate(model.parameters())])
    return matrix * (number[:, None] == number)
