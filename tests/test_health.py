"""What went wrong on the device: kept out, counted, named once, and stopped only when it must be."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.health import Health
from kfac_cond.linalg.ladder import Rung

from .training import HostReads, batches, gradients_of, network, parameters_of, train


def wrapped(model: nn.Module, **options):
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.05)
    options = {"damping": 0.1, "schedule": kc.Schedule(factors=1, inverses=2, patience=2), **options}
    kfac = kc.KFAC(model, criterion, **options)
    kfac.attach(optimizer)
    return kfac, criterion, optimizer


def forward_alone(kfac: kc.KFAC, criterion, optimizer, model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    """A step whose forward is not finite and whose gradients are zero, so that the parameters stay finite."""
    optimizer.zero_grad()
    criterion(model(inputs), labels)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def poisoned(batch):
    return batch[0] * torch.nan, batch[1]


def test_a_batch_that_is_not_finite_is_kept_out():
    model, data = network(), batches(2)
    kfac, criterion, optimizer = wrapped(model)
    train(model, criterion, optimizer, data[:1])
    before = copy.deepcopy(dict(kfac.state_dict()["layers"])["0"]["average"])
    forward_alone(kfac, criterion, optimizer, model, *poisoned(data[1]))
    after = dict(kfac.state_dict()["layers"])["0"]["average"]
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_it_is_warned_of_once_with_the_layer(value, caplog):
    model, data = network(), batches(3)
    kfac, criterion, optimizer = wrapped(model)
    train(model, criterion, optimizer, data[:1])
    with caplog.at_level(logging.WARNING, "kfac_cond"):
        forward_alone(kfac, criterion, optimizer, model, data[1][0] * value, data[1][1])
        train(model, criterion, optimizer, [data[2], data[0], data[1]])
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "1 of the last 2 captures" in messages[0]
    assert "layer '0'" in messages[0]
    assert kfac.metrics()["kfac/skipped_captures"] == 1


def test_the_first_capture_not_finite_stops_and_changes_nothing():
    model, data = network(), batches(1)
    kfac, criterion, optimizer = wrapped(model)
    before = parameters_of(model)
    with pytest.raises(kc.NumericalError, match=r"layer '0'.*there are none before"):
        forward_alone(kfac, criterion, optimizer, model, *poisoned(data[0]))
    assert torch.equal(parameters_of(model), before)
    assert kfac.step == 0


def test_a_run_goes_on_after_the_first_batch_was_mended():
    model, data = network(), batches(1)
    kfac, criterion, optimizer = wrapped(model)
    with pytest.raises(kc.NumericalError):
        forward_alone(kfac, criterion, optimizer, model, *poisoned(data[0]))
    train(model, criterion, optimizer, data)
    assert torch.isfinite(kfac.fisher()["0"].A).all()


def test_after_patience_the_run_is_stopped():
    model, data = network(), batches(1)
    kfac, criterion, optimizer = wrapped(model)
    train(model, criterion, optimizer, data)
    for _ in range(3):
        forward_alone(kfac, criterion, optimizer, model, *poisoned(data[0]))
    with pytest.raises(kc.NumericalError, match="2 refreshes in a row"):
        forward_alone(kfac, criterion, optimizer, model, *poisoned(data[0]))


def test_a_bad_micro_batch_does_not_spoil_the_good_one():
    model, data = network(), batches(2)
    kfac, criterion, optimizer = wrapped(model)
    criterion(model(data[0][0]), data[0][1]).backward()
    plain = gradients_of(model)
    criterion(model(data[1][0] * torch.nan), data[1][1])
    optimizer.step()
    rows = torch.cat([data[0][0], torch.ones(8, 1)], 1)
    torch.testing.assert_close(kfac.fisher()["0"].A, rows.mT @ rows / 8)
    assert not torch.equal(model[0].weight.grad, plain["0.weight"])


# -- labels ---------------------------------------------------------------------------------------------------------


def test_draws_out_of_range_are_an_error_at_the_refresh():
    model, (inputs, labels) = network(), batches(1)[0]
    kfac = kc.KFAC(model, "categorical")
    outputs = model(inputs)
    kfac.update(outputs, draws=torch.full((8,), 2))
    nn.functional.cross_entropy(outputs, labels).backward()
    plain = gradients_of(model)
    with pytest.raises(kc.LikelihoodError, match="1 of the last 1 captures had labels out of"):
        kfac.precondition()
    assert torch.equal(model[0].weight.grad, plain["0.weight"])
    assert kfac.step == 0


def test_data_labels_out_of_range_are_an_error():
    model, (inputs, labels) = network(), batches(1)[0]
    kfac = kc.KFAC(model, kc.Categorical(weight=torch.ones(2)))
    outputs = model(inputs)
    kfac.update(outputs, targets=labels + 5)
    outputs.sum().backward()
    with pytest.raises(kc.LikelihoodError, match="ignore_index"):
        kfac.precondition()


# -- no valid term --------------------------------------------------------------------------------------------------


def ignored(batch):
    return batch[0], torch.full_like(batch[1], -100)


def finite_step(criterion, optimizer, model: nn.Module, batch) -> None:
    """The mean over no term is NaN: what a careful loop makes of it."""
    optimizer.zero_grad()
    criterion(model(batch[0]), batch[1]).nan_to_num().backward()
    for parameter in model.parameters():
        parameter.grad.nan_to_num_()
    optimizer.step()


def test_a_batch_without_valid_terms_is_skipped():
    model, data = network(), batches(2)
    kfac, criterion, optimizer = wrapped(model)
    train(model, criterion, optimizer, data[:1])
    before = kfac.fisher()["0"]
    finite_step(criterion, optimizer, model, ignored(data[1]))
    assert torch.equal(kfac.fisher()["0"].A, before.A)
    assert torch.equal(kfac.fisher()["0"].G, before.G)
    assert kfac.metrics()["kfac/skipped_captures"] == 0


@pytest.mark.parametrize("empty", [1, 2])
def test_as_the_first_it_leaves_gradients_and_the_next_step_is_due(empty):
    model, data = network(), batches(4)
    kfac, criterion, optimizer = wrapped(model, schedule=kc.Schedule(factors=10, inverses=10))
    before = parameters_of(model)
    for batch in data[:empty]:
        finite_step(criterion, optimizer, model, ignored(batch))
    assert torch.equal(parameters_of(model), before)
    train(model, criterion, optimizer, data[3:])
    rows = torch.cat([data[3][0], torch.ones(8, 1)], 1)
    torch.testing.assert_close(kfac.fisher()["0"].A, rows.mT @ rows / 8)
    assert "inverses of 2 of 2" in str(kfac)


# -- the ladder -----------------------------------------------------------------------------------------------------

SINGULAR = {rule: kc.Damping(0.0, rule=rule) for rule in ("factored", "exact")}


@pytest.mark.parametrize("rule", SINGULAR)
def test_singular_factors_without_damping_climb_and_are_named(rule, caplog):
    model = network()
    _, criterion, optimizer = wrapped(model, damping=SINGULAR[rule], schedule=kc.Schedule(factors=1, inverses=1))
    inputs, labels = torch.ones(2, 3), torch.tensor([0, 1])
    with caplog.at_level(logging.WARNING, "kfac_cond"):
        criterion(model(inputs), labels).backward()
        optimizer.step()
    named = [record.getMessage() for record in caplog.records if "rung" in record.getMessage()]
    assert any("layer '0'" in message for message in named)
    assert torch.isfinite(model[0].weight.grad).all()


def test_a_layer_without_a_factorisation_for_patience_refreshes_stops_the_run():
    health = Health(["a", "b"], patience=2)
    health.climbed({"a": Rung.PREVIOUS, "b": Rung.FIRST})
    with pytest.raises(kc.NumericalError, match="layer 'a': no factorisation for 2 refreshes"):
        health.climbed({"a": Rung.IDENTITY, "b": Rung.FIRST})


def test_a_factorisation_that_succeeds_ends_the_count():
    health = Health(["a"], patience=2)
    health.climbed({"a": Rung.PREVIOUS})
    health.climbed({"a": Rung.MORE_DAMPING})
    health.climbed({"a": Rung.PREVIOUS})
    assert health.failures == {"a": 1}


@pytest.mark.parametrize("rung", [Rung.MORE_DAMPING, Rung.DOUBLE, Rung.PREVIOUS, Rung.IDENTITY])
def test_each_rung_is_logged_once(rung, caplog):
    health = Health(["a"], patience=10)
    with caplog.at_level(logging.WARNING, "kfac_cond"):
        health.climbed({"a": rung})
        health.climbed({"a": rung})
    assert [record.getMessage().endswith(rung.name) for record in caplog.records] == [True]


# -- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2], ids=["plain", "factors"])
def test_steps_between_refreshes_read_nothing(step):
    model, data = network(), batches(3)
    options = {"schedule": kc.Schedule(factors=2, inverses=4), "trust_region": kc.KLClip(1e-3)}
    _, criterion, optimizer = wrapped(model, **options)
    train(model, criterion, optimizer, data[:step])
    with HostReads() as reads:
        train(model, criterion, optimizer, data[step : step + 1])
    assert reads.count == 0
