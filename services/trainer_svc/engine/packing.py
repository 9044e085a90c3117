"""Several rows in one forward pass, without padding and without seeing each other.

Rows are laid end to end in one sequence; positions start again at each row, and attention is computed row
by row. So every row gets what it would get alone, while the matrix products, most of the work, are as large
as the whole pack.

Shapes: S tokens of a pack, T target tokens of a pack, H heads, D a head's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from trainer_svc.engine.examples import Example

PACKED_ATTENTION = "tunery_packed"

# Families whose attention is plain causal attention with nothing added (no sliding window, no soft cap,
# no sinks), each held against transformers' own attention in tests/unit/engine/test_packing.py.
PACKABLE_MODEL_TYPES = frozenset({"llama", "qwen2", "qwen3"})


@dataclass(frozen=True)
class Pack:
    """Rows laid end to end.

    Attributes:
        input_ids: int64 [1, S].
        position_ids: int64 [1, S]; each row's start at 0.
        segment_lengths: the rows' lengths in tokens; they sum to S.
        logit_positions: int64 [T]; where a target is predicted, that is, the position before it.
        labels: int64 [T]; the target tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_lengths: tuple[int, ...]
    logit_positions: Tensor
    labels: Tensor

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]


def make_pack(examples: Sequence[Example], device: torch.device) -> Pack:
    """Lays examples end to end.

    Args:
        examples: at least one.
        device: where the tensors go.
    """
    input_ids_S = torch.cat([example.input_ids for example in examples])
    is_target_S = torch.cat([example.is_target for example in examples])
    position_ids_S = torch.cat([torch.arange(example.num_tokens) for example in examples])
    # Position 0 of a row is never a target, so the position before a target is in the same row.
    target_positions_T = is_target_S.nonzero().squeeze(1)
    return Pack(
        input_ids=input_ids_S.unsqueeze(0).to(device),
        position_ids=position_ids_S.unsqueeze(0).to(device),
        segment_lengths=tuple(example.num_tokens for example in examples),
        logit_positions=(target_positions_T - 1).to(device),
        labels=input_ids_S[target_positions_T].to(device),
    )


def group_rows(examples: Sequence[Example], max_tokens: int) -> list[list[Example]]:
    """Splits examples into groups of at most `max_tokens` tokens, in order; a longer row stands alone.

    `max_tokens` of 0 makes each row a group of its own.
    """
    groups: list[list[Example]] = []
    room = 0
    for example in examples:
        if not groups or example.num_tokens > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(example)
        room -= example.num_tokens
    return groups


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    segment_lengths: tuple[int, ...],
    dropout: float = 0.0,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment, in the shape of transformers' attention functions.

    Args:
        module: the layer; unused.
        query: [1, H, S, D].
        key: [1, H_kv, S, D], where H is a multiple of H_kv.
        value: as key.
        attention_mask: must be None: transformers makes no mask for an attention that it doesn't know.
        scaling: factor of the products before the softmax.
        segment_lengths: lengths that sum to S.
        dropout: probability of dropping an attention weight.

    Returns:
        [1, S, H, D], and None for the weights.
    """
    assert attention_mask is None
    outputs = [
        scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=True
        )
        for q, k, v in zip(
            query.split(segment_lengths, dim=2),
            key.split(segment_lengths, dim=2),
            value.split(segment_lengths, dim=2),
            strict=True,
        )
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None
