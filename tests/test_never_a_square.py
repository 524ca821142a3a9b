"""A side as large as a vocabulary: nothing of the size of its square is formed, anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kfac_cond as kc
from kfac_cond.layers.layout import MAX_FACTOR_DIM

from .training import EVERY_STEP

VOCABULARY = 40_000


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def wide() -> nn.Sequential:
    """A side as large as a vocabulary at the input of one layer and at the output of another."""
    return nn.Sequential(nn.Linear(VOCABULARY, 3), nn.Tanh(), nn.Linear(3, VOCABULARY)).float()


def test_the_default_makes_no_square_of_a_vocabulary():
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Linear(3, 4), nn.Linear(4, MAX_FACTOR_DIM + 1), nn.Linear(MAX_FACTOR_DIM, 2, bias=False)
        )
    reasons = {row.path: row.reason for row in kc.coverage(model).rows if row.reason}
    assert reasons == dict.fromkeys(
        ["1.weight", "1.bias"], "side G of 16,385 as diagonal: more than max_factor_dim=16,384"
    )


#: What a layer's own matrix takes, some times over.
ALLOWED = 8 * 4 * (VOCABULARY + 1)


@pytest.mark.parametrize("kind", ["sampled", "forward_only"])
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "tkfac"])
def test_an_estimate_makes_no_square(structure, kind):
    with Largest() as largest:
        fisher = kc.estimate(
            wide(), [torch.randn(2, VOCABULARY).float()], "categorical", structure=structure, kind=kind
        )
    assert largest.numel <= ALLOWED
    assert [block.diagonal_sides for block in fisher.values()] == [("A",), ("G",)]


@pytest.mark.parametrize("rule", ["factored", "exact"])
def test_a_step_makes_no_square(rule):
    model, criterion = wide(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion, damping=kc.Damping(0.1, rule=rule), schedule=EVERY_STEP)
    kfac.attach(optimizer)
    with Largest() as largest:
        for _ in range(2):
            criterion(model(torch.randn(2, VOCABULARY).float()), torch.zeros(2, dtype=torch.long)).backward()
            optimizer.step()
        kfac.load_state_dict(kfac.state_dict())
    assert largest.numel <= ALLOWED


@pytest.mark.parametrize("rule", ["factored", "exact"])
def test_a_step_on_the_meta_device_runs(rule):
    """There ``item``, ``cpu`` and ``nonzero`` raise."""
    model, criterion = wide().to("meta"), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion, damping=kc.Damping(0.1, rule=rule), schedule=EVERY_STEP)
    kfac.attach(optimizer)
    for _ in range(2):
        inputs = torch.randn(2, VOCABULARY, device="meta", dtype=torch.float32)
        criterion(model(inputs), torch.zeros(2, dtype=torch.long, device="meta")).backward()
        optimizer.step()


VERBS: dict[str, Callable[[kc.Fisher], Any]] = {
    "solve": lambda f: f.solve(torch.ones(f.shape[0]), damping=0.1),
    "matvec": lambda f: f @ torch.ones(f.shape[0]),
    "sqrt": lambda f: f.sqrt(),
    "inverse_sqrt": lambda f: f.inverse_sqrt(damping=0.1),
    "logdet": lambda f: f.logdet(damping=0.1),
    "trace": lambda f: f.trace(),
    "frobenius_norm": lambda f: f.frobenius_norm(),
    "diagonal": lambda f: f.diagonal(),
    "eigenvalues": lambda f: f.eigenvalues(),
    "top_eigenpairs": lambda f: f.top_eigenpairs(1),
    "sample": lambda f: f.sample(1),
    "scaled": lambda f: 2 * f,
    "str": str,
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_a_verb_makes_no_square(structure, verb):
    fisher = kc.estimate(wide(), [torch.randn(2, VOCABULARY).float()], "categorical", structure=structure)
    with Largest() as largest:
        VERBS[verb](fisher)
    assert largest.numel <= ALLOWED


def test_the_factored_rule_makes_no_square():
    fisher = kc.estimate(wide(), [torch.randn(2, VOCABULARY).float()], "categorical")
    with Largest() as largest:
        fisher.inverse(damping=0.1, rule="factored")
    assert largest.numel <= ALLOWED


# -- inputs that are indices: nor anything of the size of all their one-hot rows --------------------------------------

TOKENS, FEATURES, EXAMPLES, POSITIONS = 50_000, 4, 16, 8

#: The weight's own matrix some times over, below one-hot rows of all positions, or of all examples.
OF_INDICES = 3 * TOKENS * FEATURES
assert EXAMPLES * TOKENS > OF_INDICES


class Bigrams(nn.Module):
    """Tokens one by one and in a bag."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, FEATURES, padding_idx=0)
        self.bag = nn.EmbeddingBag(TOKENS, FEATURES, mode="mean", padding_idx=0)
        self.head = nn.Linear(FEATURES * (POSITIONS + 1), 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.cat([self.embedding(tokens).flatten(1), self.bag(tokens)], -1))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(TOKENS, (EXAMPLES, POSITIONS))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["sampled", "forward_only"])
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "tkfac", "diagonal"])
def test_an_estimate_forms_no_one_hot_rows(structure, kind, sharing, tokens):
    rules = {"embedding": {"sharing": sharing}}
    with Largest() as largest:
        fisher = kc.estimate(Bigrams().float(), [tokens], "categorical", structure=structure, kind=kind, rules=rules)
    assert largest.numel <= OF_INDICES
    if structure != "diagonal":
        assert [block.diagonal_sides for block in fisher.values()] == [("A",), ("A",), ()]


@pytest.mark.parametrize("rule", ["factored", "exact"])
def test_a_step_forms_no_one_hot_rows(rule, tokens):
    model, criterion = Bigrams().float(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion, damping=kc.Damping(0.1, rule=rule), schedule=EVERY_STEP)
    kfac.attach(optimizer)
    with Largest() as largest:
        for _ in range(2):
            criterion(model(tokens), torch.zeros(EXAMPLES, dtype=torch.long)).backward()
            optimizer.step()
        kfac.load_state_dict(kfac.state_dict())
    assert largest.numel <= OF_INDICES


def test_the_mode_sees_a_square():
    with Largest() as largest:
        functional.one_hot(torch.arange(3))
    assert largest.numel == 9
