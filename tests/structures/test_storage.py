"""A Fisher through a file: bitwise there and back, and files that are refused."""

from __future__ import annotations

import builtins
import json
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kfac_cond.errors import ArgumentError, StateError
from kfac_cond.layers.layout import WeightLayout
from kfac_cond.structures import Fisher, FlatLayout, KroneckerBlock, LowRankBlock, Stored, register_stored
from kfac_cond.structures import storage as storage_module


@pytest.fixture
def path(fisher: Fisher, tmp_path):
    """A file of the Fisher of three layers."""
    path = tmp_path / "fisher.safetensors"
    fisher.save(path)
    return path


def rewritten(path, change):
    """The file with its header changed, and its tensors as they were."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        header = json.loads(opened.metadata()["kfac_cond"])
    tensors = load_file(path)
    change(header, tensors)
    save_file(tensors, path, metadata={"kfac_cond": json.dumps(header)})


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_bitwise(self, fisher: Fisher, tmp_path, dtype):
        fisher = fisher.to(dtype)
        fisher.save(tmp_path / "f")
        found = Fisher.load(tmp_path / "f")
        assert list(found) == list(fisher)
        assert found.meta == fisher.meta
        for name, block in fisher.items():
            mine = found[name]
            assert type(mine) is type(block)
            assert (mine.layout, mine.name, mine.dtype) == (block.layout, block.name, dtype)
            for field in ("A", "G", "basis_A", "basis_G", "values"):
                if hasattr(block, field):
                    assert torch.equal(getattr(mine, field), getattr(block, field))

    def test_low_rank_of_a_whole_model(self, tmp_path):
        layout = FlatLayout.of({"a.weight": (2, 3), "b": (2,)})
        vectors = torch.linalg.qr(torch.randn(8, 2))[0].mT
        Fisher({"model": LowRankBlock(layout, torch.ones(2), vectors, rest=0.1)}, meta={}).save(tmp_path / "f")
        block = Fisher.load(tmp_path / "f")["model"]
        assert (block.layout, block.rest) == (layout, 0.1)
        assert torch.equal(block.vectors, vectors)

    def test_derived_and_tensors_in_meta(self, fisher: Fisher, tmp_path):
        terms = torch.tensor(9.0)
        fisher = Fisher(dict(fisher), meta={"counts": {"terms": terms}}) * 2.0
        fisher.save(tmp_path / "f")
        meta = Fisher.load(tmp_path / "f").meta
        assert meta == {"counts": {"terms": 9.0}, "derived": ("* 2",)}

    def test_further_types_by_registration(self, fisher: Fisher, tmp_path, monkeypatch):
        monkeypatch.setattr(storage_module, "STORED", dict(storage_module.STORED))

        @dataclass(frozen=True, eq=False, repr=False)
        class Own(KroneckerBlock):
            power: float = 1.0

        mine = Own(fisher["fc"].layout, fisher["fc"].A, fisher["fc"].G, "fc", 0.5)
        with pytest.raises(ArgumentError, match="Own holds nothing that can be saved"):
            Fisher({"fc": mine}, meta={}).save(tmp_path / "f")
        register_stored("own", Stored(Own, ("A", "G"), ("power",)))
        Fisher({"fc": mine}, meta={}).save(tmp_path / "f")
        assert Fisher.load(tmp_path / "f")["fc"].power == 0.5
        with pytest.raises(ArgumentError, match="KroneckerBlock already"):
            register_stored("kronecker", Stored(Own, ("A", "G")))


class TestRefused:
    @pytest.mark.parametrize("left", [0, 5, 100, -1])
    def test_truncated(self, path, left):
        path.write_bytes(path.read_bytes()[:left])
        with pytest.raises(StateError, match=r"fisher\.safetensors.*truncated"):
            Fisher.load(path)

    def test_damaged_values(self, path):
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(bytes(data))
        with pytest.raises(StateError, match="values are not those"):
            Fisher.load(path)

    def test_foreign(self, tmp_path):
        (tmp_path / "text").write_text("not a file of ours, but long enough to have a header\n" * 4)
        with pytest.raises(StateError, match="no safetensors file"):
            Fisher.load(tmp_path / "text")
        save_file({"weight": torch.ones(2)}, tmp_path / "weights")
        with pytest.raises(StateError, match="not a Fisher"):
            Fisher.load(tmp_path / "weights")
        with pytest.raises(FileNotFoundError, match="nowhere"):
            Fisher.load(tmp_path / "nowhere")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda h, t: h.update(version=99), "version 99"),
            (lambda h, t: h.update(format="another"), "another"),
            (lambda h, t: h.pop("digest"), "lacks digest"),
            (lambda h, t: h["layers"][0].update(name="other"), "fingerprint"),
            (lambda h, t: h["layers"][0].pop("layout"), "list of layers"),
            (lambda h, t: h["layers"][0].update(layout={"kind": "unheard"}), "list of layers"),
            (lambda h, t: h.update(layers=[1]), "list of layers"),
            (lambda h, t: h["layers"][0].update(block="unheard"), "'fc' is stored as 'unheard'"),
            (lambda h, t: h["layers"][0].update(dtype="float16"), "header says float16"),
            (lambda h, t: t.update({"0.A": t["0.A"][:2]}), "values are not those"),
        ],
    )
    def test_header_that_does_not_fit(self, path, change, message):
        rewritten(path, change)
        with pytest.raises(StateError, match=message):
            Fisher.load(path)

    def test_shapes_that_do_not_fit(self, path):
        def change(header, tensors):
            tensors["0.A"] = tensors["0.A"][:2].contiguous()
            header["digest"] = storage_module._digest(tensors)

        rewritten(path, change)
        with pytest.raises(StateError, match=r"'fc' does not fit together.*A has shape \(2, 5\)"):
            Fisher.load(path)

    def test_another_model(self, path, fisher: Fisher):
        model = nn.ModuleDict(
            {"fc": nn.Linear(4, 3), "conv": nn.Conv1d(6, 6, 2, groups=3), "head": nn.Linear(3, 2, bias=False)}
        )
        assert list(Fisher.load(path, model)) == list(fisher)
        model["head"] = nn.Linear(3, 4, bias=False)
        del model["conv"]
        with pytest.raises(StateError, match=r"'conv.weight' is not in the model.*'head.weight' has shape \(4, 3\)"):
            Fisher.load(path, model)

    def test_what_holds_nothing(self, fisher: Fisher, tmp_path):
        with pytest.raises(ArgumentError, match="SumBlock"):
            (fisher + fisher).save(tmp_path / "f")
        with pytest.raises(ArgumentError, match="meta device"):
            fisher.to("meta").save(tmp_path / "f")
        assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_file(path, fisher: Fisher, monkeypatch):
    before = path.read_bytes()
    import safetensors.torch

    def fails(tensors, partial, metadata):
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    with pytest.raises(OSError, match="no space"):
        (2.0 * fisher).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_file_has_the_mode_of_any_other(path, tmp_path):
    (tmp_path / "other").write_text("")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_without_safetensors_the_install_line(fisher: Fisher, tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("safetensors")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"pip install 'kfac-cond\[files\]'"):
        fisher.save(tmp_path / "f")


def test_layouts_keep_what_they_are(tmp_path, kronecker):
    for layout in (WeightLayout("w", None, (4, 3), transposed=True), WeightLayout(None, "b", (3, 4))):
        block = replace(kronecker(layout), name="x")
        Fisher({"x": block}, meta={}).save(tmp_path / "f")
        assert Fisher.load(tmp_path / "f")["x"].layout == layout
