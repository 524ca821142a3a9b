"""Nothing is dropped without a word: changed layers, layers no score reaches, forgotten updates, foreign criteria."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .helpers import EVERY_STEP, classifier


def step(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    criterion(model(torch.randn(6, 3)), torch.randint(3, (6,))).backward()
    optimizer.step()


def frozen_first(model: nn.Sequential) -> None:
    model[0].requires_grad_(False)


def unfreeze(model: nn.Sequential) -> None:
    model[0].requires_grad_(True)


def replace_head(model: nn.Sequential) -> None:
    model[2] = nn.Linear(4, 3)


def add_layer(model: nn.Sequential) -> None:
    model.append(nn.Linear(3, 3))


def nothing(model: nn.Sequential) -> None:
    pass


CHANGES = [
    pytest.param(frozen_first, unfreeze, "0", id="unfrozen"),
    pytest.param(nothing, replace_head, "2", id="replaced head"),
    pytest.param(nothing, frozen_first, "0", id="frozen"),
    pytest.param(nothing, add_layer, "3", id="added"),
]
Change = Callable[[nn.Sequential], None]


@pytest.mark.parametrize(("before", "change", "name"), CHANGES)
def test_a_changed_layer_is_named_at_the_next_due_step(before: Change, change: Change, name: str):
    model, criterion = classifier(), nn.CrossEntropyLoss()
    before(model)
    kfac = kc.KFAC(model, criterion, schedule=EVERY_STEP)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac.attach(optimizer)
    step(model, criterion, optimizer)
    change(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac.attach(optimizer)
    with pytest.raises(kc.ModelChangedError, match=rf"(layer '{name}'|: {name})[\s\S]*kfac\.refresh\(\)"):
        step(model, criterion, optimizer)
    kfac.refresh()
    step(model, criterion, optimizer)
    assert set(kfac.fisher()) == set(kfac.layers)


def test_a_replaced_head_is_not_covered_until_refresh():
    model = classifier()
    kfac = kc.KFAC(model, nn.CrossEntropyLoss())
    replace_head(model)
    rows = {row.path: row for row in kfac.coverage().rows}
    assert not rows["2.weight"].covered
    assert rows["2.weight"].remedy == "kfac.refresh()"
    kfac.refresh()
    assert kfac.coverage().share == 1.0


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.stem(x))
        return self.left(h), self.right(h)


def test_a_head_that_no_score_reaches_is_named(caplog):
    model = TwoHeads()
    kfac = kc.KFAC(model, kc.Categorical(), schedule=EVERY_STEP)
    left, right = model(torch.randn(5, 3))
    kfac.update(left)
    (left.sum() + right.sum()).backward()
    with caplog.at_level(logging.WARNING, logger="kfac_cond"):
        kfac.precondition()
    assert "do not depend on them: right" in caplog.text
    assert [row.path for row in kfac.coverage().rows if not row.covered] == ["right.weight", "right.bias"]


def test_a_mask_that_no_layer_takes_is_named(caplog):
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    data = kc.Data(positions=lambda args, kwargs, outputs: torch.ones(4, 2, dtype=torch.bool))
    kfac = kc.KFAC(model, kc.Categorical(), schedule=EVERY_STEP, data=data)
    outputs = model(torch.randn(4, 2, 3))
    kfac.update(outputs)
    outputs.sum().backward()
    with caplog.at_level(logging.WARNING, logger="kfac_cond"):
        kfac.precondition()
    assert "no layer has positions of that shape" in caplog.text


def test_a_forgotten_update_is_an_error():
    model = classifier()
    kfac = kc.KFAC(model, kc.Categorical(), schedule=EVERY_STEP)
    outputs = model(torch.randn(5, 3))
    kfac.update(outputs)
    outputs.sum().backward()
    kfac.precondition()
    model(torch.randn(5, 3)).sum().backward()
    with pytest.raises(kc.CaptureError, match="was not called for its forward"):
        kfac.precondition()


def test_a_criterion_does_not_keep_models_alive():
    criterion = nn.CrossEntropyLoss()
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion, schedule=EVERY_STEP)
    kfac.attach(optimizer)
    step(model, criterion, optimizer)
    gone = weakref.ref(model)
    del model, optimizer, kfac
    gc.collect()
    assert gone() is None
    assert not criterion._forward_pre_hooks


def test_a_second_head_of_another_form_is_refused():
    """Its outputs come from a forward of ours: not a call of somebody else's."""
    model, criterion = TwoHeads(), nn.CrossEntropyLoss()
    kfac = kc.KFAC(model, criterion, schedule=EVERY_STEP)
    kfac.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    left, right = model(torch.randn(5, 3))
    criterion(left, torch.randint(3, (5,)))
    with pytest.raises(kc.LikelihoodError):
        criterion(right[0], torch.tensor(1))


def test_a_broadcasting_call_of_another_model_is_ignored():
    model, other, criterion = nn.Linear(3, 2), nn.Linear(3, 2), nn.MSELoss()
    kfac = kc.KFAC(model, criterion, schedule=EVERY_STEP)
    kfac.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match="broadcast"):
        criterion(other(torch.randn(4, 3)), torch.randn(4, 1))
    with pytest.raises(kc.LikelihoodError, match="broadcast"):
        criterion(model(torch.randn(4, 3)), torch.randn(4, 1))


def test_mixed_up_labels_in_two_calls_are_refused_with_the_remedy():
    model, criterion = classifier(), nn.CrossEntropyLoss()
    kfac = kc.KFAC(model, criterion, schedule=EVERY_STEP)
    kfac.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    outputs, labels = model(torch.randn(5, 3)), torch.randint(3, (5,))
    criterion(outputs, labels)
    with pytest.raises(kc.CaptureError, match="mixed probabilities"):
        criterion(outputs, labels.flip(0))
