"""Attention and recurrent layers in models: the blocks are those of the same with linear layers; and training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import kfac_cond as kc

from .helpers import Apply
from .reference import assert_same
from .training import EVERY_STEP

E = 4


class Attention(nn.Module):
    """Queries (N, L, E) attend to (N, S, E); a class at every query."""

    def __init__(self, *, bias: bool = True, **arguments: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, 2, batch_first=True, bias=bias, **arguments)
        self.head = nn.Linear(E, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        return self.head(self.attention(x, keys, keys, need_weights=False)[0])


class WrittenAttention(nn.Module):
    """The same with a linear layer for each projection."""

    def __init__(self, model: Attention) -> None:
        super().__init__()
        self.head = copy.deepcopy(model.head)
        attention = model.attention
        biases = [None] * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        self.q, self.k, self.v = (
            linear(weight, bias) for weight, bias in zip(attention.in_proj_weight.chunk(3), biases, strict=True)
        )
        self.out = linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        q, k, v = (z.unflatten(-1, (2, -1)).transpose(1, 2) for z in (self.q(x), self.k(keys), self.v(keys)))
        mixed = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        return self.head(self.out(mixed.transpose(1, 2).flatten(2)))


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        module.weight.copy_(weight)
        if bias is not None:
            module.bias.copy_(bias)
    return module


def ragged() -> list[tuple[tuple[Tensor, Tensor]]]:
    """Two batches with other numbers of queries and of keys."""
    return [((torch.randn(3, 2, E), torch.randn(3, 5, E)),), ((torch.randn(2, 4, E), torch.randn(2, 3, E)),)]


def estimated(model: nn.Module, data: Any, draws: Any, *, structure: str = "kfac", **rule: Any) -> kc.Fisher:
    likelihood = kc.Categorical(dim=-1)
    batches = [{"x": x, "keys": keys} for ((x, keys),) in data]
    rules, options = {"*": rule} if rule else None, kc.Options(draws=draws)
    return kc.estimate(model, batches, likelihood, structure=structure, rules=rules, options=options)


@pytest.mark.parametrize("rule", [{}, {"sharing": "reduce"}, {"max_factor_dim": 3}], ids=str)
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "tkfac", "diagonal", "unit_wise"])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_linear_layers(bias, structure, rule):
    """ORACLES 12, 16: with factors over positions of its own for each group, also over ragged batches."""
    model, data = Attention(bias=bias), ragged()
    draws = [[torch.randint(3, x.shape[:2]) for _ in range(2)] for ((x, _),) in data]
    found = estimated(model, data, draws, structure=structure, **rule)
    written = estimated(WrittenAttention(model), data, draws, structure=structure, **rule)
    whole = torch.block_diag(*[written[name].to_dense() for name in "qkv"])
    if structure == "ekfac" and rule == {"sharing": "reduce"}:
        # Pooled, G of keys and of values is singular, and a basis of what it leaves out may be any.
        size = len(whole) // 3
        assert_same(found["attention.in_proj"].to_dense()[:size, :size], whole[:size, :size])
    else:
        assert_same(found["attention.in_proj"].to_dense(), whole)
    assert_same(found["attention.out_proj"].to_dense(), written["out"].to_dense())


def test_padded_keys_are_left_out_of_the_factors():
    """A mask of real positions of the batch holds for whatever has as many positions."""
    model = Attention()
    written = WrittenAttention(model)
    x = torch.randn(3, 4, E)
    mask = torch.tensor([[True] * 4, [True, True, False, False], [True] * 3 + [False]])
    draws = [[torch.randint(3, (3, 4))]]
    options = kc.Options(draws=draws, data=kc.Data(positions=lambda args, kwargs, outputs: mask))
    batch = {"x": x, "keys": x}
    found, expected = (kc.estimate(one, [batch], kc.Categorical(dim=-1), options=options) for one in (model, written))
    for index, name in enumerate("qkv"):
        assert_same(found["attention.in_proj"].A[index], expected[name].A)
        assert_same(found["attention.in_proj"].G[index], expected[name].G)


class Recurrent(nn.Module):
    """A recurrent layer over (N, T, 3) or a packed sequence; the last state is classified."""

    def __init__(self, kind: type[nn.RNNBase], **arguments: Any) -> None:
        super().__init__()
        self.layer = kind(3, 4, batch_first=True, **arguments)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Any) -> Tensor:
        _, state = self.layer(x)
        return self.head((state[0] if isinstance(state, tuple) else state)[-1])


class WrittenGRU(nn.Module):
    """The same of one GRU layer with two linear layers, one sequence after another."""

    def __init__(self, model: Recurrent) -> None:
        super().__init__()
        layer = model.layer
        self.ih = linear(layer.weight_ih_l0, layer.bias_ih_l0)
        self.hh = linear(layer.weight_hh_l0, layer.bias_hh_l0)
        self.head = copy.deepcopy(model.head)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        states = []
        for sequence, length in zip(x, lengths, strict=True):
            h = torch.zeros(1, 4)
            for step in sequence[:length]:
                (r, z, n), (hr, hz, hn) = self.ih(step[None]).chunk(3, -1), self.hh(h).chunk(3, -1)
                z = (z + hz).sigmoid()
                h = (1 - z) * (n + (r + hr).sigmoid() * hn).tanh() + z * h
            states.append(h)
        return self.head(torch.cat(states))


def test_a_packed_recurrent_layer_is_linear_layers_over_real_time_steps():
    """ORACLES 12: uses are positions; those after the end of a sequence are none."""
    model = Recurrent(nn.GRU)
    x, lengths = torch.randn(3, 4, 3), torch.tensor([2, 4, 1])
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    options = kc.Options(draws=[[torch.randint(3, (3,))]])
    found = kc.estimate(model, [(packed, torch.zeros(3, dtype=torch.long))], "categorical", options=options)
    expected = kc.estimate(WrittenGRU(model), [{"x": x, "lengths": lengths}], "categorical", options=options)
    for name in ("ih", "hh"):
        assert_same(found[f"layer.{name}_l0"].A, expected[name].A)
        assert_same(found[f"layer.{name}_l0"].G, expected[name].G)


def encoder(dropout: float = 0.0, **arguments: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True, **arguments)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(32, 3))


class Translator(nn.Module):
    """Encoder and decoder; the class of each example is read off the decoder's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(8, 2, 1, 1, 16, dropout=0.2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.transformer(x, x[:, :3]).mean(1))


MODELS = {
    "encoder": encoder,
    "norm-first": lambda: encoder(norm_first=True),
    "dropped": lambda: encoder(0.2),
    "translator": Translator,
    **{
        kind.__name__: lambda kind=kind: Recurrent(kind, num_layers=2, dropout=0.3)
        for kind in (nn.RNN, nn.LSTM, nn.GRU)
    },
}


def batch(name: str, size: int = 48) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, 4, 3 if name in ("RNN", "LSTM", "GRU") else 8)
    return x, (x[..., 0] > 0).sum(1).clamp(max=2)


@pytest.mark.parametrize("name", MODELS)
def test_training_lowers_the_loss_and_covers_everything(name):
    torch.manual_seed(2)
    model, criterion = MODELS[name](), nn.CrossEntropyLoss()
    inputs, labels = batch(name)
    kfac = kc.KFAC(model, criterion, damping=1e-2, schedule=EVERY_STEP)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac.attach(optimizer)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = criterion(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    table = kfac.coverage()
    assert table.share == 1.0
    assert {row.form for row in table.rows} == {"kronecker"}
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_due_step_leaves_gradients_and_random_numbers_as_they_are(name):
    """ORACLES 17, to the last bit."""
    plain = MODELS[name]()
    model, criterion = copy.deepcopy(plain), nn.CrossEntropyLoss()
    inputs, labels = batch(name)
    kfac = kc.KFAC(model, criterion, schedule=EVERY_STEP)
    kfac.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    ends = []
    for one in (plain, model):
        torch.manual_seed(3)
        criterion(one(inputs), labels).backward()
        ends.append(torch.get_rng_state())
    assert torch.equal(*ends)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    kfac.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_no_fast_path_is_taken_in_eval_mode():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=True), nn.Linear(8, 3)).eval()
    found = kc.estimate(model, [torch.randn(3, 4, 8)], kc.Categorical(dim=-1))
    assert {f"0.layers.{i}.self_attn.{part}" for i in (0, 1) for part in ("in_proj", "out_proj")} <= set(found)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return checkpoint(self.inner, *args, use_reentrant=False)


@pytest.mark.parametrize("name", ["dropped", "LSTM"])
def test_activation_checkpointing_changes_nothing(name):
    plain = MODELS[name]()
    inputs, labels = batch(name)
    found = []
    for model in (plain, Checkpointed(copy.deepcopy(plain))):
        kfac = kc.KFAC(model, "categorical", schedule=EVERY_STEP)
        torch.manual_seed(4)
        outputs = model(inputs)
        kfac.update(outputs, draws=[labels])
        outputs.square().sum().backward()
        kfac.precondition()
        found.append(list(kfac.fisher().values()))
    for mine, theirs in zip(*found, strict=True):
        assert_same(mine.A, theirs.A)
        assert_same(mine.G, theirs.G)


def test_a_pattern_reaches_the_parts_of_a_module():
    model = encoder()
    parts = {"in_proj", "out_proj"}
    whole = kc.coverage(model, rules={"*.self_attn": {"exclude": True}})
    left_out = {row.path.split(".self_attn.")[1] for row in whole.rows if not row.covered}
    assert left_out == {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}
    for part in parts:
        rows = kc.coverage(model, rules={f"*.self_attn.{part}": {"exclude": True}}).rows
        assert {row.path.split(".self_attn.")[1].startswith(part) for row in rows if not row.covered} == {True}


def test_a_frozen_part_is_no_layer_and_the_others_are():
    model = Attention()
    expected = estimated(model, ragged()[:1], [[torch.zeros(3, 2, dtype=torch.long)]])
    model.attention.in_proj_weight.requires_grad_(False)
    model.attention.out_proj.weight.requires_grad_(False)
    model.attention.out_proj.bias.requires_grad_(False)
    found = estimated(model, ragged()[:1], [[torch.zeros(3, 2, dtype=torch.long)]])
    assert "attention.out_proj" in expected
    assert list(found) == ["attention.in_proj", "head"]
    assert_same(found["attention.in_proj"].A, torch.ones(3, 1, 1))


def test_a_state_is_resumed():
    model = Attention(bias=False)
    ((first,), (second,)) = ragged()
    kfac = kc.KFAC(model, kc.Categorical(dim=-1), schedule=EVERY_STEP)
    for keys in (first, second):
        outputs = model(*keys)
        kfac.update(outputs)
        outputs.square().sum().backward()
        kfac.precondition()
    other = kc.KFAC(copy.deepcopy(model), kc.Categorical(dim=-1), schedule=EVERY_STEP)
    other.load_state_dict(kfac.state_dict())
    for name, block in kfac.fisher().items():
        assert torch.equal(other.fisher()[name].A, block.A)


class Residual(Attention):
    """What attention returns is changed in place, or not."""

    in_place = False

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        y = self.attention(x, keys, keys)[0]
        return self.head(torch.tanh_(y.add_(x)) if self.in_place else torch.tanh(y + x))


def test_outputs_that_are_changed_in_place_are_read_as_they_were():
    model, data = Residual(), ragged()
    draws = [[torch.randint(3, x.shape[:2])] for ((x, _),) in data]
    expected = estimated(model, data, draws)
    model.in_place = True
    for name, block in estimated(model, data, draws).items():
        assert_same(block.to_dense(), expected[name].to_dense())


def test_the_name_of_a_module_asks_for_its_parts():
    model = nn.Sequential(nn.LSTM(3, 4), Apply(lambda output: output[0][-1]), nn.Linear(4, 2))
    found = kc.estimate(model, [torch.randn(2, 5, 3)], "categorical", options=kc.Options(layers="0"))
    assert list(found) == ["0.ih_l0", "0.hh_l0"]
