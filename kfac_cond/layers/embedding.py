"""Embeddings: linear layers whose inputs are one-hot rows, or bags of them, known by their indices alone.

y = W[index] is W^T applied to a row that is one at the index: the matrix of the layer is (features x tokens), stored
transposed. The input side is as large as the vocabulary and is kept as its diagonal: the frequencies of the tokens,
which for one token a position is A itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..linalg.sparse import SparseRows
from .base import LayerKind
from .layout import WeightLayout
from .linear import positions_in_the_middle
from .rules import Sharing


class EmbeddingKind(LayerKind):
    """``nn.Embedding`` on indices of any shape: (), (batch,) or (batch, ...), each index a position.

    A position that holds ``padding_idx`` is none: no gradient of the weight comes from it. ``max_norm`` changes the
    weight before it is looked up, and the weight that is looked up is the one that trains.
    """

    name: ClassVar[str] = "embedding"
    modules: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)
    looks_up: ClassVar[bool] = True

    def layout(self, module: nn.Module, *, weight: str | None, bias: str | None) -> WeightLayout:
        """(features x tokens), transposed on the way in and out, with a diagonal on the side of the tokens."""
        return replace(super().layout(module, weight=weight, bias=bias), transposed=True, diagonal_inputs=True)

    def of_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dtype: torch.dtype
    ) -> Tensor | None:
        """One-hot rows [batch, positions, tokens]; zero where the index is ``padding_idx``."""
        (indices,) = (*args, *kwargs.values())
        assert isinstance(module, nn.Embedding)
        rows = positions_in_the_middle(
            indices.detach().unsqueeze(-1) if indices.ndim else indices.detach().reshape(1, 1)
        )
        batch, positions, _ = rows.shape
        columns = rows.flatten().long()
        values = _real(module, columns).to(dtype)
        numbers = torch.arange(len(columns), device=columns.device)
        return _answering(numbers, columns, values, (batch, positions, module.num_embeddings))

    def activations(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """The rows of a call on indices alone."""
        return cast(Tensor, self.of_call(module, (inputs,), {}, cast(Tensor, module.weight).dtype))

    def output_gradients(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """(batch, ..., features) as [batch, positions, features]."""
        return positions_in_the_middle(gradient)

    def present(self, module: nn.Module, a: Tensor) -> Tensor | None:
        """Where something is looked up."""
        return None if module.padding_idx is None else cast(SparseRows, a).present

    def remark(self, module: nn.Module, sharing: Sharing) -> str:
        """Where the diagonal is not all of A, and where autograd's gradient is not that of the loss."""
        said = []
        if sharing == "reduce":
            said.append("A as its diagonal: an approximation, since sharing='reduce' averages the tokens of an example")
        if module.scale_grad_by_freq:
            said.append("scale_grad_by_freq divides its gradient by token counts: the factors are those of the loss")
        return "; ".join(said)


class EmbeddingBagKind(EmbeddingKind):
    """``nn.EmbeddingBag`` that sums or averages: a bag is an example of one position, its input a multi-hot row.

    Of A, the second moment of these rows, the diagonal is kept: an approximation where bags hold several tokens.
    ``padding_idx`` is in no bag, and a bag without anything in it is no position. The largest entry of each feature
    (``mode='max'``) is no linear function of the weight, and such a module is not of this kind.
    """

    name: ClassVar[str] = "embedding bag"
    modules: ClassVar[tuple[type[nn.Module], ...]] = (nn.EmbeddingBag,)

    def matches(self, module: nn.Module) -> bool:
        """Every bag that is a linear function of its weight."""
        return super().matches(module) and module.mode in ("sum", "mean")

    def of_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dtype: torch.dtype
    ) -> Tensor | None:
        """Rows [bags, 1, tokens]: of each bag its tokens with their weights."""
        assert isinstance(module, nn.EmbeddingBag)
        indices, offsets, weights = _arguments(*args, **kwargs)
        rows, bags = _bags(module, indices, offsets)
        columns = indices.detach().flatten().long()
        real = _real(module, columns).to(dtype)
        values = real if weights is None else torch.where(real > 0, weights.detach().flatten().to(dtype), 0)
        if module.mode == "mean":
            sizes = values.new_zeros(bags).index_add_(0, rows, real)
            values = values / sizes.clamp(min=1)[rows]
        return _answering(rows, columns, values, (bags, 1, module.num_embeddings))

    def present(self, module: nn.Module, a: Tensor) -> Tensor | None:
        """The bags that hold something."""
        return cast(SparseRows, a).present

    def remark(self, module: nn.Module, sharing: Sharing) -> str:
        """That a diagonal is not all of A."""
        said = "A as its diagonal: an approximation, since a bag holds several tokens"
        return "; ".join(filter(None, (said, super().remark(module, "expand"))))


def _answering(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows by their entries, which answer as a tensor does."""
    return cast(Tensor, SparseRows(rows, columns, values, shape))


def _arguments(
    input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a bag was called with, by position or by name as ``nn.EmbeddingBag.forward`` has it."""
    return input, offsets, per_sample_weights


def _bags(module: nn.EmbeddingBag, indices: Tensor, offsets: Tensor | None) -> tuple[Tensor, int]:
    """In which bag each index is, and how many bags there are."""
    if offsets is None:
        bags, size = indices.shape
        numbers = torch.arange(bags, device=indices.device)
        return numbers.unsqueeze(-1).expand(bags, size).flatten(), bags
    bags = len(offsets) - bool(module.include_last_offset)
    numbers = torch.arange(len(indices), device=indices.device)
    starts = offsets.detach()[:bags].long().contiguous()
    return torch.searchsorted(starts, numbers, right=True) - 1, bags


def _real(module: nn.Module, indices: Tensor) -> Tensor:
    """Which indices are not the padding, bool."""
    padding = module.padding_idx
    return torch.ones_like(indices, dtype=torch.bool) if padding is None else indices != cast(int, padding)
