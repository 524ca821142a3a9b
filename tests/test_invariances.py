"""ORACLES 16 and 17: what must not change the factors, and what capturing must not change."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .helpers import EVERY_STEP, Apply, assert_same_fisher, classifier, stepped, updated
from .reference import assert_same
from .test_capture import hooks_of

SHARINGS = ["expand", "reduce"]


def mixer(sharing: str) -> nn.Module:
    """(N, T, 3) to (N, 3) for 'reduce', to (N, T, 3) for 'expand'."""
    body = classifier()
    return nn.Sequential(body, Apply(lambda h: h.mean(1))) if sharing == "reduce" else nn.Sequential(body)


def labels_for(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        outputs = model(inputs)
    return torch.randint(outputs.shape[-1], outputs.shape[:-1])


# -- ORACLES 16: splits, scales, orders -------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("split", [[2, 5], [5, 2], [1] * 7, [3, 3, 1]])
@pytest.mark.parametrize("injected", [True, False])
def test_micro_batches_are_one_batch(injected, split, sharing, reduction):
    """Also with the library's own draws, on CPU."""
    model, inputs = mixer(sharing), torch.randn(7, 2, 3)
    drawn = labels_for(model, inputs)
    rules, likelihood = {"*": {"sharing": sharing}}, kc.Categorical(reduction=reduction)

    def batches(sizes: list[int]) -> list[tuple[Tensor, Tensor | None]]:
        parts = zip(inputs.split(sizes), drawn.split(sizes), strict=True)
        return [(x, y if injected else None) for x, y in parts]

    whole = updated(model, likelihood, *batches([7]), rules=rules)
    assert_same_fisher(updated(model, likelihood, *batches(split), rules=rules), whole)


@pytest.mark.parametrize("split", [[2, 5], [1] * 7])
def test_micro_batches_heard_through_the_criterion_are_one_batch(split):
    model, criterion, inputs, labels = classifier(), nn.CrossEntropyLoss(), torch.randn(7, 3), torch.randint(3, (7,))

    def run(sizes: list[int]) -> Callable[[kc.KFAC], None]:
        def forwards(kfac: kc.KFAC) -> None:
            for x, y in zip(inputs.split(sizes), labels.split(sizes), strict=True):
                (criterion(model(x), y) / len(sizes)).backward()

        return forwards

    assert_same_fisher(stepped(model, criterion, run(split)), stepped(model, criterion, run([7])))


def test_two_forwards_before_one_loss_are_one_batch():
    model, criterion, inputs, labels = classifier(), nn.CrossEntropyLoss(), torch.randn(7, 3), torch.randint(3, (7,))

    def run(kfac: kc.KFAC) -> None:
        criterion(torch.cat([model(inputs[:2]), model(inputs[2:])]), labels).backward()

    expected = kc.estimate(model, [inputs], "categorical", options=kc.Options(seed=0))
    assert_same_fisher(stepped(model, criterion, run), expected)


@pytest.mark.parametrize("scale", [1000.0, 2.0**16, 1e-3])
def test_the_scale_of_the_loss_does_not_matter(scale):
    model, criterion, inputs, labels = classifier(), nn.CrossEntropyLoss(), torch.randn(7, 3), torch.randint(3, (7,))
    plain = stepped(model, criterion, lambda kfac: criterion(model(inputs), labels).backward())
    scaled = stepped(model, criterion, lambda kfac: (criterion(model(inputs), labels) * scale).backward())
    assert_same_fisher(scaled, plain)


@pytest.mark.parametrize("loss", ["sum", "mean"])
def test_one_likelihood_under_a_sum_and_a_mean_loss(loss):
    model, inputs, labels = classifier(), torch.randn(7, 3), torch.randint(3, (7,))

    def run(kfac: kc.KFAC) -> None:
        nn.functional.cross_entropy(model(inputs), labels, reduction=loss).backward()

    expected = kc.estimate(model, [inputs], "categorical", options=kc.Options(seed=0))
    assert_same_fisher(stepped(model, "categorical", run), expected)


def test_a_sum_likelihood_is_M_times_the_mean_one_in_G_alone():
    model, inputs = classifier(), torch.randn(7, 3)
    options = kc.Options(seed=0)
    mean, total = (
        kc.estimate(model, [inputs], kc.Categorical(reduction=reduction), options=options)
        for reduction in ("mean", "sum")
    )
    assert_same(total["0"].G, 7 * mean["0"].G)
    assert_same(total["0"].A, mean["0"].A)


def test_factors_do_not_depend_on_the_data_labels():
    model, criterion, inputs = classifier(), nn.CrossEntropyLoss(label_smoothing=0.1), torch.randn(7, 3)
    found = [
        stepped(model, criterion, lambda kfac, y=y: criterion(model(inputs), torch.full((7,), y)).backward())
        for y in (0, 2)
    ]
    assert torch.equal(found[0]["0"].G, found[1]["0"].G)
    assert torch.equal(found[0]["0"].A, found[1]["0"].A)


def test_flattened_outputs_have_the_factors_of_sequences():
    """(B T, C) and (B, T, C): the layers see (B, T, d) both times."""
    body, inputs, drawn = classifier(), torch.randn(4, 2, 3), torch.randint(3, (4, 2))
    flat = nn.Sequential(body, nn.Flatten(0, 1))
    found = kc.estimate(flat, [inputs], "categorical", options=kc.Options(draws=[[drawn.flatten()]]))
    expected = kc.estimate(nn.Sequential(body), [inputs], "categorical", options=kc.Options(draws=[[drawn]]))
    assert_same_fisher(found, expected)


def test_flattened_layers_have_the_factors_of_sequences():
    """A view to (B T, d) before the first layer: 'expand' counts the same positions."""
    body, inputs, drawn = classifier(), torch.randn(4, 2, 3), torch.randint(3, (4, 2))
    flat = nn.Sequential(body, nn.Identity())
    found = kc.estimate(flat, [inputs.flatten(0, 1)], "categorical", options=kc.Options(draws=[[drawn.flatten()]]))
    expected = kc.estimate(nn.Sequential(body), [inputs], "categorical", options=kc.Options(draws=[[drawn]]))
    assert_same_fisher(found, expected)


def test_the_order_of_parameters_does_not_matter():
    class Other(nn.Module):
        def __init__(self, body: nn.Sequential) -> None:
            super().__init__()
            self.b, self.a = body[2], body[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    body, inputs, options = classifier(), torch.randn(4, 3), kc.Options(seed=1)
    found = kc.estimate(Other(body), [inputs], "categorical", options=options)
    expected = kc.estimate(body, [inputs], "categorical", options=options)
    assert list(found) == ["b", "a"]
    assert_same(found["a"].to_dense(), expected["0"].to_dense())
    assert_same(found["b"].to_dense(), expected["2"].to_dense())


def test_splitting_the_bias_off_gives_the_sub_blocks():
    layer, options, inputs = nn.Linear(3, 3), kc.Options(seed=1), torch.randn(4, 3)
    both = kc.estimate(layer, [inputs], "categorical", options=options)[""]
    layer.bias.requires_grad_(False)
    weight = kc.estimate(layer, [inputs], "categorical", options=options)[""]
    layer.requires_grad_(False).bias.requires_grad_(True)
    bias = kc.estimate(layer, [inputs], "categorical", options=options)[""]
    assert_same(weight.A, both.A[:-1, :-1])
    assert_same(bias.A, both.A[-1:, -1:])
    assert torch.equal(weight.G, both.G)
    assert torch.equal(bias.G, both.G)


# -- padding ----------------------------------------------------------------------------------------------------------

LENGTHS = [4, 1, 3]


def padded(ragged: list[Tensor], filler: float) -> tuple[Tensor, Tensor]:
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    whole = torch.full((len(LENGTHS), max(LENGTHS), *ragged[0].shape[1:]), filler, dtype=ragged[0].dtype)
    whole[mask] = torch.cat(ragged)
    return whole, mask


def masking(mask: Tensor) -> kc.Data:
    return kc.Data(mask=lambda args, kwargs, outputs: mask, positions=lambda args, kwargs, outputs: mask)


@pytest.mark.parametrize("filler", [0.0, 7.0, float("nan")])
def test_padded_is_ragged_for_terms_per_position(filler):
    model = classifier()
    inputs = [torch.randn(length, 3) for length in LENGTHS]
    drawn = [torch.randint(3, (length,)) for length in LENGTHS]
    (x, mask), (y, _) = padded(inputs, filler), padded(drawn, 0)
    found = kc.estimate(model, [x], "categorical", options=kc.Options(draws=[[y]], data=masking(mask)))
    ragged = [one[None] for one in inputs]
    expected = kc.estimate(model, ragged, "categorical", options=kc.Options(draws=[[one[None]] for one in drawn]))
    assert_same_fisher(found, expected)


class MaskedMean(nn.Module):
    """A body on (N, T, 3), averaged over real positions."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        weight = attention_mask[..., None].to(x.dtype)
        return (self.body(x) * weight).sum(1) / weight.sum(1)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_padded_is_ragged_for_pooled_outputs_with_an_attention_mask(sharing):
    model, rules = MaskedMean(classifier()), {"*": {"sharing": sharing}}
    inputs, drawn = [torch.randn(length, 3) for length in LENGTHS], torch.randint(3, (3,))
    x, mask = padded(inputs, 7.0)
    options = kc.Options(draws=[[drawn]])
    found = kc.estimate(model, [{"x": x, "attention_mask": mask.long()}], "categorical", rules=rules, options=options)
    ragged = [{"x": one[None], "attention_mask": torch.ones(1, len(one))} for one in inputs]
    options = kc.Options(draws=[[one] for one in drawn.split(1)])
    assert_same_fisher(found, kc.estimate(model, ragged, "categorical", rules=rules, options=options))


@pytest.mark.parametrize("form", ["flattened", "transposed"])
def test_padding_is_left_out_of_layers_on_other_forms_of_the_positions(form):
    body, inputs = classifier(), [torch.randn(length, 3) for length in LENGTHS]
    x, mask = padded(inputs, 7.0)
    y = torch.randint(3, mask.shape)
    before, after = {
        "flattened": (nn.Flatten(0, 1), nn.Unflatten(0, mask.shape)),
        "transposed": (Apply(lambda h: h.transpose(0, 1)), Apply(lambda h: h.transpose(0, 1))),
    }[form]
    model = nn.Sequential(before, body, after)
    options = kc.Options(draws=[[y]], data=masking(mask))
    found = kc.estimate(model, [x], "categorical", options=options)
    expected = kc.estimate(nn.Sequential(nn.Identity(), body), [x], "categorical", options=options)
    assert_same_fisher(found, expected)


def test_an_unmasked_position_without_a_term_stays_in_A():
    """A prompt: no label there, but gradient flows through it."""
    model, x, mask = classifier(), torch.randn(2, 3, 3), torch.tensor([[False, True, True], [False, False, True]])
    y = torch.randint(3, (2, 3))
    data = kc.Data(mask=lambda args, kwargs, outputs: mask)
    found = kc.estimate(model, [x], "categorical", options=kc.Options(draws=[[y]], data=data))
    whole = kc.estimate(model, [x], "categorical", options=kc.Options(draws=[[y]]))
    assert_same(found["0"].A, whole["0"].A)
    assert found.meta["counts"]["terms"] == 3


# -- ORACLES 17: bitwise ----------------------------------------------------------------------------------------------


class Busy(nn.Module):
    """Dropout, batch norm, a buffer that each forward replaces, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.4))
        self.head = nn.Linear(6, 3)
        self.head.bias.requires_grad_(False)
        self.body[3].eval()
        self.body[3].train()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.head(self.body(x))


def snapshot(model: nn.Module, *others: nn.Module) -> dict[str, Any]:
    """All that must be the same to the last bit."""
    return {
        "state": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "grad": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "flags": [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in model.modules()],
        "hooks": hooks_of(model, *others),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),
        "python": random.getstate(),
    }


def assert_bitwise(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_bitwise(found[key], value)
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


@pytest.fixture
def busy() -> Busy:
    model = Busy()
    nn.functional.cross_entropy(model(torch.randn(5, 3)), torch.randint(3, (5,))).backward()
    return model


@pytest.mark.parametrize("kind", ["sampled", "exact"])
@pytest.mark.parametrize("mode", [True, False])
def test_estimate_changes_nothing(mode, kind, busy):
    busy.train(mode)
    data, calls = [torch.randn(5, 3), torch.randn(2, 3)], busy.calls
    before = snapshot(busy)
    kc.estimate(busy, data, "categorical", kind=kind)
    assert_bitwise(snapshot(busy), before)
    assert busy.calls is calls


def broken(model: nn.Module) -> list[Any]:
    return [torch.randn(5, 3), torch.randn(5, 99)]


def nothing_finite(model: nn.Module) -> list[Any]:
    return [torch.randn(5, 3), torch.full((5, 3), float("nan"))]


def interrupted(model: nn.Module) -> Any:
    yield torch.randn(5, 3)
    raise KeyboardInterrupt


@pytest.mark.parametrize("data", [broken, nothing_finite, interrupted])
def test_estimate_changes_nothing_when_it_fails(data, busy):
    batches = data(busy)
    batches = batches if data is interrupted else list(batches)
    before = snapshot(busy)
    with pytest.raises((RuntimeError, kc.KFACError, KeyboardInterrupt)):
        kc.estimate(busy, batches, "categorical")
    assert_bitwise(snapshot(busy), before)


def test_estimate_leaves_the_order_of_a_shuffling_loader_to_the_training():
    model = classifier()
    loader = torch.utils.data.DataLoader(torch.randn(8, 3), batch_size=2, shuffle=True)
    before = torch.get_rng_state()
    kc.estimate(model, loader, "categorical")
    assert torch.equal(torch.get_rng_state(), before)


def train(*, wrap: bool, schedule: kc.Schedule, fail: bool = False, steps: int = 3) -> tuple[dict[str, Any], dict]:
    """Gradients before each step, and the whole state after the last: of SGD at learning rate 0.1."""
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)
    model, criterion = Busy(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    kfac = kc.KFAC(model, criterion, schedule=schedule) if wrap else None
    if kfac is not None:
        kfac.attach(optimizer)
    gradients = {}
    for step in range(steps):
        optimizer.zero_grad()
        if fail:
            with pytest.raises(RuntimeError, match="shapes"):
                model(torch.randn(5, 4))
        criterion(model(torch.randn(5, 3)), torch.randint(3, (5,))).backward()
        gradients[str(step)] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        if schedule.factors is None or not wrap:
            optimizer.step()
    if kfac is not None:
        kfac.remove()
    return {"gradients": gradients, **snapshot(model, criterion)}, optimizer.state_dict()["state"]


NEVER = kc.Schedule(factors=None, inverses=None)


def test_attached_but_never_due_is_plain_training_to_the_last_bit():
    found, expected = train(wrap=True, schedule=NEVER), train(wrap=False, schedule=NEVER)
    assert_bitwise(found[0], expected[0])
    assert_bitwise(found[1], expected[1])


@pytest.mark.parametrize("fail", [False, True])
def test_a_due_step_leaves_everything_alone_until_the_optimizer_steps(fail):
    """One forward and backward, with and without capture: gradients, buffers, random states."""
    found, expected = (train(wrap=wrap, schedule=EVERY_STEP, fail=fail, steps=1) for wrap in (True, False))
    keys = ("gradients", "grad", "flags", "hooks", "torch", "numpy", "python")
    assert_bitwise({key: found[0][key] for key in keys}, {key: expected[0][key] for key in keys})
    buffers = ("calls", "body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked")
    assert_bitwise(
        {key: found[0]["state"][key] for key in buffers}, {key: expected[0]["state"][key] for key in buffers}
    )
