"""A Fisher through a file: bitwise there and back, and files that are refused."""

from __future__ import annotations

import builtins
import json
import random
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kfac_cond.errors import ArgumentError, StateError
from kfac_cond.layers.layout import JointLayout, WeightLayout
from kfac_cond.structures import (
    Block,
    Fisher,
    Iteration,
    KroneckerBlock,
    LowRankBlock,
    Stored,
    SumBlock,
    register_stored,
)
from kfac_cond.structures import storage as storage_module

from ..reference import assert_same


@pytest.fixture
def path(fisher: Fisher, tmp_path):
    """A file of the Fisher of three layers."""
    path = tmp_path / "fisher.safetensors"
    fisher.save(path)
    return path


def rewritten(path, change, *, signed=False):
    """The file with its header or tensors changed, and where ``signed`` a digest of what is in it now."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        header = json.loads(opened.metadata()["kfac_cond"])
    tensors = load_file(path)
    change(header, tensors)
    if signed:
        header["digest"] = storage_module._digest(header, tensors)
    save_file(tensors, path, metadata={"kfac_cond": json.dumps(header)})


def assert_bitwise(found: Block, block: Block) -> None:
    """The same type with the same values in every field that is stored, terms of a sum included."""
    assert (type(found), found.layout, found.name) == (type(block), block.layout, block.name)
    (stored,) = (one for one in storage_module.STORED.values() if one.type is type(block))
    for field in stored.arrays:
        mine, expected = getattr(found, field), getattr(block, field)
        assert mine.dtype == expected.dtype
        assert torch.equal(mine, expected)
    for field in stored.blocks:
        for mine, expected in zip(getattr(found, field), getattr(block, field), strict=True):
            assert_bitwise(mine, expected)


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_bitwise(self, fisher: Fisher, tmp_path, dtype):
        fisher = fisher.to(dtype)
        fisher.save(tmp_path / "f")
        found = Fisher.load(tmp_path / "f")
        assert list(found) == list(fisher)
        assert found.meta == fisher.meta
        for name, block in fisher.items():
            assert_bitwise(found[name], block)
            assert found[name].dtype == dtype

    def test_every_block(self, block: Block, vector: Tensor, partner, tmp_path):
        """Each structure over each layout, alone and as a term of a sum."""
        found = block + 2.0 * partner(block.layout) + block
        assert isinstance(found, SumBlock)
        found = replace(found, iteration=Iteration(probes=3, seed=4))
        for saved in (block, found):
            Fisher({"fc": saved}, meta={}).save(tmp_path / "f")
            loaded = Fisher.load(tmp_path / "f")["fc"]
            assert_bitwise(loaded, saved)
            # The values are the same, their strides need not be: a product may round otherwise.
            assert_same(loaded @ vector, saved @ vector)
            assert_same(loaded.logdet(damping=0.1), saved.logdet(damping=0.1))
        assert loaded.iteration == found.iteration

    def test_a_loaded_fisher_adds_to_a_fresh_one(self, fisher: Fisher, path):
        v = torch.randn(fisher.shape[0])
        found = Fisher.load(path) + 2.0 * fisher
        assert_same(found @ v, 3.0 * (fisher @ v))
        found.save(path)
        assert torch.equal(Fisher.load(path) @ v, found @ v)

    def test_low_rank_of_a_whole_model(self, tmp_path):
        layout = JointLayout.of({"a.weight": (2, 3), "b": (2,)})
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
        with pytest.raises(StateError, match="does not hold what was saved"):
            Fisher.load(path)

    @pytest.mark.parametrize("part", range(40))
    def test_a_byte_that_changed_anywhere(self, path, part):
        """Header or values: never another error, never another Fisher."""
        whole = path.read_bytes()
        generator = random.Random(part)
        for _ in range(25):
            data = bytearray(whole)
            offset = generator.randrange(part * len(whole) // 40, (part + 1) * len(whole) // 40)
            data[offset] ^= 1 << generator.randrange(8)
            path.write_bytes(bytes(data))
            with pytest.raises(StateError):
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

    @pytest.mark.parametrize("signed", [True, False])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda h, t: h.update(version=99), "version 99"),
            (lambda h, t: h.update(format="another"), "another"),
            (lambda h, t: h["layers"][0].update(name="other"), "fingerprint"),
            (lambda h, t: h["layers"][0].pop("layout"), "list of layers"),
            (lambda h, t: h["layers"][0].update(layout={"kind": "unheard"}), "list of layers"),
            (lambda h, t: h.update(layers=[1]), "list of layers"),
            (lambda h, t: h["layers"][0].update(block="unheard"), "'fc' is stored as 'unheard'"),
            (lambda h, t: h["layers"][0].update(dtype="float16"), "header says float16"),
            (lambda h, t: h["layers"][0].pop("numbers"), "'fc' does not fit together"),
            (lambda h, t: t.update({"0.A": t["0.A"][:2].contiguous()}), r"does not fit together.*shape \(2, 5\)"),
            (lambda h, t: t.pop("0.A"), "'fc' does not fit together"),
            (lambda h, t: h["meta"].update(samples=3), None),
        ],
    )
    def test_header_that_does_not_fit(self, path, change, message, signed):
        """Whoever changes a file can sign it again; what does not fit together is then named."""
        rewritten(path, change, signed=signed)
        if signed and message is None:
            assert Fisher.load(path).meta["samples"] == 3
            return
        early = message is not None and ("version" in message or "another" in message)
        with pytest.raises(StateError, match=message if signed or early else "does not hold what was saved"):
            Fisher.load(path)

    @pytest.mark.parametrize("key", ["meta", "layers", "fingerprint", "digest"])
    def test_header_that_lacks_something(self, path, key):
        rewritten(path, lambda header, _: header.pop(key))
        with pytest.raises(StateError, match=f"lacks {key}"):
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

    @pytest.mark.parametrize("make", [lambda f: (f + f).inverse(damping=1.0), lambda f: f + f + (f + f).sqrt()])
    def test_what_is_known_by_its_products_alone(self, fisher: Fisher, tmp_path, make):
        with pytest.raises(ArgumentError, match=r"FunctionBlock holds nothing.*low_rank.*to_dense"):
            make(fisher).save(tmp_path / "f")
        assert not list(tmp_path.iterdir())

    def test_the_meta_device(self, fisher: Fisher, tmp_path):
        with pytest.raises(ArgumentError, match="meta device"):
            (fisher + fisher).to("meta").save(tmp_path / "f")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt(), SafetensorError("no space left")])
@pytest.mark.parametrize("moment", ["safetensors.torch.save_file", "os.fsync", "os.replace"])
def test_a_failed_save_leaves_the_old_file(path, fisher: Fisher, monkeypatch, error, moment):
    before = path.read_bytes()

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(moment, fails)
    with pytest.raises((OSError, KeyboardInterrupt), match=r"no space|^$"):
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
