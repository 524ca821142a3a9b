"""torch.compile, of the whole and of a part, before and after wrapping: due steps run as Python, others compiled."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .helpers import assert_same_fisher
from .reference import assert_same
from .training import batches, parameters_of

DUE, STEPS = 4, 20


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counting:
    """A backend that runs graphs as they are, and counts them and their runs."""

    def __init__(self) -> None:
        self.compiled = self.runs = 0

    def __call__(self, graph: Any, examples: Any) -> Callable[..., Any]:
        self.compiled += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Network(nn.Module):
    """With a parameter in the universal form between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale, self.head = Body(), nn.Parameter(torch.ones(5)), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) * self.scale)


def whole(model: Network, backend: Any) -> Any:
    return torch.compile(model, backend=backend)


def part(model: Network, backend: Any) -> Any:
    model.body = torch.compile(model.body, backend=backend)
    return model


def part_in_place(model: Network, backend: Any) -> Any:
    model.body.compile(backend=backend)
    return model


def forward_of_a_part(model: Network, backend: Any) -> Any:
    model.body.forward = torch.compile(model.body.forward, backend=backend)
    return model


def in_place(model: Network, backend: Any) -> Any:
    model.compile(backend=backend)
    return model


PARTS = [part, part_in_place, forward_of_a_part]
WAYS = [(whole, "before"), *((way, when) for way in PARTS for when in ("before", "after"))]


def trained(
    way: Callable[..., Any] | None, when: str, likelihood: Any, backend: Any
) -> tuple[Tensor, kc.Fisher, list[int]]:
    """Parameters and factors after some steps with evaluations between, and the backend's runs in each step."""
    torch.manual_seed(0)
    model = Network()
    called = way(model, backend) if way is not None and when == "before" else model
    criterion = nn.CrossEntropyLoss()
    schedule = kc.Schedule(factors=DUE, inverses=DUE)
    kfac = kc.KFAC(called, likelihood or criterion, schedule=schedule, data=kc.Data(seed=1))
    if way is not None and when == "after":
        called = way(model, backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac.attach(optimizer)
    runs = []
    for inputs, labels in batches(STEPS):
        before = getattr(backend, "runs", 0)
        optimizer.zero_grad()
        criterion(called(inputs), labels).backward()
        optimizer.step()
        runs.append(getattr(backend, "runs", 0) - before)
        with torch.no_grad():
            called(inputs)
    return parameters_of(model), kfac.fisher(), runs


@pytest.mark.parametrize("likelihood", [None, "categorical"], ids=["criterion", "forward"])
@pytest.mark.parametrize(("way", "when"), WAYS, ids=lambda one: getattr(one, "__name__", one))
def test_training_is_that_of_the_plain_model(way, when, likelihood):
    backend = Counting()
    parameters, factors, runs = trained(way, when, likelihood, backend)
    expected, plain, _ = trained(None, "", likelihood, "eager")
    assert torch.equal(parameters, expected)
    assert_same_fisher(factors, plain)
    assert [step for step, count in enumerate(runs) if not count] == list(range(0, STEPS, DUE))
    # One with gradients and one without, and none because another step is due.
    assert backend.compiled == 2


def test_training_through_an_ahead_of_time_backend():
    found, expected = trained(whole, "before", None, "aot_eager"), trained(None, "", None, "eager")
    assert_same(found[0], expected[0])


@pytest.mark.parametrize("way", [whole, in_place, *PARTS])
def test_an_estimate_is_that_of_the_plain_model(way):
    model, backend = Network(), Counting()
    plain = copy.deepcopy(model)
    called, inputs, options = way(model, backend), torch.randn(6, 3), kc.Options(seed=1)
    called(inputs)
    runs = backend.runs
    found = kc.estimate(called, [inputs], "categorical", options=options)
    assert_same_fisher(found, kc.estimate(plain, [inputs], "categorical", options=options))
    exact = kc.implicit(plain, [inputs], "categorical").to_dense()
    assert_same(kc.implicit(called, [inputs], "categorical").to_dense(), exact)
    assert_same(kc.gram(called, [inputs], "categorical").fisher().to_dense(), exact)
    assert backend.runs == runs
    called(inputs)
    assert backend.runs > runs


def test_a_model_that_compiles_its_own_call_is_refused():
    model = in_place(Network(), "eager")
    with pytest.raises(kc.CoverageError, match=r"give KFAC what torch\.compile\(model\) returns"):
        kc.KFAC(model, "categorical")
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("way", [whole, in_place])
def test_a_model_compiled_after_wrapping_is_an_error_at_the_due_step(way):
    with pytest.raises(kc.CaptureError, match=r"compile first, and give KFAC what torch\.compile\(model\) returns"):
        trained(way, "after", None, "eager")


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            raise ValueError("one example")
        return x


def test_after_an_exception_in_a_due_forward_the_model_runs_compiled_again():
    backend = Counting()
    model = nn.Sequential(nn.Linear(3, 3), torch.compile(nn.Sequential(nn.Linear(3, 3)), backend=backend), Fails())
    kfac = kc.KFAC(model, "categorical")
    with pytest.raises(ValueError, match="one example"):
        model(torch.randn(1, 3))
    assert backend.runs == 0
    with kfac.paused():
        model(torch.randn(4, 3))
    assert backend.runs == 1


def test_due_forwards_of_two_threads_overlap():
    """The compiler's stance is one for the process: the second to begin must not leave it as the first had set it."""
    backend, inside, go_on = Counting(), threading.Event(), threading.Event()

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inside.set()
            assert go_on.wait(20)
            return x

    def model(last: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 3), last, torch.compile(nn.Sequential(nn.Linear(3, 3)), backend=backend))

    slow, quick = model(Waits()), model(nn.Identity())
    kfacs = [kc.KFAC(one, "categorical") for one in (slow, quick)]
    thread = threading.Thread(target=slow, args=(torch.randn(4, 3),))
    thread.start()
    assert inside.wait(20)
    quick(torch.randn(4, 3))
    go_on.set()
    thread.join()
    assert backend.runs == 0
    assert all(len(kfac._intake.capture.fired) == 2 for kfac in kfacs)
    with kfacs[1].paused():
        quick(torch.randn(4, 3))
    assert backend.runs == 1
