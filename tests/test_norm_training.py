"""Training with norms that are preconditioned: losses fall, all units are inverted in one call, nothing else moves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .helpers import EVERY_STEP, Apply
from .training import parameters_of


class Transformer(nn.Module):
    """A block of attention and a perceptron, each with a norm before it; the mean over positions is classified."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm_1, self.norm_2, self.norm_3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.head = nn.Linear(width, 16), nn.Linear(16, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).chunk(3, -1)
        x = x + self.out((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)
        x = x + self.down(torch.relu(self.up(self.norm_2(x))))
        return self.head(self.norm_3(x).mean(1))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8, momentum=None),
        nn.ReLU(inplace=True),
        Apply(lambda h: h.mean((2, 3))),
        nn.Linear(8, 3),
    )


TASKS = {"convolutions": (convolutional, (64, 2, 6, 6)), "transformer": (Transformer, (64, 5, 8))}


@pytest.mark.parametrize("rule", ["factored", "exact"])
@pytest.mark.parametrize("task", TASKS)
def test_the_loss_falls(task, rule):
    make, shape = TASKS[task]
    model, inputs = make(), torch.randn(shape)
    labels = inputs.flatten(1)[:, :3].argmax(1)
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    kfac = kc.KFAC(model, criterion, damping=kc.Damping(0.1, rule=rule), schedule=kc.Schedule(factors=1, inverses=1))
    kfac.attach(optimizer)
    assert kfac.coverage().share == 1.0
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = criterion(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert torch.isfinite(parameters_of(model)).all()
    assert kfac.metrics()["kfac/failed_layers"] == kfac.metrics()["kfac/skipped_captures"] == 0
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("rule", "function"), [("factored", "cholesky_ex"), ("exact", "eigh")])
def test_all_units_of_all_norms_are_inverted_in_one_call_a_size(rule, function, monkeypatch):
    model = nn.Sequential(nn.LayerNorm(40), nn.Tanh(), nn.LayerNorm(40), nn.Tanh(), nn.RMSNorm(40))
    kfac = kc.KFAC(model, "categorical", damping=kc.Damping(1e-2, rule=rule))
    outputs = model(torch.randn(6, 40))
    kfac.update(outputs)
    outputs.sum().backward()
    plain, sizes = getattr(torch.linalg, function), []
    monkeypatch.setattr(torch.linalg, function, lambda x, **rest: sizes.append(tuple(x.shape)) or plain(x, **rest))
    kfac.precondition()
    # A of the two with a bias; their G with both sides of the one without.
    assert sorted(sizes) == [(80, 2, 2), (160, 1, 1)]


def counting() -> nn.Module:
    """Norms that keep running statistics, in every way of keeping them."""
    return nn.Sequential(
        nn.BatchNorm2d(3),
        nn.BatchNorm2d(3, momentum=None),
        nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        nn.Flatten(),
        nn.BatchNorm1d(12),
        nn.Linear(12, 3),
    )


@pytest.mark.parametrize("kind", ["sampled", "exact"])
@pytest.mark.parametrize("structure", ["kfac", "unit_wise"])
def test_an_estimate_leaves_running_statistics_alone_to_the_last_bit(structure, kind):
    """ORACLES 17."""
    model = counting()
    model(torch.randn(4, 3, 2, 2))
    before = copy.deepcopy(model.state_dict())
    kc.estimate(model, [torch.randn(4, 3, 2, 2)], "categorical", structure=structure, kind=kind)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_due_step_updates_running_statistics_once_as_plain_training_does():
    """ORACLES 17: buffers and gradients, to the last bit."""
    plain = counting()
    model, criterion = copy.deepcopy(plain), nn.CrossEntropyLoss()
    inputs, labels = torch.randn(4, 3, 2, 2), torch.randint(3, (4,))
    kfac = kc.KFAC(model, criterion, schedule=EVERY_STEP)
    kfac.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    for one in (plain, model):
        criterion(one(inputs), labels).backward()
    assert kfac.coverage().share == 1.0
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
