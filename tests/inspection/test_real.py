"""Reports of trained networks, and what people give a report that is no network: at all levels, end to end."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.inspection.findings import grouped

from .browser import Browser
from .made_up import HOSTILE

Batches = list[tuple[Tensor, Tensor]]


def digits() -> tuple[Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]


def trained() -> tuple[nn.Module, Batches]:
    """A convolutional classifier of digits, and the batches that it was trained on."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    inputs, labels = digits()
    inputs = inputs.view(-1, 1, 8, 8)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        batch = torch.randint(1280, (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
        optimizer.step()
    return model.eval(), list(zip(inputs[:512].split(128), labels[:512].split(128), strict=True))


class Refine(nn.Module):
    """The second stage of a detector of faces (Zhang et al. 2016, MTCNN): is there a face in 24 x 24 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 28, 3), nn.PReLU(28)
        self.conv2, self.prelu2 = nn.Conv2d(28, 48, 3), nn.PReLU(48)
        self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
        self.dense4, self.prelu4, self.dense5_1 = nn.Linear(576, 128), nn.PReLU(128), nn.Linear(128, 2)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.pool(self.prelu1(self.conv1(pixels)))
        x = self.pool(self.prelu2(self.conv2(x)))
        x = self.prelu3(self.conv3(x)).permute(0, 3, 2, 1).flatten(1)
        return self.dense5_1(self.prelu4(self.dense4(x)))


def shipped() -> tuple[nn.Module, Batches]:
    """Its weights as a package has them, and patches of two photographs without a face."""
    found = importlib.util.find_spec("facenet_pytorch")
    if found is None or found.origin is None:
        pytest.skip("facenet-pytorch is not installed")
    photographs = pytest.importorskip("sklearn.datasets").load_sample_images().images
    torch.set_default_dtype(torch.float32)
    model = Refine()
    weights = torch.load(Path(found.origin).parent / "data" / "rnet.pt", weights_only=True)
    model.load_state_dict({name: value for name, value in weights.items() if not name.startswith("dense5_2")})
    generator = torch.Generator().manual_seed(0)
    patches = []
    for index in range(64):
        picture = (torch.tensor(photographs[index % 2]).permute(2, 0, 1).float() - 127.5) / 128
        top, left = (int(torch.randint(size - 96, (1,), generator=generator)) for size in picture.shape[1:])
        patch = picture[None, :, top : top + 96, left : left + 96]
        patches.append(nn.functional.interpolate(patch, (24, 24), mode="area")[0])
    return model.eval(), [(one, torch.zeros(len(one), dtype=torch.int64)) for one in torch.stack(patches).split(32)]


@pytest.mark.parametrize("level", ["quick", "standard", "full"])
@pytest.mark.parametrize("network", [trained, shipped])
def test_a_trained_network_has_a_report_at_every_level(
    network: Callable[[], tuple[nn.Module, Batches]], level: str, tmp_path: Path
) -> None:
    model, data = network()
    report = kc.inspect(model, data, "categorical", level=level, options=kc.Options(seed=0))
    assert report.problems == {}
    assert report.whole.covered == 1.0
    assert not [one for one in report.findings() if one.severity == "error"]
    assert len(grouped(report.findings())) <= 10
    assert {"sampling-check", "uncovered", "unused", "not-quadratic"}.isdisjoint(one.code for one in report.findings())
    report.save(tmp_path / "report.html")
    assert all(name in (tmp_path / "report.html").read_text() for name in report)


def test_the_page_of_a_trained_network_has_a_line_for_each_rule(browser: Browser, tmp_path: Path) -> None:
    model, data = trained()
    report = kc.inspect(model, data, "categorical", damping=100.0, options=kc.Options(seed=0))
    report.save(tmp_path / "report.html")
    browser.open(tmp_path / "report.html")
    groups = grouped(report.findings())
    assert [group.first.code for group in groups].count("acts-as-sgd") == 1
    lines = browser.run("return [...document.querySelectorAll('.findings > li')].map(one => one.innerText)")
    assert len(lines) == len(groups)
    assert any("And so in 3 more" in line for line in lines)
    assert browser.complaints() == []


# -- what is no network ------------------------------------------------------------------------------------------------


def test_one_layer() -> None:
    report = kc.inspect(nn.Linear(4, 3), [torch.randn(64, 4)], "categorical", level="quick", samples=16, damping=1e4)
    assert [(one.code, one.layer) for one in report.findings()] == [("acts-as-sgd", "")]
    assert report.findings()[0].message.startswith("`(the model)`: ")


def test_a_frozen_model() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).requires_grad_(False)
    with pytest.raises(kc.KFACError, match="Sequential has no trainable parameter"):
        kc.inspect(model, [torch.randn(8, 4)], "categorical")


class Named(nn.Module):
    """A layer of each hostile name that a module can have."""

    def __init__(self) -> None:
        super().__init__()
        self.names = [name.replace(".", "_") for name in HOSTILE]
        for name in self.names:
            self.add_module(name, nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = torch.tanh(self._modules[name](x))
        return x


def test_hostile_names_in_findings(browser: Browser, tmp_path: Path) -> None:
    report = kc.inspect(Named(), [torch.randn(32, 3)], "categorical", level="quick", damping=1e6)
    assert {one.layer for one in report.findings()} - {""} == set(report)
    report.save(tmp_path / "report.html")
    browser.open(tmp_path / "report.html")
    assert browser.run("return window.broken") is None
    assert browser.complaints() == []


def test_many_small_layers_make_few_lines_in_little_time() -> None:
    layers = [part for _ in range(500) for part in (nn.Linear(4, 4), nn.Tanh())]
    model = nn.Sequential(*layers)
    fisher = kc.estimate(model, [torch.randn(16, 4)], "categorical", samples=2)
    start = perf_counter()
    report = kc.inspect(fisher, damping=1e6)
    text, found = str(report), report.findings()
    assert perf_counter() - start < 20.0
    assert len(found) >= 400
    assert len([line for line in text.splitlines() if line.startswith("warning")]) <= 8
