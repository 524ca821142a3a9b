"""What is read from a batch and from a call of the model."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.data import call_model, leading_dimension

MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


class Echo(nn.Module):
    """Returns what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


@pytest.mark.parametrize("name", ["mask", "positions", "outputs", "targets"])
def test_a_pick_must_be_callable(name):
    with pytest.raises(kc.ArgumentError, match=rf"Data\({name}=...\): found Tensor"):
        kc.Data(**{name: MASK})


@pytest.mark.parametrize("seed", ["a", 1.5, True])
def test_a_seed_must_be_a_whole_number(seed):
    with pytest.raises(kc.ArgumentError, match=r"Data\(seed="):
        kc.Data(seed=seed)


@pytest.mark.parametrize(
    "wrap", [lambda h: h, lambda h: {"logits": h}, lambda h: UserDict(logits=h), lambda h: SimpleNamespace(logits=h)]
)
def test_outputs_are_found(wrap):
    h = torch.zeros(2, 3)
    assert kc.Data().pick_outputs((), {}, wrap(h)) is h


@pytest.mark.parametrize(
    ("output", "described"),
    [
        ((torch.zeros(2), 1), r"tuple of \['Tensor', 'int'\]"),
        ({"scores": torch.zeros(2)}, r"dict with keys \['scores'\]"),
        (None, "NoneType"),
        (SimpleNamespace(logits=None), "SimpleNamespace"),
    ],
)
def test_outputs_that_are_not_found_are_described(output, described):
    with pytest.raises(kc.CaptureError, match=described):
        kc.Data().pick_outputs((), {}, output)


def test_a_pick_that_returns_no_tensor_is_refused():
    with pytest.raises(kc.CaptureError, match=r"Data\(outputs="):
        kc.Data(outputs=lambda args, kwargs, outputs: outputs[1]).pick_outputs((), {}, (torch.zeros(2), "x"))


def test_a_pick_is_handed_the_call():
    seen: list[Any] = []
    kc.Data(outputs=lambda *call: seen.extend(call) or torch.zeros(1)).pick_outputs((1,), {"a": 2}, 3)
    assert seen == [(1,), {"a": 2}, 3]


@pytest.mark.parametrize(
    ("kwargs", "found"),
    [
        ({}, None),
        ({"attention_mask": MASK}, MASK.bool()),
        ({"attention_mask": MASK[:, None, None]}, None),
        ({"attention_mask": None}, None),
    ],
)
def test_positions_come_from_a_two_dimensional_attention_mask(kwargs, found):
    picked = kc.Data().pick_positions((), kwargs)
    assert picked is found or torch.equal(picked, found)
    assert picked is None or picked.dtype == torch.bool


@pytest.mark.parametrize("value", [MASK[0], MASK[None], 3])
def test_positions_of_another_form_are_refused(value):
    with pytest.raises(kc.CaptureError, match=r"\(batch, length\)"):
        kc.Data(positions=lambda args, kwargs, outputs: value).pick_positions((), {})


def test_positions_may_be_picked_as_none():
    assert kc.Data(positions=lambda *call: None).pick_positions((), {"attention_mask": MASK}) is None


@pytest.mark.parametrize(("terms", "taken"), [((2, 3), True), ((2,), False), ((3, 2), False)])
def test_the_mask_of_terms_is_the_attention_mask_where_it_has_their_shape(terms, taken):
    picked = kc.Data().pick_mask((), {"attention_mask": MASK}, None, terms)
    assert (picked is not None) == taken


@pytest.mark.parametrize(("labels", "taken"), [(torch.zeros(4), True), (torch.zeros(4, 2), False), (None, False)])
def test_labels_among_the_arguments_are_taken_where_there_is_one_an_example(labels, taken):
    assert (kc.Data().pick_targets((), {"labels": labels}, None) is not None) == taken


X, Y = torch.zeros(2, 3), torch.ones(2)


@pytest.mark.parametrize(
    ("batch", "args", "kwargs", "labels"),
    [
        (X, (X,), {}, None),
        ((X,), (X,), {}, None),
        ((X, Y), (X,), {}, Y),
        ([X, Y], (X,), {}, Y),
        ({"x": X}, (), {"x": X}, None),
        (UserDict(x=X, labels=Y), (), {"x": X, "labels": Y}, Y),
        ({"x": X, "n": 3}, (), {"x": X, "n": 3}, None),
    ],
)
def test_a_batch_is_passed_as_its_form_says(batch, args, kwargs, labels):
    (given_args, given_kwargs), found = call_model(Echo(), batch)
    assert all(a is b for a, b in zip(given_args, args, strict=True))
    assert list(given_kwargs) == list(kwargs)
    assert found is labels


@pytest.mark.parametrize("batch", [(X, Y, Y), [X, Y, 3], (X, Y, None)])
def test_a_batch_of_more_than_inputs_and_labels_is_refused(batch):
    with pytest.raises(kc.ArgumentError, match=r"expected \(inputs, labels\)"):
        call_model(Echo(), batch)


class OnlyX(Echo):
    def forward(self, x: Tensor) -> Any:
        return x


def test_labels_that_the_model_does_not_take_are_not_passed():
    outputs, labels = call_model(OnlyX(), {"x": X, "labels": Y})
    assert outputs is X
    assert labels is Y


@pytest.mark.parametrize(
    ("batch", "size"), [(X, 2), ((X, Y), 2), ({"x": X}, 2), ({"n": 3, "x": X}, None), (torch.zeros(()), None)]
)
def test_the_leading_dimension_of_a_batch(batch, size):
    assert leading_dimension(batch) == size


def test_a_batch_goes_to_the_models_device():
    outputs, labels = call_model(OnlyX().to("meta"), (X, Y))
    assert outputs.is_meta
    assert labels.is_meta
