"""The real Lightning, on the CPU: its loop with the callback is a plain loop with KFAC, bit by bit."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import kfac_cond as kc

from ..architectures import library
from ..test_capture import hooks_of
from ..training import batches, network, parameters_of

lightning = library("pytorch_lightning")
KFACCallback = importlib.import_module("kfac_cond.integrations.lightning").KFACCallback

pytestmark = pytest.mark.filterwarnings("ignore")
SCHEDULE = kc.Schedule(factors=2, inverses=4)


def make(module: nn.Module) -> kc.KFAC:
    return kc.KFAC(module.net, module.criterion, damping=0.1, schedule=SCHEDULE, data=kc.Data(seed=3))


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


class Automatic(lightning.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.criterion = net, nn.CrossEntropyLoss()

    def training_step(self, batch, index):
        inputs, labels = batch
        return self.criterion(self.net(inputs), labels)

    def validation_step(self, batch, index):
        self.criterion(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return sgd(self.net.parameters())


class Manual(Automatic):
    """Its own backward and step; with two optimizers, each of a layer."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.criterion(self.net(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        return [sgd(self.net[0].parameters()), sgd(self.net[2].parameters())]


class Closures(Automatic):
    """An optimizer that evaluates its closure several times a step."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.net.parameters(), lr=0.1, max_iter=3)


def fit(module, callback, data, root: Path, *, ckpt_path=None, **options):
    trainer = lightning.Trainer(
        accelerator="cpu",
        callbacks=[callback],
        default_root_dir=root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **{"max_epochs": 1, **options},
    )
    trainer.fit(module, DataLoader(data, batch_size=None), ckpt_path=ckpt_path)
    return trainer


def plain(net: nn.Module, data, *, accumulate: int = 1, clip: float | None = None, optimizer=None) -> kc.KFAC:
    """The same in a loop of one's own."""
    criterion = nn.CrossEntropyLoss()
    optimizer = optimizer or sgd(net.parameters())
    kfac = kc.KFAC(net, criterion, damping=0.1, schedule=SCHEDULE, data=kc.Data(seed=3))
    kfac.attach(optimizer)
    for number, (inputs, labels) in enumerate(data):
        if number % accumulate == 0:
            optimizer.zero_grad()
        (criterion(net(inputs), labels) / accumulate).backward()
        if (number + 1) % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
    return kfac


def assert_same(module, callback, twin: nn.Module, kfac: kc.KFAC, *, steps: int) -> None:
    assert torch.equal(parameters_of(module.net), parameters_of(twin))
    assert callback.kfac.step == kfac.step == steps
    for name, block in kfac.fisher().items():
        assert torch.equal(callback.kfac.fisher()[name].A, block.A)
        assert torch.equal(callback.kfac.fisher()[name].G, block.G)


@pytest.mark.parametrize("kind", [Automatic, Manual], ids=["automatic", "manual, two optimizers"])
def test_its_loop_is_a_plain_loop(tmp_path, kind):
    net, data = network(), batches(7)
    twin, callback = copy.deepcopy(net), KFACCallback(make)
    module = kind(net)
    fit(module, callback, data, tmp_path)
    assert_same(module, callback, twin, plain(twin, data), steps=7)


def test_accumulated_and_clipped_gradients(tmp_path):
    net, data = network(), batches(8)
    twin, callback = copy.deepcopy(net), KFACCallback(make)
    module = Automatic(net)
    fit(module, callback, data, tmp_path, accumulate_grad_batches=2, gradient_clip_val=0.1)
    assert_same(module, callback, twin, plain(twin, data, accumulate=2, clip=0.1), steps=4)


def test_an_optimizer_that_calls_its_closure_more_than_once(tmp_path):
    net, data = network(), batches(5)
    twin, callback = copy.deepcopy(net), KFACCallback(make)
    module = Closures(net)
    fit(module, callback, data, tmp_path)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.LBFGS(twin.parameters(), lr=0.1, max_iter=3)
    kfac = kc.KFAC(twin, criterion, damping=0.1, schedule=SCHEDULE, data=kc.Data(seed=3))
    kfac.attach(optimizer)
    for inputs, labels in data:

        def closure(inputs=inputs, labels=labels):
            optimizer.zero_grad()
            loss = criterion(twin(inputs), labels)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert_same(module, callback, twin, kfac, steps=5)


def test_validation_between_the_steps_changes_nothing(tmp_path):
    net, data = network(), batches(6)
    twin, callback = copy.deepcopy(net), KFACCallback(make)
    module = Automatic(net)
    trainer = lightning.Trainer(
        accelerator="cpu",
        callbacks=[callback],
        default_root_dir=tmp_path,
        max_epochs=1,
        val_check_interval=2,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    loader = DataLoader(data, batch_size=None)
    trainer.fit(module, loader, loader)
    assert_same(module, callback, twin, plain(twin, data), steps=6)


@pytest.mark.parametrize("kind", [Automatic, Manual], ids=["automatic", "manual"])
def test_resumed_is_uninterrupted(tmp_path, kind):
    net, data = network(), batches(5)
    start = copy.deepcopy(net)
    whole = kind(net)
    fit(whole, KFACCallback(make), data, tmp_path, max_epochs=2)
    first = kind(copy.deepcopy(start))
    fit(first, KFACCallback(make), data, tmp_path, max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    torch.manual_seed(11)
    again, callback = kind(network()), KFACCallback(make)
    fit(again, callback, data, tmp_path, max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
    assert callback.kfac.step == 10
    assert torch.equal(parameters_of(again.net), parameters_of(whole.net))


def test_a_checkpoint_without_it_is_refused(tmp_path):
    data = batches(2)
    other = lightning.Callback()
    fit(Automatic(network()), other, data, tmp_path).save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(kc.StateError, match=r"plain\.ckpt has no state of .*KFACCallback"):
        fit(Automatic(network()), KFACCallback(make), data, tmp_path, max_epochs=2, ckpt_path=tmp_path / "plain.ckpt")


def test_nothing_remains_after_a_fit(tmp_path):
    module, callback = Automatic(network()), KFACCallback(make)
    fit(module, callback, batches(3), tmp_path)
    assert not any(hooks_of(module))
    fit(module, callback, batches(3), tmp_path)
    assert callback.kfac.step == 3
    assert set(callback.kfac.fisher()) == {"0", "2"}


def test_nothing_remains_after_an_exception(tmp_path):
    class Failing(Automatic):
        def training_step(self, batch, index):
            if index == 1:
                raise KeyError("batch")
            return super().training_step(batch, index)

    module = Failing(network())
    with pytest.raises(KeyError):
        fit(module, KFACCallback(make), batches(3), tmp_path)
    assert not any(hooks_of(module))


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "kfac_cond.integrations.lightning")
    with pytest.raises(ImportError, match=r"pip install 'kfac-cond\[lightning\]'"):
        importlib.import_module("kfac_cond.integrations.lightning")
