"""The example that trains a language model, as its users start it: alone, under torchrun, and after a stop."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

import kfac_cond as kc

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "language_model.py"
SMALL = ("--batch", "8", "--context", "16", "--every", "2", "--steps", "6", "--text", "400000")
TIME_LIMIT = 100


def command(*arguments: str, out: Path, ranks: int = 1) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launch, str(SCRIPT), *SMALL, "--out", str(out), *arguments]


def run(*arguments: str, out: Path, ranks: int = 1) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command(*arguments, out=out, ranks=ranks),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        told = process.communicate(timeout=TIME_LIMIT)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"it did not end within {TIME_LIMIT} s: {process.communicate()[0]}")
    assert process.returncode == 0, told
    return told


def checkpoint(out: Path, name: str) -> dict[str, Any]:
    return kc.load_checkpoint(out / f"language_model_{name}.pt")


def same(mine: Any, theirs: Any) -> bool:
    """Bit by bit, but for the seconds."""
    if isinstance(mine, dict):
        keys = mine.keys() - {"seconds"}
        return keys == theirs.keys() - {"seconds"} and all(same(mine[key], theirs[key]) for key in keys)
    if isinstance(mine, list | tuple):
        return len(mine) == len(theirs) and all(same(a, b) for a, b in zip(mine, theirs, strict=True))
    return torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


@pytest.mark.slow
def test_it_compares_both_and_resumed_is_uninterrupted(tmp_path):
    told = run(out=tmp_path / "whole")
    assert re.search(r"adamw +held out \d\.\d+ after 6 steps, .* ms a step", told)
    assert re.search(r"kfac +held out \d\.\d+ after 6 steps, .* ms a step", told)
    assert re.search(r"within [\d.]+ s each: adamw .*, kfac ", told)
    assert "trust_region_scale" in told
    run("--until", "3", out=tmp_path / "run")
    assert checkpoint(tmp_path / "run", "kfac")["step"] == 3
    run("--resume", out=tmp_path / "run")
    for name in ("adamw", "kfac"):
        whole, resumed = checkpoint(tmp_path / "whole", name), checkpoint(tmp_path / "run", name)
        assert whole["step"] == resumed["step"] == 6
        # The run that stopped was evaluated once more.
        whole.pop("curve"), resumed.pop("curve")
        assert same(whole, resumed)


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_two_ranks_train_on_the_batches_of_one_and_one_goes_on_with_their_checkpoint(tmp_path):
    told = run("--until", "2", out=tmp_path / "two", ranks=2)
    assert "2 ranks" in told
    assert len(re.findall(r"kfac +step", told)) == 1
    run("--until", "2", out=tmp_path / "one")
    # AdamW has nothing random: the ranks' mean gradient is that of the whole batch.
    one, two = (checkpoint(tmp_path / name, "adamw")["model"] for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
    run("--optimizer", "kfac", "--resume", out=tmp_path / "two")
    assert checkpoint(tmp_path / "two", "kfac")["step"] == 6


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    torch.set_default_dtype(torch.float32)
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    yield importlib.import_module("language_model")
    torch.set_num_threads(threads)


def test_bfloat16(example, tmp_path):
    example.main([*SMALL, "--bf16", "--optimizer", "kfac", "--until", "2", "--out", str(tmp_path)])
    saved = checkpoint(tmp_path, "kfac")
    assert dict(saved["stepper"]["kfac"]["layers"])["head"]["average"]["A"].dtype == torch.float32
    assert all(torch.isfinite(value).all() for value in saved["model"].values())


def test_there_is_nothing_to_resume(example, tmp_path):
    with pytest.raises(SystemExit, match="--resume: there is no"):
        example.main([*SMALL, "--resume", "--out", str(tmp_path)])


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_from_the_last_checkpoint(tmp_path):
    process = subprocess.Popen(
        command("--optimizer", "kfac", "--steps", "500", "--every", "1", out=tmp_path),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "step     3" in line:
                break
        time.sleep(0.02)
    finally:
        process.kill()
        process.wait(timeout=TIME_LIMIT)
    step = checkpoint(tmp_path, "kfac")["step"]
    assert step >= 2
    run("--optimizer", "kfac", "--steps", "500", "--resume", "--until", str(step + 2), out=tmp_path)
    assert checkpoint(tmp_path, "kfac")["step"] == step + 2


def test_the_model_looks_back_only_and_all_of_it_is_covered(example):
    tasks = sys.modules["example_tasks"]
    model = tasks.ByteModel(tasks.Size(context=8, width=16))
    text = torch.randint(tasks.BYTES, (2, 8))
    changed = text.clone()
    changed[:, 5:] = 7
    assert torch.allclose(model(text)[:, :5], model(changed)[:, :5])
    assert not torch.allclose(model(text)[:, 5:], model(changed)[:, 5:])
    assert kc.coverage(model, text).share == 1.0
