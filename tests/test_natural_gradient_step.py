"""The natural-gradient step of the definition: its KL and its invariance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .helpers import Apply
from .reference import assert_same

LABELS = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0] * 5)


def tanh_net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3))


def gradient_of(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = nn.functional.cross_entropy(model(x), y)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def moved(model: nn.Module, direction: dict[str, Tensor], size: float) -> dict[str, Tensor]:
    return {name: p.detach() + size * direction[name] for name, p in model.named_parameters()}


@pytest.mark.parametrize("through", ["implicit", "gram"])
def test_kl_of_the_step_is_half_the_quadratic_form_to_third_order(through):
    model, x = tanh_net(), torch.randn(40, 2)
    fisher = kc.implicit(model, [x], "categorical")
    gradient = gradient_of(model, x, LABELS)
    solver = fisher if through == "implicit" else kc.gram(model, [x[:20], x[20:]], "categorical")
    step = solver.solve(gradient, damping=1e-3)
    outputs = model(x).detach()
    errors = []
    for size in (0.004, 0.002, 0.001):
        after = torch.func.functional_call(model, moved(model, step, -size), (x,))
        measured = kc.Categorical().kl(outputs, after).detach() / len(x)
        predicted = size**2 * fisher.kl(step)
        errors.append(float((measured - predicted).abs()))
    assert errors[-1] < 0.05 * 0.001**2 * float(fisher.kl(step))
    # Third order: half the step, an eighth of the error.
    assert 6.5 < errors[0] / errors[1] < 9.5
    assert 7.0 < errors[1] / errors[2] < 9.0


class Reparametrised(nn.Module):
    """The same net whose parameters are a linear function B phi of one flat vector phi."""

    def __init__(self, model: nn.Module, matrix: Tensor) -> None:
        super().__init__()
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        flat = nn.utils.parameters_to_vector(model.parameters()).detach()
        self.phi = nn.Parameter(torch.linalg.solve(matrix, flat))
        self.register_buffer("matrix", matrix)
        # In a list, so that it is no child with parameters of its own.
        self.held = [model]

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.split(self.matrix @ self.phi, [shape.numel() for shape in self.shapes.values()])
        tensors = {n: piece.reshape(s) for piece, (n, s) in zip(pieces, self.shapes.items(), strict=True)}
        return torch.func.functional_call(self.held[0], tensors, (x,))


def singular_free() -> tuple[nn.Module, Tensor, Tensor]:
    """A net whose exact F is regular: two outputs' log-odds of three classes, so that no logit is free."""
    pinned = Apply(lambda f: torch.cat([f, torch.zeros(len(f), 1)], 1))
    return nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), pinned), torch.randn(40, 2), LABELS


@pytest.mark.parametrize("size", [0.5, 1.0])
def test_a_finite_step_gives_the_same_function_in_linear_parameters(size):
    model, x, y = singular_free()
    count = sum(p.numel() for p in model.parameters())
    matrix = torch.eye(count) + 0.3 * torch.randn(count, count) / count**0.5
    other = Reparametrised(model, matrix)
    after = []
    for net in (model, other):
        fisher = kc.implicit(net, [x], "categorical", iteration=kc.Iteration(tolerance=1e-13))
        step = fisher.solve(gradient_of(net, x, y))
        after.append(torch.func.functional_call(net, moved(net, step, -size), (x,)).detach())
    assert_same(after[1], after[0], tolerance=1e-8)
    # Plain gradients do differ: what is shown is not that the step is small.
    plain = [
        torch.func.functional_call(net, moved(net, gradient_of(net, x, y), -size), (x,)).detach()
        for net in (model, other)
    ]
    assert (plain[0] - plain[1]).abs().max() > 1e-3
