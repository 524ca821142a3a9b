"""Nothing on the step path waits for the device: counted in a dispatch mode, and run on the meta device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import kfac_cond as kc

from .helpers import Apply, classifier

#: Operations that read a value on the host.
READS = ("_local_scalar_dense", "_linalg_check_errors", "equal", "nonzero", "masked_select", "is_nonzero")


class Reads(TorchDispatchMode):
    """Counts operations that would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(-1, (1, 3)), nn.Conv1d(1, 4, 2, groups=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 3)
    )


def transposed() -> nn.Sequential:
    pair = nn.Bilinear(4, 4, 4)
    squared = Apply(lambda h: pair(h, h))
    squared.pair = pair
    grown = nn.ConvTranspose1d(1, 2, 2, stride=2, padding=1, output_padding=1)
    halves = nn.ConvTranspose1d(2, 2, 2, padding=2, groups=2)
    return nn.Sequential(
        nn.Unflatten(-1, (1, 3)), grown, nn.ReLU(inplace=True), halves, nn.Flatten(), squared, nn.Linear(4, 3)
    )


def of_indices() -> nn.Sequential:
    """Inputs turned into tokens, without reading them."""
    tokens = Apply(lambda x: (x * 10).long() % 7)
    bag = nn.Sequential(tokens, nn.EmbeddingBag(7, 4, padding_idx=1), nn.Tanh())
    one = nn.Sequential(tokens, nn.Embedding(7, 4, padding_idx=0), Apply(lambda h: h.sum(1)))
    return nn.Sequential(Both(bag, one), nn.Linear(8, 3))


class Both(nn.Module):
    """Two modules side by side."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


MODELS = {
    "linear": classifier,
    "convolution": convolutional,
    "transposed": transposed,
    "embedding": of_indices,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "factored": {},
    "exact": {"damping": kc.Damping(1e-2, rule="exact")},
    "clipped": {"trust_region": kc.KLClip(1e-3)},
    "tkfac": {"structure": "tkfac"},
    "diagonal": {"structure": "diagonal"},
    "ekfac": {"structure": "ekfac"},
    "reduce": {"rules": {"*": {"sharing": "reduce"}}},
    "diagonal sides": {"rules": {"*": {"max_factor_dim": 3}}},
    "diagonal sides exact": {"rules": {"*": {"max_factor_dim": 3}}, "damping": kc.Damping(1e-2, rule="exact")},
}


def steps(
    model: nn.Module, criterion: nn.Module, *, number: int, device: str = "cpu", **settings: Any
) -> list[Counter]:
    """The reads of each of so many steps; factors at every second, inverses at every fourth."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = kc.KFAC(model, criterion, **{"schedule": kc.Schedule(factors=2, inverses=4), **settings})
    kfac.attach(optimizer)
    inputs, labels = torch.randn(5, 3, device=device), torch.zeros(5, dtype=torch.long, device=device)
    counts = []
    for _ in range(number):
        with Reads() as reads:
            optimizer.zero_grad()
            criterion(model(inputs), labels).backward()
            optimizer.step()
        counts.append(reads.counts)
    return counts


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    "criterion", [{}, {"weight": torch.ones(3, dtype=torch.float64)}, {"ignore_index": 1}], ids=list
)
def test_steps_that_do_not_refresh_read_nothing(criterion, setting, model):
    """Steps 1 and 3 are plain, step 2 captures factors."""
    counts = steps(MODELS[model](), nn.CrossEntropyLoss(**criterion), number=4, **SETTINGS[setting])
    assert counts[1:] == [Counter()] * 3


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_refresh_reads_twice_at_most(setting):
    """Once the flags of captures, once the status of factorisations; eigh, which has no status, is exempt by name."""
    counts = steps(classifier(), nn.CrossEntropyLoss(), number=5, **SETTINGS[setting])[4]
    assert counts.total() - counts["_linalg_check_errors"] <= 2


def test_a_step_that_refreshes_and_solves_reads_twice_at_most():
    schedule = kc.Schedule(factors=1, inverses=1)
    counts = steps(classifier(), nn.CrossEntropyLoss(), number=3, schedule=schedule)[2]
    assert counts.total() <= 2


def test_the_counter_counts():
    with Reads() as reads:
        torch.ones(()).item()
        torch.equal(torch.ones(1), torch.ones(1))
    assert reads.counts == {"_local_scalar_dense": 1, "equal": 1}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_steps_on_the_meta_device_run(setting, model):
    """There ``item``, ``cpu`` and ``nonzero`` raise."""
    steps(MODELS[model]().to("meta"), nn.CrossEntropyLoss(), number=5, device="meta", **SETTINGS[setting])


def test_padding_on_the_meta_device():
    mask = torch.ones(2, 4, dtype=torch.bool, device="meta")
    model = nn.Sequential(classifier()).to("meta")
    data = kc.Data(mask=lambda *call: mask, positions=lambda *call: mask)
    kfac = kc.KFAC(model, "categorical", data=data)
    outputs = model(torch.randn(2, 4, 3, device="meta"))
    kfac.update(outputs)
    outputs.sum().backward()
    kfac.precondition()


@pytest.mark.parametrize("kind", ["sampled", "exact"])
def test_an_estimate_on_the_meta_device(kind):
    fisher = kc.estimate(classifier().to("meta"), [torch.randn(5, 3)] * 2, "categorical", kind=kind)
    assert fisher["0"].G.is_meta


@pytest.mark.parametrize("structure", ["kfac", "tkfac", "diagonal", "unit_wise", "block"])
def test_an_estimate_of_embeddings_on_the_meta_device(structure):
    fisher = kc.estimate(of_indices().to("meta"), [torch.randn(5, 3)] * 2, "categorical", structure=structure)
    assert fisher.trace().is_meta


def test_padding_reads_nothing():
    mask = torch.rand(2, 4) > 0.3
    body = nn.Sequential(classifier(), Apply(lambda h: h))
    kfac = kc.KFAC(body, "categorical", data=kc.Data(mask=lambda *call: mask, positions=lambda *call: mask))
    x: Tensor = torch.randn(2, 4, 3)
    with Reads() as reads:
        kfac.update(body(x))
    assert not reads.counts
