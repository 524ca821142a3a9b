from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.inspection import divergence, steps
from kfac_cond.inspection.proposals import Proposal, mean_gradient, propose

from ..helpers import Apply, classifier
from ..likelihood_cases import CLOSED, Mixing, case
from ..reference import assert_same

DOUBLE = kc.Options(dtype=torch.float64)


def exact(model: nn.Module, data: list, likelihood: object, structure: str = "block") -> kc.Fisher:
    return kc.estimate(model, data, likelihood, structure=structure, kind="exact", options=DOUBLE)


def quadratic(
    dense: Tensor, model: nn.Module, fisher: kc.Fisher, update: dict[str, Tensor], layer: str | None
) -> float:
    """1/2 delta^T F delta from the dense Fisher, of one layer's part of an update or of all of it."""
    names = [n for n, _ in model.named_parameters()]
    moved = fisher.parameter_names if layer is None else fisher[layer].layout.names
    shapes = dict(model.named_parameters())
    flat = torch.cat([(update[n] if n in moved else torch.zeros_like(shapes[n])).flatten() for n in names])
    return float(flat @ dense @ flat / 2)


@pytest.fixture
def net() -> nn.Sequential:
    return classifier(hidden=4, classes=3, features=3)


@pytest.fixture
def data() -> list[tuple[Tensor, Tensor]]:
    x, y = torch.randn(12, 3), torch.randint(3, (12,))
    return [(x[:7], y[:7]), (x[7:], y[7:])]


def test_what_is_predicted_is_half_the_trace_of_g_d_a_d(net: nn.Module, data: list) -> None:
    fisher = exact(net, data, "categorical", "kfac")
    proposal = propose(net, data, "categorical", fisher, options=DOUBLE)
    whole, layers = divergence.measure(net, data, "categorical", fisher, proposal=proposal)
    for name, found in layers.items():
        D = fisher[name].layout.to_matrix(proposal.update)
        assert found.predicted == pytest.approx(float(torch.trace(fisher[name].G @ D @ fisher[name].A @ D.T)) / 2)
        g = fisher[name].layout.to_matrix(proposal.gradient)
        assert found.decrease == pytest.approx(-float((g * D).sum()) - found.predicted)
    assert whole.predicted == pytest.approx(sum(one.predicted for one in layers.values()))
    assert whole.decrease == pytest.approx(sum(one.decrease for one in layers.values()))
    assert sum(one.share for one in layers.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("head", CLOSED)
def test_what_is_measured_is_the_quadratic_form_of_the_exact_fisher(head: str) -> None:
    of = case("perceptron", head)
    fisher = of.estimate("kfac", "exact", dtype=torch.float64)
    update = {name: torch.randn(shape) for name, shape in fisher._shapes.items()}
    whole, layers = divergence.measure(
        of.model, of.batches(), of.likelihood, fisher, proposal=Proposal(update), options=DOUBLE
    )
    for name, found in [(None, whole), *layers.items()]:
        expected = quadratic(of.dense("exact"), of.model, fisher, update, name)
        assert found.measured == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("likelihood", [kc.Categorical(), kc.Categorical(reduction="sum")])
def test_terms_of_an_example_and_a_sum_over_terms(likelihood: kc.Likelihood) -> None:
    model, x = Mixing(3), torch.randn(5, 4, 2)
    fisher = exact(model, [x], likelihood)
    whole, layers = divergence.measure(model, [x], likelihood, fisher, options=DOUBLE)
    for found in layers.values():
        assert found.ratio == pytest.approx(1.0, rel=5e-3)
        assert found.scale == pytest.approx(1.0, rel=0.1)
    assert whole.labels == "model"


def test_weights_of_classes_and_ignored_labels_count_as_in_the_fisher(net: nn.Module, data: list) -> None:
    likelihood = kc.Categorical(weight=torch.tensor([0.2, 1.0, 3.0]), ignore_index=2)
    fisher = exact(net, data, likelihood)
    _, layers = divergence.measure(net, data, likelihood, fisher, options=DOUBLE)
    for found in layers.values():
        assert found.ratio == pytest.approx(1.0, rel=5e-3)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.kind, self.size = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.body(x))
        return {"kind": self.kind(h), "size": self.size(h)}


def test_several_heads_with_weights() -> None:
    model, x = TwoHeads(), torch.randn(9, 3)
    likelihood = kc.Product(
        {"kind": kc.Categorical(), "size": kc.Gaussian(reduction="sum")}, weights={"kind": 0.3, "size": 2.0}
    )
    fisher = exact(model, [x[:4], x[4:]], likelihood)
    _, layers = divergence.measure(model, [x[:4], x[4:]], likelihood, fisher, options=DOUBLE)
    for found in layers.values():
        assert found.ratio == pytest.approx(1.0, rel=5e-3)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_wrong_factor_is_caught(net: nn.Module, data: list, factor: float) -> None:
    """Planted; and whatever the structure is, along directions that it has not chosen."""
    blocks = exact(net, data, "categorical") * factor
    whole, layers = divergence.measure(net, data, "categorical", blocks, options=DOUBLE)
    for found in layers.values():
        assert found.ratio == pytest.approx(1 / factor, rel=5e-3)
        assert found.scale == pytest.approx(1 / factor, rel=3e-2)
    assert whole.scale == pytest.approx(1 / factor, rel=3e-2)
    kronecker = exact(net, data, "categorical", "kfac") * factor
    whole, _ = divergence.measure(net, data, "categorical", kronecker, options=DOUBLE)
    assert 0.8 < whole.scale * factor < 1.25


def test_the_error_of_a_length_is_proportional_to_it(
    net: nn.Module, data: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    fisher = exact(net, data, "categorical")
    remainders, errors = [], []
    for size in (1e-8, 1e-6):
        monkeypatch.setattr(steps, "SIZE", size)
        _, layers = divergence.measure(net, data, "categorical", fisher, options=DOUBLE)
        remainders.append(layers["0"].remainder)
        errors.append(abs(layers["0"].ratio - 1))
    # Ten times as far: ten times the remainder, a hundred times what is left when it is taken off.
    assert remainders[1] / remainders[0] == pytest.approx(10, rel=0.2)
    assert errors[1] / errors[0] == pytest.approx(100, rel=0.4)


def test_a_step_that_goes_farther_than_predicted_is_made_again_shorter(net: nn.Module, data: list) -> None:
    fisher = exact(net, data, "categorical") * 1e-5
    whole, layers = divergence.measure(net, data, "categorical", fisher, held_out=data, options=DOUBLE)
    for found in layers.values():
        assert found.ratio == pytest.approx(1e5, rel=5e-3)
        assert found.held_out == pytest.approx(found.measured)
        assert found.scale == pytest.approx(1e5, rel=5e-2)
        assert found.remainder < 0.1
    assert whole.remainder < 0.1


def test_held_out_data_have_a_divergence_of_their_own(net: nn.Module, data: list) -> None:
    other = [torch.randn(6, 3) * 2]
    fisher, there = exact(net, data, "categorical"), exact(net, other, "categorical")
    proposal = propose(net, data, "categorical", fisher, options=DOUBLE)
    settings = {"proposal": proposal, "held_out": other, "options": DOUBLE}
    _, layers = divergence.measure(net, data, "categorical", fisher, **settings)
    for name, found in layers.items():
        part = {one: proposal.update[one] for one in there[name].layout.names}
        assert found.held_out == pytest.approx(float(there[name].kl(part)), rel=5e-3)


def test_the_gradient_is_that_of_the_loss_at_the_labels_of_the_data(net: nn.Module, data: list) -> None:
    fisher = exact(net, data, "categorical")
    found, labels = mean_gradient(net, data, kc.Categorical(), fisher)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    loss = nn.functional.cross_entropy(net(x), y)
    for (name, _), g in zip(net.named_parameters(), torch.autograd.grad(loss, net.parameters()), strict=True):
        assert_same(found[name], g)
    assert labels == "data"


def test_a_gradient_at_weighted_labels(net: nn.Module, data: list) -> None:
    weight = torch.tensor([0.2, 1.0, 3.0])
    fisher = exact(net, data, kc.Categorical(weight=weight))
    found, _ = mean_gradient(net, data, kc.Categorical(weight=weight), fisher)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    loss = nn.functional.cross_entropy(net(x), y, weight)
    for (name, _), g in zip(net.named_parameters(), torch.autograd.grad(loss, net.parameters()), strict=True):
        assert_same(found[name], g)


def test_labels_that_mean_nothing_to_the_likelihood_are_drawn(data: list) -> None:
    model = nn.Linear(3, 3)
    fisher = exact(model, data, kc.Gaussian())
    whole, layers = divergence.measure(model, data, kc.Gaussian(), fisher, options=DOUBLE)
    assert whole.labels == "model"
    assert layers[""].ratio == pytest.approx(1.0)
    assert layers[""].remainder == pytest.approx(0.0, abs=1e-6)


class Failing(nn.Module):
    """Raises at the n-th call."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.calls, self.linear = at, 0, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise RuntimeError("in the middle")
        return self.linear(x)


def state_of(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in (*model.parameters(), *model.buffers(), torch.get_rng_state())]


def test_parameters_are_put_back_to_the_last_bit_after_an_exception() -> None:
    model, x = Failing(0), torch.randn(5, 3)
    fisher = exact(model, [x], "categorical")
    proposal = propose(model, [x], "categorical", fisher)
    calls, before = model.calls, state_of(model)
    divergence.measure(model, [x], "categorical", fisher, proposal=proposal)
    for at in range(1, model.calls - calls + 1):
        model.at = model.calls + at
        with pytest.raises(RuntimeError, match="in the middle"):
            divergence.measure(model, [x], "categorical", fisher, proposal=proposal)
        assert all(map(torch.equal, state_of(model), before))


def test_nothing_of_a_model_in_training_changes() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    x, y = torch.randn(20, 3), torch.randint(3, (20,))
    nn.functional.cross_entropy(model(x), y).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    fisher = kc.estimate(model, [(x, y)], "categorical", samples=4)
    before, hooks = state_of(model), sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    whole, _ = divergence.measure(model, [(x, y)], "categorical", fisher)
    assert all(map(torch.equal, state_of(model), before))
    assert all(map(torch.equal, (p.grad for p in model.parameters()), gradients))
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    # The same masks before and after a step: others would measure their own divergence.
    assert whole.remainder < 0.2


def test_a_layer_that_nothing_moves_has_no_measurement(net: nn.Module, data: list) -> None:
    fisher = exact(net, data, "categorical")
    proposal = propose(net, data, "categorical", fisher)
    still = {name: step * (not name.startswith("0")) for name, step in proposal.update.items()}
    _, layers = divergence.measure(net, data, "categorical", fisher, proposal=replace(proposal, update=still))
    assert (layers["0"].predicted, layers["0"].share, layers["0"].measured, layers["0"].ratio) == (0.0, 0.0, None, None)
    assert layers["2"].share == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_few_bits(dtype: torch.dtype) -> None:
    """Predicted as far as they do move."""
    model = classifier(hidden=16, classes=4, features=6).to(dtype)
    x = torch.randn(256, 6).to(dtype)
    fisher = kc.estimate(model, [x], "categorical", structure="block", kind="exact")
    _, layers = divergence.measure(model, [x], "categorical", fisher)
    for found in layers.values():
        assert found.ratio == pytest.approx(1.0, rel=0.02 if dtype == torch.float32 else 0.3)


def test_outputs_of_few_bits() -> None:
    """As under autocast, of weights in float32."""
    model = nn.Sequential(classifier(hidden=16, classes=4, features=6), Apply(lambda f: f.bfloat16())).float()
    x = torch.randn(256, 6).float()
    fisher = kc.estimate(model, [x], "categorical", structure="block", kind="exact")
    _, layers = divergence.measure(model, [x], "categorical", fisher)
    for found in layers.values():
        assert found.ratio == pytest.approx(1.0, rel=0.3)


def test_layers_in_part_and_a_fisher_of_all_at_once(net: nn.Module, data: list) -> None:
    part = kc.estimate(net, data, "categorical", structure="block", kind="exact", options=kc.Options(layers="2"))
    _, layers = divergence.measure(net, data, "categorical", part)
    assert list(layers) == ["2"]
    whole, layers = divergence.measure(net, data, "categorical", exact(net, data, "categorical", "dense"))
    assert list(layers) == ["*"]
    assert whole.ratio == pytest.approx(1.0, rel=5e-3)


def refusals() -> dict[str, Callable[[nn.Module, list, kc.Fisher], object]]:
    return {
        "gone through once": lambda net, data, f: divergence.measure(net, iter(data), "categorical", f),
        "lacks 1 of the Fisher's parameters": lambda net, data, f: divergence.measure(
            net, data, "categorical", f, proposal=Proposal({n: torch.ones(s) for n, s in [*f._shapes.items()][1:]})
        ),
        "does not train": lambda net, data, f: divergence.measure(nn.Linear(3, 3), data, "categorical", f),
        "has no kl_terms": lambda net, data, f: divergence.measure(
            net, data, WithoutKL(), f, proposal=Proposal({n: torch.ones(s) for n, s in f._shapes.items()})
        ),
    }


class WithoutKL(kc.Categorical):
    kl_terms = kc.Likelihood.kl_terms


@pytest.mark.parametrize("message", refusals())
def test_what_does_not_fit_is_refused(net: nn.Module, data: list, message: str) -> None:
    fisher = exact(net, data, "categorical")
    with pytest.raises(kc.KFACError, match=message):
        refusals()[message](net, data, fisher)


def test_the_passes_that_are_announced_are_those_it_takes(net: nn.Module, data: list) -> None:
    fisher = exact(net, data, "categorical")
    calls = []
    handle = net.register_forward_hook(lambda *_: calls.append(1))
    proposal = propose(net, data, "categorical", fisher)
    calls.clear()
    divergence.measure(net, data, "categorical", fisher, proposal=proposal, held_out=data)
    handle.remove()
    assert len(calls) / len(data) / 3 == pytest.approx(divergence.passes(2, held_out=True, proposed=True))
