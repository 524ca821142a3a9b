"""The quadratic model: its minimum against the formula, and directions that are one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.batches import Batch
from kfac_cond.objective import Objective
from kfac_cond.output_fisher import fisher_times, root_transposed_times
from kfac_cond.quadratic import inner, quadratic_model

from .likelihood_cases import HEADS
from .reference import assert_same, exact_fisher
from .training import HostReads

SIZE = 12


def problem(number: int = 2) -> tuple[Tensor, list[Tensor], Tensor, kc.QuadraticModel]:
    """A dense F, some directions, a gradient, and the model of them."""
    root = torch.randn(SIZE, SIZE)
    F, g = root @ root.mT, torch.randn(SIZE)
    directions = [torch.randn(SIZE) for _ in range(number)]
    model = quadratic_model([root.mT @ one for one in directions], [[one] for one in directions], [g])
    return F, directions, g, model


@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_coefficients_are_the_solution_of_the_small_system(number, damping):
    F, directions, g, model = problem(number)
    D = torch.stack(directions, 1)
    damped = F + damping * torch.eye(SIZE)
    expected = -torch.linalg.solve(D.mT @ damped @ D, D.mT @ g)
    assert_same(model.coefficients(damping), expected)


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_the_change_is_the_quadratic_itself(damping):
    F, directions, g, model = problem()
    c = torch.randn(2)
    delta = c[0] * directions[0] + c[1] * directions[1]
    expected = g @ delta + delta @ (F + damping * torch.eye(SIZE)) @ delta / 2
    assert_same(model.change(c, damping), expected)
    assert_same(model.quadratic_form(c), delta @ F @ delta)
    assert_same(model.square(c), delta @ delta)


def test_the_minimum_gains_half_of_the_slope():
    _, _, _, model = problem()
    c = model.coefficients(0.3)
    assert_same(model.change(c, 0.3), model.slopes @ c / 2)


@pytest.mark.parametrize("factor", [1.0, -2.5, 1e6, 1e-6])
def test_collinear_directions_fall_back_to_the_first_alone(factor):
    F, (d, _), g, _ = problem()
    other = factor * d
    root = torch.linalg.cholesky(F)
    model = quadratic_model([root.mT @ d, root.mT @ other], [[d], [other]], [g])
    c = model.coefficients(0.1)
    assert_same(c[0], -(g @ d) / (d @ F @ d + 0.1 * d @ d))
    assert c[1] == 0


@pytest.mark.parametrize("at", [0, 1])
def test_a_direction_of_zeros_gets_no_part(at):
    _, directions, g, _ = problem()
    directions[at] = torch.zeros(SIZE)
    model = quadratic_model(directions, [[one] for one in directions], [g])
    d = directions[1 - at]
    c = model.coefficients(0.0)
    assert c[at] == 0
    assert_same(c[1 - at], -(g @ d) / (d @ d))


def test_a_third_that_is_a_sum_of_two_is_dropped():
    F, (a, b), g, model = problem()
    root = torch.linalg.cholesky(F)
    rows = [a, b, a - 3 * b]
    found = quadratic_model([root.mT @ one for one in rows], [[one] for one in rows], [g]).coefficients(0.2)
    assert_same(found[:2], model.coefficients(0.2))
    assert found[2] == 0


def test_nothing_is_read_by_the_host():
    _, _, _, model = problem()
    with HostReads() as reads:
        c = model.coefficients(0.1)
        model.change(c, 0.1)
    assert reads.count == 0


# -- from a model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_the_square_of_the_root_is_the_product(name):
    """t^T H t from S^T t, for every likelihood with an output Fisher."""
    head = HEADS[name]
    if head.information is None:
        pytest.skip("no closed form")
    outputs, t = torch.randn(5, head.width), torch.randn(5, head.width)
    likelihood = head.likelihood
    expected = (t * fisher_times(likelihood, outputs, t)).sum()
    assert_same(root_transposed_times(likelihood, outputs, t).square().sum(), expected)


def directions_of(model: nn.Module, number: int = 2) -> list[list[Tensor]]:
    return [[torch.randn_like(p) for p in model.parameters()] for _ in range(number)]


@pytest.mark.parametrize("forward", [True, False], ids=["forward mode", "double backward"])
def test_curvature_is_that_of_the_exact_fisher(forward):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(7, 3)
    objective = Objective(model, "categorical")
    objective.forward_mode = forward
    objective.begin()
    D = directions_of(model)
    found = quadratic_model(objective.pushed(Batch.of(x, None), D), D, D[0])

    def output_fisher(f: Tensor) -> Tensor:
        p = f.softmax(-1)
        return torch.diag(p) - torch.outer(p, p)

    F = exact_fisher(model, x, output_fisher, parameters=list(model.parameters()), divisor=7)
    rows = torch.stack([torch.cat([one.flatten() for one in d]) for d in D])
    assert_same(found.curvature, rows @ F @ rows.mT)
    assert_same(found.squares, rows @ rows.mT)
    assert objective.forward_mode is forward


@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_it_is_the_true_quadratic_on_linear_least_squares(l2):
    model, x, y = nn.Linear(3, 2), torch.randn(9, 3), torch.randn(9, 2)
    objective, batch = Objective(model, kc.Gaussian()), Batch.of(x, y)
    objective.l2 = l2
    loss, _ = objective.here(batch)
    gradient, before = objective.gradient(loss), objective.value(loss)
    D = directions_of(model)
    quadratic = quadratic_model(objective.pushed(batch, D), D, gradient)
    c = torch.randn(2)
    with torch.no_grad():
        for p, a, b in zip(model.parameters(), *D, strict=True):
            p.add_(c[0] * a + c[1] * b)
    assert_same(quadratic.change(c, l2), objective.again(batch) - before)


def test_masked_terms_and_heads_have_their_weights():
    """F = sum_h w_h F_h / M_h, of the terms that count."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"kind": self.first(x), "size": self.second(x)}

    model, x = Two(), torch.randn(6, 3)
    labels = torch.tensor([0, 1, -1, 3, 2, -1])
    heads = kc.Product({"kind": kc.Categorical(ignore_index=-1), "size": kc.Gaussian(2.0)}, weights={"size": 0.5})
    objective, batch = Objective(model, heads), Batch.of(x, {"kind": labels, "size": torch.randn(6, 2)})
    loss, _ = objective.here(batch)
    kind, size = model.first(x), model.second(x)
    expected = nn.functional.cross_entropy(kind, labels, ignore_index=-1)
    log_p = torch.distributions.Normal(size, 2.0**0.5).log_prob(batch.targets["size"])
    assert_same(loss.detach(), (expected - 0.5 * log_p.sum() / 6).detach())
    (d,) = directions_of(model, 1)
    (row,) = objective.pushed(batch, [d])
    p, t = kind.softmax(-1), x @ d[0].mT + d[1]
    of_kind = (p * t * t).sum(1) - (p * t).sum(1).square()
    of_size = (x @ d[2].mT + d[3]).square().sum() / 2.0
    assert_same(inner([row], [row]), (of_kind[labels >= 0].sum() / 4 + 0.5 * of_size / 6).detach())


def test_the_model_runs_again_as_it_ran():
    """The same dropout masks, and nothing of it is left behind."""
    model = nn.Sequential(nn.Linear(3, 30), nn.BatchNorm1d(30), nn.Dropout(0.5), nn.Linear(30, 2))
    objective, batch = Objective(model, kc.Gaussian()), Batch.of(torch.randn(8, 3), torch.randn(8, 2))
    loss, _ = objective.here(batch)
    buffers, directions = [b.clone() for b in model.buffers()], directions_of(model)
    state = torch.get_rng_state()
    assert_same(objective.again(batch), loss.detach())
    objective.pushed(batch, directions)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))


def test_a_part_of_a_batch_is_every_so_many_th_example():
    batch = Batch.of({"x": torch.arange(10), "scale": torch.ones(3)}, (torch.arange(10) * 2,))
    part = batch.part(4, 5)
    assert part.kwargs["x"].tolist() == [1, 5, 9]
    assert part.kwargs["scale"].tolist() == [1, 1, 1]
    assert part.targets[0].tolist() == [2, 10, 18]


@pytest.mark.parametrize("inputs", [[torch.zeros(2)], (torch.zeros(2), torch.zeros(2)), "x", None])
def test_other_inputs_are_refused(inputs):
    with pytest.raises(kc.ArgumentError, match=r"step\(inputs, targets\) got .*expected a tensor, or a mapping"):
        Batch.of(inputs, None)
