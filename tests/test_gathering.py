"""Whether sums are finite is told by their diagonals, which are finite only where all entries are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kfac_cond as kc
from kfac_cond.layers.sharing import expanded_input_moment
from kfac_cond.layers.survey import survey

LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "positions": (lambda: nn.Linear(4, 3), (5, 6, 4)),
    "convolution": (lambda: nn.Conv2d(2, 3, 3, padding=1), (5, 2, 4, 4)),
    "no padding": (lambda: nn.Conv2d(2, 3, 3), (5, 2, 5, 5)),
    "strided": (lambda: nn.Conv2d(2, 3, 3, stride=2), (5, 2, 5, 5)),
    "groups": (lambda: nn.Conv2d(4, 4, 3, groups=2), (5, 4, 4, 4)),
    "many channels": (lambda: nn.Conv2d(64, 4, 3, padding=1), (5, 64, 4, 4)),
}


@pytest.mark.parametrize("training", [None, "kfac"], ids=["estimate", "training"])
@pytest.mark.parametrize("rules", [None, {"*": {"max_factor_dim": 3}}], ids=["whole", "diagonal"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e160], ids=["nan", "inf", "overflow"])
@pytest.mark.parametrize("case", LAYERS)
def test_a_sum_is_finite_where_its_diagonal_is(case: str, bad: float, rules: dict | None, training) -> None:
    make, shape = LAYERS[case]
    module = make()
    (layer,) = survey(module, rules, training=training).layers.values()
    for at in range(0, min(torch.Size(shape[1:]).numel(), 16), 3):
        x = torch.randn(shape)
        x[2].view(-1)[at] = bad
        a = layer.kind.activations(module, x)
        A, _ = expanded_input_moment(a, None, bias=layer.ones, moment=layer.input_moment)
        told, _ = layer.largest(A, torch.zeros(1))
        assert bool(torch.isfinite(told).all()) == bool(torch.isfinite(A).all())
        assert not torch.isfinite(told).all() or "padding" in case or case == "strided"


class Reduced(TorchDispatchMode):
    """Sizes of what is added up or looked through to one number."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        made = func.overloadpacket is torch.ops.aten.new_zeros
        if not made and isinstance(found, torch.Tensor) and found.dim() == 0 and isinstance(args[0], torch.Tensor):
            self.sizes.append(args[0].numel())
        return found


def test_of_large_sums_no_more_than_the_diagonals_is_read() -> None:
    model, x = nn.Linear(200, 300, bias=False), torch.randn(3, 200)
    with Reduced() as reduced:
        kc.estimate(model, [x], kc.Gaussian(), options=kc.Options(progress=False))
    assert {200, 300} <= set(reduced.sizes)
    assert max(reduced.sizes) < 200 * 200
