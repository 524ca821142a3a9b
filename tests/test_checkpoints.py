"""Checkpoints: of other layers, through torch.distributed.checkpoint, and after a write that was cut short."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.stateful import Stateful

import kfac_cond as kc

from .test_functional_uses import Functional
from .test_functional_uses import step as functional_step
from .test_state import build, everything, same, through_a_file, trained
from .training import batches, network, parameters_of, train

TIME_LIMIT = 100


def larger() -> nn.Sequential:
    """The layers of ``network()``, and one more."""
    return nn.Sequential(*network(), nn.Tanh(), nn.Linear(2, 2))


def without(state: dict, name: str) -> dict:
    return state | {"layers": tuple(pair for pair in state["layers"] if pair[0] != name)}


class TestStrict:
    """As of ``nn.Module``."""

    def test_a_state_that_fits_leaves_no_names(self):
        kfac = build(network())[0]
        assert kfac.load_state_dict(trained().state_dict()) == ([], [])

    def test_missing_layers_are_returned_and_stay_as_they_are(self):
        kfac, other = trained(), trained()
        before = kfac.fisher()["2"]
        assert not torch.equal(other.fisher()["0"].G, kfac.fisher()["0"].G)
        found = kfac.load_state_dict(through_a_file(without(other.state_dict(), "2")), strict=False)
        assert found.missing_keys == ["2"]
        assert found.unexpected_keys == []
        assert torch.equal(kfac.fisher()["2"].A, before.A)
        assert torch.equal(kfac.fisher()["0"].G, other.fisher()["0"].G)
        assert dict(kfac.state_dict()["layers"])["2"]["inverse"] is not None

    def test_layers_that_were_never_saved_start_anew_and_train(self):
        kfac, criterion, optimizer = build(model := larger())
        found = kfac.load_state_dict(trained().state_dict(), strict=False)
        assert found.missing_keys == ["4"]
        assert list(kfac.fisher()) == ["0", "2"]
        train(model, criterion, optimizer, batches(2))
        assert list(kfac.fisher()) == ["0", "2", "4"]
        assert kfac.metrics()["kfac/plain_layers"] == 0

    def test_unexpected_layers_are_returned_and_left_out(self):
        model = larger()
        kfac, criterion, optimizer = build(model)
        train(model, criterion, optimizer, batches(2))
        criterion(model(batches(1)[0][0]), batches(1)[0][1])
        state = kfac.state_dict()
        other = build(small := network())[0]
        found = other.load_state_dict(state, strict=False)
        assert found == ([], ["4"])
        assert list(other.fisher()) == ["0", "2"]
        assert torch.equal(other.fisher()["2"].G, kfac.fisher()["2"].G)
        optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
        other.attach(optimizer)
        train(small, nn.CrossEntropyLoss(), optimizer, batches(1))

    def test_another_shape_is_refused_all_the_same(self):
        kfac = build(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)))[0]
        with pytest.raises(kc.StateError, match="layer '0': the state has"):
            kfac.load_state_dict(trained().state_dict(), strict=False)

    def test_another_version_is_refused_all_the_same(self):
        with pytest.raises(kc.StateError, match="version 3; this library reads version 6"):
            trained().load_state_dict(trained().state_dict() | {"version": 3}, strict=False)


class TestDistributedCheckpoint:
    """``torch.distributed.checkpoint`` in one process, with ``KFAC`` handed over as it is."""

    def test_it_is_stateful(self):
        assert isinstance(build(network())[0], Stateful)

    @pytest.mark.parametrize("damping", [kc.Damping(0.1), kc.Damping(0.1, rule="exact")], ids=["factored", "exact"])
    @pytest.mark.parametrize("stop", [1, 2, 3, 5])
    def test_resumed_is_uninterrupted_bitwise(self, tmp_path, stop, damping):
        start, data = network(), batches(8)
        whole, before, after = ((*build(m, damping=damping), m) for m in (copy.deepcopy(start) for _ in range(3)))
        train(whole[3], whole[1], whole[2], data)
        train(before[3], before[1], before[2], data[:stop])
        dcp.save({"kfac": before[0], "model": before[3].state_dict()}, checkpoint_id=tmp_path / "run")
        weights = after[3].state_dict()
        dcp.load({"kfac": after[0], "model": weights}, checkpoint_id=tmp_path / "run")
        assert same(everything(after[0]), everything(before[0]))
        after[2].load_state_dict(before[2].state_dict())
        train(after[3], after[1], after[2], data[stop:])
        assert torch.equal(parameters_of(after[3]), parameters_of(whole[3]))
        assert same(everything(after[0]), everything(whole[0]))

    def test_what_was_gathered_and_not_taken_goes_with_it(self, tmp_path):
        kfac, criterion, _ = build(model := network())
        x, y = batches(1)[0]
        criterion(model(x), y)
        dcp.save({"kfac": kfac}, checkpoint_id=tmp_path)
        other = build(network())[0]
        dcp.load({"kfac": other}, checkpoint_id=tmp_path)
        assert len(other.state_dict()["gathered"]) == 1
        assert same(everything(other), everything(kfac))

    @pytest.mark.parametrize("regions", [lambda: kc.Graft("adam"), lambda: [kc.KLClip(1e-3), kc.Graft("adam")]])
    def test_what_a_trust_region_keeps_goes_with_it(self, tmp_path, regions):
        kfac, criterion, optimizer = build(model := network(), trust_region=regions())
        train(model, criterion, optimizer, batches(2))
        dcp.save({"kfac": kfac}, checkpoint_id=tmp_path)
        other = build(network(), trust_region=regions())[0]
        dcp.load({"kfac": other}, checkpoint_id=tmp_path)
        assert same(everything(other), everything(kfac))

    def test_a_state_from_before_the_first_capture_is_loaded_into_one_that_has_run(self, tmp_path):
        dcp.save({"kfac": build(network())[0]}, checkpoint_id=tmp_path)
        kfac = trained()
        dcp.load({"kfac": kfac}, checkpoint_id=tmp_path)
        assert kfac.step == 0
        with pytest.raises(kc.NotReadyError):
            kfac.fisher()

    def test_layers_used_without_a_call_of_their_module_are_restored(self, tmp_path):
        kfac = kc.KFAC(model := Functional(), "categorical")
        functional_step(kfac, model, torch.randn(5, 3))
        dcp.save({"kfac": kfac}, checkpoint_id=tmp_path)
        other = kc.KFAC(Functional(), "categorical")
        assert list(other.layers) != list(kfac.layers)
        dcp.load({"kfac": other}, checkpoint_id=tmp_path)
        assert list(other.layers) == list(kfac.layers)
        assert same(everything(other), everything(kfac))

    @pytest.mark.filterwarnings("ignore")
    def test_an_asynchronous_save_is_of_the_moment_it_was_asked_for(self, tmp_path):
        kfac, criterion, optimizer = build(model := network())
        train(model, criterion, optimizer, batches(3))
        expected = everything(kfac)
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            pending = dcp.async_save({"kfac": kfac}, checkpoint_id=tmp_path / "run")
            train(model, criterion, optimizer, batches(6)[3:])
            pending.result(timeout=TIME_LIMIT)
        finally:
            torch.distributed.destroy_process_group()
        other = build(network())[0]
        dcp.load({"kfac": other}, checkpoint_id=tmp_path / "run")
        assert same(everything(other), expected)
        assert not same(everything(kfac), expected)

    def test_the_checkpoint_of_another_model_is_refused_by_name(self, tmp_path):
        dcp.save({"kfac": trained()}, checkpoint_id=tmp_path)
        other = build(larger())[0]
        with pytest.raises(kc.StateError, match=r"layers missing in it \['4'\]"):
            dcp.load({"kfac": other}, checkpoint_id=tmp_path)

    def test_a_save_that_was_killed_has_no_index_and_is_not_read(self, tmp_path):
        kfac = trained()
        for name in "12":
            dcp.save({"kfac": kfac}, checkpoint_id=tmp_path / name)
        # The index is written last.
        (tmp_path / "2" / ".metadata").unlink()
        other = build(network())[0]
        before = everything(other)
        with pytest.raises(CheckpointException, match="metadata"):
            dcp.load({"kfac": other}, checkpoint_id=tmp_path / "2")
        assert same(everything(other), before)
        dcp.load({"kfac": other}, checkpoint_id=tmp_path / "1")
        assert same(everything(other), everything(kfac))


WRITER = """
import io, sys, time, torch, kfac_cond as kc
kc.save_checkpoint(sys.argv[1], number=1)
whole = torch.save

def half(state, path):
    buffer = io.BytesIO()
    whole(state, buffer)
    with open(path, "wb") as file:
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        print("half", flush=True)
        time.sleep(1000)

torch.save = half
kc.save_checkpoint(sys.argv[1], number=2)
"""


class TestOneFile:
    def test_it_round_trips(self, tmp_path):
        kfac = trained()
        kc.save_checkpoint(tmp_path / "run.pt", kfac=kfac, step=3)
        saved, other = kc.load_checkpoint(tmp_path / "run.pt"), build(network())[0]
        other.load_state_dict(saved["kfac"])
        assert saved["step"] == 3
        assert same(everything(other), everything(kfac))
        assert os.listdir(tmp_path) == ["run.pt"]

    def test_a_full_disk_leaves_the_one_before(self, tmp_path, monkeypatch):
        kc.save_checkpoint(tmp_path / "run.pt", number=1)

        def full(state: object, path: Path) -> None:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(torch, "save", full)
            with pytest.raises(OSError, match="No space left"):
                kc.save_checkpoint(tmp_path / "run.pt", number=2)
        assert kc.load_checkpoint(tmp_path / "run.pt") == {"number": 1}
        assert os.listdir(tmp_path) == ["run.pt"]

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
    def test_torch_reports_a_full_disk(self):
        with pytest.raises((OSError, RuntimeError)):
            torch.save({"x": torch.zeros(100_000)}, "/dev/full")

    def test_a_kill_while_writing_leaves_the_one_before(self, tmp_path):
        path = tmp_path / "run.pt"
        root = str(Path(__file__).parent.parent)
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, cwd=root) as writer:
            try:
                assert writer.stdout is not None
                assert writer.stdout.readline() == b"half\n"
            finally:
                writer.kill()
                writer.wait(timeout=TIME_LIMIT)
        assert kc.load_checkpoint(path) == {"number": 1}
        kc.save_checkpoint(path, number=3)
        assert kc.load_checkpoint(path) == {"number": 3}

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda whole: whole[: len(whole) // 2], "truncated"),
            (lambda whole: b"", "truncated"),
            (lambda whole: b"something else" * 50, "no checkpoint"),
            (lambda whole: whole.replace(b"\x07" * 64, b"\x07" * 63 + b"\x06"), "checksum"),
        ],
        ids=["cut", "empty", "foreign", "a byte"],
    )
    def test_a_damaged_file_is_refused_by_name(self, tmp_path, damage: Callable[[bytes], bytes], message):
        path = tmp_path / "run.pt"
        kc.save_checkpoint(path, x=torch.full((1000,), 7, dtype=torch.uint8))
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(kc.StateError, match=rf"run\.pt .*{message}"):
            kc.load_checkpoint(path)

    def test_a_file_of_something_else_is_refused(self, tmp_path):
        torch.save([1, 2], tmp_path / "run.pt")
        with pytest.raises(kc.StateError, match="holds a list"):
            kc.load_checkpoint(tmp_path / "run.pt")

    def test_no_file_is_no_damage(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            kc.load_checkpoint(tmp_path / "run.pt")
