"""What is in the universal form in models as people write them, against gradients one example at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import kfac_cond as kc

from .reference import assert_same, categorical_log_prob, exact_fisher

EVERY_STEP = kc.Schedule(factors=1, inverses=1)


class Language(nn.Module):
    """An embedding that is also the head, between them a recurrent layer or attention."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(5, 4), middle, nn.Linear(4, 5)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        h = self.middle(h, h, h)[0] if isinstance(self.middle, nn.MultiheadAttention) else self.middle(h)[0]
        return self.head(h)


class Standardised(nn.Conv1d):
    """Weight standardisation in ``forward``."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2), keepdim=True)
        return functional.conv1d(x, weight, self.bias)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.rand(3) + 0.5), nn.Linear(3, 4)

    def _part(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x * self.scale))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._part, x, use_reentrant=False)


class InPlace(nn.Module):
    """A scale whose product is changed in place, and used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = x * self.scale
        h += self.scale
        return functional.relu_(h)


def parametrised(make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(make(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3))


def tied_with_two_biases() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    return model


def tokens() -> Tensor:
    return torch.randint(5, (3, 2))


def features() -> Tensor:
    return torch.randn(4, 3)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "tied embedding, LSTM": (lambda: Language(nn.LSTM(4, 4, batch_first=True)), tokens),
    "tied embedding, attention": (lambda: Language(nn.MultiheadAttention(4, 2, batch_first=True)), tokens),
    "weight norm": (lambda: parametrised(nn.utils.parametrizations.weight_norm), features),
    "old weight norm": (lambda: parametrised(nn.utils.weight_norm), features),
    "spectral norm": (lambda: parametrised(nn.utils.parametrizations.spectral_norm).eval(), features),
    "old spectral norm": (lambda: parametrised(nn.utils.spectral_norm).eval(), features),
    "orthogonal": (lambda: parametrised(nn.utils.parametrizations.orthogonal), features),
    "pruned": (lambda: parametrised(lambda layer: prune.l1_unstructured(layer, "weight", 5)), features),
    "PReLU": (lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 3)), features),
    "two biases": (tied_with_two_biases, features),
    "standardised": (
        lambda: nn.Sequential(Standardised(2, 3, 2), nn.Flatten(), nn.Linear(6, 3)),
        lambda: torch.randn(4, 2, 3),
    ),
    "checkpointed": (lambda: nn.Sequential(Checkpointed(), nn.Linear(4, 3)), features),
    "in place": (lambda: nn.Sequential(InPlace(), nn.Linear(3, 3)), features),
}


@pytest.fixture(params=CASES)
def case(request) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, inputs = CASES[request.param]
    return make(), inputs()


def universal(model: nn.Module) -> dict[str, nn.Parameter]:
    names = [row.path for row in kc.coverage(model).rows if row.form == "universal"]
    return {name: model.get_parameter(name) for name in names}


def output_fisher(outputs: Tensor) -> Tensor:
    p = torch.softmax(outputs, -1).reshape(-1, outputs.shape[-1])
    return torch.block_diag(*(torch.diag(one) - torch.outer(one, one) for one in p))


def test_everything_is_covered_and_the_exact_blocks_are_those_of_the_definition(case):
    model, inputs = case
    assert kc.coverage(model).share == 1.0
    options = kc.Options(dtype=torch.float64)
    found = kc.estimate(model, [inputs], kc.Categorical(dim=-1), structure="block", kind="exact", options=options)
    M = model(inputs)[..., 0].numel()
    assert universal(model)
    for name, parameter in universal(model).items():
        expected = exact_fisher(model, inputs, output_fisher, parameters=[parameter], divisor=M)
        assert_same(found[name].to_dense(), expected)


def test_drawn_labels_give_the_square_of_one_gradient(case):
    model, inputs = case
    outputs = model(inputs)
    labels = torch.randint(outputs.shape[-1], outputs.shape[:-1])
    options = kc.Options(draws=[[labels]], dtype=torch.float64)
    found = kc.estimate(model, [inputs], kc.Categorical(dim=-1), structure="block", options=options)
    for name, parameter in universal(model).items():
        (D,) = torch.autograd.grad(-categorical_log_prob(model(inputs), labels), parameter)
        assert_same(found[name].to_dense(), torch.outer(D.flatten(), D.flatten()) / labels.numel())


def test_a_few_steps_stay_finite_and_leave_no_trace(case):
    model, inputs = case
    labels = torch.randint(model(inputs).shape[-1], model(inputs).shape[:-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    kfac = kc.KFAC(model, kc.Categorical(dim=-1), damping=0.1, schedule=EVERY_STEP)
    kfac.attach(optimizer)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = functional.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), labels.flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert kfac.coverage().share == 1.0
    assert losses[-1] < losses[0]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    names = set(universal(model))
    assert f"{len(names)} of them preconditioned" in repr(kfac)
    kfac.remove()
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in model.modules() if not _normed(module)
    )


def _normed(module: nn.Module) -> bool:
    """Whether the module has a hook of torch's own."""
    return hasattr(module, "weight_g") or hasattr(module, "weight_orig")


def test_a_compiled_model_is_captured_as_it_is():
    model = nn.Sequential(InPlace(), nn.Linear(3, 3))
    compiled = torch.compile(model, backend="eager")
    inputs, labels = features(), torch.randint(3, (4,))
    options = kc.Options(draws=[[labels]], dtype=torch.float64)
    plain, other = (kc.estimate(one, [inputs], "categorical", options=options) for one in (model, compiled))
    assert_same(other["0.scale"].G, plain["0.scale"].G)


def test_half_precision_is_squared_in_float32():
    model = nn.Sequential(InPlace(), nn.Linear(3, 3)).to(torch.bfloat16)
    kfac = kc.KFAC(model, "categorical", schedule=EVERY_STEP)
    outputs = model(features().to(torch.bfloat16))
    kfac.update(outputs)
    outputs.sum().backward()
    kfac.precondition()
    assert kfac.fisher()["0.scale"].dtype == torch.float32


def test_autocast_reaches_into_no_product():
    model = nn.Sequential(InPlace(), nn.Linear(3, 3)).float()
    kfac = kc.KFAC(model, "categorical", schedule=EVERY_STEP)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(features().float())
        kfac.update(outputs)
    outputs.sum().backward()
    kfac.precondition()
    assert kfac.fisher()["0.scale"].G.dtype == torch.float32
