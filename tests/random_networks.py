"""Small networks drawn at random: stacks of layers of all kinds, tied, reused, frozen in part, on padded sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import kfac_cond as kc

CLASSES = 3
PADDING = 9.0
"""Every feature of a padded position."""


class On(nn.Module):
    """A module on (N, S, features) that is called in another way."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor], inner: nn.Module) -> None:
        super().__init__()
        self.call, self.inner = call, inner

    def forward(self, h: Tensor) -> Tensor:
        return self.call(self.inner, h)


class Twice(nn.Module):
    """One module used twice, or two modules that hold the same parameters."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, h: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(h)))


class Raw(nn.Module):
    """Parameters that no module multiplies by: a bias, a matrix given to a function, a stack of matrices."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift, self.matrix = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width, width))
        self.experts = nn.Parameter(torch.empty(2, width, width))

    def forward(self, h: Tensor) -> Tensor:
        mixed = torch.einsum("nsi, eio -> nso", torch.tanh(functional.linear(h, self.matrix)), self.experts)
        return mixed + self.shift


def on_channels(module: nn.Module, h: Tensor) -> Tensor:
    return module(h.mT).mT


def unrolled(cell: nn.Module, h: Tensor) -> Tensor:
    state, steps = None, []
    for step in h.unbind(1):
        state = cell(step, state)
        steps.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(steps, 1)


Make = Callable[[st.DrawFn, int, int], nn.Module]
"""From a source of choices, the width of the inputs and their length."""


def linear(draw: st.DrawFn, width: int, length: int) -> nn.Module:
    return nn.Linear(width, draw(st.sampled_from([1, 2, 4])), bias=draw(st.booleans()))


def convolution(draw: st.DrawFn, width: int, length: int) -> nn.Module:
    kernel, dilation, groups = (draw(st.sampled_from(each)) for each in ([1, 3], [1, 2], divisors(width)))
    padding, bias = dilation * (kernel // 2), draw(st.booleans())
    stride = draw(st.sampled_from([1, 2]))
    return On(on_channels, nn.Conv1d(width, 2 * groups, kernel, stride, padding, dilation, groups, bias))


def transposed_convolution(draw: st.DrawFn, width: int, length: int) -> nn.Module:
    """One position stays one."""
    kernel, dilation, groups = (draw(st.sampled_from(each)) for each in ([1, 3], [1, 2], divisors(width)))
    padding, bias = dilation * (kernel // 2), draw(st.booleans())
    stride = draw(st.sampled_from([1, 2]))
    extra = draw(st.integers(0, stride - 1)) if length > 1 else 0
    arguments = (width, groups, kernel, stride, padding, extra, groups, bias, dilation)
    return On(on_channels, nn.ConvTranspose1d(*arguments))


def bilinear(draw: st.DrawFn, width: int, length: int) -> nn.Module:
    return On(lambda module, h: module(h, h[..., :1].sin()), nn.Bilinear(width, 1, 2, bias=draw(st.booleans())))


def norm_of_features(draw: st.DrawFn, width: int, length: int) -> nn.Module:
    return draw(st.sampled_from([nn.LayerNorm, nn.RMSNorm]))(width)


def norm_of_channels(draw: st.DrawFn, width: int, length: int) -> nn.Module:
    """In eval, where a batch norm couples no examples; of one number there is nothing else to normalise it by."""
    groups = [nn.GroupNorm(size, width) for size in divisors(width) if width // size * length > 1]
    instance = nn.InstanceNorm1d(width, affine=True, track_running_stats=length == 1 or draw(st.booleans()))
    return On(on_channels, draw(st.sampled_from([*groups, nn.BatchNorm1d(width), instance])))


def tokens(h: Tensor) -> Tensor:
    """One of five for each position."""
    return (7.0 * h[..., 0]).long() % 5


def embedding(draw: st.DrawFn, width: int, length: int) -> nn.Module:
    module = nn.Embedding(5, width, padding_idx=draw(st.sampled_from([None, 2])))
    return On(lambda inner, h: h + inner(tokens(h)), module)


def embedding_bag(draw: st.DrawFn, width: int, length: int) -> nn.Module:
    """All positions of an example are one bag."""
    mode, padding = draw(st.sampled_from(["sum", "mean"])), draw(st.sampled_from([None, 2]))
    return On(lambda inner, h: h + inner(tokens(h))[:, None], nn.EmbeddingBag(5, width, mode=mode, padding_idx=padding))


def attention(draw: st.DrawFn, width: int, length: int) -> nn.Module:
    separate, bias = draw(st.booleans()), draw(st.booleans())
    # Queries of another width than keys and values have projections of their own.
    more = {"vdim": 1} if separate else {}
    module = nn.MultiheadAttention(width, 1, bias=bias, batch_first=True, add_bias_kv=draw(st.booleans()), **more)
    return On(lambda inner, h: inner(h, h, h[..., :1] if separate else h)[0], module)


def recurrent(draw: st.DrawFn, width: int, length: int) -> nn.Module:
    kind = draw(st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]))
    module = kind(width, 2, bias=draw(st.booleans()), batch_first=True, bidirectional=draw(st.booleans()))
    return On(lambda inner, h: inner(h)[0], module)


def recurrent_cell(draw: st.DrawFn, width: int, length: int) -> nn.Module:
    kind = draw(st.sampled_from([nn.RNNCell, nn.GRUCell, nn.LSTMCell]))
    return On(unrolled, kind(width, 2, bias=draw(st.booleans())))


def raw(draw: st.DrawFn, width: int, length: int) -> nn.Module:
    return Raw(width)


def used_twice(draw: st.DrawFn, width: int, length: int) -> nn.Module:
    module = nn.Linear(width, width, bias=draw(st.booleans()))
    return Twice(module, module)


def tied(draw: st.DrawFn, width: int, length: int) -> nn.Module:
    """With one bias, or each with its own: then in the universal form."""
    first, second = nn.Linear(width, width), nn.Linear(width, width)
    second.weight = first.weight
    if draw(st.booleans()):
        second.bias = first.bias
    return Twice(first, second)


def divisors(width: int) -> list[int]:
    return [size for size in (1, 2, 4) if width % size == 0]


@dataclass(frozen=True)
class Piece:
    """A way to make a module on (N, S, width); ``mixes`` where what it gives a position depends on others."""

    make: Make
    mixes: bool = False


#: A new kind of layer is one entry.
PIECES: dict[str, Piece] = {
    "linear": Piece(linear),
    "convolution": Piece(convolution, mixes=True),
    "transposed convolution": Piece(transposed_convolution, mixes=True),
    "bilinear": Piece(bilinear),
    "norm of features": Piece(norm_of_features),
    "norm of channels": Piece(norm_of_channels, mixes=True),
    "embedding": Piece(embedding),
    "embedding bag": Piece(embedding_bag, mixes=True),
    "attention": Piece(attention, mixes=True),
    "recurrent": Piece(recurrent, mixes=True),
    "recurrent cell": Piece(recurrent_cell, mixes=True),
    "raw": Piece(raw),
    "used twice": Piece(used_twice),
    "tied": Piece(tied),
}


class Network(nn.Module):
    """A stack of pieces and a head; classes of the mean over positions, or of each one. Padding is left out of either.

    Args:
        pieces: on (N, S, features).
        head: the last layer.
        pooled: whether positions are averaged.
    """

    def __init__(self, pieces: list[nn.Module], head: nn.Module, *, pooled: bool) -> None:
        super().__init__()
        self.pieces, self.head, self.pooled = nn.ModuleList(pieces), head, pooled

    def forward(self, x: Tensor) -> Tensor:
        h, real = x, is_real(x)
        for piece in self.pieces:
            h = torch.tanh(piece(h))
        if real.all():
            return self.head(h.mean(1) if self.pooled else h)
        real = real[..., None]
        return self.head((h * real).sum(1) / real.sum(1)) if self.pooled else self.head(h) * real


def is_real(x: Tensor) -> Tensor:
    return x[..., 0] != PADDING


@dataclass
class Drawn:
    """A network, inputs (N, S, features), and labels of several draws."""

    model: Network
    inputs: Tensor
    draws: list[Tensor]
    made_of: list[str]

    @property
    def terms(self) -> int:
        """M."""
        return len(self.inputs) if self.model.pooled else int(self.draws[0].numel() - self._padded)

    @property
    def _padded(self) -> int:
        return int((~is_real(self.inputs)).sum())

    @property
    def data(self) -> kc.Data:
        """With the masks of real positions and of valid terms, where anything is padded."""
        if not self._padded:
            return kc.Data()
        real = lambda args, *_: is_real(args[0])  # noqa: E731
        return kc.Data(positions=real) if self.model.pooled else kc.Data(positions=real, mask=real)


@st.composite
def networks(
    draw: st.DrawFn, first: str, *, among: tuple[str, ...] = tuple(PIECES), examples: int = 3, positions: int = 3
) -> Drawn:
    """A drawn network of one to three pieces.

    Args:
        first: name of the piece that comes first.
        among: names of those that the others may be.
        examples: the largest number of them.
        positions: the largest number of them.
    """
    width, length = draw(st.sampled_from([2, 4])), draw(st.integers(1, positions))
    shape = (draw(st.integers(1, examples)), length, width)
    padded = length > 1 and not PIECES[first].mixes and draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(shape)
    if padded:
        ends = torch.tensor([draw(st.integers(1, length)) for _ in range(len(x))])
        x[torch.arange(length) >= ends[:, None]] = PADDING
    allowed = [name for name in among if not (padded and PIECES[name].mixes)]
    made_of = [first, *draw(st.lists(st.sampled_from(allowed), max_size=2))]
    pieces: list[nn.Module] = []
    h = x
    for name in made_of:
        pieces.append(PIECES[name].make(draw, h.shape[-1], h.shape[1]).eval())
        with torch.no_grad():
            h = pieces[-1](h)
    head = nn.Linear(h.shape[-1], CLASSES, bias=draw(st.booleans()))
    model = Network(pieces, head, pooled=draw(st.booleans())).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    frozen = draw(st.sets(st.sampled_from([name for name, _ in model.named_parameters()]), max_size=2))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    outputs = model(x)
    if not outputs.requires_grad:
        head.requires_grad_()
    draws = [torch.randint(CLASSES, outputs.shape[:-1]) for _ in range(draw(st.integers(1, 2)))]
    return Drawn(model, x, draws, made_of)
