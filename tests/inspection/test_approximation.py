from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.inspection import approximation
from kfac_cond.inspection.approximation import ApproximationError

from ..fisher_cases import LIKELIHOODS, MODELS, case
from ..helpers import classifier

DOUBLE = kc.Options(dtype=torch.float64)
WORDS = approximation.WORDS


def of_dense(model: nn.Module, data: list, likelihood: object) -> dict[str, dict[str, float]]:
    """The errors of each layer from dense matrices, exactly."""
    fishers = kc.estimate(model, data, likelihood, structure=[*WORDS, "block"], kind="exact", options=DOUBLE)
    *approximations, exact = fishers
    found = {}
    for name, block in exact.items():
        F = block.to_dense()
        found[name] = {
            word: float(torch.linalg.norm(of[name].to_dense() - F) / torch.linalg.norm(F))
            for word, of in zip(WORDS, approximations, strict=True)
        }
        found[name] |= {"norm": float(torch.linalg.norm(F))}
        found[name] |= {"independence_gap": float(approximations[0][name].trace() / F.trace())}
    return found


@lru_cache
def of_case(model: str, likelihood: str) -> dict[str, ApproximationError]:
    of = case(model, likelihood)
    data = [(of.inputs[:3], of.labels[:3]), (of.inputs[3:], of.labels[3:])]
    fisher = of.estimate("kfac", "exact")
    return approximation.measure(of.model, data, of.likelihood, fisher, kind="exact")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_errors_are_those_of_the_dense_matrices(model: str, likelihood: str) -> None:
    of = case(model, likelihood)
    blocks = of.estimate([*WORDS], "exact", dtype=torch.float64)
    found = of_case(model, likelihood)
    assert list(found) == list(blocks[0])
    for name, errors in found.items():
        # By enumeration, and not by the library.
        F = of.block("exact", blocks[0][name])
        for word, fisher in zip(WORDS, blocks, strict=True):
            expected = torch.linalg.norm(fisher[name].to_dense() - F) / torch.linalg.norm(F)
            assert getattr(errors, word) == pytest.approx(float(expected), rel=1e-8, abs=1e-7)
            assert getattr(errors, f"{word}_standard_error") == 0.0
        assert errors.norm == pytest.approx(float(torch.linalg.norm(F)))
        assert errors.independence_gap == pytest.approx(float(blocks[0][name].trace() / F.trace()))
        assert errors.ekfac <= errors.kfac * (1 + 1e-9) + 1e-7


def test_kronecker_factors_of_one_example_are_exact() -> None:
    model, x = classifier(), torch.randn(1, 3)
    fisher = kc.estimate(model, [x], "categorical", kind="exact")
    for errors in approximation.measure(model, [x], "categorical", fisher, kind="exact").values():
        assert errors.kfac == pytest.approx(0.0, abs=1e-7)
        assert errors.independence_gap == pytest.approx(1.0)
        assert errors.diagonal > 0.1


def test_a_factor_of_two_between_the_traces_shows_in_the_gap() -> None:
    """Inputs of two lengths, of which the longer ones have all the gradient."""
    model = nn.Linear(3, 2, bias=False)
    x = torch.cat([torch.eye(3), torch.zeros(3, 3)])
    model.weight.data.zero_()
    weights = kc.Data(mask=lambda args, kwargs, f: args[0].abs().sum(-1) > 0)
    options = kc.Options(data=weights)
    fisher = kc.estimate(model, [x], kc.Categorical(), kind="exact", options=options)
    found = approximation.measure(model, [x], kc.Categorical(), fisher, kind="exact", options=options)
    assert found[""].independence_gap == pytest.approx(0.5)


@lru_cache
def trained() -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = classifier(hidden=5, classes=4, features=4)
        for p in model.parameters():
            p.data.mul_(2.5)
        return model, torch.randn(40, 4)


@lru_cache
def repeats() -> list[dict[str, ApproximationError]]:
    model, x = trained()
    fisher = kc.estimate(model, [x], "categorical")
    return [
        approximation.measure(model, [x], "categorical", fisher, samples=4, options=kc.Options(seed=seed))
        for seed in range(40)
    ]


@pytest.mark.parametrize("layer", ["0", "2"])
@pytest.mark.parametrize("word", ["kfac", "diagonal"])
def test_the_noise_of_drawing_is_no_error(layer: str, word: str) -> None:
    """Squares average to the exact ones; those of whole estimates would have the noise on top."""
    model, x = trained()
    exact = of_dense(model, [x], "categorical")[layer]
    squares = torch.tensor([(getattr(one[layer], word) * one[layer].norm) ** 2 for one in repeats()])
    expected = (exact[word] * exact["norm"]) ** 2
    deviation = squares.std() / len(squares) ** 0.5
    assert abs(squares.mean() - expected) < 4 * deviation
    norms = torch.tensor([one[layer].norm ** 2 for one in repeats()])
    assert abs(norms.mean() - exact["norm"] ** 2) < 4 * norms.std() / len(norms) ** 0.5


@pytest.mark.parametrize("layer", ["0", "2"])
def test_a_basis_of_other_draws_does_not_seem_too_good(layer: str) -> None:
    """One of the same draws fits their noise: its squares were 4 and 12 % too small here."""
    model, x = trained()
    exact = of_dense(model, [x], "categorical")[layer]
    squares = torch.tensor([(one[layer].ekfac * one[layer].norm) ** 2 for one in repeats()])
    expected = (exact["ekfac"] * exact["norm"]) ** 2
    deviation = squares.std() / len(squares) ** 0.5
    assert squares.mean() > expected - 3 * deviation
    assert squares.mean() < 1.2 * expected + 3 * deviation


@pytest.mark.parametrize("layer", ["0", "2"])
@pytest.mark.parametrize("what", [*WORDS, "independence_gap"])
def test_standard_errors_cover(layer: str, what: str) -> None:
    model, x = trained()
    exact = of_dense(model, [x], "categorical")[layer][what]
    deviation = "gap" if what == "independence_gap" else what
    hits = [
        abs(getattr(one[layer], what) - exact) < 3.2 * getattr(one[layer], f"{deviation}_standard_error")
        for one in repeats()
    ]
    # Student's t of three degrees of freedom, at 95 %.
    assert sum(hits) / len(hits) >= 0.85


def test_two_draws_have_an_error_and_no_standard_error() -> None:
    model, x = trained()
    fisher = kc.estimate(model, [x], "categorical")
    found = approximation.measure(model, [x], "categorical", fisher, samples=2)["0"]
    assert 0 < found.diagonal < 1.5
    assert (found.kfac_standard_error, found.gap_standard_error) == (None, None)


class Words(nn.Module):
    """A table looked up, with a parameter of no layer beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 3), nn.Linear(3, 4)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(tokens).cumsum(1) * self.scale))


def test_an_embedding_and_a_parameter_by_itself() -> None:
    model, tokens = Words(), torch.randint(9, (6, 4))
    fisher = kc.estimate(model, [tokens[:4], tokens[4:]], "categorical", kind="exact")
    found = approximation.measure(model, [tokens[:4], tokens[4:]], "categorical", fisher, kind="exact")
    for name, expected in of_dense(model, [tokens[:4], tokens[4:]], "categorical").items():
        for what, value in expected.items():
            assert getattr(found[name], what) == pytest.approx(value, rel=1e-7, abs=1e-7)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.kind, self.size = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.kind(h), self.size(h)


def test_several_heads() -> None:
    model, x = TwoHeads(), torch.randn(7, 3)
    likelihood = kc.Product({"kind": kc.Categorical(), "size": kc.Gaussian(0.3)}, weights={"size": 0.5})
    data = [x[:4], x[4:]]
    fisher = kc.estimate(model, data, likelihood, kind="exact")
    found = approximation.measure(model, data, likelihood, fisher, kind="exact")
    for name, expected in of_dense(model, data, likelihood).items():
        for what, value in expected.items():
            assert getattr(found[name], what) == pytest.approx(value, rel=1e-7, abs=1e-7)
    drawn = approximation.measure(model, data, likelihood, fisher, samples=3)
    assert all(one.kfac_standard_error is not None for one in drawn.values())


def test_rules_say_how_positions_enter_the_factors() -> None:
    of = case("tokens", "categorical")
    fisher = of.estimate("kfac", "exact")
    rules = {"*": {"sharing": "reduce"}}
    settings = {"kind": "exact", "rules": rules}
    found = approximation.measure(of.model, [of.inputs], of.likelihood, fisher, **settings)
    reduced = of.estimate("kfac", "exact", rules=rules, dtype=torch.float64)
    for name, errors in found.items():
        F = of.block("exact", reduced[name])
        expected = torch.linalg.norm(reduced[name].to_dense() - F) / torch.linalg.norm(F)
        assert errors.kfac == pytest.approx(float(expected))


def test_it_looks_at_the_first_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximation, "EXAMPLES", 5)
    model, x, y = classifier(), torch.randn(8, 3), torch.randint(3, (8,))
    fisher = kc.estimate(model, [x], "categorical")
    # An iterator as well: it is gone through once.
    batches = iter([(x[:3], y[:3]), (x[3:], y[3:])])
    found = approximation.measure(model, batches, "categorical", fisher, kind="exact")
    few = of_dense(model, [x[:5]], "categorical")
    for name, errors in found.items():
        assert errors.examples == 5
        assert errors.kfac == pytest.approx(few[name]["kfac"])
        assert errors.norm == pytest.approx(few[name]["norm"])


def test_only_the_layers_of_the_fisher_are_looked_at() -> None:
    model, x = classifier(), torch.randn(6, 3)
    fisher = kc.estimate(model, [x], "categorical", options=kc.Options(layers="2"))
    assert list(approximation.measure(model, [x], "categorical", fisher)) == ["2"]
    whole = kc.estimate(model, [x], "categorical", structure="dense")
    with pytest.raises(kc.ArgumentError, match="none of which is a layer"):
        approximation.measure(model, [x], "categorical", whole)


@pytest.mark.parametrize("settings", [{"samples": 1}, {"kind": "empirical"}, {"samples": 2.5}])
def test_what_has_no_unbiased_error_is_refused(settings: dict) -> None:
    model, x = classifier(), torch.randn(6, 3)
    fisher = kc.estimate(model, [x], "categorical")
    with pytest.raises(kc.ArgumentError, match="at least two draws"):
        approximation.measure(model, [x], "categorical", fisher, **settings)


def test_no_matrix_of_the_blocks_side() -> None:
    """Of 160 000 parameters it would take 205 GB."""
    model, x = nn.Linear(400, 400, bias=False), torch.randn(8, 400)
    fisher = kc.estimate(model, [x], "gaussian", structure="diagonal")
    found = approximation.measure(model, [x], "gaussian", fisher, samples=3)[""]
    assert found.examples == 8
    assert found.independence_gap == pytest.approx(1.0, rel=0.1)


def test_nothing_of_the_model_or_the_random_state_changes() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    data = [torch.randn(9, 3)]
    fisher = kc.estimate(model, data, "categorical")
    before = [t.clone() for t in (*model.parameters(), *model.buffers(), torch.get_rng_state())]
    approximation.measure(model, data, "categorical", fisher)
    assert all(map(torch.equal, (*model.parameters(), *model.buffers(), torch.get_rng_state()), before))
