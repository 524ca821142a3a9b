"""Models that ``parallelize_module`` cuts, how, and their training on one process or on several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import kfac_cond as kc

from . import cases

CLASSES, LENGTH, WIDTH = 6, 4, 4


class Perceptron(nn.Module):
    """One layer cut by columns, one by rows, one that is whole."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(6, hidden), nn.Linear(hidden, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.down(self.up(x).tanh()).tanh())


class Frozen(Perceptron):
    """What is cut does not train, or in part."""

    def __init__(self) -> None:
        super().__init__()
        self.up.requires_grad_(False)
        self.down.bias.requires_grad_(False)


class Functional(Perceptron):
    """A weight that is used without a call of its module."""

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self.up.weight, "device_mesh"):
            from torch.distributed.tensor import DTensor, Replicate

            x = DTensor.from_local(x, self.up.weight.device_mesh, [Replicate()])
        h = functional.linear(x, self.up.weight, self.up.bias).tanh()
        h = h.to_local() if hasattr(h, "to_local") else h
        return self.out(self.down(h).tanh())


class Repeated(nn.Module):
    """A layer that is used twice, and two that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.back = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.out = nn.Linear(6, 3)

    def tie(self) -> None:
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = self.back(layer(x).tanh())
        return self.out(x)


class Language(nn.Module):
    """A block of a language model: tokens, norm, attention with heads, perceptron, and a head."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(CLASSES, WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH, bias=False)
        self.last, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES, bias=False)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        x = (x.abs() * 10).long()[:, :LENGTH] % CLASSES
        h = self.tokens(x)
        z = self.norm(h)
        q, k, v = (one(z).unflatten(-1, (-1, WIDTH // self.heads)).transpose(1, 2) for one in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        h = h + self.o((weights @ v).transpose(1, 2).flatten(2))
        h = h + self.down(functional.relu(self.up(h)))
        return self.head(self.last(h)).transpose(1, 2)


class Tied(Language):
    """Its head is its table of tokens: one weight in two roles, known by its gradient alone."""

    def tie(self) -> None:
        self.head.weight = self.tokens.weight


Plan = list[dict[str, Any]]


def by_columns_and_rows() -> Plan:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return [{"up": ColwiseParallel(), "down": RowwiseParallel()}]


def uneven() -> Plan:
    """All of it on DTensors, whose parts differ in size, the outputs among them."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return [
        {
            "up": ColwiseParallel(use_local_output=False),
            "down": RowwiseParallel(output_layouts=Replicate(), use_local_output=False),
            "out": ColwiseParallel(use_local_output=False),
        }
    ]


def repeated() -> Plan:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return [{"first": ColwiseParallel(), "second": ColwiseParallel(), "back": RowwiseParallel()}]


def language(*, by_rows: bool = True) -> Plan:
    """Heads of attention, the middle of the perceptron and the vocabulary are shared out."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    table = RowwiseParallel if by_rows else ColwiseParallel
    return [
        {
            "tokens": table(input_layouts=Replicate(), output_layouts=Replicate()),
            **{name: ColwiseParallel() for name in "qkv"},
            "o": RowwiseParallel(),
            "head": ColwiseParallel(output_layouts=Replicate()),
        },
        *by_columns_and_rows(),
    ]


def along_the_sequence() -> Plan:
    """Between its layers each rank has a part of the positions."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor import parallel as tp

    some = Shard(1)
    summed = {"output_layouts": some, "use_local_output": False}
    return [
        {
            "tokens": tp.RowwiseParallel(input_layouts=Replicate(), **summed),
            "norm": tp.SequenceParallel(),
            **{name: tp.ColwiseParallel(input_layouts=some) for name in (*"qkv", "up")},
            **{name: tp.RowwiseParallel(**summed) for name in ("o", "down")},
            "last": tp.SequenceParallel(),
            "head": tp.PrepareModuleInput(input_layouts=some, desired_input_layouts=Replicate()),
        },
        {"head": tp.ColwiseParallel(output_layouts=Replicate())},
    ]


@dataclass(frozen=True)
class Case:
    """A model, how it is cut, and how it is trained."""

    model: Callable[[], nn.Module]
    plan: Callable[[], Plan]
    options: dict[str, Any] = field(default_factory=dict)
    reduction: Literal["mean", "sum"] = "mean"

    @property
    def tokens(self) -> bool:
        """Whether there is a label for each position."""
        return isinstance(self.model(), Language)

    def likelihood(self) -> kc.Categorical:
        return kc.Categorical(dim=1 if self.tokens else -1, reduction=self.reduction)


def parts_of(structure: str) -> Case:
    return Case(Language, language, options={"structure": structure})


CASES = {
    "perceptron": Case(Perceptron, by_columns_and_rows),
    "sum": Case(Perceptron, by_columns_and_rows, reduction="sum"),
    "functional": Case(Functional, by_columns_and_rows),
    "frozen": Case(Frozen, by_columns_and_rows),
    "uneven": Case(partial(Perceptron, 5), uneven),
    "repeated": Case(Repeated, repeated),
    "language": Case(Language, language),
    "tokens by columns": Case(Language, partial(language, by_rows=False)),
    "sequence": Case(Language, along_the_sequence),
    "tied": Case(Tied, language),
    "reduce": Case(Language, language, options={"rules": {"[qvo]": {"sharing": "reduce"}}}),
    "diagonal sides": Case(Language, along_the_sequence, options={"rules": {"up": {"max_factor_dim": 4}}}),
    "fraction": Case(Language, along_the_sequence, options={"rules": {"[uqd]*": {"fraction": 0.5}}}),
    "tkfac": parts_of("tkfac"),
    "diagonal": parts_of("diagonal"),
    "ekfac": parts_of("ekfac"),
    "clipped": Case(Perceptron, by_columns_and_rows, options={"trust_region": kc.KLClip(1e-5)}),
}


def data(case: Case, step: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Inputs, data labels and three draws of all ranks together."""
    generator = torch.Generator().manual_seed(100 + step)
    shape = (cases.N, LENGTH) if case.tokens else (cases.N,)
    classes = CLASSES if case.tokens else 3
    x = torch.randn(cases.N, 6, generator=generator)
    y, *draws = (torch.randint(classes, shape, generator=generator) for _ in range(4))
    return x, y, draws


def cut(model: nn.Module, mesh: Any, plan: Plan) -> nn.Module:
    from torch.distributed.tensor.parallel import parallelize_module

    for one in plan:
        parallelize_module(model, mesh, one)
    if hasattr(model, "tie"):
        model.tie()
    return model


def built(case: Case, mesh: Any = None) -> nn.Module:
    """The model, cut over a mesh where one is given."""
    torch.manual_seed(3)
    model = case.model()
    if hasattr(model, "tie"):
        model.tie()
    for p in model.parameters():
        # Not ones and zeros, of which a norm would be the same in any order.
        p.data.add_(0.1 * torch.randn(p.shape))
    return model if mesh is None else cut(model, mesh, case.plan())


def wrapped(case: Case, model: nn.Module, **options: Any) -> kc.KFAC:
    options = {"damping": 0.1, "schedule": kc.Schedule(factors=1, inverses=2, decay=0.6), **case.options, **options}
    return kc.KFAC(model, case.likelihood(), data=kc.Data(seed=5), **options)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def gradients(case: Case, model: nn.Module, kfac: kc.KFAC | None, number: int, rows: slice, *, ranks: int = 1) -> None:
    """Add the gradients of some rows; a mean over so many ranks is that of all rows."""
    x, y, draws = data(case, number)
    outputs = model(x[rows])
    if kfac is not None:
        kfac.update(outputs, draws=[one[rows] for one in draws])
    loss = functional.cross_entropy(whole(outputs), y[rows], reduction="sum") * ranks / y.numel()
    loss.backward()


def averaged(model: nn.Module, group: Any) -> None:
    """Gradients as their means over a group, brought there by hand."""
    for p in model.parameters():
        if p.grad is not None:
            part = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
            dist.all_reduce(part, group=group)
            part /= dist.get_world_size(group)


def ended(model: nn.Module, kfac: kc.KFAC) -> dict[str, Any]:
    return {
        "parameters": {name: whole(p.detach()).clone() for name, p in model.named_parameters()},
        "fisher": {name: block.to_dense() for name, block in kfac.fisher().items()},
        "plain": kfac.metrics()["kfac/plain_layers"],
    }


def trained(
    case: Case, model: nn.Module, kfac: kc.KFAC, rows: list[slice], *, ranks: int = 1, group: Any = None
) -> dict[str, Any]:
    """A run over micro-batches of these rows."""
    optimizer = torch.optim.SGD(model.parameters(), lr=cases.RATE)
    kfac.attach(optimizer)
    for number in range(cases.STEPS):
        optimizer.zero_grad()
        for one in rows:
            gradients(case, model, kfac, number, one, ranks=ranks)
        if group is not None:
            averaged(model, group)
        optimizer.step()
    return ended(model, kfac)


def alone(case: Case, rows: list[slice]) -> dict[str, Any]:
    """A run on one process, of which the ranks' rows are micro-batches."""
    model = built(case)
    return trained(case, model, wrapped(case, model), rows)


def refusal(call: Any, *args: Any, **kwargs: Any) -> str:
    """What an error says, with its type."""
    try:
        call(*args, **kwargs)
    except kc.KFACError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
