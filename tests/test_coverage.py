"""One table of every trainable parameter: covered or not, why, and what to do."""

from __future__ import annotations

import json
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


def test_the_text_has_a_line_for_every_row_and_the_share():
    table = kc.coverage(Zoo())
    lines = str(table).splitlines()
    assert len(lines) == len(table.rows) + 3
    assert lines[0].split() == ["parameter", "kind", "numbers", "covered", "reason", "remedy"]
    assert lines[-1] == f"{table.parameters} of {table.parameters} trainable numbers are covered: 100.00 %"


def test_the_dictionary_is_json():
    table = json.loads(json.dumps(kc.coverage(Zoo()).to_dict()))
    assert table["rows"][0]["path"] == "raw"
    assert table["covered"] == table["parameters"]


def test_the_data_frame_has_the_same_rows():
    pytest.importorskip("pandas")
    table = kc.coverage(Zoo())
    frame = table.to_pandas()
    assert frame["parameters"].sum() == table.parameters
    assert list(frame.columns) == ["path", "kind", "parameters", "covered", "reason", "remedy", "form"]


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


def test_a_sharded_parameter_is_named(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(0)]))
    found = rows(model)
    assert (found["0.weight"].covered, found["0.weight"].reason) == (False, "its weight is a sharded DTensor")
    assert "before sharding" in found["0.weight"].remedy
    assert found["1.weight"].covered


def test_a_layer_that_never_fired_is_not_covered():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Half()
    kfac = kc.KFAC(model, kc.Categorical(), schedule=kc.Schedule(factors=1, inverses=1))
    before = kfac.coverage().share
    outputs = model(torch.randn(4, 3))
    kfac.update(outputs)
    outputs.sum().backward()
    kfac.precondition()
    assert (before, kfac.coverage().share) == (1.0, 0.5)
    assert [row.path for row in kfac.coverage().rows if not row.covered] == ["idle.weight", "idle.bias"]


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
