"""Causal attention within each row of a pack, with a backward pass of its own.

On a CPU by plain matrix products in the activations' format: torch's flash attention for the CPU takes four
times as long for rows of some hundred tokens. Queries are taken in blocks, and keys after a block's last
query are left out. On a GPU by flash attention over all rows at once.

Shapes: S tokens of a pack, L tokens of a row, M of them when filled up, Q queries of a block, P keys up to a
block's end, H query heads, K key and value heads, N = H + 2K, E width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Queries of one block. A row a little longer stays in one piece.
_BLOCK = 128
_WHOLE_UP_TO = 160
# The softmax takes numbers one by one where they don't fill a vector register, so rows are filled up to this
# many tokens: after the others, where nothing sees them.
_MULTIPLE = 32
# Attention weights of longer rows are computed again in the backward pass: kept, they would take memory
# with the square of the length.
_KEEP_WEIGHTS_UP_TO = 1024


@dataclass(frozen=True)
class Segments:
    """Where the rows of a pack lie.

    Attributes:
        lengths: of the rows in tokens; they sum to S.
        cumulative: int32 [rows + 1] on the GPU, which flash attention reads; None on the CPU.
    """

    lengths: tuple[int, ...]
    cumulative: Tensor | None

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Segments:
        """Rows of these lengths, end to end. Flash attention takes no float32."""
        if device.type != "cuda" or dtype == torch.float32:
            return cls(lengths, None)
        cumulative = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(lengths, cumulative.to(device, non_blocking=True))


def attend(
    query_SHE: Tensor, key_SKE: Tensor, value_SKE: Tensor, segments: Segments, *, keep: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Attention of each token to those of its row up to itself.

    Args:
        query_SHE: already scaled; H is a multiple of K.
        key_SKE: keys.
        value_SKE: values.
        segments: the rows.
        keep: whether `attend_backward` will be called.

    Returns:
        [S, H, E], contiguous, and what `attend_backward` needs (nothing unless `keep`).
    """
    if segments.cumulative is not None:
        return _flash(query_SHE, key_SKE, value_SKE, segments)
    out_SHE = query_SHE.new_empty(query_SHE.shape)
    kept: list[Tensor] = []
    rows = (part.split(segments.lengths) for part in (query_SHE, key_SKE, value_SKE, out_SHE))
    for *heads, out_LHE in zip(*rows, strict=True):
        row_NME = _gather_row(heads)
        weights = _attend_row(row_NME, out_LHE)
        if keep:
            kept += [row_NME, *weights]
    return out_SHE, tuple(kept)


def attend_backward(
    grad_SHE: Tensor,
    kept: tuple[Tensor, ...],
    segments: Segments,
    grad_query_SHE: Tensor,
    grad_key_SKE: Tensor,
    grad_value_SKE: Tensor,
) -> None:
    """The gradients of `attend`, written into the last three arguments.

    Args:
        grad_SHE: of the output.
        kept: what `attend` returned.
        segments: the rows.
        grad_query_SHE: of the scaled queries.
        grad_key_SKE: of the keys.
        grad_value_SKE: of the values.
    """
    if segments.cumulative is not None:
        gradients = _flash_backward(grad_SHE, kept, segments)
        for target, gradient in zip((grad_query_SHE, grad_key_SKE, grad_value_SKE), gradients, strict=True):
            target.copy_(gradient)
        return
    remaining = iter(kept)
    targets = (grad_SHE, grad_query_SHE, grad_key_SKE, grad_value_SKE)
    for grad_LHE, *heads in zip(*(part.split(segments.lengths) for part in targets), strict=True):
        row_NME = next(remaining)
        weights = None
        if row_NME.shape[1] <= _KEEP_WEIGHTS_UP_TO:
            weights = [next(remaining) for _ in _blocks(row_NME.shape[1])]
        grad_row_NME = _attend_row_backward(row_NME, grad_LHE, weights)
        for target_LHE, gradient in zip(heads, _split_heads(grad_row_NME, grad_LHE.shape[1]), strict=True):
            target_LHE.copy_(gradient[:, : len(target_LHE)].transpose(0, 1))


def _blocks(length: int) -> list[tuple[int, int]]:
    """First query and end of each block of a row."""
    if length <= _WHOLE_UP_TO:
        return [(0, length)]
    num_blocks = -(-length // _BLOCK)
    size = _round_up(-(-length // num_blocks))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _round_up(length: int) -> int:
    return -(-length // _MULTIPLE) * _MULTIPLE


def _gather_row(heads_LHE: Sequence[Tensor]) -> Tensor:
    """A row's heads one after the other, as batched products read them, and filled up: [N, M, E]."""
    length, _, width = heads_LHE[0].shape
    num_heads = [part.shape[1] for part in heads_LHE]
    row_NME = heads_LHE[0].new_empty(sum(num_heads), _round_up(length), width)
    row_NME[:, length:] = 0
    for target, source in zip(row_NME.split(num_heads), heads_LHE, strict=True):
        target[:, :length].copy_(source.transpose(0, 1))
    return row_NME


def _split_heads(row_NME: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    num_kv_heads = (row_NME.shape[0] - num_heads) // 2
    query_HME, key_KME, value_KME = row_NME.split((num_heads, num_kv_heads, num_kv_heads))
    return query_HME, key_KME, value_KME


def _weights(query_HQE: Tensor, key_KPE: Tensor) -> Tensor:
    """Softmax of a block's scores, [K, H/K * Q, P]: all queries that share keys in one product."""
    (num_heads, num_queries, width), (num_kv_heads, num_keys, _) = query_HQE.shape, key_KPE.shape
    scores = torch.bmm(query_HQE.reshape(num_kv_heads, -1, width), key_KPE.transpose(1, 2))
    # Only the last keys can be later than a query.
    scores.view(num_heads, num_queries, num_keys)[..., num_keys - num_queries :] += _mask(
        num_queries, scores.dtype, scores.device
    )
    return torch.softmax(scores, dim=-1, out=scores)


@lru_cache(maxsize=16)
def _mask(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((size, size), float("-inf"), dtype=dtype, device=device).triu_(1)


def _attend_row(row_NME: Tensor, out_LHE: Tensor) -> list[Tensor]:
    """Writes one row's attention; returns its weights by block, or nothing for a long row."""
    _, num_heads, width = out_LHE.shape
    query_HME, key_KME, value_KME = _split_heads(row_NME, num_heads)
    keep = row_NME.shape[1] <= _KEEP_WEIGHTS_UP_TO
    kept = []
    for start, end in _blocks(row_NME.shape[1]):
        # Slices are laid out anew: strided, the product would do it, and slower.
        weights = _weights(query_HME[:, start:end], key_KME[:, :end].contiguous())
        out_HQE = torch.bmm(weights, value_KME[:, :end].contiguous()).view(num_heads, -1, width)
        target_QHE = out_LHE[start:end]
        target_QHE.copy_(out_HQE[:, : len(target_QHE)].transpose(0, 1))
        if keep:
            kept.append(weights)
    return kept


def _attend_row_backward(row_NME: Tensor, grad_LHE: Tensor, kept: list[Tensor] | None) -> Tensor:
    """The gradients of one row's queries, keys and values: [N, M, E]."""
    _, num_heads, width = grad_LHE.shape
    query_HME, key_KME, value_KME = _split_heads(row_NME, num_heads)
    num_kv_heads = key_KME.shape[0]
    blocks = _blocks(row_NME.shape[1])
    grad_NME = torch.empty_like(row_NME) if len(blocks) == 1 else torch.zeros_like(row_NME)
    grad_query_HME, grad_key_KME, grad_value_KME = _split_heads(grad_NME, num_heads)
    grad_HME = _gather_row([grad_LHE])
    for index, (start, end) in enumerate(blocks):
        query = query_HME[:, start:end].reshape(num_kv_heads, -1, width)
        key, value = key_KME[:, :end].contiguous(), value_KME[:, :end].contiguous()
        grad = grad_HME[:, start:end].reshape(num_kv_heads, -1, width)
        weights = kept[index] if kept is not None else _weights(query_HME[:, start:end], key)
        grad_scores = torch.bmm(grad, value.transpose(1, 2))
        torch.ops.aten._softmax_backward_data.out(
            grad_scores, weights, -1, weights.dtype, grad_input=grad_scores
        )
        grad_query = torch.bmm(grad_scores, key)
        grad_query_HME[:, start:end].copy_(grad_query.view(num_heads, -1, width))
        if len(blocks) == 1:
            torch.bmm(weights.transpose(1, 2), grad, out=grad_value_KME)
            torch.bmm(grad_scores.transpose(1, 2), query, out=grad_key_KME)
        else:
            grad_value_KME[:, :end] += torch.bmm(weights.transpose(1, 2), grad)
            grad_key_KME[:, :end] += torch.bmm(grad_scores.transpose(1, 2), query)
    return grad_NME


def _flash(
    query_SHE: Tensor, key_SKE: Tensor, value_SKE: Tensor, segments: Segments
) -> tuple[Tensor, tuple[Tensor, ...]]:
    longest = max(segments.lengths)
    query, key, value = (part.contiguous() for part in (query_SHE, key_SKE, value_SKE))
    # The op beneath torch.nn.attention.varlen, which hides what a backward pass outside autograd needs.
    out_SHE, log_sum_exp, rng_state, _, _ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        segments.cumulative,
        segments.cumulative,
        longest,
        longest,
        0.0,
        True,
        False,
        scale=1.0,
    )
    return out_SHE, (query, key, value, out_SHE, log_sum_exp, rng_state)


def _flash_backward(
    grad_SHE: Tensor, kept: tuple[Tensor, ...], segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, out_SHE, log_sum_exp, rng_state = kept
    longest = max(segments.lengths)
    return torch.ops.aten._flash_attention_backward(
        grad_SHE.contiguous(),
        query,
        key,
        value,
        out_SHE,
        log_sum_exp,
        segments.cumulative,
        segments.cumulative,
        longest,
        longest,
        0.0,
        True,
        rng_state,
        torch.empty(0, device=query.device),
        scale=1.0,
    )


class SegmentAttention(torch.autograd.Function):
    """`attend` for autograd: `SegmentAttention.apply(query_SHE, key_SKE, value_SKE, segments)`."""

    @staticmethod
    def forward(
        ctx: Any, query_SHE: Tensor, key_SKE: Tensor, value_SKE: Tensor, segments: Segments
    ) -> Tensor:
        """See `attend`."""
        needs_gradient = any(ctx.needs_input_grad)
        out_SHE, kept = attend(query_SHE, key_SKE, value_SKE, segments, keep=needs_gradient)
        ctx.save_for_backward(*kept)
        ctx.segments = segments
        ctx.shapes = (query_SHE.shape, key_SKE.shape)
        return out_SHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SHE: Tensor) -> tuple[Tensor | None, ...]:
        """See `attend_backward`."""
        query_shape, key_shape = ctx.shapes
        grads = [grad_SHE.new_empty(shape) for shape in (query_shape, key_shape, key_shape)]
        attend_backward(grad_SHE, ctx.saved_tensors, ctx.segments, *grads)
        return (*grads, None)
