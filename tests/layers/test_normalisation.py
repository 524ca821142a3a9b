"""Normalisation layers: the scale and shift of each unit as a layer of its own, for all arguments and inputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.layers import WeightLayout, kind_of
from kfac_cond.layers.survey import survey
from kfac_cond.summing import grouped_pair

from ..helpers import EVERY_STEP
from ..reference import assert_same, categorical_log_prob, exact_fisher, fisher_of_draws
from .test_kinds import assert_gradient_is_made_of_pairs

#: Module and shape of its input.
CASES = {
    "layer": (lambda: nn.LayerNorm(4), (5, 4)),
    "layer, one example": (lambda: nn.LayerNorm(4), (4,)),
    "layer, positions": (lambda: nn.LayerNorm(4), (5, 3, 4)),
    "layer, more positions": (lambda: nn.LayerNorm(4), (5, 3, 2, 4)),
    "layer, two dimensions": (lambda: nn.LayerNorm((3, 4)), (5, 2, 3, 4)),
    "layer, two dimensions of one example": (lambda: nn.LayerNorm((3, 4)), (3, 4)),
    "layer, large eps": (lambda: nn.LayerNorm(4, eps=0.5), (5, 4)),
    "layer, no bias": (lambda: nn.LayerNorm(4, bias=False), (5, 3, 4)),
    "layer, one unit": (lambda: nn.LayerNorm((1,)), (5, 3, 1)),
    "rms": (lambda: nn.RMSNorm(4), (5, 3, 4)),
    "rms, two dimensions": (lambda: nn.RMSNorm((3, 4)), (5, 3, 4)),
    "rms, large eps": (lambda: nn.RMSNorm(4, eps=0.5), (5, 4)),
    "rms, one example": (lambda: nn.RMSNorm(4), (4,)),
    "group": (lambda: nn.GroupNorm(2, 6), (5, 6, 3, 2)),
    "group, one": (lambda: nn.GroupNorm(1, 6), (5, 6, 3)),
    "group, no positions": (lambda: nn.GroupNorm(3, 6), (5, 6)),
    "group, large eps": (lambda: nn.GroupNorm(6, 6, eps=0.5), (5, 6, 2, 2, 2)),
    "group, one channel": (lambda: nn.GroupNorm(1, 1), (5, 1, 4)),
    "instance, 1d": (lambda: nn.InstanceNorm1d(3, affine=True), (5, 3, 4)),
    "instance, one example": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 4)),
    "instance, 2d": (lambda: nn.InstanceNorm2d(3, affine=True, eps=0.5), (5, 3, 4, 2)),
    "instance, 2d, one example": (lambda: nn.InstanceNorm2d(3, affine=True), (3, 4, 2)),
    "instance, 3d": (lambda: nn.InstanceNorm3d(3, affine=True), (5, 3, 2, 2, 2)),
    "instance, running": (lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (5, 3, 4, 2)),
    "batch": (lambda: nn.BatchNorm1d(4), (5, 4)),
    "batch, positions": (lambda: nn.BatchNorm1d(4), (5, 4, 3)),
    "batch, 2d": (lambda: nn.BatchNorm2d(4, eps=0.5), (5, 4, 3, 2)),
    "batch, 3d": (lambda: nn.BatchNorm3d(4), (5, 4, 3, 2, 2)),
    "batch, cumulative": (lambda: nn.BatchNorm2d(4, momentum=None), (5, 4, 3, 2)),
    "batch, no running": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (5, 4, 3, 2)),
    "batch, one channel": (lambda: nn.BatchNorm1d(1), (5, 1)),
    "batch, on one process": (lambda: nn.SyncBatchNorm(4), (5, 4, 3)),
}


def scattered(module: nn.Module) -> nn.Module:
    """Parameters and running statistics away from their starting values."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor))
    return module


@pytest.fixture(params=[True, False], ids=["train", "eval"])
def mode(request) -> bool:
    return request.param


@pytest.fixture(params=CASES)
def case(request, mode) -> tuple[nn.Module, Tensor]:
    make, shape = CASES[request.param]
    return scattered(make()).train(mode), 2.0 * torch.randn(shape) + 1.0


def test_pairs_make_the_gradient(case):
    assert_gradient_is_made_of_pairs(*case)


def test_the_activation_is_what_the_weight_multiplies(case):
    module, inputs = case
    kind = kind_of(module)
    outputs = module(inputs)
    w, b = module.weight.detach().flatten(), getattr(module, "bias", None)
    b = torch.zeros_like(w) if b is None else b.detach().flatten()
    a, y = kind.activations(module, inputs), kind.output_gradients(module, outputs.detach())
    assert a.shape == y.shape
    groups = [-1, 1, 1, 1] if len(w) > 1 else [1, 1, 1]
    assert_same(a, (y - b.reshape(groups)) / w.reshape(groups))


def test_the_form_is_units_examples_positions(case):
    module, inputs = case
    units, examples = module.weight.numel(), inputs.shape[0]
    if inputs.ndim in (module.weight.ndim, {nn.InstanceNorm1d: 2, nn.InstanceNorm2d: 3}.get(type(module))):
        examples = 1
    expected = (units, examples, inputs.numel() // (units * examples), 1)
    assert kind_of(module).activations(module, inputs).shape == (expected if units > 1 else expected[1:])


def test_running_statistics_are_left_alone(case):
    module, inputs = case
    before = copy.deepcopy(module.state_dict())
    kind_of(module).activations(module, inputs)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_the_layout_has_the_shapes_of_the_parameters(case):
    module, _ = case
    (layer,) = survey(module).layers.values()
    assert layer.layout.shapes == {name: tuple(p.shape) for name, p in module.named_parameters()}
    units, columns = module.weight.numel(), len(list(module.parameters()))
    assert layer.layout.matrix_shape == ((units, 1, columns) if units > 1 else (1, columns))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("name", ["layer, positions", "group", "instance, 2d", "batch, 2d", "batch, one channel"])
def test_a_frozen_side_is_left_out(name, frozen):
    make, shape = CASES[name]
    module, inputs = scattered(make()), torch.randn(shape)
    likelihood = kc.Gaussian(1.0, event_dims=tuple(range(1, inputs.ndim)))
    options = kc.Options(seed=0)
    whole = kc.estimate(module, [inputs], likelihood, options=options)[""]
    getattr(module, frozen).requires_grad_(False)
    part = kc.estimate(module, [inputs], likelihood, options=options)[""]
    assert part.layout.names == ({"weight": "bias", "bias": "weight"}[frozen],)
    kept = slice(1 if frozen == "weight" else 0, None, 2)
    assert_same(part.to_dense(), whole.to_dense()[kept, kept])


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(4, elementwise_affine=False),
        nn.RMSNorm(4, elementwise_affine=False),
        nn.GroupNorm(2, 4, affine=False),
        nn.InstanceNorm1d(4),
        nn.BatchNorm1d(4, affine=False),
    ],
    ids=lambda module: type(module).__name__,
)
def test_without_parameters_there_is_no_layer(module):
    found = survey(nn.Sequential(nn.Linear(4, 4), module))
    assert list(found.layers) == ["0"]
    assert all(row.covered for row in found.rows)


def test_a_lazy_norm_is_a_layer_once_it_is_built():
    module = nn.LazyBatchNorm1d()
    assert not survey(nn.Sequential(module)).layers
    module(torch.randn(3, 4))
    assert list(survey(nn.Sequential(module)).layers) == ["0"]


def test_statistics_of_several_processes_have_no_kronecker_form(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    assert {row.form for row in survey(nn.SyncBatchNorm(4)).rows} == {"universal"}
    assert {row.form for row in survey(nn.BatchNorm1d(4)).rows} == {"kronecker"}


class Other(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT).mT


def test_a_norm_with_another_forward_is_of_no_kind():
    assert kind_of(Other(4)) is None
    assert survey(Other(4)).rows[0].reason.endswith("LayerNorm with its forward replaced by Other")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("make", [lambda: nn.RMSNorm(64), lambda: nn.LayerNorm(64), lambda: nn.GroupNorm(4, 64)])
def test_a_model_in_half_precision_has_float32_factors(make, dtype):
    """Inputs as small as eps: an eps of another dtype would show."""
    module = make().to(dtype)
    inputs = 4e-4 * torch.randn(3, 64, dtype=torch.float32)
    (block,) = kc.estimate(module, [inputs.to(dtype)], kc.Gaussian(1.0)).values()
    assert block.dtype == torch.float32
    (block,) = kc.estimate(module, [inputs.to(dtype)], kc.Gaussian(1.0), kind="forward_only").values()
    expected = module(inputs.to(dtype)).detach().double().square().mean(0)
    torch.testing.assert_close(block.A[:, 0, 0].double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


# -- blocks -----------------------------------------------------------------------------------------------------------


def parameters_of(module: nn.Module) -> list[Tensor]:
    return list(module.parameters())


def unit_mask(layout: WeightLayout) -> Tensor:
    """Entries that a form with a matrix per unit keeps."""
    return torch.block_diag(*[torch.ones(layout.d_in, layout.d_in)] * layout.groups)


def order(layout: WeightLayout) -> Tensor:
    start, places = 0, {}
    for name, shape in layout.shapes.items():
        size = torch.Size(shape).numel()
        places[name] = torch.arange(start, start + size).reshape(shape)
        start += size
    return layout.to_matrix(places).flatten()


ONE_POSITION = {
    "layer": (lambda: nn.LayerNorm(4), (4,)),
    "layer, no bias": (lambda: nn.LayerNorm(4, bias=False), (4,)),
    "layer, two dimensions": (lambda: nn.LayerNorm((2, 2)), (2, 2)),
    "rms": (lambda: nn.RMSNorm(4), (4,)),
    "group": (lambda: nn.GroupNorm(2, 4), (4,)),
    "batch, eval": (lambda: nn.BatchNorm1d(4).eval(), (4,)),
}


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("norm", ONE_POSITION)
def test_one_example_is_exact(norm, draws):
    """ORACLES 6, on the entries kept."""
    make, shape = ONE_POSITION[norm]
    module = scattered(make())
    model = nn.Sequential(module, nn.Tanh(), nn.Flatten(), nn.Linear(4, 3))
    inputs, labels = torch.randn(1, *shape), [torch.randint(3, (1,)) for _ in range(draws)]
    block = kc.estimate(model, [inputs], "categorical", options=kc.Options(draws=[labels]))["0"]
    expected = fisher_of_draws(
        model, inputs, labels, categorical_log_prob, parameters=parameters_of(module), divisor=1
    )[order(block.layout)][:, order(block.layout)]
    assert_same(block.to_dense(), expected * unit_mask(block.layout))


def test_a_gaussian_at_each_position_is_exact():
    """ORACLES 10, of a norm: g is independent of a, for any N and S."""
    module = scattered(nn.LayerNorm(4))
    inputs = torch.randn(5, 3, 4)
    block = kc.estimate(module, [inputs], kc.Gaussian(1.0, event_dims=(-1,)), kind="exact")[""]
    expected = exact_fisher(
        module, inputs, lambda f: torch.eye(f.numel()), parameters=parameters_of(module), divisor=15
    )[order(block.layout)][:, order(block.layout)]
    assert_same(block.to_dense(), expected * unit_mask(block.layout))


SEVERAL = {
    "layer": (lambda: nn.LayerNorm(3), (5, 4, 3), -1),
    "group": (lambda: nn.GroupNorm(2, 4), (5, 4, 3), 1),
    "instance": (lambda: nn.InstanceNorm2d(3, affine=True), (5, 3, 2, 2), 1),
    "batch": (lambda: nn.BatchNorm2d(3), (5, 3, 2, 2), 1),
    "batch, eval": (lambda: nn.BatchNorm2d(3).eval(), (5, 3, 2, 2), 1),
}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("norm", SEVERAL)
def test_several_positions_are_summed_before_anything_is_squared(norm, sharing):
    """Whatever sharing a rule asks for: of a row the exact block costs no more than its factors."""
    make, shape, dim = SEVERAL[norm]
    module, inputs = scattered(make()), torch.randn(shape)
    model = nn.Sequential(module, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(inputs[0].numel(), 3))
    labels = torch.randint(3, (5,))
    rules, options = {"0": {"sharing": sharing}}, kc.Options(draws=[[labels]])
    block = kc.estimate(model, [inputs], "categorical", rules=rules, options=options)["0"]
    y = module(inputs)
    loss = nn.functional.cross_entropy(model[2:](y.relu()), labels, reduction="sum")
    (g,) = torch.autograd.grad(loss, [y])
    units = [-1 if d == dim % y.ndim else 1 for d in range(y.ndim)]
    x = ((y - module.bias.reshape(units)) / module.weight.reshape(units)).detach()
    x, g = (t.movedim(dim, 0).flatten(2) for t in (x, g))
    a = torch.stack([x, torch.ones_like(x)], -1)
    V = torch.einsum("uns, unsi -> uni", g, a)
    moments = torch.einsum("uni, unj -> uij", V, V) / 5
    assert_same(block.to_dense(), torch.block_diag(*moments))
    assert_same(block.G.flatten(), moments.diagonal(dim1=-2, dim2=-1).sum(-1))


class Moved(nn.Module):
    """A layer norm on another form of (N, S, D), and a head on the mean over positions."""

    def __init__(self, there, back) -> None:
        super().__init__()
        self.norm, self.head, self.there, self.back = nn.LayerNorm(3), nn.Linear(3, 3), there, back

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.back(self.norm(self.there(x))).tanh().mean(1))


FORMS = {
    "length first": (lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1)),
    "flattened": (lambda x: x.reshape(20, 3), lambda x: x.reshape(5, 4, 3)),
    "windows": (lambda x: x.reshape(10, 2, 3), lambda x: x.reshape(5, 4, 3)),
}


@pytest.mark.parametrize("form", FORMS)
def test_entries_are_grouped_by_example(form):
    model, inputs = Moved(*FORMS[form]), torch.randn(5, 4, 3)
    scattered(model.norm)
    labels = torch.randint(3, (5,))
    options = kc.Options(draws=[[labels]])
    found = kc.estimate(model, [inputs], "categorical", options=options)["norm"]
    model.there = model.back = nn.Identity()
    expected = kc.estimate(model, [inputs], "categorical", structure="unit_wise", options=options)["norm"]
    assert_same(found.to_dense(), expected.to_dense())


def test_entries_of_another_number_are_the_positions_of_one_example():
    """Padded tokens taken out, a table that all share: how many are whose is not known."""
    a, g = torch.randn(7, 2, 3), torch.randn(7, 2, 4)
    assert [one.shape for one in grouped_pair(a, g, 3)] == [(1, 14, 3), (1, 14, 4)]


def test_a_tied_norm_is_one_layer():
    """ORACLES 12: the uses are positions of one layer."""
    model = nn.Sequential(scattered(nn.LayerNorm(4)), nn.Tanh(), nn.LayerNorm(4))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    inputs, labels = torch.randn(5, 4), torch.randint(4, (5,))
    found = kc.estimate(model, [inputs], "categorical", options=kc.Options(draws=[[labels]]))
    assert list(found) == ["0"]
    first = model[0](inputs)
    second = model[2](first.tanh())
    gradients = torch.autograd.grad(nn.functional.cross_entropy(second, labels, reduction="sum"), [first, second])
    a = torch.cat([(y - model[0].bias) / model[0].weight for y in (first, second)]).detach()
    g = torch.cat(gradients)
    rows = g[..., None] * torch.stack([a, torch.ones_like(a)], -1)
    V = rows.reshape(2, 5, 4, 2).sum(0)
    assert_same(found["0"].to_dense(), torch.block_diag(*torch.einsum("nui, nuj -> uij", V, V) / 5))


def test_padded_positions_are_left_out():
    module, x = scattered(nn.LayerNorm(4)), torch.randn(3, 5, 4)
    keep = torch.ones(3, 5, dtype=torch.bool)
    keep[:, 4] = False
    masks = kc.Data(mask=lambda *_: keep, positions=lambda *_: keep)
    labels = torch.randint(4, (3, 5))
    padded = x.masked_fill(~keep[..., None], float("nan"))
    found = kc.estimate(module, [padded], kc.Categorical(dim=-1), options=kc.Options(draws=[[labels]], data=masks))
    expected = kc.estimate(module, [x[:, :4]], kc.Categorical(dim=-1), options=kc.Options(draws=[[labels[:, :4]]]))
    assert_same(found.to_dense(), expected.to_dense())


@pytest.mark.parametrize("rule", ["exact", "factored"])
def test_a_step_solves_for_each_unit_by_itself(rule):
    module = scattered(nn.LayerNorm(4))
    inputs = torch.randn(6, 4)
    kfac = kc.KFAC(module, "categorical", damping=kc.Damping(0.1, rule=rule), schedule=EVERY_STEP)
    outputs = module(inputs)
    kfac.update(outputs)
    outputs.square().sum().backward()
    plain = torch.stack([module.weight.grad, module.bias.grad], -1)
    kfac.precondition()
    (block,) = kfac.fisher().values()
    for unit in range(4):
        A, G = block.A[unit], block.G[unit]
        pi = (A.trace() / 2 / G.squeeze()).sqrt()
        root, eye = 0.1**0.5, torch.eye(2)
        damped = G * A + 0.1 * eye if rule == "exact" else (G + root / pi) * (A + pi * root * eye)
        found = torch.stack([module.weight.grad[unit], module.bias.grad[unit]])
        assert_same(found, torch.linalg.solve(damped, plain[unit]))


@pytest.mark.parametrize(
    ("make", "examples"),
    [
        (lambda: nn.BatchNorm2d(3), 1),
        (lambda: nn.BatchNorm2d(3).eval(), 5),
        (lambda: nn.BatchNorm2d(3, track_running_stats=False).eval(), 1),
    ],
    ids=["train, one example", "eval", "no running, one example"],
)
def test_unit_by_unit_batch_norm_is_exact_where_it_couples_no_examples(make, examples):
    """ORACLES 6 with several positions, which are summed before anything is squared."""
    module = scattered(make())
    model = nn.Sequential(module, nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    inputs, labels = torch.randn(examples, 3, 2, 2), [torch.randint(3, (examples,)) for _ in range(2)]
    settings = {"structure": "unit_wise", "options": kc.Options(draws=[labels])}
    block = kc.estimate(model, [inputs], "categorical", **settings)["0"]
    expected = fisher_of_draws(
        model, inputs, labels, categorical_log_prob, parameters=parameters_of(module), divisor=examples
    )
    assert_same(block.to_dense(), expected[order(block.layout)][:, order(block.layout)] * unit_mask(block.layout))


@pytest.mark.parametrize(
    ("first", "norms", "own"),
    [(nn.LayerNorm, 0, True), (nn.BatchNorm1d, 0, True), (nn.LayerNorm, 1, False), (nn.BatchNorm1d, 1, False)],
)
def test_batch_norm_in_training_couples_examples(first, norms, own):
    """What comes back to an example at a layer before a batch norm is not of its own loss alone; after it, it is."""
    hidden = [layer for _ in range(norms) for layer in (nn.BatchNorm1d(4), nn.Tanh())]
    model = nn.Sequential(scattered(first(4)), nn.Tanh(), *hidden, nn.Linear(4, 3))
    inputs, labels = torch.randn(5, 4), torch.randint(3, (5,))
    settings = {"structure": "unit_wise", "options": kc.Options(draws=[[labels]])}
    block = kc.estimate(model, [inputs], "categorical", **settings)["0"]
    losses = nn.functional.cross_entropy(model(inputs), labels, reduction="none")
    gradients = [torch.autograd.grad(loss, parameters_of(model[0]), retain_graph=True) for loss in losses]
    rows = torch.stack([torch.cat(of_one) for of_one in gradients])[:, order(block.layout)]
    expected = rows.T @ rows / 5 * unit_mask(block.layout)
    if own:
        assert_same(block.to_dense(), expected)
    else:
        assert (block.to_dense() - expected).abs().max() > 0.01 * expected.abs().max()
