"""The traps of capturing through a user's own graph, each reproduced."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kfac_cond as kc

from .helpers import EVERY_STEP, Apply, assert_factors, categorical_loss, plain_factors, stepped
from .reference import assert_same

IN_PLACE = {
    "relu": (lambda: nn.ReLU(inplace=True), nn.ReLU),
    "hardtanh": (lambda: nn.Hardtanh(inplace=True), nn.Hardtanh),
    "add": (
        lambda: Apply(lambda h: h.add_(torch.tanh(h.detach()))),
        lambda: Apply(lambda h: h + torch.tanh(h.detach())),
    ),
    "mul": (lambda: Apply(lambda h: h.mul_(0.5)), lambda: Apply(lambda h: h * 0.5)),
}


@pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 2, 3)], ids=["2d", "3d", "4d"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", IN_PLACE)
def test_linear_followed_by_an_in_place_operation(activation, bias, shape):
    changed, plain = (make() for make in IN_PLACE[activation])
    layers = nn.Linear(3, 4, bias=bias), nn.Linear(4, 3, bias=bias)
    inputs, drawn = torch.randn(*shape, 3), torch.randint(3, shape)
    model = nn.Sequential(layers[0], changed, layers[1])
    fisher = kc.estimate(model, [inputs], kc.Categorical(), options=kc.Options(draws=[[drawn]]))
    expected = plain_factors(
        nn.Sequential(layers[0], plain, layers[1]),
        inputs,
        lambda outputs: categorical_loss(outputs, drawn),
        divisor=drawn.numel(),
    )
    assert_factors(fisher, expected)


class Residual(nn.Module):
    """h = f(x); h += g(x), in place or not."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.f, self.g, self.head, self.in_place = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 3), in_place

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        if self.in_place:
            h += torch.tanh(self.g(x))
        else:
            h = h + torch.tanh(self.g(x))
        return self.head(h)


@pytest.mark.parametrize("shape", [(5,), (5, 2)])
def test_in_place_residual(shape):
    model, plain = Residual(in_place=True), Residual(in_place=False)
    plain.load_state_dict(model.state_dict())
    inputs, drawn = torch.randn(*shape, 3), torch.randint(3, shape)
    fisher = kc.estimate(model, [inputs], kc.Categorical(), options=kc.Options(draws=[[drawn]]))
    loss = lambda outputs: categorical_loss(outputs, drawn)  # noqa: E731
    assert_factors(fisher, plain_factors(plain, inputs, loss, divisor=drawn.numel()))


@pytest.mark.parametrize("normalised", [False, True])
def test_convolution_followed_by_an_in_place_activation(normalised):
    layer, head = nn.Conv2d(2, 3, 2), Apply(lambda h: h.flatten(2).mean(-1))
    norm = [nn.BatchNorm2d(3).eval()] if normalised else []
    inputs, drawn = torch.randn(4, 2, 3, 3), torch.randint(3, (4,))
    options = kc.Options(draws=[[drawn]])
    found, expected = (
        kc.estimate(
            nn.Sequential(layer, *norm, nn.ReLU(inplace=inplace), head), [inputs], "categorical", options=options
        )
        for inplace in (True, False)
    )
    assert_same(found["0"].G, expected["0"].G)
    outputs = layer(inputs)
    h = nn.Sequential(*norm)(outputs).relu().flatten(2).mean(-1)
    (g,) = torch.autograd.grad(categorical_loss(h, drawn), outputs)
    g = g.movedim(1, -1).reshape(-1, 3)
    assert_same(found["0"].G, g.T @ g / 4)


def test_an_unbatched_input_of_features_alone():
    layer = nn.Linear(3, 2)
    model, inputs = nn.Sequential(layer, nn.ReLU(inplace=True), nn.Unflatten(0, (1, 2))), torch.randn(3)
    fisher = kc.estimate(model, [inputs], kc.Categorical(), options=kc.Options(draws=[[torch.tensor([1])]]))
    a = torch.cat([inputs, torch.ones(1)])
    z = layer(inputs)
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(z.relu()[None], torch.tensor([1])), z)
    assert_same(fisher["0"].to_dense(), torch.kron(torch.outer(g, g), torch.outer(a, a)))


def test_a_layer_called_by_keyword():
    layer = nn.Linear(3, 2)

    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)

    inputs = torch.randn(4, 3)
    found = kc.estimate(Keyword(), [inputs], "gaussian", kind="exact")["layer"]
    assert_same(found.to_dense(), kc.estimate(layer, [inputs], "gaussian", kind="exact")[""].to_dense())


# -- autocast ---------------------------------------------------------------------------------------------------------


class Recording(nn.Module):
    """A classifier that keeps what its second layer was given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.given: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.given = torch.relu(self.first(x))
        return self.second(self.given)


def autocast_factors() -> tuple[kc.KroneckerBlock, Tensor]:
    torch.set_default_dtype(torch.float32)
    model, criterion, inputs = Recording(), nn.CrossEntropyLoss(), torch.randn(16, 6)

    def run(kfac: kc.KFAC) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = criterion(model(inputs), torch.randint(3, (16,)))
        loss.backward()

    return stepped(model, criterion, run)["second"], model.given


def test_autocast_statistics_are_float32_products_of_bfloat16_activations():
    block, given = autocast_factors()
    assert given.dtype == torch.bfloat16
    rows = torch.cat([given.float(), torch.ones(16, 1)], 1).double()
    assert block.A.dtype == block.G.dtype == torch.float32
    assert_same(block.A.double(), rows.T @ rows / 16, tolerance=1e-6)


def test_autocast_does_not_reach_into_the_estimate():
    model, inputs = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), torch.randn(16, 6)
    options = kc.Options(draws=[[torch.randint(3, (16,))]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kc.estimate(model, [inputs], "categorical", options=options)
    a = torch.cat([inputs, torch.ones(16, 1)], 1)
    assert_same(found["0"].A, a.T @ a / 16)


# -- activation checkpointing -----------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, *, how: str) -> None:
        super().__init__()
        self.first, self.norm, self.second, self.head = (
            nn.Linear(3, 4),
            nn.BatchNorm1d(4),
            nn.Linear(4, 4),
            nn.Linear(4, 3),
        )
        self.how = how

    def _middle(self, h: Tensor) -> Tensor:
        return torch.relu_(self.second(torch.dropout(self.norm(h), 0.3, self.training)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.how == "plain":
            h = self._middle(h)
        else:
            h = checkpoint(self._middle, h, use_reentrant=self.how == "reentrant")
        return self.head(h)


def checkpointed_step(how: str, *, wrap: bool = True) -> tuple[nn.Module, kc.Fisher | None]:
    torch.manual_seed(3)
    model, criterion = Checkpointed(how=how), nn.CrossEntropyLoss()
    inputs, labels = torch.randn(6, 3), torch.randint(3, (6,))
    if not wrap:
        criterion(model(inputs), labels).backward()
        return model, None
    return model, stepped(model, criterion, lambda kfac: criterion(model(inputs), labels).backward())


def test_checkpointing_gives_the_factors_of_the_plain_model():
    assert_factors(
        checkpointed_step("nonreentrant")[1],
        {name: (block.A, block.G) for name, block in checkpointed_step("plain")[1].items()},
    )


def test_checkpointing_updates_batch_norm_no_more_often_than_without_kfac():
    (wrapped, _), (plain, _) = checkpointed_step("nonreentrant"), checkpointed_step("nonreentrant", wrap=False)
    assert wrapped.norm.num_batches_tracked == plain.norm.num_batches_tracked
    assert torch.equal(wrapped.norm.running_mean, plain.norm.running_mean)
    assert torch.equal(wrapped.norm.running_var, plain.norm.running_var)


def test_checkpointing_in_the_estimate():
    inputs, options = torch.randn(6, 3), kc.Options(draws=[[torch.randint(3, (6,))]])
    model = Checkpointed(how="nonreentrant").eval()
    plain = copy.deepcopy(model)
    plain.how = "plain"
    found, expected = (kc.estimate(one, [inputs], "categorical", options=options) for one in (model, plain))
    assert_factors(found, {name: (block.A, block.G) for name, block in expected.items()})


class First(nn.Module):
    """Its first layer, or a parameter that a module of no kind holds, inside reentrant checkpointing."""

    def __init__(self, *, inside: nn.Module, needs: bool) -> None:
        super().__init__()
        self.inside, self.head, self.needs = inside, nn.Linear(3, 3), needs

    def forward(self, x: Tensor) -> Tensor:
        if self.needs:
            x = x.clone().requires_grad_()
        return self.head(checkpoint(self.inside, x, use_reentrant=True))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


REENTRANT = {
    "around the path": lambda: Checkpointed(how="reentrant").eval(),
    "first": lambda: First(inside=nn.Linear(3, 3), needs=True),
    "first, without a gradient": lambda: First(inside=nn.Linear(3, 3), needs=False),
    "of a parameter": lambda: First(inside=nn.PReLU(3), needs=True),
    "of an attention": lambda: First(inside=Attention(), needs=True),
}


def kfac_step(model: nn.Module, inputs: Tensor) -> None:
    criterion = nn.CrossEntropyLoss()
    stepped(model, criterion, lambda kfac: criterion(model(inputs), torch.randint(3, (6,))).backward())


ASKED = {
    "kfac": kfac_step,
    "estimate": lambda model, inputs: kc.estimate(model, [inputs], "categorical"),
    "dense": lambda model, inputs: kc.estimate(model, [inputs], "categorical", structure="dense", kind="exact"),
    "implicit": lambda model, inputs: kc.implicit(model, [inputs], "categorical").to_dense(),
    "gram": lambda model, inputs: kc.gram(model, [inputs], "categorical"),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("make", REENTRANT.values(), ids=REENTRANT)
def test_reentrant_checkpointing_is_refused_by_name(make, asked):
    """Its layers would have no gradient, or zero; also where nothing before it has one, so that no graph is there."""
    with pytest.raises(kc.CaptureError, match=r"'(second|norm|inside[\w.]*)' was called inside .*use_reentrant=False"):
        ASKED[asked](make(), torch.randn(6, 3))


def test_an_excluded_layer_may_be_checkpointed_reentrantly():
    model, inputs = First(inside=nn.Linear(3, 3), needs=True), torch.randn(6, 3)
    fisher = kc.estimate(model, [inputs], "categorical", rules={"inside": {"exclude": True}})
    a = torch.cat([model.inside(inputs), torch.ones(6, 1)], 1)
    assert_same(fisher["head"].A, (a.T @ a / 6).detach())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_evaluation_and_paused_forwards_may_be_checkpointed_reentrantly(without):
    model, inputs = First(inside=nn.Linear(3, 3), needs=False), torch.randn(6, 3)
    kfac = kc.KFAC(model, "categorical")
    with without():
        model(inputs)
    with kfac.paused():
        model(inputs).sum().backward()


# -- torch.compile ----------------------------------------------------------------------------------------------------


def compiled_step(*, wrap_first: bool) -> kc.Fisher:
    model, criterion = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    if wrap_first:
        kfac = kc.KFAC(model, criterion, schedule=EVERY_STEP)
        called = torch.compile(model, backend="eager")
    else:
        called = torch.compile(model, backend="eager")
        kfac = kc.KFAC(called, criterion, schedule=EVERY_STEP)
    kfac.attach(optimizer)
    criterion(called(torch.randn(5, 3)), torch.randint(3, (5,))).backward()
    optimizer.step()
    return kfac.fisher()


def test_a_model_compiled_after_wrapping_is_not_silent():
    with pytest.raises(kc.CaptureError, match="compiled"):
        compiled_step(wrap_first=True)


def test_a_model_compiled_before_wrapping_is_captured_under_its_own_names():
    assert list(compiled_step(wrap_first=False)) == ["0", "2"]
