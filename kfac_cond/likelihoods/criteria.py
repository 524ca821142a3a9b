"""From what users have (a criterion module, a name) to the likelihood it stands for, with the scale of its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import LikelihoodError
from .base import Likelihood
from .bernoulli import Bernoulli
from .categorical import TORCH_IGNORE_INDEX, Categorical
from .continuous import Laplace
from .counts import Poisson
from .gaussian import Gaussian
from .product import Product

_NAMES: dict[str, Callable[[], Likelihood]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "laplace": Laplace,
    "poisson": Poisson,
}
_CLASSES = "kc.Categorical(), kc.Bernoulli() or kc.Gaussian(variance)"
_OWN = "a class of your own derived from kc.Likelihood, with its sample and score"
_LOGITS = "kc.Bernoulli(event_dims=()) with the logits, before the sigmoid, in kfac.update(logits)"

#: Criteria without a likelihood here: (why, what to pass instead).
_REFUSED: dict[str, tuple[str, str]] = {
    "SmoothL1Loss": ("it is quadratic near 0 and linear beyond, -log p of no named distribution", _OWN),
    "HuberLoss": ("it is quadratic near 0 and linear beyond, -log p of no named distribution", _OWN),
    "BCELoss": ("it is given probabilities, not logits", f"nn.BCEWithLogitsLoss without the sigmoid, or {_LOGITS}"),
    "GaussianNLLLoss": (
        "its variance is a second tensor, and the Fisher of mean and variance needs both as outputs of the model",
        "kc.HeteroscedasticGaussian() for one tensor of means and log-variances, or kc.Gaussian(variance) where it is "
        "fixed",
    ),
    "CTCLoss": ("it sums over alignments, and its labels cannot be drawn position by position", _OWN),
    "MultiLabelSoftMarginLoss": (
        "it averages over classes within an example",
        "nn.BCEWithLogitsLoss, which is the same for reduction='mean'",
    ),
    "SoftMarginLoss": ("its labels are -1 and 1", "nn.BCEWithLogitsLoss with labels 0 and 1, which is the same loss"),
    "AdaptiveLogSoftmaxWithLoss": (
        "it holds the last layer, and its outputs are not those of the model",
        "kc.Categorical() and kfac.update(loss.log_prob(features))",
    ),
    "LinearCrossEntropyLoss": (
        "it holds the last layer, and the logits are never seen",
        "nn.CrossEntropyLoss after an nn.Linear that belongs to the model",
    ),
}
_MARGINS = [
    "CosineEmbeddingLoss",
    "HingeEmbeddingLoss",
    "MarginRankingLoss",
    "MultiLabelMarginLoss",
    "MultiMarginLoss",
    "TripletMarginLoss",
    "TripletMarginWithDistanceLoss",
]
_REFUSED |= dict.fromkeys(
    _MARGINS,
    (
        "a margin or a distance is -log p of no distribution over labels",
        f"{_CLASSES} for a p of your choice over the same outputs, in kfac.update(outputs)",
    ),
)
_FUNCTIONS: dict[Callable[..., Any], str] = {
    F.cross_entropy: "kc.Categorical()",
    F.nll_loss: "kc.Categorical()",
    F.binary_cross_entropy_with_logits: "kc.Bernoulli(event_dims=())",
    F.mse_loss: "kc.Gaussian(0.5, event_dims=())",
    F.l1_loss: "kc.Laplace(event_dims=())",
    F.poisson_nll_loss: "kc.Poisson(event_dims=())",
}


@overload
def as_likelihood(obj: Likelihood | str | nn.Module, *, heard: bool = False) -> Likelihood: ...


@overload
def as_likelihood(obj: object, *, heard: bool = False) -> Likelihood | Product: ...


def as_likelihood(obj: object, *, heard: bool = False) -> Likelihood | Product:
    """The likelihood that a user's argument means.

    Args:
        obj: a likelihood, a name ('categorical', 'bernoulli', 'gaussian', 'laplace', 'poisson'), or a criterion module.
        heard: the outputs come as the criterion is called with them, not from the model's own forward.

    Raises:
        LikelihoodError: anything else, with what to pass instead.
    """
    if isinstance(obj, Likelihood | Product):
        return obj
    if isinstance(obj, str):
        if obj not in _NAMES:
            raise LikelihoodError(
                f"there is no likelihood named {obj!r}: expected one of {', '.join(map(repr, _NAMES))}."
            )
        return _NAMES[obj]()
    if isinstance(obj, type):
        raise LikelihoodError(f"found the class {obj.__name__}, expected an instance of it: pass {obj.__name__}().")
    if isinstance(obj, nn.Module):
        return from_criterion(obj, heard=heard)
    name = getattr(obj, "__name__", type(obj).__name__)
    known = next((spelling for function, spelling in _FUNCTIONS.items() if obj is function), None)
    if known is not None:
        raise LikelihoodError(
            f"found the function {name}, whose calls cannot be listened to: pass the likelihood it computes, {known}, "
            f"with the weights and reduction that you give it."
        )
    raise LikelihoodError(
        f"found {name}, expected a likelihood ({_CLASSES}), a name ({', '.join(map(repr, _NAMES))}) or a criterion "
        f"such as nn.CrossEntropyLoss(). For a loss of your own, pass the likelihood of what it models and call "
        f"kfac.update(outputs)."
    )


def from_criterion(module: nn.Module, *, heard: bool) -> Likelihood:
    """The likelihood of a criterion module, with its weights, ignored label, smoothing and reduction.

    Args:
        module: nn.CrossEntropyLoss, NLLLoss, KLDivLoss, BCEWithLogitsLoss, MSELoss, L1Loss or PoissonNLLLoss.
        heard: outputs come as the criterion is called with them (classes at dim 1); else from the model's own forward,
            where more than two dimensions are ambiguous.

    Raises:
        LikelihoodError: a criterion without a likelihood, one whose forward is overridden, or reduction='none'.
    """
    base = next((known for known in _CRITERIA if isinstance(module, known)), None)
    name = type(module).__name__
    if base is None:
        raise _refusal(module)
    if getattr(module.forward, "__func__", None) is not base.forward:
        raise LikelihoodError(
            f"{name} overrides the forward of nn.{base.__name__}, so what it computes is not known: pass the "
            f"likelihood of what it models, {_CLASSES}, and call kfac.update(outputs)."
        )
    if module.reduction == "none":
        raise LikelihoodError(
            f"nn.{base.__name__}(reduction='none') does not say what you divide its terms by: pass the likelihood with "
            f"reduction='mean' or 'sum', or divisor=M ({_CRITERIA[base][1]}), and call kfac.update(outputs, "
            f"targets=labels) where it has weights or ignored labels."
        )
    return _CRITERIA[base][0](module, heard)


def _refusal(module: nn.Module) -> LikelihoodError:
    for ancestor in type(module).__mro__:
        if ancestor.__name__ in _REFUSED and ancestor.__module__.startswith("torch.nn."):
            reason, instead = _REFUSED[ancestor.__name__]
            return LikelihoodError(f"nn.{ancestor.__name__} has no likelihood here: {reason}. Pass {instead}.")
    known = ", ".join(f"nn.{criterion.__name__}" for criterion in _CRITERIA)
    return LikelihoodError(
        f"{type(module).__name__} is no criterion with a known likelihood ({known}): pass the likelihood of what it "
        f"models, {_CLASSES}, and call kfac.update(outputs) with the tensor that parametrises p."
    )


def _cross_entropy(module: Any, heard: bool) -> Likelihood:
    # Torch's own default does not say that the user ignores labels; bound labels of that value are ignored anyway.
    ignore_index = None if module.ignore_index == TORCH_IGNORE_INDEX else module.ignore_index
    return Categorical(
        dim=1 if heard else None,
        weight=module.weight,
        ignore_index=ignore_index,
        label_smoothing=module.label_smoothing,
        reduction=module.reduction,
    )


def _bce_with_logits(module: Any, heard: bool) -> Likelihood:
    return Bernoulli(event_dims=(), weight=module.weight, pos_weight=module.pos_weight, reduction=module.reduction)


def _mse(module: Any, heard: bool) -> Likelihood:
    return Gaussian(0.5, event_dims=(), reduction=module.reduction)


def _nll(module: Any, heard: bool) -> Likelihood:
    # Softmax leaves normalised log-probabilities as they are, and their Fisher goes back through log_softmax unchanged.
    ignore_index = None if module.ignore_index == TORCH_IGNORE_INDEX else module.ignore_index
    return Categorical(
        dim=1 if heard else None, weight=module.weight, ignore_index=ignore_index, reduction=module.reduction
    )


class _Divergence(Categorical):
    """Log-probabilities (N, C) whose loss divides by elements ('mean') or examples ('batchmean')."""

    def __init__(self, reduction: str) -> None:
        super().__init__(dim=None, reduction="sum" if reduction == "sum" else "mean")
        self.by_elements = reduction == "mean"

    def _mean_divisor(self, outputs: Tensor) -> Tensor:
        terms = super()._mean_divisor(outputs)
        return terms * outputs.shape[-1] if self.by_elements else terms


def _kl_div(module: Any, heard: bool) -> Likelihood:
    return _Divergence(module.reduction)


def _l1(module: Any, heard: bool) -> Likelihood:
    return Laplace(event_dims=(), reduction=module.reduction)


def _poisson_nll(module: Any, heard: bool) -> Likelihood:
    if not module.log_input:
        raise LikelihoodError(
            "nn.PoissonNLLLoss(log_input=False) is given rates: pass nn.PoissonNLLLoss(log_input=True) and log rates, "
            "or kc.FromDistribution(lambda rates: torch.distributions.Poisson(rates), event_dims=())."
        )
    return Poisson(event_dims=(), reduction=module.reduction)


#: (how it is made, how a user would write it).
_CRITERIA: dict[type[Any], tuple[Callable[[Any, bool], Likelihood], str]] = {
    nn.CrossEntropyLoss: (_cross_entropy, "kc.Categorical(dim=1, divisor=M)"),
    nn.BCEWithLogitsLoss: (_bce_with_logits, "kc.Bernoulli(event_dims=(), divisor=M)"),
    nn.MSELoss: (_mse, "kc.Gaussian(0.5, event_dims=(), divisor=M)"),
    nn.NLLLoss: (_nll, "kc.Categorical(dim=1, divisor=M)"),
    nn.KLDivLoss: (_kl_div, "kc.Categorical(divisor=M)"),
    nn.L1Loss: (_l1, "kc.Laplace(event_dims=(), divisor=M)"),
    nn.PoissonNLLLoss: (_poisson_nll, "kc.Poisson(event_dims=(), divisor=M)"),
}
_SYMMETRIC = (nn.MSELoss, nn.L1Loss)
#: Whose targets are classes, not shaped as the outputs.
_CLASSES_AS_TARGETS = (nn.CrossEntropyLoss, nn.NLLLoss)


def heard_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What a call of a criterion says: the outputs and the data labels.

    Args:
        module: the criterion.
        args, kwargs: of its call, ``(input, target)``.

    Raises:
        LikelihoodError: one of them missing or no tensor, or targets of an elementwise criterion that would be
            broadcast.
    """
    name = type(module).__name__
    given = {**dict(zip(("input", "target"), args, strict=False)), **kwargs}
    for role in ("input", "target"):
        if not isinstance(given.get(role), Tensor):
            found = type(given[role]).__name__ if role in given else "nothing"
            raise LikelihoodError(f"{name} was called with {found} for its {role}: expected tensors (input, target).")
    outputs, targets = given["input"], given["target"]
    if isinstance(module, nn.KLDivLoss) and module.log_target:
        targets = targets.exp()
    if isinstance(module, _SYMMETRIC) and targets.requires_grad and not outputs.requires_grad:
        # Symmetric, and often called the other way round.
        outputs, targets = targets, outputs
    if not isinstance(module, _CLASSES_AS_TARGETS) and outputs.shape != targets.shape:
        raise LikelihoodError(
            f"{name} was called with outputs of shape {tuple(outputs.shape)} and targets of shape "
            f"{tuple(targets.shape)}, expected the same: broadcast, they would make a loss over pairs that do not "
            f"belong together. Reshape one."
        )
    return outputs, targets
