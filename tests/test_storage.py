"""Moving averages kept in bfloat16: what is lost, what is kept, and where it cannot be asked for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

BFLOAT16 = {"*": {"storage": torch.bfloat16}}
SCHEDULE = kc.Schedule(factors=1, inverses=5)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 4)).float()


def trained(rules: dict, steps: int, module: nn.Module | None = None, kfac: kc.KFAC | None = None, first: int = 0):
    """A KFAC after so many steps, and the gradients that it gave in the last."""
    module = model() if module is None else module
    # The parameters stay: what differs is what was averaged.
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(module.parameters(), lr=0.0)
    data = kc.Data(seed=0)
    kfac = kfac or kc.KFAC(module, criterion, damping=1e-2, schedule=SCHEDULE, rules=rules, data=data)
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(64, 20, generator=generator, dtype=torch.float32).to(next(module.parameters()).dtype)
        y, drawn = torch.randint(4, (2, 64), generator=generator)
        optimizer.zero_grad()
        outputs = module(x)
        kfac.update(outputs, draws=drawn)
        criterion(outputs, y).backward()
        kfac.precondition()
        optimizer.step()
    return kfac, torch.cat([p.grad.flatten() for p in module.parameters()])


def test_it_takes_half_the_memory_and_the_bytes_are_those_predicted():
    kfac, _ = trained(BFLOAT16, 2)
    plain, _ = trained({}, 2)
    average = kfac._shared.factors.average
    assert {one.dtype for store in (average.A, average.G) for one in store.values()} == {torch.bfloat16}
    counts = sum(8 * 2 for _ in kfac.layers)
    assert 2 * (kfac.coverage().factor_bytes - counts) == plain.coverage().factor_bytes - counts


def distance(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(found.double() - expected) / torch.linalg.vector_norm(expected))


def test_the_factors_and_what_they_precondition_are_those_of_float64_up_to_a_percent():
    """In float32 they are up to some millionths."""
    exact, gradient = trained({}, 11, model().double())
    kfac, found = trained(BFLOAT16, 11)
    for name, block in exact.fisher().items():
        mine = kfac.fisher()[name]
        assert 1e-4 < distance(mine.A, block.A) < 1e-2
        assert 1e-4 < distance(mine.G, block.G) < 1e-2
    assert 1e-4 < distance(found, gradient) < 2e-2


def test_a_resumed_run_goes_on_bitwise():
    module = model()
    kfac, _ = trained(BFLOAT16, 3, module)
    other = copy.deepcopy(module)
    fresh = kc.KFAC(other, nn.CrossEntropyLoss(), damping=1e-2, schedule=SCHEDULE, rules=BFLOAT16, data=kc.Data(seed=0))
    fresh.load_state_dict(kfac.state_dict())
    _, expected = trained(BFLOAT16, 4, module, kfac, first=3)
    _, found = trained(BFLOAT16, 4, other, fresh, first=3)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("structure", ["ekfac", "tkfac", "diagonal"])
def test_it_is_for_factors(structure):
    with pytest.raises(kc.ArgumentError, match=r"layer '0' has storage=torch.bfloat16: it is for the moving averages"):
        kc.KFAC(model(), "categorical", structure=structure, rules=BFLOAT16)


def test_an_estimate_has_no_averages():
    with pytest.raises(kc.ArgumentError, match="it is for the moving averages of training in 'kfac'"):
        kc.estimate(model(), [torch.randn(4, 20)], "categorical", rules=BFLOAT16)


def test_another_dtype_is_refused():
    with pytest.raises(kc.ArgumentError, match=r"torch.bfloat16 or None"):
        kc.KFAC(model(), "categorical", rules={"*": {"storage": torch.float16}})
