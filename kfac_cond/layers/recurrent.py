"""Recurrent layers and their cells: maps of inputs, of hidden states, of projections; a position is a time step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..errors import CaptureError
from .base import Part
from .compound import CompoundKind
from .replay import Replay

State = tuple[Tensor, ...]
"""(h,), or (h, c) of an LSTM, [batch, features]."""


class RecurrentKind(CompoundKind):
    """``nn.RNN``, ``nn.LSTM`` and ``nn.GRU`` with all their arguments, on padded or packed sequences.

    Each layer and direction has a map of its input (ih), one of its hidden state (hh) and, with ``proj_size``, one of
    its output (hr), the gates stacked as rows. Through a GRU's new gate what comes back to hh is not what comes to ih.
    """

    name: ClassVar[str] = "recurrent"
    modules: ClassVar[tuple[type[nn.Module], ...]] = (nn.RNN, nn.LSTM, nn.GRU)
    methods: ClassVar[tuple[str, ...]] = ("forward", "permute_hidden")

    def parts(self, module: nn.Module) -> tuple[Part, ...]:
        """Those of each layer and direction."""
        assert isinstance(module, nn.RNNBase)
        return tuple(
            part
            for layer in range(module.num_layers)
            for suffix in _suffixes(module)
            for part in _parts(layer, suffix)
            if part.name[:2] != "hr" or module.proj_size
        )

    def draws_numbers(self, module: nn.Module) -> bool:
        """Where what one layer hands to the next is dropped."""
        assert isinstance(module, nn.RNNBase)
        return module.training and module.dropout > 0 and module.num_layers > 1

    def outputs(self, output: Any) -> Sequence[Tensor | None]:
        """(output, h_n), or (output, h_n, c_n)."""
        y, state = output
        return (y.data if isinstance(y, PackedSequence) else y, *(state if isinstance(state, tuple) else (state,)))

    def replay(
        self, replay: Replay, module: nn.Module, input: Tensor | PackedSequence, hx: Any = None
    ) -> Sequence[Tensor | None]:
        """The module's forward, with its arguments."""
        assert isinstance(module, nn.RNNBase)
        self._check_repeatable(module, input.data)
        form: _Padded | _Packed = _Packed(input) if isinstance(input, PackedSequence) else _Padded(module, input)
        x, states = form.read(input.data.detach()), _initial(module, form, hx)
        ends: list[State] = []
        for layer in range(module.num_layers):
            outputs = []
            for suffix in _suffixes(module):
                y, end = _direction(replay, module, _parts(layer, suffix), x, states[len(ends)], form.keep)
                outputs.append(y)
                ends.append(end)
            x = torch.cat(outputs, dim=-1)
            if self.draws_numbers(module) and layer + 1 < module.num_layers:
                # Dropped in torch's own layout, for the same numbers to fall on the same entries.
                x = form.read_native(F.dropout(form.native(x), module.dropout))
        last = [torch.stack(of_all) for of_all in zip(*ends, strict=True)]
        return form.returned(x), *(state if form.batched else state.squeeze(1) for state in last)

    def _check_repeatable(self, module: nn.RNNBase, x: Tensor) -> None:
        if self.draws_numbers(module) and x.is_cuda and torch.backends.cudnn.enabled:
            raise CaptureError(
                f"{type(module).__name__} with dropout={module.dropout} between its layers draws in cuDNN, whose "
                f"numbers cannot be drawn again: use one-layer modules with nn.Dropout between them, or run it under "
                f"torch.backends.cudnn.flags(enabled=False), or exclude it by a rule."
            )


class RecurrentCellKind(CompoundKind):
    """``nn.RNNCell``, ``nn.LSTMCell`` and ``nn.GRUCell``: one position a call."""

    name: ClassVar[str] = "recurrent cell"
    modules: ClassVar[tuple[type[nn.Module], ...]] = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
    #: h = o tanh(c).
    nested: ClassVar[tuple[tuple[int, int], ...]] = ((0, 1),)

    def parts(self, module: nn.Module) -> tuple[Part, ...]:
        """The maps of the input and of the hidden state."""
        return _CELL_PARTS

    def outputs(self, output: Any) -> Sequence[Tensor | None]:
        """(h,), or (h, c)."""
        return output if isinstance(output, tuple) else (output,)

    def replay(self, replay: Replay, module: nn.Module, input: Tensor, hx: Any = None) -> Sequence[Tensor | None]:
        """The module's forward, with its arguments."""
        assert isinstance(module, nn.RNNCell | nn.LSTMCell | nn.GRUCell)
        batched = input.dim() == 2
        x = input.detach() if batched else input.detach()[None]
        if hx is None:
            state = _zeros(x, *[module.hidden_size] * (2 if isinstance(module, nn.LSTMCell) else 1))
        else:
            given = hx if isinstance(hx, tuple) else (hx,)
            state = tuple(one.detach() if batched else one.detach()[None] for one in given)
        ih, hh = _CELL_PARTS
        mapped, hidden = replay.linear(ih, x[:, None]), replay.linear(hh, state[0][:, None])
        new = _step(module, mapped[:, 0], hidden[:, 0], state)
        return new if batched else tuple(one[0] for one in new)


_CELL_PARTS = (Part("ih", "weight_ih", "bias_ih"), Part("hh", "weight_hh", "bias_hh"))


def _suffixes(module: nn.RNNBase) -> tuple[str, ...]:
    return ("", "_reverse") if module.bidirectional else ("",)


def _parts(layer: int, suffix: str) -> tuple[Part, Part, Part]:
    """ih, hh and hr of one layer and direction."""
    end = f"l{layer}{suffix}"
    ih, hh = (Part(f"{name}_{end}", f"weight_{name}_{end}", f"bias_{name}_{end}") for name in ("ih", "hh"))
    return ih, hh, Part(f"hr_{end}", f"weight_hr_{end}", None)


def _zeros(like: Tensor, *sizes: int) -> State:
    return tuple(like.new_zeros(len(like), size) for size in sizes)


def _initial(module: nn.RNNBase, form: _Padded | _Packed, hx: Any) -> list[State]:
    """The state that each layer and direction starts from, zeros where none is given."""
    count = module.num_layers * len(_suffixes(module))
    if hx is None:
        sizes = [module.proj_size or module.hidden_size, *[module.hidden_size] * isinstance(module, nn.LSTM)]
        return [_zeros(form.example, *sizes) for _ in range(count)]
    given = hx if isinstance(hx, tuple) else (hx,)
    whole = [one.detach() if form.batched else one.detach().unsqueeze(1) for one in given]
    return list(zip(*whole, strict=True))


def _direction(
    replay: Replay, module: nn.RNNBase, parts: tuple[Part, Part, Part], x: Tensor, state: State, keep: Tensor | None
) -> tuple[Tensor, State]:
    """One layer in one direction: its outputs [batch, time, features] and its last state.

    Args:
        replay: notes the linear maps.
        module: whose layer it is.
        parts: ih, hh, hr.
        x: [batch, time, features].
        state: what it starts from.
        keep: [batch, time, 1] bool, the time steps that an example has; it keeps its state at the others.
    """
    ih, hh, hr = parts
    mapped = replay.linear(ih, x, keep=keep).unbind(dim=1)
    steps: Iterable[int] = range(len(mapped))
    outputs: dict[int, Tensor] = {}
    for t in reversed(range(len(mapped))) if ih.name.endswith("_reverse") else steps:
        now = None if keep is None else keep[:, t : t + 1]
        hidden = replay.linear(hh, state[0][:, None], place=t, keep=now)[:, 0]
        h, *rest = _step(module, mapped[t], hidden, state)
        if module.proj_size:
            h = replay.linear(hr, h[:, None], place=t, keep=now)[:, 0]
        new = (h, *rest)
        state = new if now is None else tuple(torch.where(now[:, 0], a, b) for a, b in zip(new, state, strict=True))
        outputs[t] = state[0]
    return torch.stack([outputs[t] for t in steps], dim=1), state


def _step(module: nn.Module, mapped: Tensor, hidden: Tensor, state: State) -> State:
    """The next state from the mapped input and the mapped hidden state, before any projection of it."""
    if isinstance(module, nn.LSTM | nn.LSTMCell):
        i, f, g, o = (mapped + hidden).chunk(4, dim=-1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if isinstance(module, nn.GRU | nn.GRUCell):
        (r, z, n), (of_r, of_z, of_n) = mapped.chunk(3, dim=-1), hidden.chunk(3, dim=-1)
        update = (z + of_z).sigmoid()
        new = (n + (r + of_r).sigmoid() * of_n).tanh()
        return ((1 - update) * new + update * state[0],)
    assert isinstance(module, nn.RNN | nn.RNNCell)
    return (torch.relu(mapped + hidden) if module.nonlinearity == "relu" else torch.tanh(mapped + hidden),)


class _Padded:
    """Sequences of one length, as the module is given them; torch itself works on (time, batch, features)."""

    keep = None

    def __init__(self, module: nn.RNNBase, x: Tensor) -> None:
        self.batched, self.batch_first = x.dim() == 3, module.batch_first
        self.example = self.read(x.detach())[:, 0]

    def read(self, x: Tensor) -> Tensor:
        """As [batch, time, features]."""
        if not self.batched:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def returned(self, y: Tensor) -> Tensor:
        """[batch, time, features] as the module returns it."""
        if not self.batched:
            return y[0]
        return y if self.batch_first else y.transpose(0, 1)

    def native(self, x: Tensor) -> Tensor:
        """[batch, time, features] as torch holds it between two layers."""
        return x.transpose(0, 1).contiguous()

    def read_native(self, x: Tensor) -> Tensor:
        """The inverse of ``native``."""
        return x.transpose(0, 1)


class _Packed:
    """A packed sequence; lengths are known on the host, so that nothing is read from the device."""

    batched = True

    def __init__(self, packed: PackedSequence) -> None:
        sizes, device = packed.batch_sizes.tolist(), packed.data.device
        self.time, self.batch = len(sizes), sizes[0]
        real = torch.arange(self.batch) < packed.batch_sizes[:, None]
        #: Where the entries are among (time * batch), and the order of examples there and back.
        self._index = torch.cat([torch.arange(size) + t * self.batch for t, size in enumerate(sizes)]).to(device)
        self._sorted, self._order = packed.sorted_indices, packed.unsorted_indices
        self.keep = self._unsorted(real.to(device).T).unsqueeze(-1)
        self.example = packed.data.detach().new_empty(self.batch, 0)

    def _unsorted(self, x: Tensor) -> Tensor:
        return x if self._order is None else x.index_select(0, self._order)

    def read(self, data: Tensor) -> Tensor:
        """As [batch, time, features], with zeros after the end, examples in the order they had before packing."""
        flat = data.new_zeros(self.time * self.batch, data.shape[-1]).index_copy(0, self._index, data)
        return self._unsorted(flat.reshape(self.time, self.batch, -1).transpose(0, 1))

    def returned(self, y: Tensor) -> Tensor:
        """[batch, time, features] as the data of a packed sequence."""
        y = y if self._sorted is None else y.index_select(0, self._sorted)
        return y.transpose(0, 1).reshape(self.time * self.batch, -1).index_select(0, self._index)

    native, read_native = returned, read
