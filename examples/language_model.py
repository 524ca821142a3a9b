"""A character language model on the text of Python's own standard library: AdamW beside SGD + K-FAC.

On one process, or on many with DistributedDataParallel; the batches are the same however many ranks share them:

    python examples/language_model.py
    torchrun --nproc-per-node=2 examples/language_model.py
    torchrun --nproc-per-node=2 examples/language_model.py --resume
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

import kfac_cond as kc

CHARACTERS = 128
"""ASCII; anything else is one character, '?'."""
FILES = 60
"""The first so many files of the library by name; every tenth is for validation."""


@dataclass(frozen=True)
class Size:
    """Of the model and its batches.

    Args:
        context: characters that a prediction may look back on.
        width: of the residual stream.
        heads: of each attention.
        blocks: of the transformer.
        batch: windows of one step, over all ranks.
    """

    context: int = 64
    width: int = 64
    heads: int = 4
    blocks: int = 2
    batch: int = 32


class Block(nn.Module):
    """Causal attention and a perceptron, each normalised before and added."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.norm_attention, self.norm_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm_attention(x)).chunk(3, dim=-1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(nn.functional.gelu(self.up(self.norm_perceptron(x))))


class CharacterModel(nn.Module):
    """Logits of the next character at each position, (batch, context, characters)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.character = nn.Embedding(CHARACTERS, size.width)
        self.position = nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.blocks)))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, CHARACTERS)
        nn.init.normal_(self.character.weight, std=0.1)
        nn.init.normal_(self.position.weight, std=0.1)

    def forward(self, text: Tensor) -> Tensor:
        places = torch.arange(text.shape[1], device=text.device).expand_as(text)
        return self.head(self.norm(self.blocks(self.character(text) + self.position(places))))


def corpus() -> tuple[Tensor, Tensor]:
    """The characters for training, and those for validation, from different files."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:FILES]
    if len(files) < FILES:
        raise SystemExit(f"found {len(files)} files of Python's standard library, expected {FILES} at least")
    texts = [file.read_text(encoding="utf8").encode("ascii", errors="replace") for file in files]
    held_out = b"".join(texts[9::10])
    training = b"".join(text for number, text in enumerate(texts) if number % 10 != 9)
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in (training, held_out))


def windows(text: Tensor, starts: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Windows that begin at ``starts``, and the character that follows each of theirs."""
    rows = text[starts[:, None] + torch.arange(size.context + 1)]
    return rows[:, :-1], rows[:, 1:]


def batch_of(step: int, text: Tensor, size: Size, *, seed: int) -> Tensor:
    """Where the windows of a step begin: of step and seed alone, so that a run can go on anywhere, on any ranks."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.randint(len(text) - size.context - 1, (size.batch,), generator=generator)


@dataclass(frozen=True)
class Ranks:
    """One process among those that share the work.

    Args:
        rank: its number.
        world: how many there are.
        device: its own.
    """

    rank: int
    world: int
    device: torch.device

    @classmethod
    def of_torchrun(cls) -> Ranks:
        """What torchrun says in the environment; one process where it says nothing."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        else:
            device = torch.device("cpu")
            # The network is small: more threads would wait for each other, and far longer beside other work.
            torch.set_num_threads(1)
        if world > 1:
            dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
        return cls(rank, world, device)

    def end(self) -> None:
        """Leave together: a process group that one rank destroys while others use it aborts them."""
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()

    def say(self, text: str) -> None:
        """Print once."""
        if self.rank == 0:
            print(text, flush=True)


@dataclass
class Curve:
    """Validation loss against steps, and against seconds of training: evaluation and checkpoints are not counted."""

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def at(self, seconds: float) -> float | None:
        """The last loss that was measured within so many seconds."""
        return next(
            (loss for at, loss in zip(self.seconds[::-1], self.losses[::-1], strict=True) if at <= seconds), None
        )


class Run:
    """One optimizer's training.

    Args:
        name: 'adamw' or 'kfac'.
        options: of the command line.
        ranks: this process.
    """

    def __init__(self, name: str, options: argparse.Namespace, ranks: Ranks) -> None:
        torch.manual_seed(options.seed)
        self.name, self.options, self.ranks = name, options, ranks
        self.size = Size(context=options.context, batch=options.batch)
        self.model = CharacterModel(self.size).to(ranks.device)
        self.trained: nn.Module = DistributedDataParallel(self.model) if ranks.world > 1 else self.model
        self.criterion = nn.CrossEntropyLoss()
        self.kfac: kc.KFAC | None = None
        self.optimizer: torch.optim.Optimizer
        if name == "kfac":
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=options.kfac_lr, momentum=0.9)
            self.kfac = kc.KFAC(
                self.trained,
                self.criterion,
                damping=options.damping,
                schedule=kc.Schedule(factors=10, inverses=50, warmup=100),
                trust_region=kc.KLClip(1e-2),
                data=kc.Data(seed=options.seed),
            )
            self.kfac.attach(self.optimizer)
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.adamw_lr, weight_decay=0.01)
        self.schedule = LambdaLR(self.optimizer, cosine(options.steps))
        self.step, self.curve = 0, Curve()

    @property
    def path(self) -> Path:
        """Its checkpoint."""
        return self.options.out / f"language_model_{self.name}.pt"

    def save(self) -> None:
        """Every rank is asked for its state, one writes; the file before stays until the new one is whole."""
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        state = {name: part.state_dict() for name, part in parts.items()}
        if self.kfac is not None:
            state["kfac"] = self.kfac.state_dict()
        if self.ranks.rank == 0:
            kc.save_checkpoint(self.path, **state, step=self.step, curve=asdict(self.curve))

    def resume(self) -> None:
        """Go on from the checkpoint; the number of ranks may be another."""
        try:
            saved = kc.load_checkpoint(self.path)
        except FileNotFoundError:
            raise SystemExit(f"--resume: there is no {self.path}; start without it, or say --out") from None
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        if self.kfac is not None:
            self.kfac.load_state_dict(saved["kfac"])
        self.step, self.curve = saved["step"], Curve(**saved["curve"])

    def train(self, text: Tensor, held_out: Tensor) -> None:
        """Train to the end, or to where the command line says to stop."""
        options, seconds = self.options, self.curve.seconds[-1] if self.curve.seconds else 0.0
        last = min(options.steps, options.until or options.steps)
        while self.step < last:
            start = time.perf_counter()
            self._one_step(text)
            seconds += time.perf_counter() - start
            if self.step % options.every == 0 or self.step == last:
                self._report(held_out, seconds)
                self.save()

    def _one_step(self, text: Tensor) -> None:
        mine = batch_of(self.step, text, self.size, seed=self.options.seed)[self.ranks.rank :: self.ranks.world]
        inputs, targets = (part.to(self.ranks.device) for part in windows(text, mine, self.size))
        self.optimizer.zero_grad()
        with self._precision():
            logits = self.trained(inputs)
        # The criterion's call is what K-FAC listens to; a labels' loss in float32 also under autocast.
        self.criterion(logits.float().flatten(0, 1), targets.flatten()).backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1

    def _precision(self) -> Any:
        return torch.autocast(self.ranks.device.type, torch.bfloat16) if self.options.bf16 else nullcontext()

    @torch.no_grad()
    def _report(self, held_out: Tensor, seconds: float) -> None:
        starts = torch.arange(0, len(held_out) - self.size.context - 1, self.size.context)
        starts = starts[:: max(1, len(starts) // 256)]
        losses = []
        for part in starts.split(64):
            inputs, targets = (one.to(self.ranks.device) for one in windows(held_out, part, self.size))
            with self._precision():
                logits = self.model(inputs)
            losses.append(nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten()) * len(part))
        loss = torch.stack(losses).sum().item() / len(starts)
        self.curve.steps.append(self.step)
        self.curve.seconds.append(seconds)
        self.curve.losses.append(loss)
        self.ranks.say(
            f"{self.name:6} step {self.step:5}  validation loss {loss:.4f}  {seconds:7.1f} s{self._metrics()}"
        )

    def _metrics(self) -> str:
        if self.kfac is None:
            return ""
        numbers = {name.removeprefix("kfac/"): float(value) for name, value in self.kfac.metrics().items()}
        wanted = ("damping", "trust_region_scale", "plain_layers")
        return "  " + ", ".join(f"{name} {numbers[name]:.3g}" for name in wanted if name in numbers)


def cosine(steps: int) -> Callable[[int], float]:
    """The factor on the learning rate at each step, from 1 to 0: the same schedule for both."""
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


def verdict(curves: dict[str, Curve]) -> list[str]:
    """Both optimizers after equally many steps, and after equally many seconds."""
    lines = [
        f"{name:6} {curve.losses[-1]:.4f} after {curve.steps[-1]} steps, {curve.seconds[-1]:.1f} s "
        f"({1000 * curve.seconds[-1] / curve.steps[-1]:.0f} ms a step)"
        for name, curve in curves.items()
    ]
    if len(curves) == 2:
        seconds = min(curve.seconds[-1] for curve in curves.values())
        found = {name: curve.at(seconds) for name, curve in curves.items()}
        told = ", ".join(f"{name} {'no loss yet' if loss is None else f'{loss:.4f}'}" for name, loss in found.items())
        lines.append(f"within {seconds:.1f} s each: {told}")
    return lines


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of each optimizer")
    parser.add_argument("--until", type=int, help="stop after this step, to go on with --resume")
    parser.add_argument("--every", type=int, default=50, help="steps between two evaluations and checkpoints")
    parser.add_argument("--optimizer", choices=("both", "adamw", "kfac"), default="both")
    parser.add_argument("--context", type=int, default=Size.context)
    parser.add_argument("--batch", type=int, default=Size.batch, help="windows a step, over all ranks")
    parser.add_argument("--adamw-lr", type=float, default=3e-3)
    parser.add_argument("--kfac-lr", type=float, default=3.0)
    parser.add_argument("--damping", type=float, default=1.0)
    parser.add_argument("--bf16", action="store_true", help="forwards under autocast in bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    parser.add_argument("--out", type=Path, default=Path("language-model"), help="where the checkpoints are")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train one or both, and say how they compare."""
    options = arguments(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    ranks = Ranks.of_torchrun()
    text, held_out = corpus()
    ranks.say(f"{len(text):,} characters to train on, {len(held_out):,} held out; {ranks.world} ranks, {ranks.device}")
    curves = {}
    for name in ("adamw", "kfac") if options.optimizer == "both" else (options.optimizer,):
        run = Run(name, options, ranks)
        if options.resume:
            run.resume()
        run.train(text, held_out)
        curves[name] = run.curve
    for line in verdict(curves):
        ranks.say(line)
    ranks.end()


if __name__ == "__main__":
    sys.exit(main())
