"""Low-rank adapters beside a frozen layer, as modules and as raw parameters: what is covered, and with which blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kfac_cond as kc

from .reference import assert_same, categorical_log_prob, exact_fisher, fisher_of_draws
from .training import EVERY_STEP


class Adapted(nn.Module):
    """A frozen linear layer with B A x added, dropped and scaled, of a few names, one of them active."""

    def __init__(self, base: nn.Linear, rank: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        self.lora_dropout, self.scaling = nn.Dropout(dropout), 16 / rank
        nn.init.normal_(self.lora_B["default"].weight)

    def forward(self, x: Tensor) -> Tensor:
        added = self.lora_B["default"](self.lora_A["default"](self.lora_dropout(x)))
        return self.base_layer(x) + added * self.scaling


class AdaptedRaw(nn.Module):
    """The same with two matrices of its own."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base_layer, self.scaling = base.requires_grad_(False), 16 / rank
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.randn(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + functional.linear(functional.linear(x, self.lora_A), self.lora_B) * self.scaling


def model(adapted: type[nn.Module] = Adapted, **arguments: float) -> nn.Sequential:
    """A frozen network with an adapter at its first and at its last layer."""
    first, last = (adapted(nn.Linear(d_in, d_out), 2, **arguments) for d_in, d_out in ((4, 5), (5, 3)))
    return nn.Sequential(first, nn.Tanh(), nn.Linear(5, 5).requires_grad_(False), nn.Tanh(), last)


MODULES = ["0.lora_A.default", "0.lora_B.default", "4.lora_A.default", "4.lora_B.default"]
RAW = ["0.lora_A", "0.lora_B", "4.lora_A", "4.lora_B"]


def output_fisher(outputs: Tensor) -> Tensor:
    p = torch.softmax(outputs, -1)
    return torch.diag(p) - torch.outer(p, p)


@pytest.mark.parametrize(
    ("adapted", "form", "paths"),
    [(Adapted, "kronecker", [f"{name}.weight" for name in MODULES]), (AdaptedRaw, "universal", RAW)],
)
def test_what_trains_is_covered_and_nothing_else_is_counted(adapted, form, paths):
    coverage = kc.coverage(model(adapted))
    assert [row.path for row in coverage.rows] == paths
    assert {row.form for row in coverage.rows} == {form}
    assert (coverage.share, sum(row.parameters for row in coverage.rows)) == (1.0, 2 * (4 + 5) + 2 * (5 + 3))


@pytest.mark.parametrize("draws", [1, 3])
def test_one_example_is_exact(draws):
    """ORACLES 6, of both matrices of each adapter; the scaling is in G of B, and in that of A through B."""
    network, inputs = model(), torch.randn(1, 4)
    drawn = [torch.randint(3, (1,)) for _ in range(draws)]
    found = kc.estimate(network, [inputs], "categorical", options=kc.Options(draws=[drawn]))
    assert list(found) == MODULES
    for name, block in found.items():
        parameters = [network.get_submodule(name).weight]
        expected = fisher_of_draws(network, inputs, drawn, categorical_log_prob, parameters=parameters, divisor=1)
        assert_same(block.to_dense(), expected)


@pytest.mark.parametrize(("adapted", "names"), [(Adapted, MODULES), (AdaptedRaw, RAW)])
@pytest.mark.parametrize("structure", ["block", "diagonal"])
def test_blocks_are_those_of_the_definition(adapted, names, structure):
    network, inputs = model(adapted), torch.randn(5, 4)
    options = kc.Options(dtype=torch.float64)
    found = kc.estimate(network, [inputs], "categorical", structure=structure, kind="exact", options=options)
    assert list(found) == names
    for name, block in found.items():
        path = name if adapted is AdaptedRaw else f"{name}.weight"
        F = exact_fisher(network, inputs, output_fisher, parameters=[network.get_parameter(path)], divisor=5)
        assert_same(block.to_dense(), F if structure == "block" else torch.diag(F.diagonal()))


def test_dropout_before_an_adapter_is_in_its_inputs():
    """A of lora_A is of what was left after dropping, as its weight saw it."""
    network, inputs, seen = model(dropout=0.5).train(), torch.randn(6, 4), []
    network[0].lora_dropout.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    found = kc.estimate(network, [inputs], "categorical", options=kc.Options(seed=0))
    assert_same(found["0.lora_A.default"].A, seen[0].T @ seen[0] / 6)


@pytest.mark.parametrize("adapted", [Adapted, AdaptedRaw])
def test_training_moves_the_adapters_alone(adapted):
    network, inputs, labels = model(adapted), torch.randn(32, 4), torch.randint(3, (32,))
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.05)
    criterion = nn.CrossEntropyLoss()
    kfac = kc.KFAC(network, criterion, damping=0.1, schedule=EVERY_STEP)
    kfac.attach(optimizer)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = criterion(network(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for name, p in network.named_parameters():
        assert torch.equal(p, before[name]) == ("lora" not in name)
