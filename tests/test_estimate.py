"""kc.estimate: the same numbers however the data come, exact where it says so, and clear refusals."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kfac_cond as kc

from .helpers import (
    EVERY_STEP,
    Apply,
    assert_factors,
    assert_same_fisher,
    categorical_loss,
    classifier,
    plain_factors,
)
from .passes import Passes
from .reference import assert_same

# -- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", [kc.Categorical(), kc.Bernoulli(), kc.Gaussian(0.5)], ids=repr)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("size", [1, 2, 5, 7])
@pytest.mark.parametrize(("kind", "samples"), [("sampled", 1), ("sampled", 3), ("exact", 1)])
def test_the_batch_size_does_not_matter(kind, samples, size, sharing, likelihood):
    model = nn.Sequential(classifier(), Apply(lambda h: h.mean(1)))
    inputs = torch.randn(7, 2, 3)
    rules, options = {"*": {"sharing": sharing}}, kc.Options(seed=2)
    found, expected = (
        kc.estimate(model, inputs.split(part), likelihood, kind=kind, samples=samples, rules=rules, options=options)
        for part in (size, 7)
    )
    assert_same_fisher(found, expected)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(sum), seed=st.integers(-(2**63), 2**63 - 1))
def test_any_split_with_any_seed_gives_the_same_numbers(sizes, seed):
    model, inputs = classifier(), torch.randn(sum(sizes), 3)
    options = kc.Options(seed=seed)
    found = kc.estimate(model, inputs.split(sizes), "categorical", options=options)
    assert_same_fisher(found, kc.estimate(model, [inputs], "categorical", options=options))


class TakesX(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class TakesLabels(TakesX):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.body(x) + 0 * labels[:, None]


BATCHES = {
    "tensor": (TakesX, lambda x, y: x),
    "tuple": (TakesX, lambda x, y: (x, y)),
    "list": (TakesX, lambda x, y: [x, y]),
    "inputs alone": (TakesX, lambda x, y: (x,)),
    "dict": (TakesX, lambda x, y: {"x": x}),
    "dict with labels": (TakesX, lambda x, y: {"x": x, "labels": y}),
    "dict with labels that the model takes": (TakesLabels, lambda x, y: {"x": x, "labels": y}),
}


@pytest.mark.parametrize("form", BATCHES)
def test_batches_of_any_form(form):
    kind, make = BATCHES[form]
    body, x, y = classifier(), torch.randn(5, 3), torch.randint(3, (5,))
    options = kc.Options(seed=1)
    found = kc.estimate(kind(body), [make(x, y)], "categorical", options=options)
    expected = kc.estimate(body, [x], "categorical", options=options)
    assert_same(found["body.0"].G, expected["0"].G)


def test_a_function_that_yields_the_data():
    model, inputs, options = classifier(), torch.randn(5, 3), kc.Options(seed=1)

    def batches() -> Iterator[Tensor]:
        yield from inputs.split(2)

    expected = kc.estimate(model, [inputs], "categorical", options=options)
    assert_same_fisher(kc.estimate(model, batches, "categorical", options=options), expected)
    assert_same_fisher(kc.estimate(model, batches, "categorical", options=options), expected)


def test_labels_that_mean_nothing_to_the_likelihood_are_left_alone():
    """The digits that come with the images of an autoencoder."""
    model, x, options = classifier(), torch.randn(5, 3), kc.Options(seed=1)
    found = kc.estimate(model, [(x, torch.arange(5))], "bernoulli", options=options)
    assert_same_fisher(found, kc.estimate(model, [x], "bernoulli", options=options))


def test_ignored_labels_of_a_batch_leave_their_terms_out():
    model, x, y = classifier(), torch.randn(5, 3), torch.tensor([0, -100, 1, 2, -100])
    drawn = torch.randint(3, (5,))
    found = kc.estimate(model, [(x, y)], "categorical", options=kc.Options(draws=[[drawn]]))
    expected = kc.estimate(model, [x[y >= 0]], "categorical", options=kc.Options(draws=[[drawn[y >= 0]]]))
    assert_same(found["0"].G, expected["0"].G)
    expected_counts = {"examples": 5, "terms": torch.tensor(3.0), "adds": True, "positions": {"0": 5.0, "2": 5.0}}
    assert found.meta["counts"] == expected_counts


@pytest.mark.parametrize("make", [list, lambda: iter(()), lambda: list])
def test_no_data_is_refused(make):
    with pytest.raises(kc.ArgumentError, match="yielded no batch"):
        kc.estimate(classifier(), make(), "categorical")


def test_data_without_a_valid_term_are_refused():
    with pytest.raises(kc.ArgumentError, match="no valid loss term"):
        kc.estimate(classifier(), [(torch.randn(2, 3), torch.tensor([-100, -100]))], "categorical")


@pytest.mark.parametrize("batch", [3, "x", (1, 2), [[1.0]], None])
def test_a_batch_of_another_kind_is_refused(batch):
    with pytest.raises(kc.ArgumentError, match="expected a tensor, a tuple"):
        kc.estimate(classifier(), [batch], "categorical")


# -- exact ------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """One head, written out, so that each of its layers is a module; positions mix."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.head = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.query(x) @ self.key(x).mT).softmax(-1)
        return self.head(x + weights @ self.value(x))


@pytest.mark.parametrize(("examples", "terms"), [(1, 3), (2, 2)])
def test_exact_is_the_average_over_all_labels_on_a_net_that_mixes_positions(examples, terms):
    """ORACLES 15."""
    model, inputs = Attention(), torch.randn(examples, terms, 3)
    with torch.no_grad():
        p = model(inputs).softmax(-1)
    combinations = torch.tensor(list(itertools.product(range(3), repeat=examples * terms)))
    combinations = combinations.reshape(-1, examples, terms)
    probability = p.log()[None].expand(len(combinations), *p.shape).gather(-1, combinations[..., None])
    probability = probability.flatten(1).sum(1).exp()
    found = kc.estimate(model, [inputs], "categorical", kind="exact")
    each = [
        plain_factors(model, inputs, lambda outputs, y=y: categorical_loss(outputs, y), divisor=examples * terms)
        for y in combinations
    ]
    expected = {
        name: (each[0][name][0], torch.einsum("y, yij -> ij", probability, torch.stack([one[name][1] for one in each])))
        for name in found
    }
    assert_factors(found, expected)


def test_the_average_of_the_estimator_over_all_labels_is_exact():
    """ORACLES 15 with the library's own one-backward estimator, where all labels are equally likely."""
    model, inputs = Attention(), torch.randn(1, 3, 3)
    even = nn.Sequential(model, Apply(lambda h: h - h.detach()))  # equal logits, and still a way back
    draws = torch.tensor(list(itertools.product(range(3), repeat=3)))[:, None]
    found = kc.estimate(even, [inputs], "categorical", options=kc.Options(draws=[list(draws)]))
    assert found["0.value"].G.norm() > 1e-3
    assert_same_fisher(found, kc.estimate(even, [inputs], "categorical", kind="exact"))


def test_exact_refuses_flattened_outputs_whose_positions_may_mix():
    model = nn.Sequential(Attention(), nn.Flatten(0, 1))
    with pytest.raises(kc.LikelihoodError, match="one example per index of dimension 0"):
        kc.estimate(model, [torch.randn(2, 3, 3)], "categorical", kind="exact")


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"structure": "kfca"}, "structure='kfca'"),
        ({"structure": ["kfac", "kfca"]}, "structure='kfca'"),
        ({"structure": []}, "empty list"),
        ({"kind": "emprical"}, "kind='emprical'"),
        ({"kind": "empirical", "samples": 2}, "draws no labels"),
        ({"kind": "forward_only", "samples": 2}, "draws no labels"),
        ({"samples": 0}, "samples=0"),
        ({"samples": 1.5}, r"samples=1\.5"),
        ({"samples": True}, "samples=True"),
        ({"kind": "exact", "samples": 2}, "draws no labels"),
        ({"kind": "exact", "options": kc.Options(draws=[])}, "draws no labels"),
        ({"options": kc.Options(draws=[])}, "fewer entries"),
        ({"options": kc.Options(draws=[[torch.zeros(2, dtype=torch.long)]] * 2)}, "more entries"),
        ({"rules": {"0": {"damping": 0.1}}}, r"rules\['0'\]: damping=0\.1 means nothing here"),
        ({"rules": {"0": {"structure": "ekfac"}}}, "pass structure='mixed' for it to hold"),
        ({"options": kc.Options(draws=[5])}, "has 5 for a batch: expected a list of label tensors"),
        ({"options": kc.Options(draws=[[5]])}, r"has list of \['int'\] for a batch"),
        ({"options": kc.Options(draws=[[]])}, r"has list of \[\] for a batch"),
        ({"rules": 5}, "rules is 5"),
        ({"options": 3}, r"options is 3: expected kc\.Options"),
        ({"options": {"seed": 3}}, r"options is dict: expected kc\.Options"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, match):
    with pytest.raises(kc.ArgumentError, match=match):
        kc.estimate(classifier(), [torch.randn(2, 3)], "categorical", **arguments)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (torch.randn(2, 3), r"a tensor of shape \(2, 3\), which is one batch: expected batches, pass \[x\]"),
        ({"x": torch.randn(2, 3)}, r"dict, which is one batch"),
        (lambda: torch.randn(2, 3), r"a tensor of shape \(2, 3\), which is one batch"),
        (5, "data is 5: expected batches"),
        (None, "data is NoneType: expected batches"),
        (lambda: None, "data is NoneType: expected batches"),
    ],
)
def test_data_that_are_no_batches_are_refused(data, match):
    with pytest.raises(kc.ArgumentError, match=match):
        kc.estimate(classifier(), data, "categorical")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"layers": 5}, "layers=5"),
        ({"layers": [5]}, r"layers=\[5\]"),
        ({"seed": "a"}, "seed='a'"),
        ({"seed": 1.5}, r"seed=1\.5"),
        ({"draws": 5}, r"draws=...\) is 5"),
        ({"progress": "yes"}, "progress='yes'"),
        ({"data": {"seed": 3}}, r"Options\.data is dict"),
    ],
)
def test_options_of_another_type_are_refused_by_name(options, name):
    with pytest.raises(kc.ArgumentError, match=name):
        kc.Options(**options)


def test_something_else_than_a_module_is_refused():
    with pytest.raises(kc.ArgumentError, match=r"expected a torch\.nn\.Module"):
        kc.estimate(lambda x: x, [torch.randn(2, 3)], "categorical")


@pytest.mark.parametrize(
    ("patterns", "names"),
    [("0", ["0"]), ("*", ["0", "2"]), (["2"], ["2"]), (["2", "0"], ["0", "2"]), (None, ["0", "2"])],
)
def test_patterns_choose_layers(patterns, names):
    options = kc.Options(layers=patterns, seed=1)
    model, inputs = classifier(), torch.randn(3, 3)
    found = kc.estimate(model, [inputs], "categorical", options=options)
    whole = kc.estimate(model, [inputs], "categorical", options=kc.Options(seed=1))
    assert list(found) == names
    assert_same(found[names[-1]].G, whole[names[-1]].G)


def test_a_pattern_that_matches_nothing_is_refused_with_the_names():
    with pytest.raises(kc.CoverageError, match="'head' matches none of 0, 2"):
        kc.estimate(classifier(), [torch.randn(2, 3)], "categorical", options=kc.Options(layers="head"))


def test_a_model_without_a_covered_layer_is_refused():
    with pytest.raises(kc.CoverageError, match=r"kc\.coverage"):
        kc.estimate(nn.ReLU(), [torch.randn(2, 3)], "categorical")


def test_a_criterion_alone_with_three_dimensions_is_refused_with_both_spellings():
    with pytest.raises(kc.LikelihoodError, match=r"kc\.Categorical\(dim=1\).*kc\.Categorical\(dim=-1\)"):
        kc.estimate(classifier(), [torch.randn(2, 4, 3)], nn.CrossEntropyLoss())


def test_class_weights_without_labels_are_refused():
    with pytest.raises(kc.LikelihoodError, match=r"yield \(inputs, labels\)"):
        kc.estimate(classifier(), [torch.randn(2, 3)], nn.CrossEntropyLoss(weight=torch.ones(3)))


# -- bad numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_named_with_batch_and_layer(value):
    bad = torch.randn(2, 3)
    bad[1, 1] = value
    with pytest.raises(kc.NumericalError, match=r"batch 1: .* first in '0'"):
        kc.estimate(classifier(), [torch.randn(2, 3), bad], "categorical")


@pytest.mark.parametrize("label", [3, -1])
def test_labels_out_of_range_are_named(label):
    labels = torch.tensor([0, label])
    with pytest.raises(kc.LikelihoodError, match="batch 0: labels out of the range"):
        kc.estimate(classifier(), [(torch.randn(2, 3), labels)], "categorical")


@pytest.mark.parametrize("label", [3, -1])
def test_injected_draws_out_of_range_are_named(label):
    options = kc.Options(draws=[[torch.tensor([0, label])]])
    with pytest.raises(kc.LikelihoodError, match="batch 0: labels out of the range"):
        kc.estimate(classifier(), [torch.randn(2, 3)], "categorical", options=options)


def test_outputs_without_a_graph_are_refused():
    model = nn.Sequential(classifier(), Apply(Tensor.detach))
    with pytest.raises(kc.CaptureError, match="do not depend on any layer"):
        kc.estimate(model, [torch.randn(2, 3)], "categorical")


def test_a_layer_that_never_took_part_is_named(caplog):
    model = nn.Sequential(classifier())
    model.spare = nn.Linear(2, 2)
    model.forward = lambda x: model[0](x)
    with caplog.at_level(logging.WARNING, logger="kfac_cond"):
        fisher = kc.estimate(model, [torch.randn(2, 3)], "categorical")
    assert "spare" in caplog.text
    assert "spare" not in fisher


# -- others at work on the model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("listening", ["to the criterion", "to the forward"])
def test_a_kfac_on_the_model_is_paused_meanwhile(listening):
    model, criterion, inputs, labels = classifier(), nn.CrossEntropyLoss(), torch.randn(7, 3), torch.randint(3, (7,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    kfac = kc.KFAC(model, criterion if listening == "to the criterion" else "categorical", schedule=EVERY_STEP)
    kfac.attach(optimizer)
    kc.estimate(model, [torch.randn(3, 3)], criterion)
    criterion(model(inputs), labels).backward()
    kc.estimate(model, [torch.randn(3, 3)], criterion)
    optimizer.step()
    a = torch.cat([inputs, torch.ones(7, 1)], 1)
    assert_same(kfac.fisher()["0"].A, a.T @ a / 7)
    assert kfac.step == 1
    assert kfac.active


def test_no_grad_around_it_does_not_matter():
    model, inputs, options = classifier(), torch.randn(3, 3), kc.Options(seed=1)
    with torch.no_grad():
        found = kc.estimate(model, [inputs], "categorical", options=options)
    assert_same_fisher(found, kc.estimate(model, [inputs], "categorical", options=options))


@pytest.mark.parametrize("seed", [None, 7])
def test_the_default_seed_is_that_of_torch(seed):
    torch.manual_seed(7)
    model, inputs = classifier(), torch.randn(30, 3)
    found = kc.estimate(model, [inputs], "categorical", options=kc.Options(seed=seed))
    torch.rand(3)
    again = kc.estimate(model, [inputs], "categorical", options=kc.Options(data=kc.Data(seed=7)))
    assert torch.equal(found["0"].G, again["0"].G)


def test_another_seed_gives_other_labels():
    model, inputs = classifier(), torch.randn(30, 3)
    found = [kc.estimate(model, [inputs], "categorical", options=kc.Options(seed=seed))["0"].G for seed in (1, 2)]
    assert not torch.equal(*found)


def test_progress_to_something_else_than_a_terminal_prints_nothing(capfd):
    kc.estimate(classifier(), torch.randn(6, 3).split(1), "categorical")
    assert capfd.readouterr() == ("", "")


def test_progress_is_shown_where_asked_for(capfd):
    kc.estimate(classifier(), torch.randn(6, 3).split(1), "categorical", options=kc.Options(progress=True))
    assert "Fisher" in capfd.readouterr().err


def test_a_compiled_model_is_captured_under_its_own_names():
    model, inputs, options = classifier(), torch.randn(5, 3), kc.Options(seed=1)
    compiled: Any = torch.compile(model, backend="eager")
    found = kc.estimate(compiled, [inputs], "categorical", options=options)
    assert_same_fisher(found, kc.estimate(model, [inputs], "categorical", options=options))


def test_a_compiled_model_is_compiled_again_afterwards():
    compiled = torch.compile(
        nn.Sequential(nn.Linear(3, 3), Apply(lambda h: h + torch.compiler.is_compiling())), backend="eager"
    )
    kc.estimate(compiled, [torch.randn(5, 3)], "categorical")
    zero = torch.zeros(1, 3)
    assert_same(compiled(zero)[0], compiled._orig_mod[0].bias + 1)


def test_estimates_over_different_data_merge_into_that_over_all():
    model, inputs, drawn = classifier(), torch.randn(7, 3), torch.randint(3, (7,))

    def over(rows: slice) -> kc.Fisher:
        return kc.estimate(model, [inputs[rows]], "categorical", options=kc.Options(draws=[[drawn[rows]]]))

    merged, whole = over(slice(0, 2)).merge(over(slice(2, 7))), over(slice(0, 7))
    assert_same(merged["0"].to_dense(), whole["0"].to_dense())


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
def test_a_saved_estimate_is_read_back(structure, tmp_path):
    pytest.importorskip("safetensors")
    fisher = kc.estimate(classifier(), [torch.randn(5, 3)], "categorical", structure=structure)
    fisher.save(tmp_path / "fisher.safetensors")
    found = kc.Fisher.load(tmp_path / "fisher.safetensors")
    assert torch.equal(found["2"].to_dense(), fisher["2"].to_dense())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal", "block", "dense"])
def test_statistics_are_as_wide_as_asked_for(dtype, structure):
    """Of a narrow model the statistics are those of its own activations and gradients, in the wider dtype."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype), torch.randn(6, 3).to(dtype)
    draws = [[torch.randint(3, (6,))]]
    narrow, wide = (
        kc.estimate(model, [x], "categorical", structure=structure, options=kc.Options(draws=draws, dtype=one))
        for one in (torch.float32, torch.float64)
    )
    assert (narrow.dtype, wide.dtype) == (torch.float32, torch.float64)
    assert_same(narrow.to_dense().double(), wide.to_dense(), tolerance=1e-5)


def test_products_are_made_in_the_wider_dtype():
    """What float32 rounds away is there: 1 + 1e-4 squared, summed over many positions."""
    model, x = nn.Linear(1, 1, bias=False), torch.full((5, 1), 1 + 2.0**-13)
    found = kc.estimate(model, [x], "gaussian", kind="exact", options=kc.Options(dtype=torch.float64))
    assert float(found[""].A) == (1 + 2.0**-13) ** 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, "float64"])
def test_a_dtype_that_statistics_cannot_have_is_refused(dtype):
    with pytest.raises(kc.ArgumentError, match=r"expected torch\.float32 or torch\.float64"):
        kc.Options(dtype=dtype)


def test_a_batch_is_one_forward_a_backward_without_weight_gradients_and_two_products_a_layer():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    with Passes() as passes:
        kc.estimate(model, [torch.randn(11, 3)], "categorical")
    forward, backward = [(11, 3, 5), (11, 5, 7), (11, 7, 2)], [(11, 2, 7), (11, 7, 5)]
    moments = [(d, 11, d) for d in (3, 5, 7, 5, 7, 2)]
    assert sorted(passes.products) == sorted([*forward, *backward, *moments])
