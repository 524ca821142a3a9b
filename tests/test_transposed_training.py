"""Training and saving models with transposed convolutions and bilinear layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .training import EVERY_STEP, parameters_of


class Decoder(nn.Module):
    """Two numbers and a gate to an image of as many pixels as are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Bilinear(2, 3, 8)
        self.up = nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, groups=2)
        self.last = nn.ConvTranspose2d(4, 1, 2, stride=2, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.mix(x[:, :2], x[:, 2:]))[..., None, None].expand(-1, -1, 2, 2)
        return self.last(torch.relu_(self.up(h, output_size=[4, 4])))[:, 0]


def images() -> tuple[Tensor, Tensor]:
    inputs = torch.randn(32, 5)
    return inputs, torch.sin(inputs[:, :1, None] + torch.arange(9.0)[:, None] * inputs[:, 1:2, None]).expand(-1, -1, 9)


@pytest.mark.parametrize("rule", ["factored", "exact"])
def test_the_loss_falls(rule):
    model, (inputs, targets) = Decoder(), images()
    criterion, optimizer = nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    kfac = kc.KFAC(model, criterion, damping=kc.Damping(1e-2, rule=rule), schedule=EVERY_STEP)
    kfac.attach(optimizer)
    assert {row.form for row in kfac.coverage().rows} == {"kronecker"}
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = criterion(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert torch.isfinite(parameters_of(model)).all()
    assert kfac.metrics()["kfac/failed_layers"] == kfac.metrics()["kfac/skipped_captures"] == 0
    assert losses[-1] < 0.7 * losses[0]


def test_a_batch_without_examples_changes_nothing():
    model, (inputs, targets) = Decoder(), images()
    kfac = kc.KFAC(model, kc.Gaussian(0.5, event_dims=(1, 2)), schedule=EVERY_STEP)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    kfac.attach(optimizer)
    for size in (32, 0):
        before = parameters_of(model)
        optimizer.zero_grad()
        (model(inputs[:size]) - targets[:size]).square().sum().backward()
        optimizer.step()
    assert torch.equal(parameters_of(model), before)
    assert torch.isfinite(before).all()


def test_a_resumed_run_is_bitwise_the_same():
    def steps(model: nn.Module, kfac: kc.KFAC, optimizer: torch.optim.Optimizer, number: int) -> None:
        for _ in range(number):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()

    def built(model: nn.Module) -> tuple[nn.Module, kc.KFAC, torch.optim.Optimizer]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        schedule = kc.Schedule(factors=2, inverses=4)
        kfac = kc.KFAC(model, kc.Gaussian(0.5, event_dims=(1, 2)), schedule=schedule, data=kc.Data(seed=3))
        kfac.attach(optimizer)
        return model, kfac, optimizer

    inputs, targets = images()
    whole, again = Decoder(), Decoder()
    run = built(whole)
    steps(*run, 3)
    again.load_state_dict(whole.state_dict())
    resumed = built(again)
    resumed[1].load_state_dict(copy.deepcopy(run[1].state_dict()))
    for one in (run, resumed):
        steps(*one, 4)
    assert torch.equal(parameters_of(whole), parameters_of(again))


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "block", "unit_wise", "diagonal"])
def test_a_fisher_is_saved_and_loaded(structure, tmp_path):
    model, (inputs, _) = Decoder(), images()
    likelihood = kc.Gaussian(0.5, event_dims=(1, 2))
    found = kc.estimate(model, [inputs], likelihood, structure=structure)
    found.save(tmp_path / "f")
    loaded = kc.Fisher.load(tmp_path / "f")
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, solved in found.solve(gradients, damping=0.1).items():
        assert solved.shape == gradients[name].shape
        assert torch.equal(loaded.solve(gradients, damping=0.1)[name], solved)
