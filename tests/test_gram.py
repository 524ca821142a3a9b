"""What the Gram kernel refuses, and when."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.linearised import Linearised

from .helpers import classifier


def test_a_gram_kernel_that_is_too_large_is_refused_before_its_columns_are_made(monkeypatch):
    made: list[int] = []

    class Counted(kc.Categorical):
        def fisher_columns(self, outputs: Tensor) -> Iterator[Tensor]:
            for column in super().fisher_columns(outputs):
                made.append(1)
                yield column

    monkeypatch.setattr(Linearised, "rows", lambda *_: pytest.fail("a row was made"))
    with pytest.raises(kc.ArgumentError, match=r"side of 24000 or more .* the most is 20000: use kc.implicit"):
        kc.gram(nn.Linear(1, 500), [torch.randn(8000, 1)], Counted())
    assert len(made) == 3


def test_a_gram_kernel_of_values_that_are_not_finite_is_refused():
    with pytest.raises(kc.NumericalError, match="not finite"):
        kc.gram(classifier(), [torch.full((2, 3), float("inf"))], "categorical")
