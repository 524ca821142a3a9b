"""What a model is found to be made of, and the rules that choose among it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import kfac_cond as kc
from kfac_cond.layers.survey import survey
from kfac_cond.layers.universal import universal_layout

from ..helpers import classifier

UNIVERSAL = "universal form, from 10 effective draws on in training: "


def tied(*, bias: bool = True, share_bias: bool = True) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 3, bias=bias), nn.Linear(3, 3, bias=bias))
    model[1].weight = model[0].weight
    if share_bias:
        model[1].bias = model[0].bias
    return model


def reasons(model: nn.Module, **settings: Any) -> dict[str, str]:
    """Why parameters have no Kronecker form, whether or not the universal one covers them."""
    rows = [row for row in survey(model, **settings).rows if row.form != "kronecker"]
    return {row.path: row.reason.removeprefix(UNIVERSAL) for row in rows}


def kronecker(model: nn.Module, **settings: Any) -> list[str]:
    return [name for name, layer in survey(model, **settings).layers.items() if layer.modules]


def test_layers_come_in_the_order_of_the_model():
    assert list(survey(nn.Sequential(classifier(), nn.Linear(3, 3))).layers) == ["0.0", "0.2", "1"]


def test_a_bare_layer_is_a_model():
    assert list(survey(nn.Linear(3, 3)).layers) == [""]


@pytest.mark.parametrize("bias", [True, False])
def test_tied_layers_are_one(bias):
    model = tied(bias=bias)
    (layer,) = survey(model).layers.values()
    assert layer.modules == (model[0], model[1])


def test_what_is_tied_is_said_in_its_row():
    rows = {row.path: row.reason for row in survey(tied()).rows}
    assert rows["0.weight"] == "tied to '1.weight': their uses count as positions of one layer"
    model = nn.Sequential(*(nn.PReLU() for _ in range(6)))
    for one in model[1:]:
        one.weight = model[0].weight
    assert "tied to '1.weight', '2.weight', '3.weight' and 2 more: one parameter" in survey(model).rows[0].reason


def test_a_module_held_twice_is_one_layer_with_one_module():
    layer = nn.Linear(3, 3)
    (found,) = survey(nn.Sequential(layer, nn.ReLU(), layer)).layers.values()
    assert (found.name, found.modules) == ("0", (layer,))


def test_a_tied_weight_with_different_biases_has_no_kronecker_form():
    found = reasons(tied(share_bias=False))
    assert found["0.weight"] == "'0.weight' and '1.weight' are one weight with two biases"
    assert set(found) == {"0.weight", "0.bias", "1.bias"}


def test_a_bias_of_two_weights_has_no_kronecker_form():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].bias = model[0].bias
    assert reasons(model)["0.bias"] == "'0.bias' and '1.bias' are one bias of two weights"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(3)), "lazy"),
        (lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))), "parametrization"),
        (lambda: nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64)), "torch.complex64"),
    ],
)
def test_a_weight_of_another_storage_is_named(change, reason):
    model = change()
    assert not kronecker(model)
    assert any(reason in text for text in reasons(model).values())


def test_of_two_matching_rules_the_later_wins_key_by_key():
    rules = {"*": {"sharing": "reduce", "damping": 0.1}, "2": {"damping": 0.2}}
    layers = survey(classifier(), rules).layers
    assert [(layer.sharing, layer.rule.damping) for layer in layers.values()] == [("reduce", 0.1), ("reduce", 0.2)]


@pytest.mark.parametrize("pattern", ["0", "1", "*"])
def test_a_rule_on_either_name_excludes_a_tied_layer(pattern):
    assert not survey(tied(), {pattern: {"exclude": True}}).layers


@pytest.mark.parametrize(
    ("rules", "match"),
    [
        ({"head": {}}, "'head' matches no module with parameters. The modules are: 0, 2"),
        ({"0": {"shraing": "reduce"}}, r"unknown setting \['shraing'\]"),
        ({"0": {"sharing": "both"}}, "sharing='both'"),
        ({"0": {"damping": -1.0}}, r"damping=-1\.0"),
        ({"0": {"damping": float("inf")}}, "damping=inf"),
        ({"0": {"damping": True}}, "damping=True"),
        ({"0": {"structure": 5}}, "structure=5, expected the name of a structure"),
        ({"0": {"exclude": "no"}}, "exclude='no', expected True or False"),
        ({"0": {"exclude": None}}, "exclude=None, expected True or False"),
        ({"0": 5}, r"rules\['0'\] is 5: expected dict\("),
        ({0: {}}, "the pattern 0 is 0: expected a str"),
        (["0"], r"rules is list of \['str'\]: expected \{pattern"),
        (5, "rules is 5: expected"),
    ],
)
def test_rules_that_mean_nothing_are_refused(rules, match):
    with pytest.raises(kc.ArgumentError, match=match):
        survey(classifier(), rules)


def frozen(model: nn.Module) -> None:
    model[0].bias.requires_grad_(False)


def resized(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(torch.zeros(4, 9))


def without_bias(model: nn.Module) -> None:
    model[0].bias = None


@pytest.mark.parametrize("change", [frozen, resized, without_bias])
def test_a_layer_that_changed_is_named_with_the_remedy(change):
    model = classifier()
    layer = survey(model).layers["0"]
    layer.check_unchanged()
    change(model)
    with pytest.raises(kc.ModelChangedError, match=r"layer '0' .*kfac\.refresh\(\)"):
        layer.check_unchanged()


def test_a_rule_may_name_the_structure_there_is():
    assert list(survey(classifier(), {"*": {"structure": "kfac", "exclude": False}}).layers) == ["0", "2"]


class Wide(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(2 * x)


class Renamed(nn.Linear):
    pass


def replaced(kind: type[nn.Module] = nn.Linear) -> nn.Module:
    module = kind(3, 4)
    plain = module.forward
    module.forward = lambda x: plain(2 * x)
    return module


@pytest.mark.parametrize(
    ("module", "where"),
    [
        (Wide(3, 4), "by Wide"),
        (replaced(), "on this instance"),
        (replaced(Renamed), "on this instance"),
    ],
)
def test_a_layer_with_another_forward_has_no_kronecker_form_and_says_so(module, where):
    model = nn.Sequential(module, nn.Linear(4, 2))
    assert kronecker(model) == ["1"]
    assert reasons(model)["0.weight"] == f"Linear with its forward replaced {where}"


def test_a_subclass_with_the_same_forward_is_covered():
    assert list(survey(nn.Sequential(Renamed(3, 4))).layers) == ["0"]


@pytest.mark.parametrize(
    ("module", "path", "remedy"),
    [
        (nn.ParameterList([torch.zeros(3, 4)]), "0.0", "nn.Conv modules in its place"),
        (Wide(3, 4), "0.weight", "around a plain Linear"),
        (replaced(), "0.bias", "a LayerKind of your own"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), "0.bias", "remove_parametrizations"),
        (nn.LazyLinear(3), "0.weight", "run one forward"),
        (tied(share_bias=False), "0.0.weight", "tie the biases"),
    ],
)
def test_what_has_no_kronecker_form_says_what_to_do(module, path, remedy):
    row = next(row for row in survey(nn.Sequential(module)).rows if row.path == path)
    assert row.form != "kronecker"
    assert remedy in row.remedy


@pytest.mark.parametrize(
    "modules",
    [
        (nn.Conv1d(2, 4, 1), nn.Conv1d(4, 4, 1, groups=2)),
        (nn.ConvTranspose1d(6, 4, 2, groups=2), nn.ConvTranspose1d(6, 6, 2, groups=3)),
        (nn.Conv1d(2, 4, 3), nn.ConvTranspose1d(4, 2, 3)),
    ],
)
def test_convolutions_that_use_one_weight_in_different_ways_have_no_kronecker_form(modules):
    model = nn.Sequential(*modules)
    model[1].weight = model[0].weight
    assert not kronecker(model)
    assert reasons(model)["0.weight"] == "'0.weight' and '1.weight' are one weight in two roles"


def test_convolutions_that_use_one_weight_at_different_strides_are_one_layer():
    model = nn.Sequential(nn.ConvTranspose1d(2, 2, 3, bias=False), nn.ConvTranspose1d(2, 2, 3, stride=2, bias=False))
    model[1].weight = model[0].weight
    assert kronecker(model) == ["0"]


@pytest.mark.parametrize(
    ("modules", "path", "pair"),
    [
        ((nn.Embedding(4, 3), nn.Linear(3, 4)), "0.weight", "'0.weight' and '1.weight'"),
        ((nn.Embedding(4, 3), nn.Linear(3, 4)), "1.bias", "'1.weight' and '0.weight'"),
        ((nn.Linear(3, 4), nn.Embedding(4, 3)), "0.weight", "'0.weight' and '1.weight'"),
        ((nn.Linear(3, 4), nn.Embedding(4, 3)), "0.bias", "'0.weight' and '1.weight'"),
    ],
)
def test_a_tied_embedding_and_its_head_are_both_named(modules, path, pair):
    model = nn.Sequential(*modules)
    model[1].weight = model[0].weight
    assert reasons(model)[path] == f"{pair} are one weight in two roles"


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.body = nn.Linear(4, 4)
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.complex = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)


def test_raw_parameters_are_layers_by_their_full_names_in_the_order_of_the_model():
    layers = survey(nn.Sequential(Tokens(), nn.Linear(4, 2))).layers
    assert list(layers) == ["0.token", "0.body", "1"]
    assert (layers["0.token"].kind.name, layers["0.token"].modules) == ("universal", ())


@pytest.mark.parametrize(
    ("path", "reason"), [("complex", "torch.complex64"), ("empty", "no entries"), ("embedding.weight", "sparse")]
)
def test_what_cannot_be_covered_is_refused_by_name(path, reason):
    model = Tokens()
    model.embedding = nn.Embedding(4, 3, sparse=True)
    row = next(row for row in survey(model).rows if row.path == path)
    assert (row.covered, row.form) == (False, "none")
    assert reason in row.reason


@pytest.mark.parametrize("pattern", ["0.token", "*.token", "0"])
def test_a_raw_parameter_is_excluded_by_its_own_name_or_its_module_s(pattern):
    model = nn.Sequential(Tokens(), nn.Linear(4, 2))
    rules = {pattern: {"exclude": True}}
    assert list(survey(model, rules).layers) == ["0.body", "1"]
    assert reasons(model, rules=rules)["0.token"] == "excluded by a rule"


def test_the_name_of_a_parameter_of_a_layer_is_no_pattern():
    with pytest.raises(kc.ArgumentError, match=r"'0\.weight' matches no module"):
        survey(classifier(), {"0.weight": {"exclude": True}})


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [
        ((), (1, 1)),
        ((5,), (5, 1)),
        ((1, 1, 5), (5, 1)),
        ((5, 1), (5, 1)),
        ((2, 3), (2, 3)),
        ((1, 2, 3), (2, 3)),
        ((4, 2, 3), (4, 2, 3)),
        ((4, 1, 2, 3), (4, 2, 3)),
        ((4, 2, 1, 3), (4, 2, 3)),
        ((4, 2, 3, 1), (4, 2, 3)),
        ((4, 5, 2, 3), (20, 2, 3)),
    ],
)
def test_a_parameter_is_a_stack_of_matrices_and_back(shape, matrix):
    layout = universal_layout("p", shape)
    assert layout.matrix_shape == matrix
    values = torch.randn(shape)
    there = layout.to_matrix({"p": values})
    assert torch.equal(there.flatten(), values.flatten())
    assert torch.equal(layout.from_matrix(there)["p"], values)


def test_parametrised_weights_are_covered_where_they_train():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)))
    assert set(survey(model).layers) == {
        "0.bias",
        "0.parametrizations.weight.original0",
        "0.parametrizations.weight.original1",
    }


def test_a_tied_embedding_is_one_parameter_which_either_name_excludes():
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    model[1].weight = model[0].weight
    (layer,) = survey(model).layers.values()
    assert layer.name == "0.weight"
    for pattern in ("0", "1", "0.weight"):
        assert not survey(model, {pattern: {"exclude": True}}).layers


@pytest.mark.parametrize(
    ("pattern", "names"),
    [("*.head", ["head", "body.head"]), ("head", ["head"]), ("body.*", ["body.head", "body.ahead"]), ("?head", [])],
)
def test_a_leading_star_and_dot_stand_for_the_model_itself_too(pattern, names):
    body = nn.ModuleDict({"head": nn.Linear(2, 2), "ahead": nn.Linear(2, 2)})
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "body": body})
    if not names:
        with pytest.raises(kc.ArgumentError, match="matches no module"):
            survey(model, {pattern: {"damping": 1.0}})
        return
    layers = survey(model, {pattern: {"damping": 1.0}}).layers
    assert [name for name, layer in layers.items() if layer.rule.damping] == names
