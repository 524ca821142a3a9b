"""What coverage predicts is what training holds, and its operations are those of the formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.errors import CaptureError
from kfac_cond.layers.layer import draws_needed
from kfac_cond.layers.recurrent import RecurrentKind
from kfac_cond.uses import uses_in_forward

from .helpers import EVERY_STEP

#: As many effective draws as captures.
UNDECAYED = kc.Schedule(factors=1, inverses=1, decay=1 - 1e-9)


def held(kfac: kc.KFAC) -> tuple[int, int]:
    """Bytes of the averages and of the inverses of all layers."""
    layers = dict(kfac.state_dict()["layers"]).values()
    return sum(size(one["average"]) for one in layers), sum(size(one["inverse"]) for one in layers)


def inverses(kfac: kc.KFAC) -> dict[str, int]:
    """Bytes of the inverse of each layer."""
    return {name: size(one["inverse"]) for name, one in kfac.state_dict()["layers"]}


def size(part: Any) -> int:
    return sum(one.nbytes for one in (part or {}).values() if isinstance(one, Tensor))


class Frozen(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 4), nn.Linear(4, 3))
        self[0].weight.requires_grad_(False)


class Raw(nn.Module):
    """A vector, a number, a matrix wider and one higher, a stack, and one weight in two roles."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.number = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(()))
        self.down, self.up = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 6))
        self.stack = nn.Parameter(torch.randn(2, 6, 3))
        self.one, self.other = nn.Linear(6, 3), nn.Linear(6, 3)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.number * (self.scale * x) @ self.down @ self.up
        return torch.einsum("ni,eio->no", h, self.stack) + self.one(h) + self.other(torch.tanh(h))


class Attending(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True, **settings), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), 1, 6)
        return self.head(self.attention(x, x, x)[0][:, 0])


class Recurring(nn.Module):
    def __init__(self, kind: type[nn.Module], **settings: Any) -> None:
        super().__init__()
        self.body = kind(3, 3, **settings)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), 2, 3) if isinstance(self.body, nn.RNNBase) else x[:, :3]
        found = self.body(x)
        y = found[0] if isinstance(found, tuple) else found
        return y[:, -1] if y.dim() == 3 else y


def convolved() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2, groups=2), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(8, 3)
    )


#: By kind a model of inputs of six features that gives three logits.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)),
    "grouped convolution": convolved,
    "norm": lambda: nn.Sequential(nn.Linear(6, 6, bias=False), nn.LayerNorm(6), nn.Linear(6, 3), nn.BatchNorm1d(3)),
    "norm without scale": lambda: nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 3)),
    "half": lambda: nn.Sequential(nn.Linear(6, 3)).bfloat16(),
    "frozen": lambda: nn.Sequential(nn.Linear(6, 3), Frozen()),
    "universal": Raw,
    "packed attention": Attending,
    "attention without biases": lambda: Attending(bias=False),
    "separate attention": lambda: Attending(kdim=6, vdim=6, add_bias_kv=True),
    "lstm": lambda: Recurring(nn.LSTM, batch_first=True, bidirectional=False, num_layers=2),
    "projected lstm": lambda: Recurring(nn.LSTM, batch_first=True, proj_size=2),
    "gru cell": lambda: Recurring(nn.GRUCell),
}


@pytest.mark.parametrize("structure", ["kfac", "tkfac", "diagonal"])
@pytest.mark.parametrize("limit", [None, 4])
@pytest.mark.parametrize("rule", ["factored", "exact"])
@pytest.mark.parametrize("name", MODELS)
def test_the_bytes_predicted_are_the_bytes_held(name, rule, limit, structure):
    model = MODELS[name]()
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.01)
    rules = {"*": {"max_factor_dim": limit}}
    damping = kc.Damping(0.1, rule=rule)
    kfac = kc.KFAC(model, criterion, damping=damping, schedule=UNDECAYED, structure=structure, rules=rules)
    kfac.attach(optimizer)
    table = kfac.coverage()
    for _ in range(max(draws_needed(kfac.layers).values(), default=1) + 1):
        optimizer.zero_grad()
        inputs = torch.randn(5, 6).to(next(model.parameters()).dtype)
        criterion(model(inputs), torch.tensor([0, 1, 0, 1, 1])).backward()
        optimizer.step()
    assert table.share == 1.0
    assert (table.factor_bytes, table.inverse_bytes) == held(kfac)
    assert {row.layer: row.inverse_bytes for row in table.rows if row.d_in} == inverses(kfac)


@pytest.mark.parametrize("limit", [None, 4])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_predicted_without_a_preconditioner_is_what_one_predicts(name, limit):
    model, rules = MODELS[name](), {"*": {"max_factor_dim": limit}}
    expected = kc.coverage(model, rules=rules).to_dict()
    assert kc.KFAC(model, nn.CrossEntropyLoss(), rules=rules).coverage().to_dict() == expected


def test_heads_have_an_average_of_G_each():
    model = nn.Linear(3, 4)
    product = kc.Product({"a": kc.Categorical(), "b": kc.Categorical()})
    kfac = kc.KFAC(model, product, schedule=EVERY_STEP)
    outputs = model(torch.randn(5, 3))
    kfac.update({"a": outputs, "b": 2 * outputs})
    outputs.sum().backward()
    kfac.precondition()
    table = kfac.coverage()
    assert (table.factor_bytes, table.inverse_bytes) == held(kfac)


@pytest.mark.parametrize("name", MODELS)
def test_the_rows_counted_are_those_captured(name):
    model = MODELS[name]()
    kfac = kc.KFAC(model, "categorical")
    inputs = torch.randn(5, 6).to(next(model.parameters()).dtype)
    used, functional = uses_in_forward(model, kfac.layers, inputs)
    assert not functional
    kfac.update(model(inputs))
    for layer, sums in kfac.state_dict()["gathered"][0]["layers"].items():
        found = kfac.layers[layer]
        if found.modules and found.gradient_sums is None:
            # What counts its groups apart has the rows of all of them.
            groups = found.layout.groups if found.kind.counts_groups(found.layout) else 1
            assert used[layer].rows * groups == sums["A_count"].item()
            assert used[layer].calls == len(found.modules)
        elif found.modules:
            assert used[layer].examples == 5
        else:
            assert layer not in used


@pytest.mark.parametrize(
    ("rule", "limit", "expected"),
    [("factored", None, 4**3 + 5**3), ("exact", None, 9 * (4**3 + 5**3)), ("factored", 4, 4**3 + 5)],
)
def test_the_operations_of_a_refresh(rule, limit, expected):
    rules = {"*": {"max_factor_dim": limit}}
    kfac = kc.KFAC(nn.Linear(3, 5), "categorical", damping=kc.Damping(rule=rule), rules=rules)
    assert kfac.coverage().refresh_flops == expected


@pytest.mark.parametrize(
    ("inverses", "expected"), [(1, 4**3 // 3 + 5**3 // 3), (2, 4**3 // 3 + 5**3 // 3), (3, 4**3 + 5**3)]
)
def test_a_refresh_of_what_serves_for_a_few_steps_is_a_factorisation(inverses, expected):
    schedule = kc.Schedule(factors=1, inverses=inverses)
    kfac = kc.KFAC(nn.Linear(3, 5), "categorical", schedule=schedule)
    assert kfac.coverage().refresh_flops == expected
    # Ranks are sent inverses.
    assert sum(row.refresh_flops for row in kfac.plan(world=2).ranks) == 4**3 + 5**3


@pytest.mark.parametrize(
    ("sharing", "limit", "expected"),
    [("expand", None, 2 * 14 * (16 + 25)), ("reduce", None, 2 * 7 * (16 + 25)), ("expand", 4, 2 * 14 * (16 + 5))],
)
def test_the_operations_of_a_batch(sharing, limit, expected):
    rules = {"*": {"sharing": sharing, "max_factor_dim": limit}}
    assert kc.coverage(nn.Linear(3, 5), torch.randn(7, 2, 3), rules=rules).capture_flops == expected


@pytest.mark.parametrize(
    ("structure", "expected"),
    [("tkfac", 2 * 14 * 20 + 2 * 7 * (5 * 16 + 4 * 25)), ("diagonal", 2 * 14 * 20 + 2 * 7 * 20)],
)
def test_structures_that_square_the_gradients_of_examples_make_them_first(structure, expected):
    rules = {"*": {"structure": structure}}
    assert kc.coverage(nn.Linear(3, 5), torch.randn(7, 2, 3), rules=rules).capture_flops == expected


def test_groups_count_each():
    table = kc.coverage(nn.Conv2d(4, 6, 3, groups=2, bias=False), torch.randn(2, 4, 5, 5))
    assert table.refresh_flops == 2 * (18**3 + 3**3)
    assert table.capture_flops == 2 * 2 * 9 * 2 * (18**2 + 3**2)


def test_the_universal_form_costs_what_its_gradient_does():
    def costs(examples: int) -> dict[str, tuple[int | None, int | None]]:
        table = kc.coverage(Raw(), torch.randn(examples, 6))
        return {row.path: (row.capture_flops, row.uses) for row in table.rows if row.form == "universal"}

    assert costs(5)["scale"] == (2 * (6 * 1 + 6), None)
    assert costs(5)["stack"] == (2 * 2 * (6 * 3**2 + 3 * 6**2), None)
    assert costs(5) == costs(50)


def test_a_call_that_cannot_be_captured_says_so(monkeypatch):
    def refuse(*_: object) -> None:
        raise CaptureError("its numbers cannot be drawn again")

    monkeypatch.setattr(RecurrentKind, "_check_repeatable", refuse)
    table = kc.coverage(MODELS["lstm"](), torch.randn(5, 6))
    row = table.rows[0]
    assert (row.uses, row.capture_flops, row.reason) == (1, None, "its numbers cannot be drawn again")


def test_positions_of_attention_are_those_of_its_longest_group():
    model = nn.MultiheadAttention(4, 2, batch_first=True, bias=False)
    batch = {"query": torch.randn(3, 2, 4), "key": torch.randn(3, 7, 4), "value": torch.randn(3, 7, 4)}
    packed, out = (row for row in kc.coverage(model, batch).rows if row.d_in)
    assert packed.capture_flops == 2 * 3 * 7 * 3 * (4**2 + 4**2)
    assert out.capture_flops == 2 * 3 * 2 * (4**2 + 4**2)
