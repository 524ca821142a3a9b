"""An estimate that was interrupted goes on from its partial file to bitwise the same numbers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond import partial

STRUCTURES = ["kfac", "ekfac", "tkfac", "kpsvd", "diagonal", "block", "dense"]


def model(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 3))


def batches(n: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(2, 3, generator=generator), torch.randint(3, (2,), generator=generator)) for _ in range(n)]


class Power(Exception):
    """Gone."""


class Failing:
    """Batches that break off after a number of them, once."""

    def __init__(self, data: list[Any], after: int, times: int = 1) -> None:
        self.data, self.after, self.times = data, after, times

    def __call__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.data):
            if number == self.after and self.times:
                self.times -= 1
                raise Power
            yield batch


def estimate(data: Any, path: Path | None, structure: Any, kind: str = "sampled", **settings: Any) -> Any:
    dropout, samples = settings.pop("dropout", 0.0), settings.pop("samples", 2 if kind == "sampled" else 1)
    options = kc.Options(seed=3, partial=path, **settings)
    net = model(dropout)
    torch.manual_seed(7)
    return kc.estimate(net, data, "categorical", structure=structure, kind=kind, samples=samples, options=options)


def assert_bitwise(found: kc.Fisher, expected: kc.Fisher) -> None:
    assert list(found) == list(expected)
    for name, block in expected.items():
        for key, value in vars(block).items():
            if isinstance(value, Tensor):
                assert torch.equal(getattr(found[name], key), value), (name, key)
    counts = found.meta["counts"]
    assert {**counts, "terms": float(counts["terms"])} == {
        **expected.meta["counts"],
        "terms": float(expected.meta["counts"]["terms"]),
    }


@pytest.mark.parametrize("kind", ["sampled", "exact", "empirical", "forward_only"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_going_on_is_bitwise_the_uninterrupted_estimate(structure, kind, tmp_path):
    """ORACLES 24."""
    path = tmp_path / "fisher.partial"
    data = Failing(batches(), after=3)
    with pytest.raises(Power):
        estimate(data, path, structure, kind)
    assert path.exists()
    found = estimate(data, path, structure, kind)
    assert_bitwise(found, estimate(batches(), None, structure, kind))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("after", [1, 2, 4])
def test_several_structures_and_interruptions(after, tmp_path):
    path = tmp_path / "fisher.partial"
    words = ["kfac", "ekfac", "diagonal"]
    data = Failing(batches(), after=after, times=2)
    for _ in range(2):
        with pytest.raises(Power):
            estimate(data, path, words)
    for found, expected in zip(estimate(data, path, words), estimate(batches(), None, words), strict=True):
        assert_bitwise(found, expected)


class FailingTwice(Failing):
    """Breaks off in the given pass over the data."""

    def __init__(self, data: list[Any], after: int, in_pass: int) -> None:
        super().__init__(data, after)
        self.left = in_pass

    def __call__(self) -> Iterator[Any]:
        self.left -= 1
        return super().__call__() if self.left == 0 else iter(self.data)


@pytest.mark.parametrize("in_pass", [1, 2])
def test_the_second_pass_goes_on_where_it_was(in_pass, tmp_path):
    path = tmp_path / "fisher.partial"
    data = FailingTwice(batches(), 3, in_pass)
    words = [kc.Structure("ekfac", second_pass=True), "diagonal", "kfac"]
    with pytest.raises(Power):
        estimate(data, path, words)
    found = estimate(batches(), path, words)
    for one, expected in zip(found, estimate(batches(), None, words), strict=True):
        assert_bitwise(one, expected)


def test_dropout_goes_on_in_its_stream(tmp_path):
    path = tmp_path / "fisher.partial"
    data = Failing(batches(), after=3)
    with pytest.raises(Power):
        estimate(data, path, "kfac", dropout=0.5)
    assert_bitwise(estimate(data, path, "kfac", dropout=0.5), estimate(batches(), None, "kfac", dropout=0.5))


def test_injected_labels_go_on_with_their_batch(tmp_path):
    path = tmp_path / "fisher.partial"
    draws = [[torch.randint(3, (2,), generator=torch.Generator().manual_seed(n))] for n in range(5)]
    data = Failing(batches(), after=3)
    with pytest.raises(Power):
        estimate(data, path, "kfac", draws=draws, samples=1)
    found = estimate(data, path, "kfac", draws=draws, samples=1)
    assert_bitwise(found, estimate(batches(), None, "kfac", draws=draws, samples=1))


def test_only_what_is_left_is_computed(tmp_path):
    path = tmp_path / "fisher.partial"
    data, calls = Failing(batches(), after=3), []
    net = model()
    net.register_forward_hook(lambda *_: calls.append(1))
    options = kc.Options(seed=3, partial=path)
    with pytest.raises(Power):
        kc.estimate(net, data, "categorical", options=options)
    kc.estimate(net, data, "categorical", options=options)
    assert len(calls) == 5


def test_what_breaks_in_the_middle_of_a_batch_leaves_the_last_write(tmp_path):
    path = tmp_path / "fisher.partial"
    net, broken = model(), []
    net[3].register_forward_hook(lambda *_: broken.append(1) if len(broken) != 3 else (_ for _ in ()).throw(Power()))
    options = kc.Options(seed=3, partial=path)
    with pytest.raises(Power):
        kc.estimate(net, batches(), "categorical", options=options)
    broken.append(1)
    found = kc.estimate(net, batches(), "categorical", options=options)
    assert_bitwise(found, estimate(batches(), None, "kfac", samples=1))


def test_the_sampling_error_goes_on_too(tmp_path):
    path = tmp_path / "fisher.partial"
    data = Failing(batches(), after=3)
    with pytest.raises(Power):
        estimate(data, path, "kfac")
    found, expected = estimate(data, path, "kfac"), estimate(batches(), None, "kfac")
    assert found.sampling_error().trace == expected.sampling_error().trace


def test_writing_is_spared_where_it_takes_long(tmp_path, monkeypatch):
    now, writes = [0.0], []
    monkeypatch.setattr(partial, "monotonic", lambda: now[0])

    def slow(state: Any, file: Path) -> None:
        writes.append(state)
        file.write_bytes(b"")
        now[0] += 1.0

    monkeypatch.setattr(torch, "save", slow)
    held = partial.Partial(tmp_path / "x", {})
    for _ in range(25):
        if held.due:
            held.write({})
        now[0] += 1.0
    assert len(writes) == 3


OTHERS = {
    "kind": lambda data, path: estimate(data, path, "kfac", "exact"),
    "structure": lambda data, path: estimate(data, path, "ekfac"),
    "samples": lambda data, path: estimate(data, path, "kfac", samples=3),
    "layers": lambda data, path: estimate(data, path, "kfac", layers="0"),
    "dtype": lambda data, path: estimate(data, path, "kfac", dtype=torch.float64),
    "seed": lambda data, path: kc.estimate(
        model(), data, "categorical", samples=2, options=kc.Options(seed=4, partial=path)
    ),
    "likelihood": lambda data, path: kc.estimate(
        model(), data, "gaussian", samples=2, options=kc.Options(seed=3, partial=path)
    ),
    "model": lambda data, path: kc.estimate(
        model().requires_grad_(True).apply(lambda m: m.weight.data.mul_(2) if isinstance(m, nn.Linear) else None),
        data,
        "categorical",
        samples=2,
        options=kc.Options(seed=3, partial=path),
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_the_file_of_another_estimate_is_refused_and_kept(what, tmp_path):
    path = tmp_path / "fisher.partial"
    data = Failing(batches(), after=3)
    with pytest.raises(Power):
        estimate(data, path, "kfac")
    held = path.read_bytes()
    with pytest.raises(kc.StateError, match=f"of another estimate: its {what} is"):
        OTHERS[what](data, path)
    assert path.read_bytes() == held


def test_other_batches_are_refused(tmp_path):
    path = tmp_path / "fisher.partial"
    with pytest.raises(Power):
        estimate(Failing(batches(), after=3), path, "kfac")
    with pytest.raises(kc.StateError, match="batch 2 is not the one"):
        estimate(batches()[1:], path, "kfac")


def test_fewer_batches_are_refused(tmp_path):
    path = tmp_path / "fisher.partial"
    with pytest.raises(Power):
        estimate(Failing(batches(), after=3), path, "kfac")
    with pytest.raises(kc.StateError, match="2 batches, and the partial estimate took in 3"):
        estimate(batches()[:2], path, "kfac")


DAMAGES = {
    "empty": lambda held: b"",
    "text": lambda held: b"no such thing",
    "half": lambda held: held[: len(held) // 2],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(damage, tmp_path):
    path = tmp_path / "fisher.partial"
    with pytest.raises(Power):
        estimate(Failing(batches(), after=3), path, "kfac")
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(kc.StateError, match=r"is no partial estimate, or is damaged.*to start anew"):
        estimate(batches(), path, "kfac")


@pytest.mark.parametrize(
    ("held", "match"),
    [
        ({"weights": torch.zeros(3)}, "is not a partial estimate"),
        ([1, 2], "is not a partial estimate"),
        ({"format": partial.FORMAT, "version": 99, "request": {}, "state": {}}, "version 99"),
    ],
)
def test_a_foreign_file_is_refused(held, match, tmp_path):
    path = tmp_path / "fisher.partial"
    torch.save(held, path)
    with pytest.raises(kc.StateError, match=match):
        estimate(batches(), path, "kfac")


def test_a_folder_that_is_not_there_is_refused_before_anything_is_computed(tmp_path):
    calls = []
    net = model()
    net.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(kc.ArgumentError, match="there is no folder"):
        kc.estimate(net, batches(), "categorical", options=kc.Options(partial=tmp_path / "no" / "x"))
    assert not calls


def test_a_path_that_is_none_is_refused():
    with pytest.raises(kc.ArgumentError, match="expected the path of a file"):
        kc.Options(partial=3)


SCRIPT = """
import sys, time, torch, kfac_cond as kc
torch.manual_seed(0)
model = torch.nn.Linear(3, 2)
def batches():
    for n in range(40):
        time.sleep(float(sys.argv[2]))
        yield torch.randn(4, 3, generator=torch.Generator().manual_seed(n))
fisher = kc.estimate(model, batches, "categorical", options=kc.Options(seed=1, partial=sys.argv[1]))
print(fisher[""].G.tolist(), fisher.meta["counts"]["examples"])
"""


def test_a_killed_process_goes_on_from_its_last_write(tmp_path):
    path = tmp_path / "fisher.partial"
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    running = subprocess.Popen([*command, str(path), "0.05"])
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait(60)
    assert path.exists()
    texts = [
        subprocess.run([*command, str(one), "0"], capture_output=True, text=True, timeout=100, check=True).stdout
        for one in (path, tmp_path / "other")
    ]
    assert texts[0] == texts[1]
    assert "160" in texts[0]
