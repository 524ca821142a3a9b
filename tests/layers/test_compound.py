"""Attention and recurrent modules run again: their outputs, and what their parts are given and get back."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from kfac_cond.calls import Replays
from kfac_cond.layers import CompoundKind, kind_of

from ..reference import assert_same

N, L, S, E = 3, 4, 5, 6


def sum_of_outputs(module: nn.Module, output: Any) -> Tensor:
    """A scalar that depends on every entry of what a module returns, each in its own way."""
    kind = kind_of(module)
    assert isinstance(kind, CompoundKind)
    generator = torch.Generator().manual_seed(5)
    total = torch.zeros(())
    for one in kind.outputs(output):
        if one is not None and one.requires_grad:
            total = total + (torch.randn(one.shape, generator=generator, dtype=one.dtype) * one.square()).sum()
    return total


def check(module: nn.Module, *args: Any, tolerance: float = 1e-10, **kwargs: Any) -> None:
    """The replay returns what the module did, and sum_s g a^T of each part is autograd's gradient of its weight."""
    kind = kind_of(module)
    assert isinstance(kind, CompoundKind)
    parts = {part.name: part for part in kind.parts(module)}
    replays = Replays()
    replays.before(module)
    output = module(*args, **kwargs)
    state = torch.get_rng_state()
    call, replay = replays.after(module, parts, args, kwargs, output)
    assert torch.equal(torch.get_rng_state(), state)
    for mine, theirs in zip(replay.outputs, kind.outputs(output), strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            assert_same(mine, theirs, tolerance=tolerance)
    loss = sum_of_outputs(module, output)
    arrived = call.output_gradients(iter(torch.autograd.grad(loss, call.edges, retain_graph=True)))
    for name, part in parts.items():
        a, keep = replay.inputs(name, None)
        g = arrived[name]
        if keep is not None:
            assert not g.masked_select(~keep).any()
            a = a.masked_fill(~keep, 0)
        weight = module.get_parameter(part.weight)
        (expected,) = torch.autograd.grad(loss, weight, retain_graph=True)
        assert_same((g.mT @ a).sum(-3).reshape(weight.shape), expected, tolerance=tolerance)
        if part.bias is not None and kind_bias(module, part.bias) is not None:
            (expected,) = torch.autograd.grad(loss, kind_bias(module, part.bias), retain_graph=True)
            assert_same(g.sum((-3, -2)).flatten(), expected, tolerance=tolerance)


def kind_bias(module: nn.Module, name: str) -> Tensor | None:
    path, _, last = name.rpartition(".")
    return getattr(module.get_submodule(path), last, None)


def attention(**arguments: Any) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(E, 2, **arguments)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.7)
    return module


def given(module: nn.MultiheadAttention, *, same: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as the module takes them."""
    if same:
        x = torch.randn(N, L, E)
        triple = (x, x, x)
    else:
        triple = (torch.randn(N, L, E), torch.randn(N, S, module.kdim), torch.randn(N, S, module.vdim))
    return triple if module.batch_first else tuple(x.transpose(0, 1) for x in triple)


HIDDEN = (torch.arange(L)[:, None] + torch.arange(S)) % 3 == 1
KEYS = torch.tensor([[False] * 5, [False, False, True, True, False], [True] + [False] * 4])
FORMS = {
    "packed": {},
    "unbiased": {"bias": False},
    "separate": {"kdim": 3, "vdim": 5},
    "separate-unbiased": {"kdim": 3, "bias": False},
    "added": {"add_bias_kv": True, "add_zero_attn": True},
    "separate-added": {"kdim": 3, "vdim": 5, "add_bias_kv": True},
}
MASKS = {
    "none": {},
    "keys": {"key_padding_mask": KEYS},
    "float-keys": {"key_padding_mask": torch.zeros(3, 5, dtype=torch.float64).masked_fill(KEYS, -3.0)},
    "mask": {"attn_mask": HIDDEN},
    "float-mask": {"attn_mask": torch.randn(L, S, dtype=torch.float64)},
    "both": {
        "attn_mask": torch.randn(N * 2, L, S, dtype=torch.float64),
        "key_padding_mask": torch.randn(3, 5, dtype=torch.float64),
    },
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("weights", ["none", "average", "each"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_attention(form, mask, weights, batch_first):
    module = attention(batch_first=batch_first, **FORMS[form])
    asked = {"need_weights": weights != "none", "average_attn_weights": weights != "each"}
    check(module, *given(module), **MASKS[mask], **asked)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_causal_self_attention(padded, need_weights):
    module = attention(batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    keys = {"key_padding_mask": KEYS[:, 1:] & False} if padded else {}
    check(module, *given(module, same=True), attn_mask=mask, is_causal=True, need_weights=need_weights, **keys)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_unbatched_attention(form, weights):
    module = attention(**FORMS[form])
    arguments = {"key_padding_mask": KEYS[1], "attn_mask": HIDDEN.expand(2, L, S), "need_weights": weights}
    check(module, torch.randn(L, E), torch.randn(S, module.kdim), torch.randn(S, module.vdim), **arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_dropped_attention(form, need_weights, dtype):
    module = attention(dropout=0.4, **FORMS[form]).to(dtype)
    inputs = [x.to(dtype) for x in given(module)]
    check(module, *inputs, need_weights=need_weights, tolerance=1e-10 if dtype == torch.float64 else 1e-4)


RECURRENT = [
    *((nn.RNN, {"nonlinearity": name}) for name in ("tanh", "relu")),
    *((kind, {}) for kind in (nn.LSTM, nn.GRU)),
    (nn.LSTM, {"proj_size": 2}),
]


def states(module: nn.RNNBase, batch: int | None) -> Any:
    """An initial state of the module."""
    count = module.num_layers * (1 + module.bidirectional)
    size = (count,) if batch is None else (count, batch)
    h = torch.randn(*size, module.proj_size or module.hidden_size)
    return (h, torch.randn(*size, module.hidden_size)) if isinstance(module, nn.LSTM) else h


def sequences(form: str) -> Tensor | PackedSequence:
    if form == "ragged":
        return pack_sequence([torch.randn(n, 3) for n in (2, 5, 1, 2)], enforce_sorted=False)
    if form == "sorted":
        return pack_padded_sequence(torch.randn(5, 3, 3), torch.tensor([5, 2, 2]))
    return torch.randn(5, 3) if form == "unbatched" else torch.randn(5, 4, 3)


BATCH = {"padded": 4, "ragged": 4, "sorted": 3, "unbatched": None}


@pytest.mark.parametrize("form", BATCH)
@pytest.mark.parametrize(
    ("layers", "bidirectional", "bias", "start"), [*product((1, 2), (True, False), (True, False), (True, False))]
)
@pytest.mark.parametrize(("kind", "more"), RECURRENT)
def test_recurrent(kind, more, layers, bidirectional, bias, start, form):
    module = kind(3, 4, layers, bidirectional=bidirectional, bias=bias, **more)
    check(module, sequences(form), *([states(module, BATCH[form])] if start else []))


@pytest.mark.parametrize(("kind", "more"), RECURRENT)
def test_batch_first_recurrent(kind, more):
    module = kind(3, 4, 2, batch_first=True, bidirectional=True, **more)
    check(module, torch.randn(4, 5, 3), states(module, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", BATCH)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("kind", "more"), RECURRENT)
def test_dropped_recurrent(kind, more, batch_first, form, dtype):
    module = kind(3, 4, 3, bidirectional=True, dropout=0.4, batch_first=batch_first, dtype=dtype, **more)
    inputs = sequences(form).to(dtype)
    check(module, inputs, tolerance=1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("batch", [(), (4,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_cells(kind, bias, batch, start):
    module = kind(3, 4, bias=bias)
    h = torch.randn(*batch, 4)
    state = (h, torch.randn(*batch, 4)) if kind is nn.LSTMCell else h
    check(module, torch.randn(*batch, 3), *([state] if start else []))
