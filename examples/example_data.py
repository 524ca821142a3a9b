"""What the examples train on: curves that are drawn here, digits, and the sources of Python's own library."""

from __future__ import annotations

import gzip
import importlib.util
import struct
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[Tensor, Tensor]
SIDE = 28
"""Pixels of an image, across and down."""
HELD_OUT_FILES = 10
"""Every so many-th file of the library is held out."""


class Data(Protocol):
    """Batches to train on, and parts of what is evaluated."""

    def batch(self, step: int, size: int, *, seed: int) -> Pair:
        """Inputs and targets of a step: of step and seed alone, so that a run can go on anywhere, on any ranks."""

    def parts(self, split: str) -> Iterator[Pair]:
        """All that 'train' or 'held_out' are evaluated on, piece by piece."""


@dataclass(frozen=True)
class Examples:
    """Inputs and targets in memory.

    Args:
        splits: by 'train' and 'held_out'.
        most: examples of a split that it is evaluated on, the first.
    """

    splits: Mapping[str, Pair]
    most: int = 10_000

    def batch(self, step: int, size: int, *, seed: int) -> Pair:
        """Epochs in an order of their own each, the ragged last batch left out."""
        inputs, targets = self.splits["train"]
        size = min(size, len(inputs))
        epoch, place = divmod(step, len(inputs) // size)
        order = torch.randperm(len(inputs), generator=seeded(seed, epoch))[place * size : (place + 1) * size]
        return inputs[order], targets[order]

    def parts(self, split: str) -> Iterator[Pair]:
        inputs, targets = (one[: self.most].split(500) for one in self.splits[split])
        return zip(inputs, targets, strict=True)


@dataclass(frozen=True)
class Text:
    """Bytes, of which windows are read at random places.

    Args:
        splits: bytes (N,) as whole numbers, by 'train' and 'held_out'.
        context: bytes of a window; its targets are those that follow each of them.
        most: windows of a split that it is evaluated on, evenly spaced.
    """

    splits: Mapping[str, Tensor]
    context: int
    most: int = 256

    def batch(self, step: int, size: int, *, seed: int) -> Pair:
        text = self.splits["train"]
        return self.windows(text, torch.randint(len(text) - self.context - 1, (size,), generator=seeded(seed, step)))

    def parts(self, split: str) -> Iterator[Pair]:
        text = self.splits[split]
        starts = torch.arange(0, len(text) - self.context - 1, self.context)
        for some in starts[:: max(1, len(starts) // self.most)].split(64):
            yield self.windows(text, some)

    def windows(self, text: Tensor, starts: Tensor) -> Pair:
        """Windows that begin at ``starts``, and the byte that follows each of theirs."""
        rows = text[starts[:, None] + torch.arange(self.context + 1)]
        return rows[:, :-1], rows[:, 1:]


def seeded(seed: int, number: int) -> torch.Generator:
    """A generator of both."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


# -- images ------------------------------------------------------------------------------------------------------------


def images(source: str) -> dict[str, Pair]:
    """Images (N, 28, 28) in [0, 1] and labels (N,) by 'train' and 'held_out'; curves have the label 0.

    Args:
        source: 'curves', 'digits', or 'mnist:PATH' with the folder of the usual idx files.

    Raises:
        SystemExit: another word, or what it needs is not there.
    """
    kind, _, path = source.partition(":")
    if kind == "mnist" and path:
        return mnist(Path(path))
    if source == "digits":
        return digits()
    if source == "curves":
        drawn = {"train": curves(20_000, seed=1), "held_out": curves(5_000, seed=2)}
        return {name: (one, torch.zeros(len(one), dtype=torch.long)) for name, one in drawn.items()}
    raise SystemExit(f"--data {source}: expected curves, digits or mnist:PATH, with the folder of the idx files")


def curves(count: int, *, seed: int, pen: float = 0.8) -> Tensor:
    """Smooth curves through three random points, (count, 28, 28): six numbers say all of an image.

    The curve is the natural cubic spline through the points; a pixel is the darker the longer a round pen, as wide as
    that in pixels, is on it.

    Source: Hinton & Salakhutdinov 2006 (Reducing the dimensionality of data with neural networks), whose 'curves' are
    images of curves through three points; Martens 2010 (Deep learning via Hessian-free optimization) trains on them.
    """
    points = 3 + (SIDE - 7) * torch.rand(count, 3, 2, generator=torch.Generator().manual_seed(seed))
    return torch.cat([_drawn(some, pen) for some in points.split(1000)])


def spline(points: Tensor, t: Tensor) -> Tensor:
    """The natural cubic spline through three points at -1, 0 and 1, (N, T, 2).

    Args:
        points: (N, 3, 2).
        t: (T,) in [-1, 1].
    """
    first, middle, last = points.unbind(1)
    # Its second derivative is zero at both ends, and this in the middle.
    bend = 1.5 * (first - 2 * middle + last)
    s = t.abs()[:, None]
    outer = torch.where(t[:, None] < 0, first[:, None], last[:, None])
    cubic = ((1 - s) ** 3 - (1 - s)) / 6
    return (1 - s) * middle[:, None] + s * outer + cubic * bend[:, None]


def _drawn(points: Tensor, pen: float) -> Tensor:
    along = spline(points, torch.linspace(-1, 1, 160))
    pixels = torch.arange(SIDE, dtype=along.dtype) + 0.5
    x, y = (torch.exp(-(one[..., None] - pixels).square() / (2 * pen**2)) for one in along.unbind(-1))
    # Weighed by the length of the path, so that no curve is darker where it is slow.
    length = torch.linalg.vector_norm(along.diff(dim=1, append=along[:, -1:]), dim=-1)
    return 1 - torch.exp(-torch.einsum("ntx,nty,nt->nyx", x, y, length))


def digits() -> dict[str, Pair]:
    """The 1797 digits of 8 x 8 pixels that come with scikit-learn, drawn larger; every fifth is held out."""
    if importlib.util.find_spec("sklearn") is None:
        raise SystemExit("--data digits needs scikit-learn: pip install 'kfac-cond[demo]'; --data curves needs nothing")
    from sklearn.datasets import load_digits

    small, labels = load_digits(return_X_y=True)
    small = torch.tensor(small / 16, dtype=torch.get_default_dtype()).view(-1, 1, 8, 8)
    large = F.interpolate(small, (SIDE, SIDE), mode="bilinear", align_corners=False).squeeze(1)
    held_out = torch.arange(len(large)) % 5 == 4
    labels = torch.tensor(labels)
    return {"train": (large[~held_out], labels[~held_out]), "held_out": (large[held_out], labels[held_out])}


def mnist(folder: Path) -> dict[str, Pair]:
    """The digits of the usual four files; where only the 10,000 of the test are there, the first 8,000 to train on.

    Raises:
        SystemExit: there are none.
    """
    found = {name: _images_and_labels(folder, name) for name in ("train", "t10k")}
    test, train = found["t10k"], found["train"]
    if test is None:
        raise SystemExit(
            f"--data mnist:{folder}: found no t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte there, with or without "
            f".gz; say the folder that holds them"
        )
    if train is not None:
        return {"train": train, "held_out": test}
    cut = 4 * len(test[0]) // 5
    return {"train": (test[0][:cut], test[1][:cut]), "held_out": (test[0][cut:], test[1][cut:])}


def _images_and_labels(folder: Path, name: str) -> Pair | None:
    files = [_idx_file(folder, f"{name}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    if None in files:
        return None
    pixels, labels = (idx(file) for file in files if file is not None)
    return pixels.to(torch.get_default_dtype()) / 255, labels.long()


def _idx_file(folder: Path, name: str) -> Path | None:
    names = (name, name.replace("-idx", ".idx"))
    paths = (folder / f"{one}{ending}" for one in names for ending in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def idx(path: Path) -> Tensor:
    """The bytes of an idx file in their shape, compressed or not.

    Raises:
        SystemExit: it is no such file, or truncated.
    """
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = file.read()
    dimensions = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    start = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", content[4:start]) if dimensions and len(content) >= start else ()
    if not shape or len(content) - start != torch.Size(shape).numel():
        raise SystemExit(f"{path} is no idx file of bytes, or not whole: {len(content)} bytes, shape {shape}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)


# -- text --------------------------------------------------------------------------------------------------------------


def library(most: int = 8_000_000) -> dict[str, Tensor]:
    """The bytes of the sources of Python's standard library, in the order of their paths, up to ``most`` of them."""
    root, texts, size = Path(sysconfig.get_path("stdlib")), [], 0
    for file in sorted(one for one in root.rglob("*.py") if "site-packages" not in one.parts):
        texts.append(file.read_bytes()[: most - size])
        size += len(texts[-1])
        if size == most:
            break
    if len(texts) < HELD_OUT_FILES:
        raise SystemExit(f"found {len(texts)} files of Python's standard library in {root}, expected many")
    held_out = b"".join(texts[HELD_OUT_FILES - 1 :: HELD_OUT_FILES])
    train = b"".join(text for number, text in enumerate(texts, 1) if number % HELD_OUT_FILES)
    joined = {"train": train, "held_out": held_out}
    return {name: torch.frombuffer(bytearray(one), dtype=torch.uint8).long() for name, one in joined.items()}
