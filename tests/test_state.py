"""Saved and loaded: bitwise resume, and every file that is not the right one refused with nothing changed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .training import batches, network, noisy_network, parameters_of, train

SCHEDULE = kc.Schedule(factors=2, inverses=4)


def build(model: nn.Module, *, explicit: bool = False, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    options = {"damping": 0.1, "schedule": SCHEDULE, "data": kc.Data(seed=3), **options}
    kfac = kc.KFAC(model, "categorical" if explicit else criterion, **options)
    kfac.attach(optimizer)
    return kfac, criterion, optimizer


def run(kfac: kc.KFAC, model: nn.Module, optimizer, data, *, explicit: bool = False, criterion=None) -> None:
    for inputs, labels in data:
        optimizer.zero_grad()
        outputs = model(inputs)
        if explicit:
            kfac.update(outputs)
        (criterion or nn.functional.cross_entropy)(outputs, labels).backward()
        optimizer.step()


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def everything(kfac: kc.KFAC) -> dict[str, Tensor]:
    """Every tensor of the state by path, and its counts."""
    return flattened(kfac.state_dict())


def flattened(state: Any) -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                walk(f"{path}/{key}", child)
        elif isinstance(value, (tuple, list)):
            for index, child in enumerate(value):
                walk(f"{path}/{index}", child)
        elif isinstance(value, Tensor):
            flat[path] = value.clone()
        elif isinstance(value, int | float):
            flat[path] = torch.tensor(value)

    walk("", state)
    return flat


def same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def structure(kfac: kc.KFAC, name: str) -> str:
    """What the inverse of a layer is saved as."""
    return str(dict(kfac.state_dict()["layers"])[name]["inverse"]["structure"])


RULES = {"factored": kc.Damping(0.1), "exact": kc.Damping(0.1, rule="exact")}


@pytest.mark.parametrize("explicit", [False, True], ids=["heard", "explicit"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 6])
def test_resumed_is_uninterrupted_bitwise(stop, rule, explicit):
    """Between captures, at a capture, at a refresh; in a new model, optimizer and preconditioner."""
    start, data = noisy_network().eval(), batches(8)
    models = [copy.deepcopy(start), copy.deepcopy(start), copy.deepcopy(start)]
    whole, before, after = ((*build(m, damping=RULES[rule], explicit=explicit), m) for m in models)

    def go(parts, some) -> None:
        kfac, criterion, optimizer, model = parts
        run(kfac, model, optimizer, some, explicit=explicit, criterion=None if explicit else criterion)

    go(whole, data)
    go(before, data[:stop])
    saved = through_a_file([before[3].state_dict(), before[2].state_dict(), before[0].state_dict()])
    for target, state in zip((after[3], after[2], after[0]), saved, strict=True):
        target.load_state_dict(state)
    go(after, data[stop:])
    assert torch.equal(parameters_of(after[3]), parameters_of(whole[3]))
    assert same(everything(after[0]), everything(whole[0]))


@pytest.mark.parametrize("stop", [1, 2])
def test_resumed_between_refreshes_that_keep_factors_is_uninterrupted_bitwise(stop):
    start, data = noisy_network().eval(), batches(4)
    models = [copy.deepcopy(start), copy.deepcopy(start), copy.deepcopy(start)]
    schedule = kc.Schedule(factors=1, inverses=2)
    whole, before, after = ((*build(m, schedule=schedule), m) for m in models)
    for (kfac, criterion, optimizer, model), some in ((whole, data), (before, data[:stop])):
        run(kfac, model, optimizer, some, criterion=criterion)
    saved = through_a_file([before[3].state_dict(), before[2].state_dict(), before[0].state_dict()])
    for target, state in zip((after[3], after[2], after[0]), saved, strict=True):
        target.load_state_dict(state)
    assert {structure(after[0], name) for name in after[0].layers} == {"CholeskyBlock"}
    run(after[0], after[3], after[2], data[stop:], criterion=after[1])
    assert torch.equal(parameters_of(after[3]), parameters_of(whole[3]))
    assert same(everything(after[0]), everything(whole[0]))


@pytest.mark.parametrize(("first", "then"), [(2, 4), (4, 2)])
def test_a_resume_under_another_schedule_goes_on_and_changes_at_the_refresh(first, then):
    model, data = network(), batches(5)
    kfac, criterion, optimizer = build(model, schedule=kc.Schedule(factors=1, inverses=first))
    train(model, criterion, optimizer, data[:1])
    state = kfac.state_dict()
    kfac.remove()
    kfac, criterion, optimizer = build(model, schedule=kc.Schedule(factors=1, inverses=then))
    kfac.load_state_dict(state)
    kept = {2: "CholeskyBlock", 4: "KroneckerBlock"}
    train(model, criterion, optimizer, data[1:2])
    assert structure(kfac, "0") == kept[first]
    train(model, criterion, optimizer, data[2:])
    assert structure(kfac, "0") == kept[then]


@pytest.mark.parametrize(("first", "then"), [("factored", "exact"), ("exact", "factored")])
def test_a_resume_under_the_other_rule_goes_on_and_changes_at_the_refresh(first, then):
    model, data = network(), batches(5)
    kfac, criterion, optimizer = build(model, damping=RULES[first])
    train(model, criterion, optimizer, data[:2])
    state = kfac.state_dict()
    kfac.remove()
    kfac, criterion, optimizer = build(model, damping=RULES[then])
    kfac.load_state_dict(state)
    train(model, criterion, optimizer, data[2:])
    assert structure(kfac, "0") == {"factored": "KroneckerBlock", "exact": "EigenBlock"}[then]


def trained(model: nn.Module | None = None) -> kc.KFAC:
    model = model or network()
    kfac, criterion, optimizer = build(model)
    train(model, criterion, optimizer, batches(2))
    return kfac


def test_the_state_before_any_step_round_trips():
    state = through_a_file(build(network())[0].state_dict())
    kfac = trained()
    kfac.load_state_dict(state)
    assert kfac.step == 0


def test_the_seed_is_saved():
    kfac = build(network(), data=kc.Data(seed=11))[0]
    other = build(network(), data=kc.Data(seed=12))[0]
    other.load_state_dict(kfac.state_dict())
    assert other.state_dict()["seed"] == 11


def test_a_loaded_state_shares_no_memory():
    kfac, other = trained(), build(network())[0]
    state = kfac.state_dict()
    other.load_state_dict(state)
    dict(state["layers"])["0"]["average"]["A"].zero_()
    assert other.fisher()["0"].A.norm() > 0


def test_a_state_goes_to_the_dtype_of_the_model():
    other = build(network().float())[0]
    other.load_state_dict(trained().state_dict())
    assert other.fisher()["0"].dtype == torch.float32


def test_a_capture_that_was_not_finite_is_still_named_after_a_resume(caplog):
    """What was noted and not yet read is part of the state."""
    model, data = network(), batches(4)
    kfac, criterion, optimizer = build(model, schedule=kc.Schedule(factors=1, inverses=4))
    train(model, criterion, optimizer, data[:1])
    train(model, criterion, optimizer, [(data[1][0] * torch.nan, data[1][1])])
    state = through_a_file(kfac.state_dict())
    fresh = network()
    kfac, criterion, optimizer = build(fresh, schedule=kc.Schedule(factors=1, inverses=4))
    kfac.load_state_dict(state)
    train(fresh, criterion, optimizer, [*data[2:], *data[:1]])
    assert "1 of the last 4 captures" in caplog.text


# -- refused --------------------------------------------------------------------------------------------------------


def changed(*path: str, value: Any = None, drop: bool = False) -> Callable[[dict[str, Any]], Any]:
    """A damage: replace or remove what is at ``path``."""

    def damage(state: dict[str, Any]) -> Any:
        paired = [key for key in ("layers", "health") if path != (key,)]
        state |= {key: dict(state[key]) for key in paired}
        at = state
        for key in path[:-1]:
            at = at[key]
        if drop:
            del at[path[-1]]
        else:
            at[path[-1]] = value
        return state | {key: tuple(state[key].items()) for key in paired}

    return damage


LAYER = ("layers", "2")
DAMAGES = {
    "nothing": (lambda state: {}, "not a KFAC state"),
    "none": (lambda state: None, "not a KFAC state: found NoneType"),
    "a list": (lambda state: [1, 2], "not a KFAC state: found list"),
    "a model's": (lambda state: network().state_dict(), r"not a KFAC state: found \['0.weight'"),
    "mixed keys": (lambda state: {1: 2, "a": 3}, "not a KFAC state"),
    "another version": (changed("version", value=99), "version 99; this library reads version 6"),
    "no step": (changed("step", drop=True), r"without \['step'\]"),
    "no layers": (changed("layers", drop=True), r"without \['layers'\]"),
    "layers a list": (changed("layers", value=[1]), "layers are list, expected pairs"),
    "step a word": (changed("step", value="many"), "cannot be read"),
    "health a list": (changed("health", value=[]), "cannot be read"),
    "gathered none": (changed("gathered", value=None), "cannot be read"),
    "heads none": (changed("heads"), "cannot be read"),
    "functional none": (changed("functional"), "cannot be read"),
    "version several": (changed("version", value=torch.ones(2)), "cannot be read"),
    "average not a number": (
        changed(*LAYER, "average", "A_weight", value=torch.tensor(torch.nan)),
        "'2': A_weight not",
    ),
    "inverse infinite": (changed(*LAYER, "inverse", "A", value=torch.full((5, 5), torch.inf)), "'2': A not finite"),
    "no health counts": (changed("health", "skipped_captures", drop=True), "skipped_captures"),
    "a layer too few": (changed(*LAYER, drop=True), r"layers missing in it \['2'\]"),
    "a layer too many": (changed("layers", "9", value={}), r"the model has not \['9'\]"),
    "layer none": (changed(*LAYER), "layer '2': found NoneType"),
    "layer cut": (changed(*LAYER, "average", drop=True), "layer '2': found"),
    "shape": (changed(*LAYER, "shape", value=[3, 3]), r"layer '2': the state has \{'shape': \[3, 3\]\}"),
    "parameters": (changed(*LAYER, "parameters", value=["2.weight"]), "layer '2': the state has {'parameters'"),
    "average none": (changed(*LAYER, "average"), "layer '2': its average has"),
    "average cut": (changed(*LAYER, "average", "A_weight", drop=True), "layer '2': its average has"),
    "average more": (changed(*LAYER, "average", "B", value=torch.ones(())), "layer '2': its average has"),
    "A cut": (
        changed(*LAYER, "average", "A", value=torch.ones(2, 2)),
        r"layer '2': A is \(2, 2\), expected .*\(15,\)",
    ),
    "A a number": (changed(*LAYER, "average", "A", value=1.0), "layer '2': A is float"),
    "inverse foreign": (
        changed(*LAYER, "inverse", "structure", value="Diagonal"),
        "layer '2': an inverse of .*Diagonal",
    ),
    "inverse cut": (changed(*LAYER, "inverse", "G", drop=True), "layer '2': an inverse of structure"),
    "inverse a list": (changed(*LAYER, "inverse", value=[1]), "layer '2': an inverse of structure 'list'"),
    "inverse shape": (changed(*LAYER, "inverse", "G", value=torch.ones(3, 3)), r"layer '2': G is \(3, 3\)"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_wrong_state_is_refused_by_name_and_changes_nothing(case):
    damage, message = DAMAGES[case]
    kfac = trained()
    before = everything(kfac)
    with pytest.raises(kc.StateError, match=message):
        kfac.load_state_dict(damage(copy.deepcopy(kfac.state_dict())))
    assert same(everything(kfac), before)


MODELS = {
    "another size": lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)),
    "without bias": lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2)),
    "other names": lambda: nn.Sequential(nn.Identity(), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
    "more layers": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Linear(2, 2)),
}


@pytest.mark.parametrize("case", MODELS)
def test_the_state_of_another_model_is_refused(case):
    kfac = trained(MODELS[case]())
    with pytest.raises(kc.StateError, match="model"):
        kfac.load_state_dict(trained().state_dict())


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_capture_after_the_step_survives_a_resume(stop):
    """As a GAN's other half leaves one behind: forwards between the step and the checkpoint."""

    def start():
        torch.manual_seed(5)
        model, criterion = torch.nn.Linear(3, 3), torch.nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kfac = kc.KFAC(model, criterion, schedule=kc.Schedule(factors=1, inverses=2), data=kc.Data(seed=9))
        kfac.attach(optimizer)
        return model, criterion, optimizer, kfac

    def iterate(model, criterion, optimizer, number):
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(6, 3, generator=generator), torch.randint(3, (6,), generator=generator)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        criterion(model(2 * x), y).backward()

    model, criterion, optimizer, kfac = start()
    saved = None
    for number in range(5):
        iterate(model, criterion, optimizer, number)
        if number + 1 == stop:
            buffer = io.BytesIO()
            torch.save((model.state_dict(), kfac.state_dict()), buffer)
            buffer.seek(0)
            saved = torch.load(buffer, weights_only=True)
    resumed, criterion, optimizer, again = start()
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    for number in range(stop, 5):
        iterate(resumed, criterion, optimizer, number)
    assert torch.equal(resumed.weight, model.weight)


def test_a_state_stays_as_it_was_while_training_goes_on_from_it():
    model = network()
    kfac, criterion, optimizer = build(model)
    run(kfac, model, optimizer, batches(3), criterion=criterion)
    state = kfac.state_dict()
    before = flattened(state)
    run(kfac, model, optimizer, batches(3), criterion=criterion)
    kfac.load_state_dict(state)
    run(kfac, model, optimizer, batches(3), criterion=criterion)
    assert same(flattened(state), before)


def test_a_state_keeps_what_was_gathered_as_it_was():
    model = network()
    kfac, criterion, _ = build(model)
    (one, two), (three, four) = batches(2), batches(2, seed=2)
    criterion(model(one[0]), one[1]).backward()
    state = kfac.state_dict()
    before = flattened(state)
    criterion(model(two[0]), two[1]).backward()
    kfac.load_state_dict(state)
    criterion(model(three[0]), three[1]).backward()
    criterion(model(four[0]), four[1]).backward()
    assert len(state["gathered"])
    assert same(flattened(state), before)
