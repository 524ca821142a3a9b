"""Models of few parameters with data, labels and draws, and the matrices that brute force gives for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.layers.normalisation import NormKind
from kfac_cond.layers.survey import survey

from .helpers import Apply
from .reference import (
    bernoulli_log_prob,
    categorical_log_prob,
    exact_fisher,
    fisher_of_draws,
    gaussian_log_prob,
)


class Tokens(nn.Module):
    """Attention written out over (N, S, d), one layer used twice and one without bias: positions mix."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.head = nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.query(x) @ torch.tanh(self.query(x.flip(1))).mT).softmax(-1)
        return self.head(x + weights @ self.value(x))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def pixels() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 2, (2, 1), groups=2), nn.Tanh(), nn.Conv2d(2, 3, 2, padding=1), Apply(lambda x: x.mean((2, 3)))
    )


class Normalised(nn.Module):
    """Each kind of norm that leaves an example to itself, over (N, 4, 3); the layer norm is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.group, self.instance = nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True)
        self.layer, self.rms = nn.LayerNorm((4, 3)), nn.RMSNorm(4)
        self.head = nn.Linear(4, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(torch.tanh(self.instance(torch.tanh(self.group(x)))))
        return self.head(self.rms(torch.tanh(self.layer(h + x)).mean(-1)))


class Attending(nn.Module):
    """Attention to itself and to shorter sequences, over (N, 3, 2), with one and with separate projections."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(2, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(2, 1, batch_first=True, vdim=1, bias=False)
        self.head = nn.Linear(2, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.own(x, x, x)[0]
        h = h + self.own(h, x[:, :2], x[:, 1:])[0]
        return self.head(h + self.cross(h, x[:, :2], x[:, :2, :1])[0])


class Recurring(nn.Module):
    """Each kind of recurrent layer, and a cell used at every step, over (N, 3, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 2, batch_first=True, bidirectional=True, proj_size=1)
        self.gru, self.cell = nn.GRU(2, 2, bias=False), nn.LSTMCell(2, 2)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.lstm(x)
        steps, _ = self.gru(h.transpose(0, 1))
        state = None
        for step in steps:
            state = self.cell(step, state)
        return self.head(state[0] + state[1])


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (perceptron, (5, 3)),
    "tokens": (Tokens, (4, 3, 2)),
    "pixels": (pixels, (4, 4, 3, 2)),
    "normalised": (Normalised, (4, 4, 3)),
    "attending": (Attending, (4, 3, 2)),
    "recurring": (Recurring, (4, 3, 2)),
}


def information(name: str, f: Tensor) -> Tensor:
    """The output Fisher of one example, its terms along all but the last dimension."""
    if name == "categorical":
        p = f.softmax(-1)
        blocks = torch.diag_embed(p) - p[..., None] * p[..., None, :]
    else:
        of_one = f.sigmoid() * (1 - f.sigmoid()) if name == "bernoulli" else torch.full_like(f, 1 / 0.7)
        blocks = torch.diag_embed(of_one)
    return torch.block_diag(*blocks.reshape(-1, f.shape[-1], f.shape[-1]))


LIKELIHOODS = {
    "categorical": (kc.Categorical(dim=-1), categorical_log_prob),
    "bernoulli": (kc.Bernoulli(event_dims=(-1,)), bernoulli_log_prob),
    "gaussian": (kc.Gaussian(0.7, event_dims=(-1,)), lambda f, y: gaussian_log_prob(f, y, 0.7)),
}


Structures = str | kc.Structure | list[str | kc.Structure]
Rules = dict[str, dict[str, object]]


def twice(words: str | list[str]) -> Structures:
    """The same structures, 'ekfac' from a second pass over the data."""
    if isinstance(words, list):
        return [twice(word) for word in words]
    return kc.Structure("ekfac", second_pass=True) if words == "ekfac" else words


class Case:
    """A model with data and labels, and the matrices that brute force gives for it."""

    def __init__(self, model: str, likelihood: str) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            make, shape = MODELS[model]
            self.model, self.inputs = make().double(), torch.randn(shape, dtype=torch.float64)
            self.name, (self.likelihood, self.log_prob) = likelihood, LIKELIHOODS[likelihood]
            outputs = self.model(self.inputs).detach()
            self.labels, *self.draws = (self.drawn(outputs) for _ in range(3))
        self.divisor = outputs[..., 0].numel()
        self.layers = tuple(survey(self.model).layers)

    def drawn(self, outputs: Tensor) -> Tensor:
        if self.name == "categorical":
            return torch.randint(outputs.shape[-1], outputs.shape[:-1])
        return torch.randint(2, outputs.shape).double() if self.name == "bernoulli" else torch.randn_like(outputs)

    def estimate(
        self, structure: Structures, kind: str, *, rules: Rules | None = None, **options: object
    ) -> kc.Fisher | list[kc.Fisher]:
        # Two batches, of unequal size.
        data = [(self.inputs[:3], self.labels[:3]), (self.inputs[3:], self.labels[3:])]
        if kind == "sampled":
            options["draws"] = [[draw[:3] for draw in self.draws], [draw[3:] for draw in self.draws]]
        given = {"structure": structure, "kind": kind, "rules": rules, "options": kc.Options(**options)}
        return kc.estimate(self.model, data, self.likelihood, **given)

    @lru_cache  # noqa: B019
    def dense(self, kind: str, names: tuple[str, ...] | None = None) -> Tensor:
        """F over all parameters, in the order of the model or of ``names``."""
        held = dict(self.model.named_parameters())
        parameters = [held[name] for name in names or held]
        settings = {"parameters": parameters, "divisor": self.divisor}
        if kind == "exact":
            return exact_fisher(self.model, self.inputs, lambda f: information(self.name, f), **settings).detach()
        labels = self.draws if kind == "sampled" else [self.labels]
        return fisher_of_draws(self.model, self.inputs, labels, self.log_prob, **settings)

    def is_norm(self, name: str) -> bool:
        return isinstance(survey(self.model).layers[name].kind, NormKind)

    def block(self, kind: str, block: kc.Block) -> Tensor:
        """F of one layer in the order of its matrix; for 'forward_only' I (x) A."""
        if kind == "forward_only":
            eye, A = torch.eye(block.layout.d_out), self.estimate("kfac", "forward_only")[block.name].A
            return torch.block_diag(*[torch.kron(eye, one) for one in A.reshape(-1, *A.shape[-2:])])
        order = self.order(block)
        return self.dense(kind)[order][:, order]

    def order(self, block: kc.Block) -> Tensor:
        """Where the entries of the layer's matrix are in a flat vector of all parameters."""
        start, places = 0, {}
        for name, parameter in self.model.named_parameters():
            places[name] = torch.arange(start, start + parameter.numel()).reshape(parameter.shape)
            start += parameter.numel()
        return block.layout.to_matrix({name: places[name] for name in block.layout.names}).flatten()


@lru_cache
def case(model: str, likelihood: str) -> Case:
    return Case(model, likelihood)
