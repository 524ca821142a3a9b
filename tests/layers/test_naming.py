"""Canonical names: those of the model its author wrote, whatever wraps it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import kfac_cond as kc
from kfac_cond.layers.naming import join, named_modules
from kfac_cond.layers.survey import survey

from ..helpers import classifier


class HasModule(nn.Module):
    """An attribute of one's own that is called ``module``."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)


def checkpointed() -> nn.Module:
    model = classifier()
    model[2] = checkpoint_wrapper(model[2])
    return model


def compiled_inside() -> nn.Module:
    model = classifier()
    model[0] = torch.compile(model[0], backend="eager")
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        classifier,
        lambda: torch.compile(classifier(), backend="eager"),
        lambda: nn.DataParallel(classifier()),
        checkpointed,
        compiled_inside,
        lambda: torch.compile(checkpointed(), backend="eager"),
    ],
)
def test_wrappers_leave_no_mark_on_names(wrap):
    rows = survey(wrap()).rows
    assert [row.path for row in rows] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert all(row.covered for row in rows)


def test_an_attribute_called_module_is_a_name():
    assert [name for name, _ in named_modules(HasModule())] == ["", "module"]


def test_a_module_held_twice_comes_twice():
    layer = nn.Linear(2, 2)
    assert [name for name, _ in named_modules(nn.Sequential(layer, layer))] == ["", "0", "1"]


@pytest.mark.parametrize(("module", "name"), [("", "weight"), ("a.b", "a.b.weight")])
def test_the_name_of_a_parameter(module, name):
    assert join(module, "weight") == name


def test_a_checkpoint_wrapper_is_captured_through():
    model, inputs, options = checkpointed(), torch.randn(4, 3), kc.Options(seed=1)
    found = kc.estimate(model, [inputs], "categorical", options=options)
    assert list(found) == ["0", "2"]
