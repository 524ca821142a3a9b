"""The products of a capture, of a step and of a refresh, counted: one that is lost or done twice turns these red."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import kfac_cond as kc
from kfac_cond.linalg.products import gram_flops

from .passes import Passes

ROWS = 6


class Heads(nn.Module):
    """Queries, keys and values of one input, added up."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(9, 9, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.query(x) * self.key(x) + self.value(x)


def linear(d_in: int, d_out: int) -> nn.Linear:
    # What a bias adds to A are sums, and no product.
    return nn.Linear(d_in, d_out, bias=False)


def perceptron() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(linear(300, 200), nn.ReLU(), linear(200, 140), nn.ReLU(), linear(140, 4)), torch.randn(
        ROWS, 300
    )


def convolutions() -> tuple[nn.Module, Tensor]:
    inner = [
        nn.Conv2d(20, 24, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(24, 28, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
    ]
    return nn.Sequential(*inner, nn.Flatten(), linear(28 * 16, 4)), torch.randn(ROWS, 20, 8, 8)


def attention() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(linear(7, 9), Heads(), nn.Flatten(), linear(45, 4)), torch.randn(ROWS, 5, 7)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "perceptron": perceptron,
    "convolutions": convolutions,
    "attention": attention,
}


@pytest.fixture(params=MODELS)
def case(request) -> tuple[nn.Module, Tensor]:
    return MODELS[request.param]()


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def backward_to_outputs(model: nn.Module, x: Tensor) -> int:
    """Operations of a forward, and of a backward that stops at the layers' outputs."""
    outputs: list[Tensor] = []
    layers = [one for one in model.modules() if isinstance(one, nn.Linear | nn.Conv2d)]
    handles = [one.register_forward_hook(lambda _, args, output: outputs.append(output)) for one in layers]
    found = counted(lambda: torch.autograd.grad(model(x).sum(), outputs, allow_unused=True))
    for handle in handles:
        handle.remove()
    return found


def of_factors(model: nn.Module, x: Tensor) -> int:
    """Operations of the products of a capture, as ``coverage`` predicts them."""
    rows = kc.coverage(model, x).rows
    saved = sum(gram_flops(x.shape[1] * ROWS, 9, x.device) for one in model.modules() if isinstance(one, Heads))
    # Three of one input share a product.
    return sum(row.capture_flops or 0 for row in rows if row.path.endswith("weight")) - 2 * saved


class Training:
    """A model in training, whose first step has a capture and a refresh."""

    def __init__(self, model: nn.Module, x: Tensor, *, kfac: bool, schedule: kc.Schedule | None = None) -> None:
        self.model, self.x, self.criterion = model, x, nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        if kfac:
            self.kfac = kc.KFAC(model, self.criterion, schedule=schedule or kc.Schedule())
            self.kfac.attach(self.optimizer)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.criterion(self.model(self.x), torch.arange(ROWS) % 4).backward()
        self.optimizer.step()


def test_an_estimate_is_one_forward_a_backward_to_the_outputs_and_the_products_of_its_factors(case) -> None:
    model, x = case
    found = counted(lambda: kc.estimate(model, [x], "categorical", options=kc.Options(progress=False)))
    assert found == backward_to_outputs(model, x) + of_factors(model, x)


def test_a_step_between_captures_adds_two_products_a_layer(case) -> None:
    model, x = case
    plain = counted(Training(model, x, kfac=False).step)
    training = Training(model, x, kfac=True, schedule=kc.Schedule(factors=100, inverses=100))
    training.step()
    assert counted(training.step) == plain + sum(
        2 * o * i * (o + i) for o, i in (layer.layout.matrix_shape for layer in training.kfac.layers.values())
    )


def test_a_step_that_refreshes_every_time_solves_in_place_of_inverting(case) -> None:
    model, x = case
    training = Training(model, x, kfac=True, schedule=kc.Schedule(factors=100, inverses=1))
    training.step()
    plain = Training(model, x, kfac=False)
    with Passes() as without:
        plain.step()
    inverted: list[torch.Size] = []
    original = torch.cholesky_inverse
    with pytest.MonkeyPatch.context() as patch, Passes() as passes:
        patch.setattr(torch, "cholesky_inverse", lambda m, **kept: inverted.append(m.shape) or original(m, **kept))
        training.step()
    # Two triangles on each side have the operations of one product.
    shapes = [layer.layout.matrix_shape for layer in training.kfac.layers.values()]
    assert passes.solves == [shape for shape in shapes for _ in range(4)]
    assert len(passes.products) == len(without.products)
    assert inverted == []


def test_a_capture_in_training_reuses_the_forward(case) -> None:
    model, x = case
    forward = counted(lambda: model(x))
    training = Training(model, x, kfac=True, schedule=kc.Schedule(factors=3, inverses=100))
    training.step()
    between = counted(training.step)
    training.step()
    captured = counted(training.step)
    assert captured == between + backward_to_outputs(model, x) - forward + of_factors(model, x)


def test_a_refresh_adds_no_product_and_factorises_equal_sizes_together() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(5)), nn.Linear(8, 4, bias=False))
    x = torch.randn(ROWS, 8)
    often = Training(model, x, kfac=True, schedule=kc.Schedule(factors=1, inverses=2))
    sizes: list[torch.Size] = []
    original = torch.linalg.cholesky_ex
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "cholesky_ex", lambda m, **kept: sizes.append(m.shape) or original(m, **kept))
        often.step()
        with Passes() as without:
            often.step()
        sizes.clear()
        with Passes() as refreshed:
            often.step()
    assert sorted(map(tuple, sizes)) == [(1, 4, 4), (11, 8, 8)]
    assert len(refreshed.products) == len(without.products)
