"""What a step of the natural gradient is given: a call of the model, from which it can be called again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .checks import described
from .data import moved
from .errors import ArgumentError
from .linearised import Called


@dataclass(frozen=True)
class Batch:
    """What a step is given: how the model is called, and the data labels.

    Args:
        args, kwargs: of the model's call.
        targets: the labels as the loss takes them; None where nobody says, or the call names them.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    targets: Any = None

    @classmethod
    def of(cls, inputs: Any, targets: Any) -> Batch:
        """From what ``step(inputs, targets)`` is given.

        Raises:
            ArgumentError: inputs that are neither a tensor, a packed sequence nor a mapping.
        """
        if isinstance(inputs, Mapping):
            return cls((), dict(inputs), targets)
        if isinstance(inputs, Tensor | PackedSequence):
            return cls((inputs,), {}, targets)
        raise ArgumentError(
            f"step(inputs, targets) got {described(inputs)} for its inputs: expected a tensor, or a mapping of keyword "
            f"arguments where the model takes more than one"
        )

    @property
    def size(self) -> int | None:
        """The number of examples, along dimension 0 of the first tensor; None where there is no such."""
        first = next(iter((*self.args, *self.kwargs.values())), None)
        return first.shape[0] if isinstance(first, Tensor) and first.ndim else None

    def part(self, stride: int, offset: int) -> Batch:
        """Every so many-th of its examples, beginning at ``offset``."""
        size = self.size

        def taken(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: taken(one) for key, one in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(map(taken, value)) if type(value) in (list, tuple) else value
            fits = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size
            return value[offset % stride :: stride] if fits else value

        if stride == 1 or size is None:
            return self
        return Batch(taken(self.args), taken(self.kwargs), taken(self.targets))

    def as_yielded(self) -> Any:
        """As a loader would yield it; labels serve masks and weights alone there.

        Raises:
            ArgumentError: a call with several positional arguments.
        """
        if not self.args:
            return dict(self.kwargs) if self.targets is None else {**self.kwargs, "labels": self.targets}
        if len(self.args) > 1 or self.kwargs:
            raise ArgumentError(
                f"direction='gram' got a call of the model with {len(self.args)} positional arguments and the keywords "
                f"{sorted(self.kwargs)}: expected one tensor, or keywords alone"
            )
        return self.args[0] if self.targets is None else (self.args[0], self.targets)


class CalledOn(Called):
    """A model as a function of a ``Batch``."""

    def forward(self, batch: Batch) -> tuple[Any, Any]:
        if batch.args:
            args, kwargs = moved(batch.args, self.model), moved(batch.kwargs, self.model)
            self.call, labels = (tuple(args), kwargs), None
            output = self.model(*args, **kwargs)
        else:
            output, labels = super().forward(batch.kwargs)
        return output, labels if batch.targets is None else moved(batch.targets, self.model)
