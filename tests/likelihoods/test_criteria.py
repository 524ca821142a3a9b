"""Criteria: the weighted Fisher is the Gauss-Newton matrix of the very loss, or the criterion is refused by name."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfac_cond.errors import LikelihoodError
from kfac_cond.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, as_likelihood, exact_scores, heard_call

from .cases import named

SHAPES = [(6, 3), (2, 3, 3), (2, 3, 2, 2)]


def gauss_newton(bound: Likelihood, outputs: Tensor) -> Tensor:
    """(1/M) sum over terms of kappa times their Fisher, as a matrix over all outputs."""
    total = torch.zeros(outputs.numel(), outputs.numel())
    for column, _ in exact_scores(bound, outputs):
        # One example at a time: columns hold the same term of all examples.
        for n, row in enumerate(column.reshape(len(column), -1)):
            at = slice(n * len(row), (n + 1) * len(row))
            total[at, at] += row.outer(row)
    return total / bound.terms(outputs)


def assert_gauss_newton(criterion: nn.Module, outputs: Tensor, targets: Tensor) -> None:
    bound = as_likelihood(criterion, heard=True).bind(targets)
    hessian = torch.func.hessian(lambda f: criterion(f, targets))(outputs).reshape(outputs.numel(), -1)
    torch.testing.assert_close(gauss_newton(bound, outputs), hessian, rtol=1e-10, atol=1e-10)


def hard_targets(shape: tuple[int, ...]) -> Tensor:
    """Every class, in an order that differs between the shapes."""
    return torch.randperm(torch.Size((shape[0], *shape[2:])).numel()).reshape(shape[0], *shape[2:]) % shape[1]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("ignore_index", [-100, 1])
@pytest.mark.parametrize("weight", [None, [0.5, 2.0, 1.3], [0.0, 0.7, 2.0]], ids=named)
@pytest.mark.parametrize("shape", SHAPES, ids=named)
def test_cross_entropy(
    shape: tuple[int, ...], weight: list[float] | None, ignore_index: int, smoothing: float, reduction: str
) -> None:
    criterion = nn.CrossEntropyLoss(
        None if weight is None else torch.tensor(weight),
        ignore_index=ignore_index,
        label_smoothing=smoothing,
        reduction=reduction,
    )
    targets = hard_targets(shape)
    targets.view(-1)[0] = ignore_index
    assert_gauss_newton(criterion, torch.randn(shape), targets)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weight", [None, [0.0, 0.7, 2.0]], ids=named)
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=named)
def test_cross_entropy_of_probabilities(
    shape: tuple[int, ...], normalised: bool, weight: list[float] | None, smoothing: float, reduction: str
) -> None:
    criterion = nn.CrossEntropyLoss(
        None if weight is None else torch.tensor(weight), label_smoothing=smoothing, reduction=reduction
    )
    targets = torch.rand(shape)
    assert_gauss_newton(criterion, torch.randn(shape), targets.softmax(1) if normalised else targets)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    ("weight", "pos_weight"), list(itertools.product([None, (3,), (4, 1), (4, 3)], [None, (), (3,)]))
)
def test_bce_with_logits(
    weight: tuple[int, ...] | None, pos_weight: tuple[int, ...] | None, soft: bool, reduction: str
) -> None:
    criterion = nn.BCEWithLogitsLoss(
        weight=None if weight is None else torch.rand(weight),
        pos_weight=None if pos_weight is None else 3 * torch.rand(pos_weight),
        reduction=reduction,
    )
    targets = torch.rand(4, 3)
    assert_gauss_newton(criterion, torch.randn(4, 3), targets if soft else targets.round())


def test_bce_with_logits_of_images_with_a_weight_a_channel() -> None:
    criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 5.0]).reshape(3, 1, 1))
    assert_gauss_newton(criterion, torch.randn(2, 3, 2, 2), torch.rand(2, 3, 2, 2).round())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 3, 2)], ids=named)
def test_mse(shape: tuple[int, ...], reduction: str) -> None:
    assert_gauss_newton(nn.MSELoss(reduction=reduction), torch.randn(shape), torch.randn(shape))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 3, 2)], ids=named)
def test_poisson_nll(shape: tuple[int, ...], reduction: str) -> None:
    assert_gauss_newton(nn.PoissonNLLLoss(reduction=reduction), torch.randn(shape), torch.rand(shape).round())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weight", [None, [0.5, 2.0, 1.3]], ids=named)
@pytest.mark.parametrize("shape", SHAPES, ids=named)
def test_nll_of_log_probabilities_is_cross_entropy(
    shape: tuple[int, ...], weight: list[float] | None, reduction: str
) -> None:
    weights = None if weight is None else torch.tensor(weight)
    outputs, targets = torch.randn(shape).log_softmax(1), hard_targets(shape)
    targets.view(-1)[0] = -100
    found, expected = (
        as_likelihood(kind(weights, reduction=reduction), heard=True).bind(targets)
        for kind in (nn.NLLLoss, nn.CrossEntropyLoss)
    )
    torch.testing.assert_close(gauss_newton(found, outputs), gauss_newton(expected, outputs))


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
@pytest.mark.parametrize("log_target", [False, True])
def test_kl_div_of_log_probabilities(log_target: bool, reduction: str) -> None:
    criterion = nn.KLDivLoss(reduction=reduction, log_target=log_target)
    outputs, targets = torch.randn(4, 3).log_softmax(1), torch.randn(4, 3).softmax(1)
    given = targets.log() if log_target else targets
    _, heard = heard_call(criterion, (outputs, given), {})
    bound = as_likelihood(criterion, heard=True).bind(heard)
    hessian = torch.func.hessian(lambda f: criterion(f.log_softmax(1), given))(outputs).reshape(12, 12)
    torch.testing.assert_close(gauss_newton(bound, outputs), hessian, rtol=1e-10, atol=1e-10)
    assert not bound.invalid_targets(outputs)


@pytest.mark.parametrize(("reduction", "divisor"), [("mean", 12), ("sum", 1)])
def test_l1_is_laplace_of_scale_one_a_term_an_element(reduction: str, divisor: int) -> None:
    outputs = torch.randn(4, 3)
    found = gauss_newton(as_likelihood(nn.L1Loss(reduction=reduction)), outputs)
    torch.testing.assert_close(found, torch.eye(12) / divisor)


@pytest.mark.parametrize("legacy", [{"size_average": False}, {"reduce": True, "size_average": False}], ids=named)
@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_the_legacy_spelling_of_a_sum(legacy: dict[str, Any]) -> None:
    assert as_likelihood(nn.MSELoss(**legacy)).reduction == "sum"


# Heard or not --------------------------------------------------------------------------------------------------------


def test_a_criterion_that_is_not_heard_leaves_three_dimensions_ambiguous() -> None:
    likelihood = as_likelihood(nn.CrossEntropyLoss(), heard=False)
    likelihood.check(torch.randn(4, 3))
    with pytest.raises(LikelihoodError, match=r"kc\.Categorical\(dim=1\).*kc\.Categorical\(dim=-1\)"):
        likelihood.check(torch.randn(2, 3, 4))


@pytest.mark.parametrize(
    ("criterion", "needs"),
    [
        (nn.CrossEntropyLoss(), False),
        (nn.CrossEntropyLoss(label_smoothing=0.1), False),
        (nn.CrossEntropyLoss(ignore_index=0), True),
        (nn.CrossEntropyLoss(torch.ones(3)), True),
        (nn.BCEWithLogitsLoss(torch.ones(3)), False),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), True),
        (nn.MSELoss(), False),
    ],
    ids=named,
)
@pytest.mark.parametrize("heard", [False, True])
def test_data_labels_are_needed_for_weights_and_ignored_labels_alone(
    criterion: nn.Module, needs: bool, heard: bool
) -> None:
    assert as_likelihood(criterion, heard=heard).needs_targets == needs


def test_a_subclass_with_a_constructor_of_its_own_is_its_base() -> None:
    class Halved(nn.MSELoss):
        def __init__(self) -> None:
            super().__init__(reduction="sum")

    assert as_likelihood(Halved()).reduction == "sum"


# What is accepted, what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [("categorical", Categorical), ("bernoulli", Bernoulli), ("gaussian", Gaussian)]
)
def test_names(name: str, kind: type[Likelihood]) -> None:
    assert type(as_likelihood(name)) is kind


@pytest.mark.parametrize("heard", [False, True])
def test_an_instance_is_itself(heard: bool) -> None:
    likelihood = Gaussian(3.0)
    assert as_likelihood(likelihood, heard=heard) is likelihood


class FocalLoss(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target) ** 2


def patched() -> nn.Module:
    criterion = nn.MSELoss()
    criterion.forward = lambda input, target: input.sum()  # type: ignore[method-assign]
    return criterion


REFUSED: list[tuple[Any, str]] = [
    ("cauchy", "'cauchy'.*'categorical', 'bernoulli', 'gaussian'"),
    (Categorical, r"class Categorical.*Categorical\(\)"),
    (nn.CrossEntropyLoss, r"class CrossEntropyLoss.*CrossEntropyLoss\(\)"),
    (F.cross_entropy, r"function cross_entropy.*kc\.Categorical\(\)"),
    (F.mse_loss, r"kc\.Gaussian\(0\.5, event_dims=\(\)\)"),
    (F.binary_cross_entropy_with_logits, r"kc\.Bernoulli\(event_dims=\(\)\)"),
    (lambda f, y: f.sum(), r"kc\.Categorical\(\).*kfac\.update\(outputs\)"),
    (None, r"found NoneType"),
    (3, r"found int"),
    (nn.Linear(2, 2), r"Linear is no criterion.*kc\.Gaussian.*kfac\.update\(outputs\)"),
    (FocalLoss(), r"FocalLoss overrides the forward of nn\.CrossEntropyLoss.*kfac\.update\(outputs\)"),
    (patched(), "MSELoss overrides the forward"),
    (
        nn.CrossEntropyLoss(reduction="none"),
        r"CrossEntropyLoss\(reduction='none'\).*kc\.Categorical\(dim=1, divisor=M\)",
    ),
    (nn.MSELoss(reduction="none"), r"kc\.Gaussian\(0\.5, event_dims=\(\), divisor=M\)"),
    (nn.SmoothL1Loss(), r"nn\.SmoothL1Loss.*quadratic near 0"),
    (nn.HuberLoss(), r"nn\.HuberLoss.*quadratic near 0"),
    (nn.BCELoss(), r"nn\.BCELoss.*probabilities, not logits.*nn\.BCEWithLogitsLoss"),
    (nn.PoissonNLLLoss(log_input=False), r"log_input=False.*FromDistribution"),
    (nn.GaussianNLLLoss(), r"nn\.GaussianNLLLoss.*second tensor.*kc\.HeteroscedasticGaussian"),
    (nn.CTCLoss(), r"nn\.CTCLoss.*alignments"),
    (nn.MultiLabelSoftMarginLoss(), r"nn\.MultiLabelSoftMarginLoss.*nn\.BCEWithLogitsLoss"),
    (nn.SoftMarginLoss(), r"nn\.SoftMarginLoss.*-1 and 1"),
    (nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2]), r"nn\.AdaptiveLogSoftmaxWithLoss.*log_prob"),
    *(
        (loss(), rf"nn\.{loss.__name__}.*margin or a distance")
        for loss in (
            nn.CosineEmbeddingLoss,
            nn.HingeEmbeddingLoss,
            nn.MarginRankingLoss,
            nn.MultiLabelMarginLoss,
            nn.MultiMarginLoss,
            nn.TripletMarginLoss,
            nn.TripletMarginWithDistanceLoss,
        )
    ),
]


SUPPORTED = {
    "CrossEntropyLoss",
    "BCEWithLogitsLoss",
    "MSELoss",
    "NLLLoss",
    "KLDivLoss",
    "L1Loss",
    "PoissonNLLLoss",
}
OTHERS = [getattr(nn.modules.loss, name) for name in nn.modules.loss.__all__ if name not in SUPPORTED | {"NLLLoss2d"}]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=named)
def test_what_has_no_likelihood_is_refused_with_what_to_pass_instead(given: Any, message: str) -> None:
    with pytest.raises(LikelihoodError, match=message):
        as_likelihood(given)


@pytest.mark.parametrize("kind", OTHERS)
def test_every_other_loss_of_torch_is_refused_by_name(kind: type[nn.Module]) -> None:
    # Made without its constructor, whose arguments differ from loss to loss.
    with pytest.raises(LikelihoodError, match=rf"^nn\.{kind.__name__} has no likelihood here"):
        as_likelihood(kind.__new__(kind))


# The heard call ------------------------------------------------------------------------------------------------------

OUTPUTS, LABELS = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((OUTPUTS, LABELS), {}),
        ((OUTPUTS,), {"target": LABELS}),
        ((), {"input": OUTPUTS, "target": LABELS}),
    ],
    ids=["positional", "mixed", "keyword"],
)
def test_the_call_says_outputs_and_targets(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    outputs, targets = heard_call(nn.CrossEntropyLoss(), args, kwargs)
    assert outputs is OUTPUTS and targets is LABELS


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((OUTPUTS,), "CrossEntropyLoss was called with nothing for its target"),
        ((), "nothing for its input"),
        (([1, 2], LABELS), "list for its input"),
    ],
    ids=named,
)
def test_a_call_that_says_too_little_is_refused(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(LikelihoodError, match=message):
        heard_call(nn.CrossEntropyLoss(), args, {})


@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.BCEWithLogitsLoss()], ids=repr)
def test_targets_that_would_be_broadcast_are_refused(criterion: nn.Module) -> None:
    with pytest.raises(LikelihoodError, match=r"outputs of shape \(4, 1\) and targets of shape \(4,\)"):
        heard_call(criterion, (torch.randn(4, 1), torch.randn(4)), {})


def test_mse_called_the_other_way_round_still_says_the_outputs() -> None:
    data, outputs = torch.randn(4, 3), torch.randn(4, 3, requires_grad=True)
    assert heard_call(nn.MSELoss(), (data, outputs), {}) == (outputs, data)
