"""What all likelihoods share: binding a batch, M, a class of one's own, the meta device, and errors."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_cond.errors import LikelihoodError
from kfac_cond.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, exact_scores, sampled_scores

from .cases import CASES, NAMES, Case, named


class Exponential(Likelihood):
    """Waiting times; outputs are log rates. Never calls the base's constructor, and does not mask."""

    def __init__(self) -> None:
        pass

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        u = torch.rand(outputs.shape, generator=generator, device=outputs.device)
        return -torch.log1p(-u) / outputs.exp()

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs.exp() * labels - 1


class Rooted(Exponential):
    """One that says its square root as well."""

    event_dims = (-1,)

    def fisher_sqrt(self, outputs: Tensor) -> Tensor:
        return torch.diag_embed(torch.ones_like(outputs))


# Binding -------------------------------------------------------------------------------------------------------------


def test_bind_leaves_the_original_as_it_was() -> None:
    likelihood = Categorical()
    bound = likelihood.bind(torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool), torch.ones(3))
    assert (likelihood.targets, likelihood.mask, likelihood.weights) == (None, None, None)
    assert all(value is not None for value in (bound.targets, bound.mask, bound.weights))


def test_bind_forgets_the_batch_bound_before() -> None:
    bound = Categorical().bind(torch.zeros(3, dtype=torch.long)).bind(mask=torch.ones(3, dtype=torch.bool))
    assert bound.targets is None


def test_bind_keeps_no_graph() -> None:
    targets = torch.randn(3, 2, requires_grad=True)
    bound = Gaussian().bind(targets * 2)
    assert bound.targets is not None and not bound.targets.requires_grad


def test_term_weights_multiply_the_score_by_their_square_root() -> None:
    outputs, labels, weight = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([0.0, 0.25, 1.0, 4.0])
    found = Categorical().bind(weight=weight).weighted_score(outputs, labels)
    expected = Categorical().score(outputs, labels) * torch.tensor([[0.0], [0.5], [1.0], [2.0]])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_term_weights_do_not_enter_m() -> None:
    assert Categorical().bind(weight=torch.full((4,), 3.0)).terms(torch.randn(4, 3)).item() == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=named)
def test_weighted_scores_keep_the_dtype_of_the_outputs(dtype: torch.dtype) -> None:
    outputs = torch.randn(4, 3, dtype=dtype)
    bound = Categorical().bind(weight=torch.full((4,), 2.0, dtype=torch.float64))
    assert bound.weighted_score(outputs, torch.zeros(4, dtype=torch.long)).dtype == dtype


def test_spread_makes_terms_broadcast_to_the_outputs() -> None:
    outputs, values = torch.randn(2, 3, 4, 5), torch.randn(2, 4)
    spread = Gaussian(event_dims=(1, 3)).spread(values, outputs)
    assert torch.equal(spread.expand_as(outputs)[1, 2, 3, 4], values[1, 3])


# M -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("make", [Categorical, Bernoulli, Gaussian])
def test_sum_divides_by_one(make: type[Likelihood], masked: bool) -> None:
    mask = torch.tensor([True, False, True]) if masked else None
    assert make(reduction="sum").bind(mask=mask).terms(torch.randn(3, 4)).item() == 1


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_divisor_is_m_whatever_the_reduction(reduction: str) -> None:
    assert Gaussian(reduction=reduction, divisor=12.5).terms(torch.randn(3, 4)).item() == 12.5


def test_m_counts_beyond_what_float32_can() -> None:
    outputs = torch.empty(1, device="meta").expand(2**25 + 1)
    assert Bernoulli().terms(outputs).dtype == torch.float64


def test_m_of_a_batch_without_valid_terms_is_zero() -> None:
    assert Categorical().bind(mask=torch.zeros(3, dtype=torch.bool)).terms(torch.randn(3, 4)).item() == 0


def test_m_of_an_empty_batch_is_zero() -> None:
    assert Categorical().terms(torch.randn(0, 4)).item() == 0


# A class of one's own ------------------------------------------------------------------------------------------------


def test_sample_and_score_are_enough_for_sampled_scores() -> None:
    outputs = torch.randn(5, 2)
    (score, factor), _ = sampled_scores(Exponential(), outputs, generators=(None, None))
    assert score.shape == outputs.shape and factor == 0.5


def test_the_masked_score_of_ones_own_is_zero_even_where_it_is_not_finite() -> None:
    outputs, mask = torch.randn(3, 2), torch.tensor([True, False, True])
    labels = torch.ones(3, 2)
    labels[1] = torch.nan
    score = Exponential().bind(mask=mask).weighted_score(outputs, labels)
    assert torch.equal(score[1], torch.zeros(2)) and score[mask].isfinite().all()


@pytest.mark.parametrize(("shape", "terms"), [((4,), 4), ((4, 3), 4)], ids=named)
def test_the_event_of_ones_own_is_the_last_of_two_dimensions(shape: tuple[int, ...], terms: int) -> None:
    assert Exponential().terms(torch.randn(shape)).item() == terms


def test_ones_own_on_three_dimensions_must_say_its_event() -> None:
    with pytest.raises(LikelihoodError, match=r"event_dims=\(1, 2\)"):
        Exponential().terms(torch.randn(2, 3, 4))


def test_columns_of_ones_own_come_from_its_square_root() -> None:
    outputs = torch.randn(2, 3, 4)
    columns = [column for column, _ in exact_scores(Rooted(), outputs)]
    assert len(columns) == 12
    torch.testing.assert_close(sum(column.square() for column in columns), torch.ones(2, 3, 4))


@pytest.mark.parametrize(
    ("method", "count"), [("fisher_sqrt", 1), ("fisher", 1), ("log_prob", 2), ("kl", 2), ("kl_terms", 2)]
)
def test_what_ones_own_lacks_is_named(method: str, count: int) -> None:
    needed = {"fisher": "fisher_sqrt", "kl": "kl_terms"}.get(method, method)
    with pytest.raises(LikelihoodError, match=f"Exponential has no {needed}.*define {needed}"):
        getattr(Exponential(), method)(*[torch.randn(3, 2)] * count)


def test_type_2_of_ones_own_without_a_square_root_is_named() -> None:
    with pytest.raises(LikelihoodError, match="Exponential has no fisher_sqrt"):
        next(exact_scores(Exponential(), torch.randn(3, 2)))


def test_a_score_of_another_shape_is_refused() -> None:
    class Wrong(Exponential):
        def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
            return super().score(outputs, labels).sum(1)

    with pytest.raises(LikelihoodError, match=r"shape \(3,\), expected that of the outputs, \(3, 2\)"):
        Wrong().weighted_score(torch.randn(3, 2), torch.ones(3, 2))


def test_a_class_without_a_score_cannot_be_made() -> None:
    class Half(Likelihood):
        def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
            return outputs

    with pytest.raises(TypeError, match="score"):
        Half()  # type: ignore[abstract]


# The meta device: nothing reads a value ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_nothing_waits_for_the_device(case: Case) -> None:
    outputs = torch.empty(case.shape, device="meta")
    labels = case.likelihood.sample(outputs)
    bound = case.likelihood.bind(labels, case.mask().to("meta"), torch.empty(case.terms, device="meta"))
    bound.check(outputs)
    for value in (
        bound.terms(outputs),
        bound.weighted_score(outputs, labels),
        bound.log_prob(outputs, labels),
        bound.fisher(outputs),
        bound.fisher_sqrt(outputs),
        bound.kl(outputs, outputs),
        bound.invalid_labels(outputs, labels),
        bound.invalid_targets(outputs),
        *(column for column, _ in exact_scores(bound, outputs)),
        *(score for score, _ in sampled_scores(bound, outputs)),
    ):
        assert value.device.type == "meta"


WEIGHTED = [
    (Categorical(weight=torch.ones(4), ignore_index=1, label_smoothing=0.1), torch.long),
    (Categorical(weight=torch.ones(4), label_smoothing=0.1), torch.float),
    (Bernoulli(event_dims=(), pos_weight=torch.ones(4), weight=torch.ones(4)), torch.float),
]


@pytest.mark.parametrize(("likelihood", "dtype"), WEIGHTED, ids=named)
def test_weights_from_data_labels_wait_for_no_device(likelihood: Likelihood, dtype: torch.dtype) -> None:
    outputs = torch.empty(3, 4, device="meta")
    targets = torch.empty((3,) if dtype == torch.long else (3, 4), dtype=dtype, device="meta")
    bound = likelihood.bind(targets)
    ((score, _),) = sampled_scores(bound, outputs)
    assert {value.device.type for value in (score, bound.terms(outputs), bound.invalid_targets(outputs))} == {"meta"}


# Errors --------------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[Likelihood, Any, str]] = [
    (Categorical(), torch.zeros(3, 4, dtype=torch.long), "torch.int64, expected floating point"),
    (Gaussian(), torch.tensor(1.0), "0-dimensional"),
    (Gaussian(), {"logits": 1}, "outputs are dict, expected one tensor"),
    (Categorical(), torch.randn(3), r"outputs of shape \(3,\) have no dimension of classes.*kc\.Bernoulli\(\)"),
    (Categorical(), torch.randn(3, 1), r"outputs of shape \(3, 1\) have 1 class.*kc\.Bernoulli"),
    (Categorical(dim=2), torch.randn(3, 4), r"no dimension 2"),
    (Categorical(dim=-2), torch.randn(3, 4), r"no dimension -2 other than that of examples"),
    (
        Categorical(dim=None),
        torch.randn(2, 3, 4),
        r"shape \(2, 3, 4\).*kc\.Categorical\(dim=1\).*kc\.Categorical\(dim=-1\)",
    ),
    (Categorical(weight=torch.ones(3)), torch.randn(2, 4), r"3 class weights for 4 classes.*\(2, 4\)"),
    (Bernoulli(), torch.randn(2, 3, 4), r"shape \(2, 3, 4\).*event_dims=\(1, 2\).*event_dims=\(\)"),
    (Gaussian(), torch.randn(2, 3, 4, 5), r"event_dims=\(1, 2, 3\)"),
    (Gaussian(event_dims=(2,)), torch.randn(2, 3), r"event_dims=\(2,\) does not fit outputs of shape \(2, 3\)"),
    (Gaussian(event_dims=(-2,)), torch.randn(2, 3), r"none of them 0"),
    (Gaussian(event_dims=(1, -1)), torch.randn(2, 3), r"different dimensions"),
    (Bernoulli(pos_weight=torch.ones(3)), torch.randn(2, 3), r"pos_weight .*event_dims=\(\)"),
    (Bernoulli(weight=torch.ones(3)), torch.randn(2, 3), r"weight .*event_dims=\(\)"),
    (
        Bernoulli(event_dims=(), pos_weight=torch.ones(4)),
        torch.randn(2, 3),
        r"pos_weight has shape \(4,\).*outputs, \(2, 3\)",
    ),
    (
        Bernoulli(event_dims=(), weight=torch.ones(5, 2, 3)),
        torch.randn(2, 3),
        r"weight has shape \(5, 2, 3\).*\(2, 3\)",
    ),
    (
        Categorical().bind(mask=torch.ones(2, 3, dtype=torch.bool)),
        torch.randn(2, 3),
        r"mask has shape \(2, 3\), expected that of the terms, \(2,\)",
    ),
    (
        Categorical().bind(mask=torch.ones(2)),
        torch.randn(2, 3),
        r"mask is torch.float32, expected torch.bool.*bool\(\)",
    ),
    (Gaussian().bind(weight=torch.ones(3)), torch.randn(2, 3), r"weight has shape \(3,\).*\(2,\)"),
    (
        Categorical().bind(torch.zeros(3, dtype=torch.long)),
        torch.randn(2, 3),
        r"targets have shape \(3,\).*integers of shape \(2,\) or probabilities of shape \(2, 3\)",
    ),
    (Categorical().bind(torch.zeros(2)), torch.randn(2, 3), r"targets have shape \(2,\) and dtype torch.float32"),
    (Categorical().bind(torch.zeros(2, dtype=torch.bool)), torch.randn(2, 3), "dtype torch.bool"),
    (Gaussian().bind(torch.zeros(3, 2)), torch.randn(2, 3), r"targets have shape \(3, 2\), expected \(2, 3\)"),
]


@pytest.mark.parametrize(("likelihood", "outputs", "message"), REFUSED, ids=named)
def test_outputs_that_do_not_fit_are_refused(likelihood: Likelihood, outputs: Any, message: str) -> None:
    with pytest.raises(LikelihoodError, match=message):
        likelihood.check(outputs)


@pytest.mark.parametrize("method", ["sample", "fisher", "fisher_sqrt", "fisher_columns", "terms", "valid", "examples"])
@pytest.mark.parametrize("make", [Categorical, Bernoulli, Gaussian])
def test_every_method_checks_the_outputs(make: type[Likelihood], method: str) -> None:
    with pytest.raises(LikelihoodError, match="expected floating point"):
        getattr(make(), method)(torch.zeros(3, 4, dtype=torch.long))


@pytest.mark.parametrize("method", ["score", "log_prob", "weighted_score", "invalid_labels"])
@pytest.mark.parametrize(
    ("likelihood", "labels", "message"),
    [
        (Categorical(), torch.zeros(3, 4, dtype=torch.long), r"labels have shape \(3, 4\), expected \(3,\)"),
        (Categorical(), torch.zeros(3), r"labels are torch.float32, expected integers of shape \(3,\)"),
        (Bernoulli(), torch.zeros(3), r"labels have shape \(3,\), expected \(3, 4\)"),
        (Gaussian(), torch.zeros(4), r"labels have shape \(4,\), expected \(3, 4\)"),
    ],
    ids=named,
)
def test_labels_that_do_not_fit_are_refused(likelihood: Likelihood, method: str, labels: Tensor, message: str) -> None:
    with pytest.raises(LikelihoodError, match=message):
        getattr(likelihood, method)(torch.randn(3, 4), labels)


@pytest.mark.parametrize("make", [Categorical, Bernoulli, Gaussian])
def test_kl_between_shapes_that_broadcast_is_refused(make: type[Likelihood]) -> None:
    with pytest.raises(LikelihoodError, match=r"other outputs have shape \(1, 4\), expected \(3, 4\)"):
        make().kl(torch.randn(3, 4), torch.randn(1, 4))


@pytest.mark.parametrize("make", [Categorical, Bernoulli, Gaussian])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduction": "batchmean"}, "'batchmean'.*'mean' or 'sum'"),
        ({"reduction": "none"}, "'none'.*divisor=M"),
        ({"divisor": 0}, "divisor=0.*positive number"),
        ({"divisor": float("nan")}, "positive number"),
        ({"divisor": True}, "positive number"),
    ],
    ids=named,
)
def test_a_scale_that_says_nothing_is_refused(make: type[Likelihood], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(LikelihoodError, match=message):
        make(**arguments)


@pytest.mark.parametrize("make", [Bernoulli, Gaussian])
@pytest.mark.parametrize("dims", [(0,), (1, 1), 1, ("a",), (True,)], ids=named)
def test_event_dims_that_are_no_dimensions_are_refused(make: type[Any], dims: Any) -> None:
    with pytest.raises(LikelihoodError, match="event_dims="):
        make(event_dims=dims)


# Odds and ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("likelihood", "text"),
    [
        (Categorical(), "Categorical(dim=-1, reduction='mean')"),
        (Categorical(dim=1, ignore_index=0, reduction="sum"), "Categorical(dim=1, ignore_index=0, reduction='sum')"),
        (Bernoulli(event_dims=()), "Bernoulli(event_dims=(), reduction='mean')"),
        (Gaussian(0.5, divisor=3), "Gaussian(variance=0.5, reduction='mean', divisor=3)"),
        (Exponential(), "Exponential(reduction='mean')"),
    ],
    ids=named,
)
def test_repr_is_short(likelihood: Likelihood, text: str) -> None:
    assert repr(likelihood) == text


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda likelihood: pickle.loads(pickle.dumps(likelihood))])
def test_a_likelihood_can_be_copied_and_pickled(clone: Any) -> None:
    assert repr(clone(Categorical(weight=torch.ones(3)))) == "Categorical(dim=-1, weight='3 classes', reduction='mean')"
