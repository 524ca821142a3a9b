"""Refreshes spread over the steps of a period: each layer by the formula at its own steps, and nothing read there."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.linalg.triangles import triangle

from .linalg.conftest import ReadCounter
from .reference import assert_same
from .training import batches, parameters_of, train, wrapped

STAGGERED = kc.Schedule(factors=2, inverses=6, decay=0.7, stagger=True)
KINDS = {
    "factored": {"damping": kc.Damping(0.1)},
    "exact": {"damping": kc.Damping(0.1, rule="exact")},
    "relative": {"damping": kc.Damping(0.1, relative=True)},
    "tkfac": {"structure": "tkfac"},
    "diagonal": {"structure": "diagonal"},
    "ekfac": {"structure": "ekfac"},
    "diagonal sides": {"rules": {"*": {"max_factor_dim": 4}}},
}


def deep() -> nn.Sequential:
    """Five layers of four costs."""
    widths = [3, 4, 5, 5, 4, 2]
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*layers)


def run(number: int, *, schedule: kc.Schedule = STAGGERED, **options) -> Iterator[tuple[int, kc.KFAC, nn.Module]]:
    """A K-FAC after each of so many steps."""
    torch.manual_seed(0)
    model = deep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    kfac, criterion = wrapped(model, optimizer, schedule=schedule, **options)
    for step, batch in enumerate(batches(number)):
        train(model, criterion, optimizer, [batch])
        yield step, kfac, model


def own_steps(kfac: kc.KFAC) -> dict[str, int]:
    return {name: step for step, names in kfac._refreshes._at.items() for name in names}


def inverse_by_formula(kfac: kc.KFAC, name: str) -> Tensor:
    """(F + damping)^-1 of the averages as they are."""
    block, damping = kfac.fisher()[name], kfac.damping
    if not isinstance(block, kc.KroneckerBlock):
        return torch.linalg.inv(block.to_dense() + damping.at(0) * torch.eye(block.layout.numel))
    A, G = (torch.diag(x) if x.ndim == 1 else x for x in (block.A, block.G))
    value = damping.at(0) * (A.trace() * G.trace() / len(A) / len(G) if damping.relative else 1.0)
    value = float(value)
    if damping.rule == "exact":
        return torch.linalg.inv(torch.kron(G, A) + value * torch.eye(block.layout.numel))
    pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
    of_G = torch.linalg.inv(G + value**0.5 / pi * torch.eye(len(G)))
    return torch.kron(of_G, torch.linalg.inv(A + pi * value**0.5 * torch.eye(len(A))))


# -- when --------------------------------------------------------------------------------------------------------------


def test_the_dearest_layers_have_the_steps_with_least_to_do():
    schedule = kc.Schedule(factors=None, inverses=3, stagger=True)
    assert schedule.offsets({"a": 1, "b": 5, "c": 3, "d": 3, "e": 2}) == {"b": 0, "c": 1, "d": 2, "e": 1, "a": 2}


def test_steps_that_capture_have_enough_to_do():
    costs = {str(index): 1 for index in range(8)}
    steps = Counter(kc.Schedule(factors=2, inverses=8, stagger=True).offsets(costs).values())
    assert steps == {1: 2, 3: 2, 5: 2, 7: 2}


@pytest.mark.parametrize("schedule", [kc.Schedule(factors=1, inverses=4), kc.Schedule(factors=3, inverses=4)])
def test_where_no_step_is_free_of_captures_all_take_part(schedule):
    spread = dataclasses.replace(schedule, stagger=True)
    assert set(spread.offsets(dict.fromkeys("abcd", 1)).values()) == {0, 1, 2, 3}


def test_without_it_no_layer_has_a_step_of_its_own():
    assert kc.Schedule().offsets({"a": 1}) == {}


@pytest.mark.parametrize("inverses", [None, lambda step: True, kc.Adaptive()])
def test_it_needs_a_period(inverses):
    with pytest.raises(kc.ArgumentError, match="expected a number of steps, over which the refreshes are spread"):
        kc.Schedule(inverses=inverses, stagger=True)


def test_the_load_is_flat():
    """Within the dearest layer of the least that is possible."""
    generator = torch.Generator().manual_seed(3)
    costs = {str(i): int(c) for i, c in enumerate(torch.randint(1, 1000, (60,), generator=generator))}
    steps = kc.Schedule(factors=10, inverses=20, stagger=True).offsets(costs)
    load: Counter[int] = Counter()
    for name, step in steps.items():
        load[step] += costs[name]
    assert max(load.values()) <= sum(costs.values()) / 18 + max(costs.values())
    assert max(load.values()) < 1.3 * min(load.values())


# -- what --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_has_the_inverse_of_its_own_step(kind):
    expected: dict[str, Tensor] = {}
    for step, kfac, _ in run(14, **KINDS[kind]):
        for name, offset in own_steps(kfac).items():
            if step == 0 or step % 6 == offset or (kind == "ekfac" and step % 2 == 0):
                expected[name] = inverse_by_formula(kfac, name)
        for name, inverse in kfac._shared.factors.inverses.items():
            assert_same(inverse.to_dense(), expected[name])
    assert len(set(own_steps(kfac).values())) > 1


def test_bases_turn_at_the_steps_of_their_layers():
    before: dict[str, Tensor] = {}
    for step, kfac, _ in run(12, structure="ekfac"):
        for name, (basis, _) in kfac._shared.factors.bases.items():
            turned = name in before and not torch.equal(basis, before[name])
            assert turned == (step > 0 and (step % 6 == own_steps(kfac)[name] or name in read_again(kfac, step)))
            before[name] = basis


def read_again(kfac: kc.KFAC, step: int) -> set[str]:
    """What the read of a period found to be too far for one step."""
    return kfac._shared.factors.health.unsettled if step % 6 == 0 else set()


def test_the_update_is_that_of_those_inverses():
    *_, (step, kfac, model) = run(9)
    before = {name: inverse.to_dense() for name, inverse in kfac._shared.factors.inverses.items()}
    model.zero_grad()
    inputs, labels = batches(1, seed=5)[0]
    nn.functional.cross_entropy(model(inputs), labels).backward()
    plain = {
        name: layer.layout.to_matrix({k: p.grad.clone() for k, p in layer.parameters.items()})
        for name, layer in kfac.layers.items()
    }
    assert step + 1 == 9
    own = own_steps(kfac)
    kfac._attachments.remove()
    kfac.precondition()
    for name, layer in kfac.layers.items():
        if own[name] == 9 % 6:
            continue
        found = layer.layout.to_matrix({k: p.grad for k, p in layer.parameters.items()})
        assert_same(found.flatten(), before[name] @ plain[name].flatten())


def test_the_warm_up_refreshes_all():
    schedule = kc.Schedule(factors=2, inverses=6, decay=0.7, stagger=True, warmup=6)
    for step, kfac, _ in run(5, schedule=schedule):
        if step in (0, 2, 4):
            for name, inverse in kfac._shared.factors.inverses.items():
                assert_same(inverse.to_dense(), inverse_by_formula(kfac, name))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_nothing(kind):
    """Once a period what was noted is read; eigh, which has no status to keep, is exempt by name."""
    torch.manual_seed(0)
    model = deep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    _, criterion = wrapped(model, optimizer, schedule=STAGGERED, **KINDS[kind])
    counts = []
    for batch in batches(13):
        with ReadCounter() as reads:
            train(model, criterion, optimizer, [batch])
        counts.append([read for read in reads.names if kind != "exact" or "linalg" not in read])
    assert [step for step, names in enumerate(counts) if names] == [0, 6, 12]
    assert len(counts[6]) <= (5 if kind == "ekfac" else 2)


def test_steps_on_the_meta_device_run():
    model = deep().to("meta")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    _, criterion = wrapped(model, optimizer, schedule=STAGGERED)
    inputs, labels = torch.randn(4, 3, device="meta"), torch.zeros(4, dtype=torch.long, device="meta")
    train(model, criterion, optimizer, [(inputs, labels)] * 8)


def test_a_step_of_a_layer_does_not_wait_for_a_gradient_scaler():
    for step, kfac, _ in run(7):
        due = kfac.captures_now()
        assert due == ((step + 1) % 2 == 0)


# -- what fails --------------------------------------------------------------------------------------------------------


def broken(kfac: kc.KFAC, name: str) -> None:
    """The average of A made indefinite, as round-off may."""
    kfac._shared.factors.average.A[name] *= -1.0


@pytest.mark.parametrize("kind", ["factored", "exact"])
def test_what_fails_keeps_its_inverse_and_is_read_once_a_period(kind, caplog):
    for step, kfac, _ in run(12, **KINDS[kind]):
        own = own_steps(kfac)
        name = next(name for name, offset in own.items() if offset == 5)
        other = next(name for name, offset in own.items() if offset == 3)
        inverse = kfac._shared.factors.inverses[name].to_dense()
        if step == 4:
            kept, others = inverse, kfac._shared.factors.inverses[other].to_dense()
            kfac._shared.factors.average.A[name] *= -1.0 if kind == "factored" else torch.nan
        if step == 5:
            assert torch.equal(inverse, kept)
            assert torch.equal(kfac._shared.factors.inverses[other].to_dense(), others)
            kfac._shared.factors.average.A[name] = triangle(torch.eye(len(kfac.fisher()[name].A)))
            with caplog.at_level(logging.WARNING, "kfac_cond"):
                assert not caplog.records
        if step == 6:
            # Tried again with all that a refresh may do.
            assert kfac._shared.factors.health.unsettled == {name}
            assert_same(inverse, inverse_by_formula(kfac, name))
            assert kfac.metrics()["kfac/unsettled_layers"] == 1
    assert kfac._shared.factors.health.failures[name] == 0


def test_what_fails_for_good_stops_the_run_by_name():
    schedule = kc.Schedule(factors=1, inverses=2, decay=0.7, stagger=True, patience=2)

    def break_each_step() -> None:
        for _, kfac, _ in run(20, schedule=schedule):
            kfac._shared.factors.average.A["0.0"] *= torch.nan

    with pytest.raises(kc.NumericalError, match=r"layer '0\.0': no factorisation for 2 refreshes in a row"):
        break_each_step()


@pytest.mark.parametrize("at", [3, 5, 6, 8])
@pytest.mark.parametrize("kind", ["factored", "exact", "diagonal"])
def test_a_resumed_run_is_the_same_to_the_last_bit(kind, at):
    data = batches(14)

    def made():
        torch.manual_seed(0)
        model = deep()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        return model, optimizer, *wrapped(model, optimizer, schedule=STAGGERED, **KINDS[kind])

    model, optimizer, kfac, criterion = made()
    train(model, criterion, optimizer, data[:at])
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(kfac.state_dict())
    train(model, criterion, optimizer, data[at:])
    again, optimizer, other, criterion = made()
    again.load_state_dict(weights)
    other.load_state_dict(state)
    train(again, criterion, optimizer, data[at:])
    assert torch.equal(parameters_of(again), parameters_of(model))


def test_what_failed_and_was_not_read_survives_a_resume():
    for step, kfac, _ in run(6):
        if step == 4:
            name = next(name for name, offset in own_steps(kfac).items() if offset == 5)
            broken(kfac, name)
    state = kfac.state_dict()
    again, _ = wrapped(copy.deepcopy(deep()), schedule=STAGGERED)
    again.load_state_dict(state)
    assert again._shared.factors.health.read(first=False)
    assert again._shared.factors.health.unsettled == {name}


def test_an_inverse_of_the_other_rule_serves_until_the_next_read():
    for _, kfac, _ in run(3):
        state = kfac.state_dict()
    model = deep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    other, criterion = wrapped(model, optimizer, schedule=STAGGERED, damping=kc.Damping(0.1, rule="exact"))
    other.load_state_dict(state)
    train(model, criterion, optimizer, batches(3))
    kinds = {type(inverse).__name__ for inverse in other._shared.factors.inverses.values()}
    assert kinds == {"KroneckerBlock"}
    train(model, criterion, optimizer, batches(1))
    assert type(other._shared.factors.inverses["0.0"]).__name__ == "EigenBlock"
