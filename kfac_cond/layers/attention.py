"""Multi-head attention: the projections of queries, keys and values, and the one of what attention returns.

Between them torch's own function runs, so that masks, dropout and added keys are what they are in the module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Part
from .compound import CompoundKind
from .replay import Replay

_PACKED = Part("in_proj", "in_proj_weight", "in_proj_bias", groups=3)
#: Their biases are thirds of one parameter, which belongs to none of them.
_SEPARATE = tuple(Part(f"{name}_proj", f"{name}_proj_weight", None) for name in "qkv")
_OUT = Part("out_proj", "out_proj.weight", "out_proj.bias")


class AttentionKind(CompoundKind):
    """``nn.MultiheadAttention`` with all its arguments.

    The packed projection is a layer of three groups of rows, with queries, keys and values for inputs; separate
    projections are three layers, and their common bias is left to the universal form, as are ``bias_k`` and ``bias_v``.
    """

    name: ClassVar[str] = "attention"
    modules: ClassVar[tuple[type[nn.Module], ...]] = (nn.MultiheadAttention,)
    #: Weights that are not averaged are those that the values are mixed with.
    nested: ClassVar[tuple[tuple[int, int], ...]] = ((0, 1),)

    def parts(self, module: nn.Module) -> tuple[Part, ...]:
        """The projections into the attention, and the one out of it."""
        assert isinstance(module, nn.MultiheadAttention)
        return (_PACKED, _OUT) if module._qkv_same_embed_dim else (*_SEPARATE, _OUT)

    def draws_numbers(self, module: nn.Module) -> bool:
        """Where attention weights are dropped."""
        assert isinstance(module, nn.MultiheadAttention)
        return module.training and module.dropout > 0

    def outputs(self, output: Any) -> Sequence[Tensor | None]:
        """(attention's output, weights or None)."""
        return tuple(output)

    def replay(
        self,
        replay: Replay,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Sequence[Tensor | None]:
        """The module's forward, with its arguments."""
        assert isinstance(module, nn.MultiheadAttention)
        batched = query.dim() == 3
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
        q, k, v = self._projected(replay, module, query, key, value)
        eye = torch.eye(module.embed_dim, dtype=q.dtype, device=q.device)
        mixed, weights = F.multi_head_attention_forward(
            *(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)),
            *(module.embed_dim, module.num_heads),
            *(None, None),
            bias_k=None if module.bias_k is None else module.bias_k.detach(),
            bias_v=None if module.bias_v is None else module.bias_v.detach(),
            add_zero_attn=module.add_zero_attn,
            dropout_p=module.dropout,
            out_proj_weight=eye,
            out_proj_bias=None,
            training=module.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=True,
            q_proj_weight=eye,
            k_proj_weight=eye,
            v_proj_weight=eye,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        y = replay.linear(_OUT, mixed.transpose(0, 1))
        if not batched:
            return y[0], None if weights is None else weights[0]
        return y if module.batch_first else y.transpose(0, 1), weights

    def _projected(self, replay: Replay, module: nn.MultiheadAttention, *given: Tensor) -> list[Tensor]:
        """Queries, keys and values after their projections, [batch, positions, features]."""
        projected = []
        for place, x in enumerate(given):
            part = _PACKED if module._qkv_same_embed_dim else _SEPARATE[place]
            if x.dim() == 2:
                x = x[None]
            elif not module.batch_first:
                x = x.transpose(0, 1)
            if part.groups > 1:
                z = replay.linear(part, x.detach(), place=place)
            else:
                z = replay.linear(part, x.detach())
                if module.in_proj_bias is not None:
                    z = z + module.in_proj_bias.detach().chunk(3)[place]
            projected.append(z)
        return projected
