"""The monitor: what it measures by brute force, that it disturbs nothing, and what becomes of what it finds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import kfac_cond as kc

from ..test_synchronisation import MODELS, SETTINGS, Reads, steps
from ..training import batches, convolutional, network, noisy_network, parameters_of, train

#: Every setting, and every model.
CASES = [*((setting, "linear") for setting in SETTINGS), *(("exact", model) for model in MODELS if model != "linear")]
RULES = {"factored": kc.Damping(0.1), "exact": kc.Damping(0.1, rule="exact")}


def monitored(
    number: int = 5, *, make: Callable[[], nn.Module] = network, every: int = 1, writer: Any = None, **settings: Any
) -> tuple[kc.Monitor, nn.Module]:
    """After so many steps with factors at every one and inverses at every second."""
    torch.manual_seed(0)
    model, criterion = make(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    settings = {"damping": 0.1, "schedule": kc.Schedule(factors=1, inverses=2, decay=0.9), **settings}
    kfac = kc.KFAC(model, criterion, data=kc.Data(seed=3), **settings)
    kfac.attach(optimizer)
    monitor = kc.Monitor(kfac, every=every, writer=writer)
    train(model, criterion, optimizer, batches(number))
    monitor.flush()
    return monitor, model


class Board:
    """What TensorBoard's writer has, kept."""

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}
        self.histograms: dict[tuple[str, int], torch.Tensor] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag, step] = value

    def add_histogram(self, tag: str, values: torch.Tensor, step: int) -> None:
        self.histograms[tag, step] = values


# -- what it measures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("structure", ["kfac", "tkfac", "ekfac", "diagonal"])
def test_numbers_are_those_of_the_dense_matrices(structure, rule):
    """Of the last step, gone through by hand: gradients kept before it, the factors and inverses after it."""
    torch.manual_seed(0)
    model, criterion, rate = network(), nn.CrossEntropyLoss(), 0.05
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    schedule = kc.Schedule(factors=1, inverses=3, decay=0.9)
    kfac = kc.KFAC(
        model, criterion, damping=RULES[rule], structure=structure, schedule=schedule, trust_region=kc.KLClip(1e-4)
    )
    kfac.attach(optimizer)
    monitor = kc.Monitor(kfac, every=4)
    *data, (inputs, labels) = batches(5)
    train(model, criterion, optimizer, data)
    optimizer.zero_grad()
    criterion(model(inputs), labels).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    monitor.flush()
    reading, fisher = monitor.readings[-1], kfac.fisher()
    assert reading.step == 4
    updates = {name: p.grad for name, p in model.named_parameters()}
    total = 0.0
    for name, block in fisher.items():
        of, dense = reading.layers[name], block.to_dense()
        g, u, w = (
            block.layout.to_matrix({n: part[n] for n in block.layout.names}).flatten()
            for part in (plain, updates, weights)
        )
        inverse = kfac._shared.factors.inverses[name].to_dense()
        damped = dense + 0.1 * torch.eye(len(g))
        if rule == "factored" and isinstance(block, kc.KroneckerBlock):
            damped = torch.linalg.inv(block.inverse(damping=0.1, rule="factored").to_dense())
        expected = {
            "gradient_norm": g.norm(),
            "update_norm": u.norm(),
            "weight_norm": w.norm(),
            "step_to_weight": rate * u.norm() / w.norm(),
            "cosine": g @ u / g.norm() / u.norm(),
            "decrease": rate * g @ u,
            "kl": rate**2 * u @ dense @ u / 2,
            "trace": dense.trace(),
            "participation": dense.trace() ** 2 / dense.square().sum(),
            "effective_dimension": (dense @ inverse).trace(),
            "residual": (inverse @ damped @ g - g).norm() / g.norm(),
        }
        for key, value in expected.items():
            assert of[key] == pytest.approx(float(value), rel=1e-6, abs=1e-9), key
        assert of["age"] == 1.0
        assert of["failures"] == 0.0
        total += expected["kl"]
    assert reading.whole["kl"] == pytest.approx(float(total))
    assert sum(of["kl_share"] for of in reading.layers.values()) == pytest.approx(1.0)
    assert reading.whole["trust_region_scale"] < 1.0
    # The bound is of the damped form.
    assert 1e-6 < reading.whole["kl"] <= 1e-4


@pytest.mark.parametrize("rule", RULES)
def test_the_turn_of_a_refresh_is_that_of_both_inverses(rule):
    torch.manual_seed(0)
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    kfac = kc.KFAC(model, criterion, damping=RULES[rule], schedule=kc.Schedule(factors=1, inverses=3, decay=0.5))
    kfac.attach(optimizer)
    monitor = kc.Monitor(kfac, every=3)
    *data, (inputs, labels) = batches(4)
    train(model, criterion, optimizer, data)
    old = {name: inverse.to_dense() for name, inverse in kfac._shared.factors.inverses.items()}
    optimizer.zero_grad()
    criterion(model(inputs), labels).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    monitor.flush()
    for name, inverse in kfac._shared.factors.inverses.items():
        g = inverse.layout.to_matrix({n: plain[n] for n in inverse.layout.names}).flatten()
        mine, theirs = old[name] @ g, inverse.to_dense() @ g
        expected = float(mine @ theirs / mine.norm() / theirs.norm())
        assert monitor.readings[-1].layers[name]["stale_cosine"] == pytest.approx(expected, abs=1e-9)
        assert expected < 0.9999


@pytest.mark.parametrize(
    "schedule",
    [kc.Schedule(factors=1, inverses=4, stagger=True), kc.Schedule(factors=1, inverses=kc.Adaptive(0.1))],
    ids=["staggered", "adaptive"],
)
def test_refreshes_of_single_layers_are_noticed(schedule):
    monitor, _ = monitored(12, schedule=schedule)
    seen = {name for reading in monitor.readings for name, of in reading.layers.items() if "stale_cosine" in of}
    assert seen == {"0", "2"}
    ages = [reading.layers["0"]["age"] for reading in monitor.readings]
    assert ages[0] == 0.0
    assert max(ages) >= 1.0


def test_examples_and_dead_units_are_counted():
    monitor, _ = monitored(3, make=lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    weights = torch.tensor([1.0, 0.9, 0.81])
    captures = float(weights.sum() ** 2 / weights.square().sum())
    assert monitor.readings[-1].layers["2"]["effective_examples"] == pytest.approx(8 * captures)

    def dead() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        nn.init.constant_(model[0].bias[:2], -100.0)
        return model

    monitor, _ = monitored(3, make=dead)
    assert monitor.readings[-1].layers["2"]["dead_inputs"] == 2.0
    assert monitor.readings[-1].layers["0"]["dead_outputs"] == 2.0


def test_positions_of_a_convolution_count():
    monitor, _ = monitored_convolution(3)
    assert monitor.readings[0].layers["0"]["effective_positions"] == 8 * 9
    assert monitor.readings[0].layers["0"]["effective_examples"] == 8


def monitored_convolution(number: int) -> tuple[kc.Monitor, nn.Module]:
    model, criterion = convolutional(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    kfac = kc.KFAC(model, criterion, damping=0.1)
    kfac.attach(optimizer)
    monitor = kc.Monitor(kfac, every=1)
    train(model, criterion, optimizer, [(torch.randn(8, 2, 6, 6), torch.randint(3, (8,))) for _ in range(number)])
    monitor.flush()
    return monitor, model


def test_several_optimizers_make_one_reading():
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizers = [torch.optim.SGD(model[index].parameters(), lr=0.1) for index in (0, 2)]
    kfac = kc.KFAC(model, criterion, damping=0.1)
    kfac.attach(*optimizers)
    monitor = kc.Monitor(kfac, every=1)
    for inputs, labels in batches(2):
        model.zero_grad()
        criterion(model(inputs), labels).backward()
        for optimizer in optimizers:
            optimizer.step()
    monitor.flush()
    assert [sorted(reading.layers) for reading in monitor.readings] == [["0", "2"]] * 2


def test_a_layer_that_turns_out_to_have_another_form_is_read_in_that():
    """Its weight is used without a call of its module, which the first capture finds out within its step."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(nn.functional.linear(x, self.layer.weight, self.layer.bias).tanh())

    monitor, _ = monitored(3, make=Functional)
    assert [reading.step for reading in monitor.readings] == [0, 1, 2]
    assert set(monitor.readings[-1].layers) == {"layer.weight", "layer.bias", "out"}


def test_by_hand_as_well():
    model = network()
    kfac = kc.KFAC(model, "categorical", damping=0.1)
    monitor = kc.Monitor(kfac, every=1)
    (inputs, labels), *_ = batches(1)
    outputs = model(inputs)
    kfac.update(outputs)
    nn.functional.cross_entropy(outputs, labels).backward()
    kfac.precondition()
    monitor.flush()
    assert monitor.readings[0].layers["0"]["age"] == 0.0


def test_a_gradient_scaler_leaves_the_numbers_as_they_are():
    """What a fused optimizer is handed; its own factor goes out again."""
    found = []
    for scale in (1.0, 1024.0):
        model, criterion = network(), nn.CrossEntropyLoss()
        for p in model.parameters():
            nn.init.constant_(p, 0.3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        kfac = kc.KFAC(model, criterion, damping=0.1, data=kc.Data(seed=1))
        kfac.attach(optimizer)
        monitor = kc.Monitor(kfac, every=1)
        (inputs, labels), *_ = batches(1)
        (scale * criterion(model(inputs), labels)).backward()
        optimizer.grad_scale = torch.tensor(scale, dtype=torch.float32)
        optimizer.found_inf = torch.tensor(0.0, dtype=torch.float32)
        optimizer.step()
        monitor.flush()
        found.append(monitor.readings[0].layers["0"])
    assert found[0] == pytest.approx(found[1])


# -- that it disturbs nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [network, noisy_network])
@pytest.mark.parametrize("setting", ["factored", "exact", "ekfac", "clipped"])
def test_training_is_bitwise_what_it_is_without(setting, make):
    def run(every: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        model, criterion = make(), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        kfac = kc.KFAC(model, criterion, schedule=kc.Schedule(factors=2, inverses=3), **SETTINGS[setting])
        kfac.attach(optimizer)
        if every is not None:
            kc.Monitor(kfac, every=every, writer=Board())
        train(model, criterion, optimizer, batches(8))
        return parameters_of(model)

    plain = run(None)
    assert torch.equal(run(1), plain)


def watched_steps(monkeypatch: pytest.MonkeyPatch, model: nn.Module, **settings: Any) -> list[Any]:
    """The reads of each of nine steps under a monitor that is due at every third."""
    monitors = []

    class Watched(kc.KFAC):
        def attach(self, *optimizers: torch.optim.Optimizer) -> None:
            super().attach(*optimizers)
            monitors.append(kc.Monitor(self, every=3, writer=Board()))

    monkeypatch.setattr(kc, "KFAC", Watched)
    counts = steps(model, nn.CrossEntropyLoss(), number=9, **settings)
    watched_steps.monitor = monitors[0]
    return counts


@pytest.mark.parametrize(("setting", "model"), CASES)
def test_steps_that_do_not_refresh_read_nothing(monkeypatch, setting, model):
    """Steps 3 and 6 are read at, steps 4 and 8 refresh; the numbers of 3 are written at 4."""
    counts = watched_steps(monkeypatch, MODELS[model](), **SETTINGS[setting])
    plain = steps(MODELS[model](), nn.CrossEntropyLoss(), number=9, **SETTINGS[setting])
    assert [one.total() for one in counts] == [one.total() for one in plain]
    assert counts[3].total() == counts[6].total() == 0
    assert [reading.step for reading in watched_steps.monitor.readings] == [0, 3, 6]


@pytest.mark.parametrize(("setting", "model"), CASES)
def test_steps_on_the_meta_device_run(monkeypatch, setting, model):
    watched_steps(monkeypatch, MODELS[model]().to("meta"), device="meta", **SETTINGS[setting])
    watched_steps.monitor.flush()
    assert not watched_steps.monitor.readings


def test_the_counter_would_see_a_read():
    class Reading:
        def around(self, step):
            next(iter(step.gradients.values())).popitem()[1].sum().item()
            return torch.no_grad()

    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion)
    kfac.attach(optimizer)
    data = batches(2)
    train(model, criterion, optimizer, data[:1])
    kfac.watchers.append(Reading())
    with Reads() as reads:
        train(model, criterion, optimizer, data[1:])
    assert reads.counts.total() > 0


def test_no_backward_is_added(monkeypatch):
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: calls.append(1) or grad(*args, **kwargs))
    monitored(6)
    with_monitor = len(calls)
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    kfac = kc.KFAC(model, criterion, damping=0.1, schedule=kc.Schedule(factors=1, inverses=2))
    kfac.attach(optimizer)
    train(model, criterion, optimizer, batches(6))
    assert len(calls) == 2 * with_monitor


def test_removed_it_looks_on_no_more():
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion)
    kfac.attach(optimizer)
    monitor = kc.Monitor(kfac, every=1)
    train(model, criterion, optimizer, batches(2))
    monitor.remove()
    monitor.remove()
    assert kfac.watchers == []
    train(model, criterion, optimizer, batches(2))
    assert [reading.step for reading in monitor.readings] == [0, 1]


def test_resumed_readings_are_those_of_an_uninterrupted_run():
    def run(model: nn.Module, data: list[Any], state: Any = None) -> tuple[list[Any], Any]:
        criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1)
        kfac = kc.KFAC(model, criterion, schedule=kc.Schedule(factors=1, inverses=4), data=kc.Data(seed=2))
        if state is not None:
            kfac.load_state_dict(state)
        kfac.attach(optimizer)
        monitor = kc.Monitor(kfac, every=2)
        train(model, criterion, optimizer, data)
        monitor.flush()
        kfac.remove()
        return list(monitor.readings), kfac.state_dict()

    data, model = batches(12), network()
    start = copy.deepcopy(model)
    whole, _ = run(model, data)
    first, state = run(start, data[:7])
    second, _ = run(start, data[7:], state)
    found = [(one.step, one.layers) for one in first + second]
    assert found == [(one.step, one.layers) for one in whole]
    assert [one.step for one in whole] == [0, 2, 4, 6, 8, 10]
    assert second[0].layers["0"]["age"] == 0.0
    assert second[1].layers["0"]["age"] == 2.0


# -- what becomes of it -----------------------------------------------------------------------------------------------


def test_a_board_gets_scalars_and_histograms():
    board = Board()
    monitor, _ = monitored(5, every=2, writer=board)
    assert {step for _, step in board.scalars} == {0, 2, 4}
    assert board.scalars["kfac_trace/0", 4] == monitor.readings[-1].layers["0"]["trace"]
    assert board.scalars["kfac/kl", 4] == monitor.readings[-1].whole["kl"]
    fisher = monitor._kfac.fisher()
    assert torch.allclose(board.histograms["kfac_A/2", 4], fisher["2"].A.diagonal())
    assert torch.allclose(board.histograms["kfac_G/2", 4], fisher["2"].G.diagonal())


def test_histograms_of_an_exact_inverse_are_of_eigenvalues():
    board = Board()
    monitor, _ = monitored(1, writer=board, damping=RULES["exact"])
    found = board.histograms["kfac_A/0", 0].sort()[0]
    assert torch.allclose(found, torch.linalg.eigvalsh(monitor._kfac.fisher()["0"].A))


def test_a_callable_gets_step_and_numbers():
    calls: list[Any] = []
    monitor, _ = monitored(4, every=3, writer=lambda step, numbers: calls.append((step, numbers)))
    assert [step for step, _ in calls] == [0, 3]
    assert calls[-1][1] == monitor.readings[-1].flat()
    assert all(isinstance(value, float) for value in calls[-1][1].values())


def test_a_writer_that_raises_is_named_once_and_training_goes_on(caplog):
    def broken(step: int, numbers: dict[str, float]) -> None:
        raise OSError("disk full")

    monitor, _ = monitored(4, writer=broken)
    warnings = [record for record in caplog.records if "its writer" in record.message]
    assert len(warnings) == 1
    assert "disk full" in str(warnings[0].exc_info[1])
    assert monitor.writer_failures == 4
    assert len(monitor.readings) == 4


def test_an_interrupt_in_a_writer_is_not_kept():
    def interrupted(step: int, numbers: dict[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        monitored(2, writer=interrupted)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"every": 0}, "number of steps"), ({"every": True}, "number of steps"), ({"writer": 3}, "SummaryWriter")],
)
def test_bad_arguments_are_named(arguments, said):
    with pytest.raises(kc.ArgumentError, match=said):
        kc.Monitor(kc.KFAC(network(), "categorical"), **arguments)
    with pytest.raises(kc.ArgumentError, match=r"expected a kc\.KFAC"):
        kc.Monitor(network())


# -- alerts -----------------------------------------------------------------------------------------------------------


def codes(monitor: kc.Monitor) -> set[tuple[str, str]]:
    return {(one.code, one.layer) for one in monitor.findings}


def test_a_healthy_run_is_silent(caplog):
    monitor, _ = monitored(13, every=4, damping=0.01, trust_region=kc.KLClip(1e-3))
    assert codes(monitor) == set()
    assert not caplog.records


def test_a_damping_that_hides_the_fisher_is_found(caplog):
    monitor, _ = monitored(3, damping=1e3)
    assert codes(monitor) == {("acts-as-sgd", "0"), ("acts-as-sgd", "2")}
    said = [record.message for record in caplog.records if "acts as SGD" in record.message]
    assert len(said) == 1
    assert "and so in 1 more" in said[0]


def test_a_step_too_large_is_found():
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    kfac = kc.KFAC(model, criterion, damping=0.01)
    kfac.attach(optimizer)
    monitor = kc.Monitor(kfac, every=1)
    train(model, criterion, optimizer, batches(1))
    monitor.flush()
    assert ("large-step", "0") in codes(monitor)


def test_an_average_of_too_few_positions_is_found():
    monitor, _ = monitored(1, make=lambda: nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 2)))
    assert codes(monitor) >= {("few-positions", "0"), ("few-positions", "2")}
    number = next(one for one in monitor.findings if one.code == "few-positions")
    assert (number.number, number.threshold) == (8.0, 20.0)


def test_a_stale_inverse_is_found():
    """Inputs that change their direction between two refreshes, of an average that forgets at once."""
    model, criterion = nn.Sequential(nn.Linear(3, 2)), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    kfac = kc.KFAC(model, criterion, damping=1e-3, schedule=kc.Schedule(factors=1, inverses=2, decay=0.0))
    kfac.attach(optimizer)
    monitor = kc.Monitor(kfac, every=2)
    scales = [torch.tensor([10.0, 1.0, 0.1])] * 2 + [torch.tensor([0.1, 1.0, 10.0])]
    data = [(inputs * scale, labels) for (inputs, labels), scale in zip(batches(3, size=64), scales, strict=True)]
    train(model, criterion, optimizer, data)
    monitor.flush()
    assert ("stale", "0") in codes(monitor)


def test_numbers_that_are_not_finite_are_found():
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion, damping=0.1)
    kfac.attach(optimizer)
    monitor = kc.Monitor(kfac, every=1)
    (inputs, labels), *_ = batches(1)
    criterion(model(inputs), labels).backward()
    model[0].weight.grad[0, 0] = float("nan")
    optimizer.step()
    monitor.flush()
    assert ("not-finite", "0") in codes(monitor)
    assert ("not-finite", "2") not in codes(monitor)


def test_an_overflow_that_a_gradient_scaler_skips_is_no_finding():
    """Of a fused optimizer, which knows on the device; at a step that takes in no factors."""
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    kfac = kc.KFAC(model, criterion, damping=0.1, schedule=kc.Schedule(factors=2, inverses=2))
    kfac.attach(optimizer)
    monitor = kc.Monitor(kfac, every=1)
    for overflow, (inputs, labels) in zip((0.0, 1.0), batches(2), strict=True):
        optimizer.zero_grad()
        criterion(model(inputs), labels).backward()
        if overflow:
            model[0].weight.grad[0, 0] = float("inf")
        optimizer.grad_scale = torch.tensor(2.0, dtype=torch.float32)
        optimizer.found_inf = torch.tensor(overflow, dtype=torch.float32)
        optimizer.step()
    monitor.flush()
    assert monitor.readings[-1].step == 1
    assert monitor.readings[-1].layers["0"]["gradient_norm"] == float("inf")
    assert not [one for one in monitor.findings if one.code == "not-finite"]


def test_captures_left_out_are_found():
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    kfac = kc.KFAC(model, criterion, damping=0.1, schedule=kc.Schedule(factors=1, inverses=1))
    kfac.attach(optimizer)
    monitor = kc.Monitor(kfac, every=1)
    data = batches(3)
    data[1][0][0] = float("inf")
    for inputs, labels in data:
        optimizer.zero_grad()
        criterion(model(inputs), labels).backward()
        for p in model.parameters():
            p.grad.nan_to_num_()
        optimizer.step()
    monitor.flush()
    found = {one.code for reading in monitor.readings for one in reading.findings}
    assert "skipped-captures" in found
