"""ORACLES 6-11: where a Kronecker block equals the exact one, and where it must not."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .reference import (
    assert_same,
    bernoulli_log_prob,
    categorical_log_prob,
    exact_fisher,
    fisher_of_draws,
    gaussian_log_prob,
    matrix_order,
)

LIKELIHOODS = {
    "categorical": (kc.Categorical(), categorical_log_prob),
    "bernoulli": (kc.Bernoulli(), bernoulli_log_prob),
    "gaussian": (kc.Gaussian(1.0), gaussian_log_prob),
}


def labels_for(name: str, outputs: Tensor) -> Tensor:
    if name == "categorical":
        return torch.randint(outputs.shape[-1], outputs.shape[:-1])
    return torch.randint(2, outputs.shape).to(outputs) if name == "bernoulli" else torch.randn_like(outputs)


def network(depth: int, activation: type[nn.Module], *, bias: bool = True) -> nn.Sequential:
    sizes = [3, *[4] * (depth - 1), 5]
    modules: list[nn.Module] = []
    for d_in, d_out in pairwise(sizes):
        modules += [nn.Linear(d_in, d_out, bias=bias), activation()]
    return nn.Sequential(*modules[:-1])


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }


def parameters_of(module: nn.Module) -> list[Tensor]:
    return [module.weight] if module.bias is None else [module.weight, module.bias]


def assert_blocks_of_draws(model, inputs, name, *, draws, divisor, options=None):
    """Each block of the estimate equals the mean outer product of the same draws."""
    likelihood, log_prob = LIKELIHOODS[name]
    fisher = kc.estimate(model, [inputs], likelihood, options=options or kc.Options(draws=[draws]))
    for layer, module in linear_layers(model).items():
        expected = fisher_of_draws(model, inputs, draws, log_prob, parameters=parameters_of(module), divisor=divisor)
        order = matrix_order(module)
        assert_same(fisher[layer].to_dense(), expected[order][:, order])


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.GELU])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_one_example_is_exact(name, depth, activation, bias, draws):
    model = network(depth, activation, bias=bias)
    inputs = torch.randn(1, 3)
    drawn = [labels_for(name, model(inputs)) for _ in range(draws)]
    assert_blocks_of_draws(model, inputs, name, draws=drawn, divisor=1)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_equal_inputs_are_exact(name):
    model = network(3, nn.Tanh)
    inputs = torch.randn(1, 3).expand(6, 3)
    drawn = [labels_for(name, model(inputs)) for _ in range(2)]
    assert_blocks_of_draws(model, inputs, name, draws=drawn, divisor=6)


class Pooled(nn.Module):
    """A stack on (N, S, d), pooled over positions at the end."""

    def __init__(self, stack: nn.Module, how: str) -> None:
        super().__init__()
        self.stack = stack
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y = self.stack(x)
        return y.sum(1) if self.how == "sum" else y.mean(1)


@pytest.mark.parametrize("how", ["sum", "mean"])
@pytest.mark.parametrize("examples", [1, 4])
def test_identical_positions_pooled_exact_is_positions_times_expand(how, examples):
    """ORACLES 7: exact = S x expand = reduce."""
    positions = 3
    model = Pooled(network(2, nn.Tanh), how)
    inputs = torch.randn(1, 1, 3).expand(examples, positions, 3)
    drawn = [torch.randint(5, (examples,))]
    likelihood, log_prob = LIKELIHOODS["categorical"]
    found = {
        sharing: kc.estimate(
            model,
            [inputs],
            likelihood,
            rules={"*": {"sharing": sharing}},
            options=kc.Options(draws=[drawn]),
        )
        for sharing in ("expand", "reduce")
    }
    for layer, module in linear_layers(model).items():
        expected = fisher_of_draws(model, inputs, drawn, log_prob, parameters=parameters_of(module), divisor=examples)
        order = matrix_order(module)
        assert_same(positions * found["expand"][layer].to_dense(), expected[order][:, order])
        assert_same(found["reduce"][layer].to_dense(), expected[order][:, order])


def identity_fisher(outputs: Tensor) -> Tensor:
    return torch.eye(outputs.numel())


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("examples", [1, 5])
def test_deep_linear_gaussian_type2_is_exact(examples):
    """ORACLES 8."""
    model = network(3, Identity)
    inputs = torch.randn(examples, 3)
    fisher = kc.estimate(model, [inputs], kc.Gaussian(1.0), kind="exact")
    for layer, module in linear_layers(model).items():
        expected = exact_fisher(model, inputs, identity_fisher, parameters=parameters_of(module), divisor=examples)
        order = matrix_order(module)
        assert_same(fisher[layer].to_dense(), expected[order][:, order])


def test_deep_linear_gaussian_with_data_labels_is_not_exact():
    """ORACLES 8: the empirical Fisher is another matrix."""
    model = network(2, Identity)
    inputs, data_labels = torch.randn(5, 3), torch.randn(5, 5)
    empirical = kc.estimate(model, [inputs], kc.Gaussian(1.0), options=kc.Options(draws=[[data_labels]]))
    exact = kc.estimate(model, [inputs], kc.Gaussian(1.0), kind="exact")
    difference = (empirical["0"].to_dense() - exact["0"].to_dense()).norm()
    assert difference > 0.1 * exact["0"].to_dense().norm()


def test_sampled_tends_to_type2():
    """ORACLES 8, 23: the mean over draws; 2000 draws have a relative error near 1/sqrt(2000 * 8)."""
    model = network(2, Identity)
    inputs = torch.randn(8, 3)
    exact = kc.estimate(model, [inputs], kc.Gaussian(1.0), kind="exact")
    sampled = kc.estimate(model, [inputs], kc.Gaussian(1.0), samples=2000, options=kc.Options(seed=1))
    ratio = sampled["0"].trace() / exact["0"].trace()
    assert abs(ratio - 1) < 0.03, f"ratio {ratio}"


@pytest.mark.parametrize("examples", [1, 4])
def test_per_position_outputs_expand_is_exact(examples):
    """ORACLES 9: a deep linear net on (N, S, d) with a Gaussian at every position."""
    model = network(2, Identity)
    inputs = torch.randn(examples, 3, 3)
    fisher = kc.estimate(model, [inputs], kc.Gaussian(1.0, event_dims=(-1,)), kind="exact")
    for layer, module in linear_layers(model).items():
        expected = exact_fisher(model, inputs, identity_fisher, parameters=parameters_of(module), divisor=examples * 3)
        order = matrix_order(module)
        assert_same(fisher[layer].to_dense(), expected[order][:, order])


@pytest.mark.parametrize("how", ["sum", "mean"])
def test_pooled_outputs_reduce_is_exact(how):
    """ORACLES 9."""
    model = Pooled(network(2, Identity), how)
    inputs = torch.randn(4, 3, 3)
    rules = {"*": {"sharing": "reduce"}}
    fisher = kc.estimate(model, [inputs], kc.Gaussian(1.0), kind="exact", rules=rules)
    for layer, module in linear_layers(model).items():
        expected = exact_fisher(model, inputs, identity_fisher, parameters=parameters_of(module), divisor=4)
        order = matrix_order(module)
        assert_same(fisher[layer].to_dense(), expected[order][:, order])


CONVOLUTIONS = [
    pytest.param(nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}, id="2d"),
    pytest.param(nn.Conv2d, {"kernel_size": (3, 2), "padding": "same", "dilation": (2, 1)}, id="2d-same"),
    pytest.param(nn.Conv2d, {"kernel_size": 2, "padding": "valid", "bias": False}, id="2d-valid"),
    pytest.param(nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, id="2d-circular"),
    pytest.param(nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, id="2d-reflect"),
    pytest.param(nn.Conv1d, {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2}, id="1d"),
    pytest.param(nn.Conv1d, {"kernel_size": 4, "padding": "same", "padding_mode": "replicate"}, id="1d-same-odd"),
    pytest.param(nn.Conv3d, {"kernel_size": (1, 2, 3), "padding": (0, 1, 1), "stride": (1, 2, 1)}, id="3d"),
]


def convolution(kind: type[nn.Module], arguments: dict, groups: int) -> tuple[nn.Module, Tensor]:
    space = {nn.Conv1d: (7,), nn.Conv2d: (5, 6), nn.Conv3d: (3, 4, 3)}[kind]
    module = kind(2 * groups, 2 * groups, groups=groups, **arguments)
    return module, torch.randn(3, 2 * groups, *space)


def group_mask(module: nn.Module) -> Tensor:
    """Entries of the layer's matrix that a form with a pair per group keeps."""
    rows = torch.arange(module.weight.shape[0]) // (module.weight.shape[0] // module.groups)
    columns = module.weight[0].numel() + (module.bias is not None)
    group = rows.repeat_interleave(columns)
    return (group[:, None] == group[None, :]).to(module.weight)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("kind", "arguments"), CONVOLUTIONS)
def test_convolution_per_pixel_expand_is_exact(kind, arguments, groups):
    """ORACLES 10: N = 3, a Gaussian at every output pixel."""
    module, inputs = convolution(kind, arguments, groups)
    model = nn.Sequential(module)
    pixels = model(inputs).numel() / (2 * groups)
    likelihood = kc.Gaussian(1.0, event_dims=(1,))
    fisher = kc.estimate(model, [inputs], likelihood, kind="exact")
    expected = exact_fisher(model, inputs, identity_fisher, parameters=parameters_of(module), divisor=pixels)
    order = matrix_order(module)
    assert_same(fisher["0"].to_dense(), expected[order][:, order] * group_mask(module))


class GlobalAverage(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(-1)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("kind", "arguments"), CONVOLUTIONS)
def test_convolution_globally_pooled_reduce_is_exact(kind, arguments, groups):
    """ORACLES 10."""
    module, inputs = convolution(kind, arguments, groups)
    model = nn.Sequential(module, GlobalAverage())
    rules = {"0": {"sharing": "reduce"}}
    fisher = kc.estimate(model, [inputs], kc.Gaussian(1.0), kind="exact", rules=rules)
    expected = exact_fisher(model, inputs, identity_fisher, parameters=parameters_of(module), divisor=3)
    order = matrix_order(module)
    assert_same(fisher["0"].to_dense(), expected[order][:, order] * group_mask(module))


@pytest.mark.parametrize("variance", [0.25, 1.0, 3.0])
def test_one_linear_layer_gaussian(variance):
    """ORACLES 11: the block is I / variance (x) mean of a a^T."""
    model, inputs = nn.Linear(3, 2), torch.randn(7, 3)
    fisher = kc.estimate(model, [inputs], kc.Gaussian(variance), kind="exact")
    a = torch.cat([inputs, torch.ones(7, 1)], 1)
    assert_same(fisher[""].to_dense(), torch.kron(torch.eye(2) / variance, a.T @ a / 7))


def test_module_used_twice_is_its_uses_along_positions():
    """ORACLES 12, as a formula: A and G are sums over both uses."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    model, inputs = Twice(), torch.randn(4, 3)
    drawn = torch.randint(3, (4,))
    fisher = kc.estimate(model, [inputs], kc.Categorical(), options=kc.Options(draws=[[drawn]]))
    first = model.layer(inputs)
    second_in = torch.tanh(first)
    second = model.layer(second_in)
    loss = nn.functional.cross_entropy(second, drawn, reduction="sum")
    g1, g2 = torch.autograd.grad(loss, [first, second])
    ones = torch.ones(4, 1)
    a = torch.cat([torch.cat([inputs, ones], 1), torch.cat([second_in.detach(), ones], 1)])
    assert_same(fisher["layer"].A, a.T @ a / 8)
    assert_same(fisher["layer"].G, (g1.T @ g1 + g2.T @ g2) / 4)
