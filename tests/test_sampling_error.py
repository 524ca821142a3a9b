"""The standard error of drawn labels: it covers at its stated rate, and says how many draws a precision needs."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.structures.sampling import Estimated, sampling_error

from .fisher_cases import MODELS, case
from .reference import assert_same

STRUCTURES = ["kfac", "ekfac", "tkfac", "kpsvd", "diagonal", "block", "dense"]
REPEATS = 100


@lru_cache
def repeats(structure: str) -> tuple[kc.Fisher, list[kc.Fisher]]:
    """The exact Fisher of a small classifier, and a hundred estimates of it from four draws each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x = torch.randn(60, 2, dtype=torch.float64)
    exact = kc.estimate(model, [x], "categorical", structure=structure, kind="exact")
    options = [kc.Options(seed=seed) for seed in range(REPEATS)]
    return exact, [
        kc.estimate(model, [x], "categorical", structure=structure, samples=4, options=one) for one in options
    ]


def assert_covers(hits: int, level: float) -> None:
    """A number of hits in a hundred is what the level says: two-sided, refused once in ten thousand."""
    low, high = stats.binom.interval(1 - 1e-4, REPEATS, level)
    assert low <= hits <= high, f"{hits} of {REPEATS} intervals of level {level} cover, expected {low:g} to {high:g}"


@pytest.mark.parametrize("level", [0.5, 0.9])
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "tkfac", "diagonal", "block", "dense"])
def test_intervals_of_the_trace_cover_at_their_level(structure, level):
    """ORACLES 23."""
    exact, found = repeats(structure)
    for name, block in exact.items():
        intervals = [fisher.sampling_error()[name].trace.interval(level) for fisher in found]
        assert_covers(sum(low <= float(block.trace()) <= high for low, high in intervals), level)
    intervals = [fisher.sampling_error().trace.interval(level) for fisher in found]
    assert_covers(sum(low <= float(exact.trace()) <= high for low, high in intervals), level)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "tkfac", "kpsvd", "diagonal", "block"])
def test_the_error_of_the_trace_is_the_spread_between_estimates(structure):
    """Their mean squares agree: a chi-square test of a hundred estimates against their own stated errors."""
    _, found = repeats(structure)
    traces = torch.stack([fisher["2"].trace() for fisher in found])
    stated = torch.tensor([fisher.sampling_error()["2"].trace.error ** 2 for fisher in found]).mean()
    ratio = float(traces.var() / stated)
    assert 0.5 < ratio < 1.9, f"ratio {ratio}"


@pytest.mark.parametrize("level", [0.5, 0.9])
@pytest.mark.parametrize("structure", ["kfac", "diagonal"])
def test_intervals_of_the_top_eigenvalue_cover_at_their_level(structure, level):
    """Of what is linear: along the exact eigenvector, which the estimate's own is near to."""
    exact, found = repeats(structure)
    for name, block in exact.items():
        top = float(block.top_eigenpairs(1)[0])
        intervals = [fisher.sampling_error()[name].top_eigenvalue.interval(level) for fisher in found]
        hits = sum(low <= top <= high for low, high in intervals)
        # The largest eigenvalue is too large by a part of its error, so it is covered a little less often.
        assert hits >= stats.binom.ppf(1e-4, REPEATS, level) - 12


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("model", MODELS)
def test_groups_of_draws_add_up_to_the_estimate(model, structure):
    of = case(model, "categorical")
    fisher = kc.estimate(of.model, [of.inputs[:3], of.inputs[3:]], of.likelihood, structure=structure, samples=3)
    errors = fisher.sampling_error()
    assert list(errors) == list(fisher)
    for name, block in fisher.items():
        assert_same(torch.tensor(errors[name].trace.value), block.trace())
        assert_same(torch.tensor(errors[name].top_eigenvalue.value), block.top_eigenpairs(1)[0][0])
        assert (errors[name].trace.draws, errors[name].trace.degrees) == (3, 2)
        if structure in ("diagonal", "block", "ekfac", "dense"):
            of_groups = sum(share * blocks[name].trace() for share, blocks in fisher._groups)
            assert_same(of_groups, block.trace())


def test_two_draws_by_hand():
    """With k = 2 the error of a mean is half the difference of the two."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    draws = [torch.randint(2, (5,)) for _ in range(2)]
    alone = [kc.estimate(model, [x], "categorical", options=kc.Options(draws=[[one]])) for one in draws]
    found = sampling_error(dict(alone[0]), [(0.5, alone[0]), (0.5, alone[1])], 2)
    assert_same(torch.tensor(found.trace.error), (alone[0].trace() - alone[1].trace()).abs() / 2)


def test_draws_beyond_the_groups_are_dealt_to_them_in_turn():
    model, x = nn.Linear(3, 2), torch.randn(20, 3)
    errors = kc.estimate(model, [x], "categorical", samples=19).sampling_error()
    assert (errors.trace.draws, errors.trace.degrees) == (19, 7)


def test_all_draws_alike_have_no_error():
    """Where p leaves no doubt the score is zero, whatever is drawn."""
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([200.0, -200.0]))
    errors = kc.estimate(model, [torch.randn(4, 3)], "categorical", samples=2).sampling_error()
    assert (errors.trace.error, errors.trace.relative, errors.draws_needed(0.1)) == (0.0, 0.0, {"": 1})


@pytest.mark.parametrize(
    ("error", "relative", "draws"), [(0.1, 0.1, 4), (0.1, 0.05, 16), (0.1, 0.2, 1), (0.2, 0.1, 16), (0.0, 0.1, 1)]
)
def test_draws_needed_falls_with_the_square_of_the_precision(error, relative, draws):
    assert Estimated(1.0, error, 4, 3).draws_needed(relative) == draws


def test_draws_needed_reach_the_precision_they_promise():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4), torch.randn(50, 3)
    first = kc.estimate(model, [x], "categorical", samples=8).sampling_error()
    needed = first.draws_needed(first.trace.relative / 4)[""]
    more = kc.estimate(model, [x], "categorical", samples=needed).sampling_error()
    assert more.trace.relative < first.trace.relative / 4 * 2.5


@pytest.mark.parametrize("relative", [0.0, -1.0, float("nan")])
def test_a_precision_that_is_none_is_refused(relative):
    with pytest.raises(kc.ArgumentError, match="expected a positive number"):
        Estimated(1.0, 0.1, 4, 3).draws_needed(relative)


def test_a_value_of_zero_with_an_error_has_no_relative_one():
    with pytest.raises(kc.ArgumentError, match="the value is 0"):
        Estimated(0.0, 0.1, 4, 3).draws_needed(0.1)


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_a_level_that_is_none_is_refused(level):
    with pytest.raises(kc.ArgumentError, match="between 0 and 1"):
        Estimated(1.0, 0.1, 4, 3).interval(level)


def without(name: str) -> kc.Fisher:
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    several = kc.estimate(model, [x], "categorical", samples=2)
    return {
        "one draw": lambda: kc.estimate(model, [x], "categorical"),
        "exact": lambda: kc.estimate(model, [x], "categorical", kind="exact"),
        "empirical": lambda: kc.estimate(model, [(x, y)], "categorical", kind="empirical"),
        "handed in": lambda: kc.estimate(model, [x], "categorical", options=kc.Options(draws=[[y, y]])),
        "derived": lambda: several * 2.0,
        "merged": lambda: several.merge(several),
    }[name]()


REASONS = {
    "one draw": r"of kind 'sampled' with samples=1: .*samples=8",
    "exact": r"of kind 'exact' with samples=1: .*samples=8",
    "empirical": r"of kind 'empirical' with samples=1: .*samples=8",
    "handed in": r"of kind 'sampled' with samples=1: .*samples=8",
    "derived": r"is \* 2 of an estimate: .*samples=8",
    "merged": "does not hold its draws apart",
}


@pytest.mark.parametrize("name", REASONS)
def test_what_has_no_groups_of_draws_says_what_to_do(name):
    with pytest.raises(kc.ArgumentError, match=REASONS[name]):
        without(name).sampling_error()


def test_a_file_has_no_groups_of_draws(tmp_path):
    kc.estimate(nn.Linear(3, 2), [torch.randn(4, 3)], "categorical", samples=2).save(tmp_path / "fisher")
    with pytest.raises(kc.ArgumentError, match="read from a file"):
        kc.Fisher.load(tmp_path / "fisher").sampling_error()


def test_the_table_is_short():
    text = repr(kc.estimate(nn.Linear(3, 2), [torch.randn(4, 3)], "categorical", samples=2).sampling_error())
    assert text.splitlines()[0] == "Sampling error: 2 draws a term, 1 degrees of freedom"
    assert len(text.splitlines()) == 4


def test_it_moves_with_the_fisher():
    fisher = kc.estimate(nn.Linear(3, 2), [torch.randn(4, 3)], "categorical", samples=2)
    assert fisher.to(torch.float64).sampling_error().trace.error == pytest.approx(fisher.sampling_error().trace.error)


def test_heads_and_groups_are_kept_apart_together():
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": self.a(x), "b": self.b(x)}

    model, x = Net().double(), torch.randn(9, 3, dtype=torch.float64)
    both = kc.Product({"a": kc.Categorical(), "b": kc.Gaussian()}, weights={"b": 0.5})
    errors = kc.estimate(model, [x], both, samples=4, options=kc.Options(seed=1)).sampling_error()
    alone = kc.estimate(
        model,
        [x],
        "categorical",
        samples=4,
        options=kc.Options(seed=1, layers="a", data=kc.Data(outputs=lambda args, kwargs, outputs: outputs["a"])),
    ).sampling_error()
    assert errors["a"].trace.error == pytest.approx(alone["a"].trace.error, rel=1e-12)
