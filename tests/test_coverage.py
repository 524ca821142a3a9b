"""One table of every trainable parameter: covered or not, why, and what to do."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn

import kfac_cond as kc


class Zoo(nn.Module):
    """Something of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.conv = nn.Conv2d(2, 4, 3, groups=2)
        self.norm = nn.LayerNorm(4)
        self.slope = nn.PReLU()
        self.embedding = nn.Embedding(5, 3)
        self.raw = nn.Parameter(torch.zeros(7))
        self.attention = nn.MultiheadAttention(4, 2)
        self.frozen = nn.Linear(3, 4).requires_grad_(False)
        self.partly = nn.Linear(3, 4)
        self.partly.weight.requires_grad_(False)
        self.weight_norm = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def rows(model: nn.Module, **settings: Any) -> dict[str, Any]:
    return {row.path: row for row in kc.coverage(model, **settings).rows}


def test_every_trainable_parameter_has_one_row():
    model = Zoo()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(rows(model)) == trainable
    assert len(kc.coverage(model).rows) == len(trainable)


def test_everything_is_covered():
    assert kc.coverage(Zoo()).share == 1.0


def test_what_has_a_kronecker_form():
    covered = {path for path, row in rows(Zoo()).items() if row.form == "kronecker"}
    assert covered == {
        "linear.weight",
        "linear.bias",
        "conv.weight",
        "conv.bias",
        "norm.weight",
        "norm.bias",
        "attention.in_proj_weight",
        "attention.in_proj_bias",
        "attention.out_proj.weight",
        "attention.out_proj.bias",
        "partly.bias",
    }


@pytest.mark.parametrize(
    ("path", "kind", "reason"),
    [
        ("slope.weight", "PReLU", "no Kronecker form"),
        ("raw", "Zoo", "no Kronecker form"),
        ("embedding.weight", "Embedding", "'embedding.weight' and 'head.weight' are one weight in two roles"),
        ("weight_norm.bias", "ParametrizedLinear", "parametrization"),
    ],
)
def test_what_is_in_the_universal_form_says_why(path, kind, reason):
    row = rows(Zoo())[path]
    assert (row.form, row.covered, row.kind) == ("universal", True, kind)
    assert row.reason.startswith("universal form, from 10 effective draws on in training: ")
    assert reason in row.reason


def test_shares_and_counts_add_up():
    table = kc.coverage(Zoo(), rules={"slope": {"exclude": True}, "raw": {"exclude": True}})
    assert table.parameters == sum(p.numel() for p in Zoo().parameters() if p.requires_grad)
    assert table.covered == table.parameters - 1 - 7
    assert table.share == table.covered / table.parameters


def test_a_model_of_linear_layers_is_covered_whole():
    assert kc.coverage(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))).share == 1.0


def test_a_model_without_trainable_parameters_has_share_zero():
    assert kc.coverage(nn.ReLU()).share == 0.0


def test_excluded_layers_say_so():
    row = rows(Zoo(), rules={"lin*": {"exclude": True}})["linear.weight"]
    assert (row.covered, row.reason) == (False, "excluded by a rule")
    assert row.remedy


def test_it_is_the_table_of_a_kfac():
    model = Zoo()
    assert str(kc.KFAC(model, "categorical").coverage()) == str(kc.coverage(model))


def test_the_text_has_a_line_for_every_layer_and_ends_with_share_and_cost(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Conv2d(2, 4, 3, groups=2), nn.Linear(2, 2))
    assert str(kc.coverage(model, rules={"3": {"exclude": True}})).splitlines() == [
        "parameter       kind         form          in x out  structure  factors  inverses",
        "--------------------------------------------------------------------------------------",
        "0.weight, bias  linear       kronecker        4 x 4  kfac         176 B     256 B",
        "1.weight        PReLU        universal        1 x 1  kfac          56 B      16 B  [1]",
        "2.weight, bias  convolution  kronecker  2 of 10 x 2  kfac         944 B   1.6 KiB",
        "3.weight        Linear       none         4 numbers                                [2]",
        "3.bias          Linear       none         2 numbers                                [2]",
        "[1] universal form, from 10 effective draws on in training: no Kronecker form for this module type",
        "[2] excluded by a rule; remedy: remove the rule to cover it",
        "57 of 63 trainable numbers are covered: 90.48 %, 1 of them in the universal form",
        "memory: 1.1 KiB of factors, 1.9 KiB of inverses, and 1.1 KiB from a capture to its step",
        "a refresh of the inverses takes 2.1 kFLOP",
    ]


def test_the_text_counts_uses_where_there_is_a_batch(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    lines = str(kc.coverage(nn.Linear(3, 4), torch.zeros(5, 3))).splitlines()
    assert [line.split()[-1] for line in (lines[0], lines[2])] == ["uses", "1"]
    assert lines[-1] == "a refresh of the inverses takes 128 FLOP, the factors of this batch 320 FLOP a draw"


@pytest.mark.parametrize("columns", [80, 110, 140])
def test_the_text_fits_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    table = kc.coverage(nn.ModuleDict({"a" * 20: nn.ModuleDict({"b" * 30: Zoo()})}))
    assert max(map(len, str(table).splitlines())) <= columns
    text = "".join(str(table).split())
    assert all(row.path.rpartition(".")[2] in text for row in table.rows)
    assert "[2]" in text


def test_the_dictionary_is_json():
    table = json.loads(json.dumps(kc.coverage(Zoo()).to_dict()))
    assert table["rows"][0]["path"] == "raw"
    assert table["covered"] == table["parameters"]


def test_the_data_frame_has_the_same_rows():
    pytest.importorskip("pandas")
    table = kc.coverage(Zoo())
    frame = table.to_pandas()
    assert frame["parameters"].sum() == table.parameters
    assert frame["factor_bytes"].sum() == table.factor_bytes
    assert list(frame.columns) == [field.name for field in fields(table.rows[0])]


def test_nothing_is_left_on_the_model():
    model = Zoo()
    kc.coverage(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.linear.modules())


@pytest.fixture
def mesh(tmp_path):
    dist = pytest.importorskip("torch.distributed")
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs gloo")
    dist.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_parameter_on_a_mesh_is_said_to_be_so(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(0)]))
    found = rows(model)
    assert found["0.weight"].covered and found["1.weight"].covered
    assert found["0.weight"].reason.startswith("on a tensor-parallel mesh of 1 rank: what its module is given")
    assert not found["1.weight"].reason


def test_a_module_of_several_parts_on_a_mesh_is_in_the_universal_form(mesh):
    from torch.distributed.tensor import distribute_module

    model = nn.ModuleDict({"gates": nn.LSTM(2, 3), "out": nn.Linear(3, 2)})
    distribute_module(model["gates"], mesh)
    found = rows(model)
    assert found["gates.weight_ih_l0"].form == "universal"
    assert (
        "a part of a module of several parts, which computes with a DTensor on 1 rank"
        in found["gates.weight_ih_l0"].reason
    )
    assert found["out.weight"].form == "kronecker"


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_a_layer_that_no_forward_uses_is_said_to_be_unused():
    """It has no gradient that anything could be done with."""
    model = Half()
    kfac = kc.KFAC(model, kc.Categorical(), schedule=kc.Schedule(factors=1, inverses=1))
    before = kfac.coverage().share
    outputs = model(torch.randn(4, 3))
    kfac.update(outputs)
    outputs.sum().backward()
    kfac.precondition()
    assert (before, kfac.coverage().share) == (1.0, 1.0)
    unused = [row.path for row in kfac.coverage().rows if row.reason == "not used in a captured forward yet"]
    assert unused == ["idle.weight", "idle.bias"]


def test_a_layer_with_gradients_that_no_score_reaches_is_not_covered_until_one_does():
    """A head of its own loss, beside the one that parametrises p."""
    model, x = Half(), torch.randn(4, 3)
    kfac = kc.KFAC(model, kc.Categorical(), schedule=kc.Schedule(factors=1, inverses=1))
    for score in (False, True):
        outputs, other = model(x), model.idle(x)
        if score:
            outputs = outputs + 0.1 * other
        kfac.update(outputs)
        (outputs.sum() + other.square().sum()).backward()
        kfac.precondition()
        left = [row.path for row in kfac.coverage().rows if not row.covered]
        assert left == ([] if score else ["idle.weight", "idle.bias"])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"model": 5}, r"model is 5: expected a torch\.nn\.Module"),
        ({"model": nn.Linear}, "model is the class Linear"),
        ({"model": nn.Linear(2, 2), "rules": 3}, "rules is 3"),
    ],
)
def test_arguments_of_another_type_are_refused(arguments, match):
    with pytest.raises(kc.ArgumentError, match=match):
        kc.coverage(**arguments)


def test_a_forward_that_was_replaced_after_wrapping_is_in_the_table():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    kfac = kc.KFAC(model, "categorical")
    model[0].forward = lambda x: x
    found = {row.path: row for row in kfac.coverage().rows}
    assert (found["0.weight"].covered, found["0.weight"].form) == (False, "none")
    assert (found["0.weight"].reason, found["0.weight"].remedy) == (
        "its layer changed since it was wrapped",
        "kfac.refresh()",
    )


# -- form, cost and use -----------------------------------------------------------------------------------------------


def test_a_layer_s_numbers_stand_in_its_first_row():
    weight, bias = kc.coverage(nn.Sequential(nn.Conv2d(2, 4, 3, groups=2)), torch.randn(5, 2, 4, 4)).rows
    assert (weight.layer, weight.form, weight.structure, weight.uses) == ("0", "kronecker", "kfac", 1)
    assert (weight.d_in, weight.d_out, weight.groups) == (10, 2, 2)
    assert (bias.layer, bias.form, bias.structure, bias.uses) == ("0", "kronecker", "kfac", None)
    assert (bias.d_in, bias.factor_bytes, bias.inverse_bytes, bias.refresh_flops) == (0, 0, 0, 0)


def test_what_is_not_covered_costs_nothing():
    row = rows(Zoo(), rules={"raw": {"exclude": True}})["raw"]
    assert (row.form, row.layer, row.structure, row.factor_bytes) == ("none", "", "", 0)


class Counted(nn.Module):
    """Uses a layer twice, two tied ones once each, and one not at all; with state that a forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.one, self.other, self.idle = (nn.Linear(3, 3) for _ in range(4))
        self.other.weight, self.other.bias = self.one.weight, self.one.bias
        self.norm, self.dropout = nn.BatchNorm1d(3), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.norm(self.twice(torch.tanh(self.twice(x)))))
        return self.other(torch.relu_(self.one(x)))


def test_a_batch_counts_what_a_forward_uses():
    model = Counted()
    table = kc.coverage(model, torch.randn(5, 3))
    assert {row.layer: row.uses for row in table.rows if row.d_in} == {"twice": 2, "one": 2, "idle": 0, "norm": 1}
    idle = next(row for row in table.rows if row.path == "idle.weight")
    assert (idle.covered, idle.reason, idle.capture_flops) == (True, "not called in this forward", 0)
    assert {row.uses for row in kc.coverage(model).rows} == {None}
    assert kc.coverage(model).capture_flops is None


@pytest.mark.parametrize("fails", [False, True])
def test_counting_leaves_everything_as_it_was(fails):
    model = Counted()
    kfac = kc.KFAC(model, "categorical")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    hooks, random = len(model.twice._forward_hooks), torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError):
            kc.coverage(model, torch.randn(5, 4))
    else:
        kc.coverage(model, (torch.randn(5, 3), torch.zeros(5)))
        assert torch.is_grad_enabled()
    del kfac
    assert len(model.twice._forward_hooks) == hooks
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    random_now = torch.get_rng_state()
    with torch.random.fork_rng():
        torch.set_rng_state(random)
        torch.randn(5, 4 if fails else 3)
        assert torch.equal(random_now, torch.get_rng_state())


def test_on_the_meta_device_nothing_is_allocated():
    with torch.device("meta"):
        model, batch = nn.Sequential(nn.Linear(10_000, 10_000), nn.BatchNorm1d(10_000)), torch.randn(64, 10_000)
    table = kc.coverage(model, batch)
    assert table.rows[0].uses == 1
    assert table.rows[0].factor_bytes == (10_001 * 10_002 + 10_000 * 10_001) // 2 * batch.element_size() + 16
    # Of a large symmetric product more than half is done.
    assert 64 * 2 * 10_000**2 < table.capture_flops < 2 * 64 * 2 * 10_000**2


def test_a_compiled_model_counts_its_uses():
    model = torch.compile(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), backend="eager")
    model(torch.randn(5, 3))
    assert [row.uses for row in kc.coverage(model, torch.randn(5, 3)).rows if row.d_in] == [1, 1]


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_the_uses_are_those_of_training_whatever_the_mode(context):
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    with context():
        table = kc.coverage(model, torch.randn(3, 5, 8))
        assert torch.is_grad_enabled() == (context is torch.enable_grad)
    assert {row.uses for row in table.rows if row.d_in} == {1}
    assert not model.training


def test_under_ddp_the_inner_module_runs_alone(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
        called = []
        model.register_forward_hook(lambda *_: called.append(True))
        assert kc.coverage(model, torch.randn(5, 3)).rows[0].uses == 1
        assert not called
    finally:
        torch.distributed.destroy_process_group()


def test_a_foreign_hook_that_replaces_the_output_does_not_matter():
    model = nn.Sequential(nn.Linear(3, 4), nn.Flatten())
    model[0].register_forward_hook(lambda module, args, output: output[:1])
    assert kc.coverage(model, torch.randn(5, 3)).capture_flops == 2 * 5 * (16 + 16)


def test_strict_lists_everything_without_a_form_of_its_own():
    with pytest.raises(kc.CoverageError, match=r"6 of 17 parameters .*kc\.register_layer") as error:
        kc.coverage(Zoo(), strict=True)
    missing = [row.path for row in kc.coverage(Zoo()).rows if row.form != "kronecker"]
    lines = str(error.value).splitlines()[1:]
    assert [line.split()[0] for line in lines] == missing


def test_strict_is_silent_where_all_have_one():
    assert kc.coverage(nn.Linear(3, 2), strict=True).share == 1.0
