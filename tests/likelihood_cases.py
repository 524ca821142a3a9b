"""Every likelihood at the end of a small net, with its log p, draws and output Fisher apart from the library's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch import distributions as td

import kfac_cond as kc

from . import fisher_cases
from .helpers import Apply
from .reference import exact_fisher, fisher_of_draws

STRUCTURES = ["kfac", "ekfac", "tkfac", "kpsvd", "diagonal", "block", "dense"]
Make = Callable[[Tensor], td.Distribution]
CUTS = (-1.0, 0.2, 1.5)
COVARIANCE = torch.tensor([[1.3, 0.4], [0.4, 0.6]], dtype=torch.float64)


class Ordered(td.Distribution):
    """Classes by cumulative logits, probabilities as plain differences."""

    def __init__(self, f: Tensor) -> None:
        super().__init__(f.shape, validate_args=False)
        below = torch.stack([torch.zeros_like(f), *[(cut - f).sigmoid() for cut in CUTS], torch.ones_like(f)], -1)
        self.classes = td.Categorical(probs=below.diff(dim=-1))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self.classes.sample(sample_shape).double()

    def log_prob(self, value: Tensor) -> Tensor:
        return self.classes.log_prob(value.long())


def angles(f: Tensor) -> td.Distribution:
    """Torch's von Mises, whose Bessel function is a polynomial: its normaliser does not depend on f."""
    return td.VonMises(f, torch.full_like(f, 1.7))


def student(f: Tensor) -> td.Distribution:
    return td.StudentT(4.0, f[..., 0], (f[..., 1] / 2).exp())


def mixture(f: Tensor) -> td.Distribution:
    """Two normals over one label: logits, means, log-variances."""
    parts = td.Independent(td.Normal(f[..., 2:4, None], (f[..., 4:6, None] / 2).exp()), 1)
    return td.MixtureSameFamily(td.Categorical(logits=f[..., :2]), parts)


@dataclass(frozen=True)
class Head:
    """A likelihood of ``width`` outputs along the last dimension, and torch's distribution of the same labels.

    ``information`` is the output Fisher of one term, [width, width] from [width]; None where there is no closed form.
    """

    make: Callable[..., kc.Likelihood]
    width: int
    distribution: Make
    information: Callable[[Tensor], Tensor] | None

    @property
    def likelihood(self) -> kc.Likelihood:
        return self.make()

    @property
    def closed(self) -> bool:
        return self.information is not None

    def labels(self, f: Tensor) -> Tensor:
        return self.distribution(f.detach()).sample()

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        """The sum over all terms."""
        return self.distribution(f).log_prob(y).sum()

    def fisher(self, f: Tensor) -> Tensor:
        """Of all terms of (..., width) outputs, as one block-diagonal matrix."""
        assert self.information is not None
        return torch.block_diag(*[self.information(row) for row in f.reshape(-1, self.width)])


def integrated(distribution: Make, rule: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
    """The second moment of autograd's gradient of torch's log p, element by element, over labels and their measure."""

    def information(row: Tensor) -> Tensor:
        moments = []
        for f in row:
            y, measure = rule(f)
            at = f.detach().expand(len(y)).clone().requires_grad_()
            log_p = distribution(at).log_prob(y)
            (score,) = torch.autograd.grad(log_p.sum(), at)
            p = log_p.detach().exp() * measure
            moments.append((p * score.square()).sum() / p.sum())
        return torch.stack(moments).diag()

    return information


def counts(last: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda f: (torch.arange(last + 1.0), torch.ones(last + 1))


def transformed(low: float, high: float, label: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]):
    """The trapezoidal rule in t with y = label(t): as good as exact where the density dies out at both ends."""

    def rule(f: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.linspace(low, high, 4001)
        return label(t), slope(t) * (high - low) / 4000

    return rule


positive = transformed(-60.0, 8.0, torch.exp, torch.exp)


def circle(f: Tensor) -> tuple[Tensor, Tensor]:
    steps = 200
    return f.detach() + torch.linspace(-math.pi, math.pi, steps + 1)[1:], torch.full((steps,), 2 * math.pi / steps)


def of_two_logarithms(row: Tensor) -> Tensor:
    """Of a beta: the Hessian of the logarithm of its normaliser in the concentrations, pulled back to each output."""

    def normaliser(c: Tensor) -> Tensor:
        return torch.lgamma(c).sum() - torch.lgamma(c.sum())

    def concentrations(f: Tensor) -> Tensor:
        return 4 * torch.stack([f.sigmoid(), (-f).sigmoid()])

    slopes = [torch.func.jacrev(concentrations)(f) for f in row]
    curvatures = [torch.func.hessian(normaliser)(concentrations(f)) for f in row]
    return torch.stack([slope @ curvature @ slope for slope, curvature in zip(slopes, curvatures, strict=True)]).diag()


def softmax_fisher(f: Tensor, scale: float = 1.0) -> Tensor:
    p = f.softmax(-1)
    return scale * (p.diag() - p.outer(p))


def mean_and_log_variance(f: Tensor) -> Tensor:
    """Fisher of a normal: 1 / variance for the mean, 1/2 for the log-variance."""
    return torch.stack([(-f[1]).exp(), torch.tensor(0.5)]).diag()


def poisson(f: Tensor) -> td.Distribution:
    return td.Poisson(f.exp())


def negative_binomial(f: Tensor) -> td.Distribution:
    return td.NegativeBinomial(2.5, logits=f - math.log(2.5))


def binomial(f: Tensor) -> td.Distribution:
    return td.Binomial(4, logits=f)


def gamma(f: Tensor) -> td.Distribution:
    return td.Gamma(1 / 0.4, (-f).exp() / 0.4)


def beta(f: Tensor) -> td.Distribution:
    return td.Beta(4 * f.sigmoid(), 4 * (-f).sigmoid())


def normals(f: Tensor) -> td.Distribution:
    return td.Independent(td.Normal(f[..., :1], (f[..., 1:] / 2).exp()), 1)


LAST = {"event_dims": (-1,)}
HEADS = {
    "categorical": Head(
        lambda **kw: kc.Categorical(dim=-1, **kw), 3, lambda f: td.Categorical(logits=f), softmax_fisher
    ),
    "bernoulli": Head(
        lambda **kw: kc.Bernoulli(**LAST, **kw),
        2,
        lambda f: td.Bernoulli(logits=f),
        lambda f: (f.sigmoid() * (1 - f.sigmoid())).diag(),
    ),
    "gaussian": Head(
        lambda **kw: kc.Gaussian(0.7, **LAST, **kw), 2, lambda f: td.Normal(f, 0.7**0.5), lambda f: torch.eye(2) / 0.7
    ),
    "multivariate gaussian": Head(
        lambda **kw: kc.MultivariateGaussian(COVARIANCE, **kw),
        2,
        lambda f: td.MultivariateNormal(f, COVARIANCE),
        lambda f: COVARIANCE.inverse(),
    ),
    "heteroscedastic": Head(lambda **kw: kc.HeteroscedasticGaussian(**kw), 2, normals, mean_and_log_variance),
    "laplace": Head(
        lambda **kw: kc.Laplace(0.7, **LAST, **kw), 2, lambda f: td.Laplace(f, 0.7), lambda f: torch.eye(2) / 0.7**2
    ),
    "poisson": Head(lambda **kw: kc.Poisson(**LAST, **kw), 2, poisson, integrated(poisson, counts(80))),
    "negative binomial": Head(
        lambda **kw: kc.NegativeBinomial(2.5, **LAST, **kw),
        2,
        negative_binomial,
        integrated(negative_binomial, counts(400)),
    ),
    "binomial": Head(lambda **kw: kc.Binomial(4, **LAST, **kw), 2, binomial, integrated(binomial, counts(4))),
    "multinomial": Head(
        lambda **kw: kc.Multinomial(5, **kw),
        3,
        lambda f: td.Multinomial(5, logits=f),
        lambda f: softmax_fisher(f, 5.0),
    ),
    "gamma": Head(lambda **kw: kc.Gamma(0.4, **LAST, **kw), 2, gamma, integrated(gamma, positive)),
    "beta": Head(lambda **kw: kc.Beta(0.2, **LAST, **kw), 2, beta, of_two_logarithms),
    "ordinal": Head(lambda **kw: kc.Ordinal(CUTS, **LAST, **kw), 2, Ordered, integrated(Ordered, counts(3))),
    "von mises": Head(lambda **kw: kc.VonMises(1.7, **LAST, **kw), 2, angles, integrated(angles, circle)),
    "tempered": Head(
        lambda **kw: kc.Tempered(kc.Categorical(dim=-1, **kw), 2.5),
        3,
        lambda f: td.Categorical(logits=f / 2.5),
        lambda f: softmax_fisher(f / 2.5, 2.5**-2),
    ),
    "mixture": Head(lambda **kw: kc.MixtureDensity(2, **kw), 6, mixture, None),
    "any distribution": Head(lambda **kw: kc.FromDistribution(student, **LAST, **kw), 2, student, None),
}
CLOSED = [name for name, head in HEADS.items() if head.closed]
#: Whose output Fisher is the same wherever the outputs are.
CONSTANT = ["gaussian", "multivariate gaussian", "laplace", "gamma", "von mises"]


class Mixing(nn.Module):
    """Attention written out over (N, T, 2), one layer used twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.head = nn.Linear(2, 2), nn.Linear(2, width)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.query(x) @ torch.tanh(self.query(x.flip(1))).mT).softmax(-1)
        return self.head(x + weights @ x)


def perceptron(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, width))


def deep_linear(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, width))


def pooled(width: int) -> nn.Module:
    return nn.Sequential(deep_linear(width), Apply(lambda h: h.mean(1)))


def one_convolution(width: int) -> nn.Module:
    """Events along the last dimension."""
    module = nn.Conv2d(2, width, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
    return nn.Sequential(module, Apply(lambda h: h.movedim(1, -1)))


def pooled_convolution(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, width, (3, 2), stride=(2, 1), padding=1), Apply(lambda h: h.mean((2, 3))))


NETS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "perceptron": (perceptron, (5, 3)),
    "mixing": (Mixing, (4, 2, 2)),
    "one example": (perceptron, (1, 3)),
    "deep linear": (deep_linear, (5, 3)),
    "deep linear over positions": (deep_linear, (4, 3, 3)),
    "deep linear pooled": (pooled, (4, 3, 3)),
    "linear": (lambda width: nn.Sequential(nn.Linear(3, width)), (7, 3)),
    "convolution": (one_convolution, (3, 2, 4, 3)),
    "convolution pooled": (pooled_convolution, (3, 2, 4, 3)),
}


class Case(fisher_cases.Case):
    """A net with a head, data, data labels and two draws, and what brute force gives for it."""

    def __init__(self, net: str, head: str) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            make, shape = NETS[net]
            self.head = HEADS[head]
            self.model, self.inputs = make(self.head.width).double(), torch.randn(shape, dtype=torch.float64)
            self.likelihood = self.head.likelihood
            outputs = self.model(self.inputs).detach()
            self.labels, *self.draws = (self.head.labels(outputs) for _ in range(3))
        self.divisor = outputs[..., 0].numel()
        self.layers = {name: m for name, m in self.model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        pieces = [(self.inputs[:3], self.labels[:3]), (self.inputs[3:], self.labels[3:])]
        return [(x, y) for x, y in pieces if len(x)]

    def estimate(
        self,
        structure: str | list[str],
        kind: str,
        *,
        rules: dict[str, dict[str, object]] | None = None,
        **options: object,
    ) -> kc.Fisher | list[kc.Fisher]:
        if kind == "sampled":
            pieces = [[draw[:3] for draw in self.draws], [draw[3:] for draw in self.draws]]
            options["draws"] = pieces[: len(self.batches())]
        given = {"structure": structure, "kind": kind, "rules": rules, "options": kc.Options(**options)}
        return kc.estimate(self.model, self.batches(), self.likelihood, **given)

    @lru_cache  # noqa: B019
    def dense(self, kind: str) -> Tensor:
        """F over all parameters, in the order of a flat vector."""
        settings = {"parameters": list(self.model.parameters()), "divisor": self.divisor}
        if kind == "exact":
            return exact_fisher(self.model, self.inputs, self.head.fisher, **settings).detach()
        labels = self.draws if kind == "sampled" else [self.labels]
        return fisher_of_draws(self.model, self.inputs, labels, self.head.log_prob, **settings)

    @lru_cache  # noqa: B019
    def stored(self, kind: str, sharing: str = "expand") -> dict[str, kc.Fisher]:
        """Every structure, from one pass."""
        return dict(zip(STRUCTURES, self.estimate(STRUCTURES, kind, rules={"*": {"sharing": sharing}}), strict=True))


@lru_cache
def case(net: str, head: str) -> Case:
    return Case(net, head)
