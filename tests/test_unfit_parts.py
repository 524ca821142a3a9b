"""Parts that cannot be captured are refused or named; parts that are used on nothing are tolerated and named."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from .helpers import (
    EVERY_STEP,
    categorical_loss,
    classifier,
    plain_factors,
    stepped,
)
from .reference import assert_same
from .training import parameters_of

ASKED: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "kfac": lambda model, inputs: kc.KFAC(model, "categorical"),
    "estimate": lambda model, inputs: kc.estimate(model, [inputs], "categorical"),
    "implicit": lambda model, inputs: kc.implicit(model, [inputs], "categorical"),
    "gram": lambda model, inputs: kc.gram(model, [inputs], "categorical"),
}
EVERY_WAY = pytest.mark.parametrize("asked", ASKED)
REFUSING = {**ASKED, "coverage": lambda model, inputs: kc.coverage(model)}


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3), torch.randint(3, (6,))


# -- what cannot be captured ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", REFUSING)
@pytest.mark.parametrize(
    ("around", "name"), [(lambda model: model, "DataParallel"), (nn.Sequential, "0")], ids=["whole", "part"]
)
def test_data_parallel_is_refused(around, name, asked, batch):
    with pytest.raises(kc.CoverageError, match=rf"'{name}' is nn\.DataParallel.*DistributedDataParallel"):
        REFUSING[asked](around(nn.DataParallel(classifier())), batch[0])


@pytest.mark.parametrize("asked", REFUSING)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("where", [0, 2])
def test_a_quantised_part_is_refused_by_name(where, asked):
    quantise = getattr(torch.ao.quantization, "quantize_dynamic", None)
    if quantise is None or not torch.backends.quantized.supported_engines:
        pytest.skip("this torch does not quantise")
    torch.set_default_dtype(torch.float32)
    model = classifier()
    model[where] = quantise(nn.Sequential(model[where]), {nn.Linear})
    with pytest.raises(kc.CoverageError, match=rf"'{where}\.0' is a quantised Linear.*Quantise after training"):
        REFUSING[asked](model, torch.randn(4, 3))


class Through(nn.Module):
    """A weight that is no real dense matrix between two layers."""

    def __init__(self, weight: Tensor, multiply: Callable[[Tensor, Tensor], Tensor], *, trains: bool = True) -> None:
        super().__init__()
        self.first, self.head, self.multiply = nn.Linear(3, 4), nn.Linear(4, 3), multiply
        self.odd = nn.Parameter(weight, requires_grad=trains)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.multiply(self.first(x), self.odd))


ODD = {
    "complex": lambda **settings: Through(
        torch.eye(4, dtype=torch.complex128), lambda h, w: (h.to(w.dtype) @ w).real, **settings
    ),
    "sparse": lambda **settings: Through(torch.eye(4).to_sparse(), lambda h, w: torch.sparse.mm(w, h.T).T, **settings),
}
WORDS = {"complex": r"torch\.complex128.*real floating-point", "sparse": r"torch\.sparse_coo.*dense weight"}


@EVERY_WAY
@pytest.mark.parametrize("odd", ODD)
def test_complex_and_sparse_weights_are_named(odd, asked, batch, caplog):
    """Of layers the others are covered, and a warning says which is not; the Fisher of the whole is refused."""
    if asked in ("implicit", "gram"):
        with pytest.raises(kc.CoverageError, match=rf"'odd' has no place in the Fisher.*{WORDS[odd]}"):
            ASKED[asked](ODD[odd](), batch[0])
        return
    with caplog.at_level(logging.WARNING, "kfac_cond"):
        found = ASKED[asked](ODD[odd](), batch[0])
    assert list(found if asked == "estimate" else found.layers) == ["first", "head"]
    assert [record.getMessage().count("odd (its weight is torch.") for record in caplog.records] == [1]
    (row,) = [row for row in kc.coverage(ODD[odd]()).rows if not row.covered]
    assert row.path == "odd"
    assert row.remedy


@EVERY_WAY
@pytest.mark.parametrize("odd", [*ODD, "integer"])
def test_frozen_weights_may_be_of_any_kind(odd, asked, batch, caplog):
    make = ODD.get(odd, lambda **settings: Through(torch.arange(4).flip(0), lambda h, w: h[:, w], **settings))
    with caplog.at_level(logging.WARNING, "kfac_cond"):
        found = ASKED[asked](make(trains=False), batch[0])
    assert not caplog.records
    if asked == "implicit":
        assert found.trace().isfinite()


@pytest.mark.parametrize("by", ["a rule", "layers"])
def test_a_weight_that_is_left_out_on_purpose_is_not_named(by, batch, caplog):
    with caplog.at_level(logging.WARNING, "kfac_cond"):
        if by == "a rule":
            model = nn.Sequential(ODD["complex"]())
            kc.estimate(model, [batch[0]], "categorical", rules={"0": {"exclude": True}})
        else:
            kc.estimate(ODD["complex"](), [batch[0]], "categorical", options=kc.Options(layers="head"))
    assert not caplog.records


# -- not used, or on nothing ------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Rows go to one of three experts, as ``routes`` says; one that is sent no row is called on none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(3))
        self.routes = torch.tensor([0, 0, 0, 1, 1, 1])

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            rows = (self.routes == number).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(h[rows]))
        return self.head(out)


def test_an_expert_without_a_row_has_no_block_and_is_named(batch, caplog):
    model, (inputs, drawn) = Experts(), batch
    with caplog.at_level(logging.WARNING, "kfac_cond"):
        fisher = kc.estimate(model, [inputs], "categorical", options=kc.Options(draws=[[drawn]]))
    assert [name for name in fisher if name.startswith("experts")] == [
        f"experts.{expert}.{part}" for expert in (0, 1) for part in (0, 1)
    ]
    assert "have no block: experts.2.0, experts.2.1" in caplog.text
    expected = plain_factors(model, inputs, lambda outputs: categorical_loss(outputs, drawn), divisor=6)
    for name in ("stem", "experts.0.0", "experts.1.0", "head"):
        assert_same(fisher[name].A, expected[name][0])
        assert_same(fisher[name].G, expected[name][1])


def test_an_expert_without_a_row_in_one_batch_counts_only_in_the_other(batch):
    """A of the expert is of the rows it was sent; its G is over all terms."""
    model, (inputs, drawn) = Experts(), batch
    alone = plain_factors(model, inputs, lambda outputs: categorical_loss(outputs, drawn), divisor=12)

    def run(kfac: kc.KFAC) -> None:
        for routes in (model.routes, torch.full((6,), 2)):
            model.routes = routes
            outputs = model(inputs)
            kfac.update(outputs, draws=drawn)
            outputs.sum().backward()

    fisher = stepped(model, "categorical", run)
    assert_same(fisher["experts.0.0"].A, alone["experts.0.0"][0])
    assert_same(fisher["experts.0.0"].G, alone["experts.0.0"][1])


def test_an_expert_without_a_row_keeps_its_gradient_in_training_and_the_numbers_are_shown(batch):
    model, (inputs, labels) = Experts(), batch
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion, schedule=EVERY_STEP)
    kfac.attach(optimizer)
    for routes in (model.routes, model.routes, torch.full((6,), 2)):
        model.routes = routes
        optimizer.zero_grad()
        criterion(model(inputs), labels).backward()
        optimizer.step()
        assert parameters_of(model).isfinite().all()
        used = {0: "6 of 8", 2: "8 of 8"}[int(routes[0])]
        assert f"inverses of {used} layers" in str(kfac)
        assert kfac.metrics()["kfac/plain_layers"] == {0: 2, 2: 0}[int(routes[0])]


@pytest.mark.parametrize("asked", ["estimate", "implicit", "gram"])
def test_a_batch_without_examples_adds_nothing(asked):
    model = nn.Sequential(
        nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4, 4), nn.PReLU()
    ).eval()
    inputs, empty = torch.randn(5, 3, 2), torch.randn(0, 3, 2)
    matrices = {
        "estimate": lambda data: kc.estimate(model, data, "categorical", structure="dense", kind="exact").to_dense(),
        "implicit": lambda data: kc.implicit(model, data, "categorical").to_dense(),
        "gram": lambda data: kc.gram(model, data, "categorical").fisher().to_dense(),
    }
    assert_same(matrices[asked]([inputs, empty]), matrices[asked]([inputs]))
