"""Models of public libraries, as they are defined there: covered, trained for some steps, and left as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kfac_cond as kc

from .architectures import ARCHITECTURES, LENGTH, Made, logits_of
from .test_capture import hooks_of

RULES = {"*": {"max_factor_dim": 256}}
"""Sides of thousands are kept as diagonals, for the time that their factorisation takes."""

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def plain_numbers() -> None:
    torch.set_default_dtype(torch.float32)


def wrapped(model: nn.Module) -> tuple[kc.KFAC, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    kfac = kc.KFAC(
        model,
        kc.Categorical(dim=-1),
        damping=0.1,
        schedule=kc.Schedule(factors=1, inverses=5),
        rules=RULES,
        trust_region=kc.KLClip(1e-2),
        data=kc.Data(outputs=lambda args, kwargs, outputs: logits_of(outputs)),
    )
    kfac.attach(optimizer)
    return kfac, optimizer


def train(made: Made, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    model, batch, loss = made
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model(**batch))
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_is_covered_whole(name):
    assert kc.coverage(ARCHITECTURES[name]()[0]).share == 1.0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_is_covered_whole_after_a_step(name):
    made = ARCHITECTURES[name]()
    kfac, optimizer = wrapped(made[0])
    train(made, optimizer, 1)
    assert kfac.coverage().share == 1.0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_table_counts_the_uses_of_a_forward_and_leaves_the_model_alone(name):
    model, batch, _ = ARCHITECTURES[name]()
    hooks, before = hooks_of(model), {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    table = kc.coverage(model, batch, rules=RULES)
    assert any(row.uses for row in table.rows)
    assert table.capture_flops > 0
    assert torch.equal(torch.get_rng_state(), random)
    assert hooks_of(model) == hooks
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_table_is_the_same_on_the_meta_device(name):
    with torch.device("meta"):
        model = ARCHITECTURES[name]()[0]
    assert kc.coverage(model).to_dict() == kc.coverage(ARCHITECTURES[name]()[0]).to_dict()


def test_settings_by_pattern_reach_the_layers_of_a_transformer():
    model, batch, _ = ARCHITECTURES["GPT-2"]()
    rules = {"*.lm_head": {"structure": "diagonal"}, "*.attn.*": {"sharing": "reduce"}}
    plain, ruled = kc.coverage(model, batch), kc.coverage(model, batch, rules=rules)
    assert {row.path for row in ruled.rows if row.structure == "diagonal"} == {"transformer.wte.weight"}
    pairs = [(a, b) for a, b in zip(plain.rows, ruled.rows, strict=True) if b.capture_flops and ".attn." in b.path]
    assert len(pairs) == 4
    assert all(a.capture_flops == LENGTH * b.capture_flops for a, b in pairs)
    kfac = kc.KFAC(model, kc.Categorical(dim=-1), rules=rules)
    assert {row.structure for row in kfac.coverage().rows} == {"kfac", "diagonal"}
    kfac.remove()
    options = kc.Options(data=kc.Data(outputs=lambda args, kwargs, outputs: logits_of(outputs)))
    fisher = kc.estimate(model, [batch], kc.Categorical(dim=-1), structure="mixed", rules=rules, options=options)
    assert [name for name, block in fisher.items() if isinstance(block, kc.DiagonalBlock)] == ["transformer.wte.weight"]


@pytest.mark.parametrize("pattern", ["*.lm_heads", "*.attention.*", "attn", "lm_head.*"])
def test_a_pattern_that_reaches_nothing_in_a_transformer_is_refused(pattern):
    model = ARCHITECTURES["GPT-2"]()[0]
    for make in (kc.coverage, lambda model, rules: kc.KFAC(model, kc.Categorical(dim=-1), rules=rules)):
        with pytest.raises(kc.ArgumentError, match="matches no module with parameters"):
            make(model, rules={"*.attn.*": {"sharing": "reduce"}, pattern: {}})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_falls_and_nothing_remains(name):
    made = ARCHITECTURES[name]()
    model = made[0]
    hooks, modules = hooks_of(model), {key: type(module) for key, module in model.named_modules()}
    kfac, optimizer = wrapped(model)
    losses = train(made, optimizer, 4)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert losses[-1] < losses[0]
    kfac.remove()
    assert hooks_of(model) == hooks
    assert {key: type(module) for key, module in model.named_modules()} == modules
    assert not (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
    train(made, optimizer, 1)
