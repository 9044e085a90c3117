"""Causal attention within each row of a pack, with a backward pass of its own.

On a CPU by plain matrix products in the activations' format: torch's flash attention for the CPU takes four
times as long for rows of some hundred tokens. Queries are taken in blocks, and keys after a block's last
query are left out. On a GPU by flash attention over all rows at once.

Rows may share a prefix that is in the pack once, before them: each row sees it, and it sees no row.

Shapes: S tokens of a pack, L tokens of a row without the shared prefix, M keys of a row, with the shared
prefix and some filling, Q queries of a block, P keys up to a block's end, H query heads, K key and value
heads, N = H + 2K, E width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Queries of one block. A row a little longer stays in one piece.
_BLOCK = 128
_WHOLE_UP_TO = 256
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
        lengths: of the parts of the pack in tokens; they sum to S.
        shared: tokens of the first part if all others continue it; 0 if each part is a row of its own.
        cumulative: int32 [parts + 1] on the GPU, which flash attention reads; None on the CPU.
    """

    lengths: tuple[int, ...]
    shared: int
    cumulative: Tensor | None

    @classmethod
    def of(
        cls, lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype, *, shared: int = 0
    ) -> Segments:
        """Rows of these lengths, end to end. Flash attention takes no float32, and shares nothing."""
        if not uses_flash(device, dtype):
            return cls(lengths, shared, None)
        assert shared == 0
        cumulative = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(lengths, 0, cumulative.to(device, non_blocking=True))


def uses_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention of this kind is flash attention, whose kernels need the Ampere generation."""
    if device.type != "cuda" or dtype == torch.float32:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 8


def attend(
    heads_SNE: Tensor, num_kv_heads: int, segments: Segments, *, keep: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Attention of each token to those of its row up to itself.

    Args:
        heads_SNE: the queries' heads, already scaled, then the keys' and the values'.
        num_kv_heads: K; H is a multiple of it.
        segments: the rows.
        keep: whether `attend_backward` will be called.

    Returns:
        [S, H, E], contiguous, and what `attend_backward` needs (nothing unless `keep`).
    """
    num_heads = heads_SNE.shape[1] - 2 * num_kv_heads
    if segments.cumulative is not None:
        return _flash(heads_SNE.split((num_heads, num_kv_heads, num_kv_heads), dim=1), segments)
    out_SHE = heads_SNE.new_empty(len(heads_SNE), num_heads, heads_SNE.shape[2])
    prefix_LNE = heads_SNE[: segments.shared]
    kept: list[Tensor] = []
    for index, (row_LNE, out_LHE) in enumerate(
        zip(heads_SNE.split(segments.lengths), out_SHE.split(segments.lengths), strict=True)
    ):
        before_LNE = prefix_LNE if index > 0 else prefix_LNE[:0]
        row_NME = _gather(row_LNE, before_LNE)
        weights = _attend_row(row_NME, len(before_LNE), out_LHE)
        if keep:
            kept += [row_NME, *weights]
    return out_SHE, tuple(kept)


def attend_backward(
    grad_SHE: Tensor, kept: tuple[Tensor, ...], num_kv_heads: int, segments: Segments
) -> Tensor:
    """The gradient of `attend` by the heads, [S, N, E].

    Args:
        grad_SHE: of the output.
        kept: what `attend` returned.
        num_kv_heads: K.
        segments: the rows.
    """
    if segments.cumulative is not None:
        return torch.cat(_flash_backward(grad_SHE, kept, segments), dim=1)
    length, num_heads, width = grad_SHE.shape
    out_SNE = grad_SHE.new_empty(length, num_heads + 2 * num_kv_heads, width)
    shared = segments.shared
    # What all rows together send back to the keys and values that they share.
    grad_prefix = grad_SHE.new_zeros(2 * num_kv_heads, shared, width, dtype=torch.float32)
    remaining = iter(kept)
    for index, (grad_LHE, out_LNE) in enumerate(
        zip(grad_SHE.split(segments.lengths), out_SNE.split(segments.lengths), strict=True)
    ):
        before = shared if index > 0 else 0
        row_NME = next(remaining)
        weights = None
        if row_NME.shape[1] <= _KEEP_WEIGHTS_UP_TO:
            weights = [next(remaining) for _ in _blocks(before, row_NME.shape[1])]
        grad_NME = _attend_row_backward(row_NME, before, grad_LHE, weights)
        out_LNE.copy_(grad_NME[:, before : before + len(out_LNE)].transpose(0, 1))
        if before:
            grad_prefix += grad_NME[num_heads:, :before]
    if shared:
        out_SNE[:shared, num_heads:] += grad_prefix.transpose(0, 1)
    return out_SNE


def _blocks(before: int, length: int) -> list[tuple[int, int]]:
    """First query and end of each block of a row, counted as keys are: queries begin after what is shared."""
    if length - before <= _WHOLE_UP_TO:
        return [(before, length)]
    num_blocks = -(-(length - before) // _BLOCK)
    size = _round_up(-(-(length - before) // num_blocks))
    first_end = before - before % _MULTIPLE + size
    edges = [before, *range(first_end, length, size), length]
    return list(pairwise(edges))


def _round_up(length: int) -> int:
    return -(-length // _MULTIPLE) * _MULTIPLE


def _gather(row_LNE: Tensor, before_LNE: Tensor) -> Tensor:
    """A row's heads one after the other, as batched products read them, and filled up: [N, M, E].

    Queries of what is shared are nobody's here, and left as they are.
    """
    start, end = len(before_LNE), len(before_LNE) + len(row_LNE)
    row_NME = row_LNE.new_empty(row_LNE.shape[1], _round_up(end), row_LNE.shape[2])
    if start:
        row_NME[:, :start].copy_(before_LNE.transpose(0, 1))
    row_NME[:, start:end].copy_(row_LNE.transpose(0, 1))
    row_NME[:, end:] = 0
    return row_NME


def _split_heads(row_NME: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    num_kv_heads = (row_NME.shape[0] - num_heads) // 2
    query_HME, key_KME, value_KME = row_NME.split((num_heads, num_kv_heads, num_kv_heads))
    return query_HME, key_KME, value_KME


def _weights(query_KQE: Tensor, key_KPE: Tensor, num_queries: int) -> Tensor:
    """Softmax of a block's scores, [K, H/K * Q, P].

    Args:
        query_KQE: all queries that share keys one after the other, [K, H/K * Q, E].
        key_KPE: keys up to the block's end.
        num_queries: Q.
    """
    mask = _mask(
        query_KQE.shape[1] // num_queries, num_queries, key_KPE.shape[1], query_KQE.dtype, query_KQE.device
    )
    scores = torch.baddbmm(mask, query_KQE, key_KPE.transpose(1, 2))
    return torch.softmax(scores, dim=-1, out=scores)


@lru_cache(maxsize=64)
def _mask(
    num_heads: int, num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What is added to a block's scores, [1, H/K * Q, P]; the last query sees the last key."""
    mask = torch.full((num_queries, num_keys), float("-inf"), dtype=dtype, device=device)
    return mask.triu_(1 + num_keys - num_queries).repeat(num_heads, 1).unsqueeze(0)


def _attend_row(row_NME: Tensor, before: int, out_LHE: Tensor) -> list[Tensor]:
    """Writes one row's attention; returns its weights by block, or nothing for a long row."""
    _, num_heads, width = out_LHE.shape
    query_HME, key_KME, value_KME = _split_heads(row_NME, num_heads)
    num_kv_heads = len(key_KME)
    keep = row_NME.shape[1] <= _KEEP_WEIGHTS_UP_TO
    kept = []
    for start, end in _blocks(before, row_NME.shape[1]):
        query = query_HME[:, start:end].reshape(num_kv_heads, -1, width)
        # Slices are laid out anew: strided, the product would do it, and slower.
        weights = _weights(query, key_KME[:, :end].contiguous(), end - start)
        out_HQE = torch.bmm(weights, value_KME[:, :end].contiguous()).view(num_heads, -1, width)
        target_QHE = out_LHE[start - before : end - before]
        target_QHE.copy_(out_HQE[:, : len(target_QHE)].transpose(0, 1))
        if keep:
            kept.append(weights)
    return kept


def _attend_row_backward(row_NME: Tensor, before: int, grad_LHE: Tensor, kept: list[Tensor] | None) -> Tensor:
    """The gradients of one row's queries, keys and values, [N, M, E]; of shared queries anything."""
    _, num_heads, width = grad_LHE.shape
    query_HME, key_KME, value_KME = _split_heads(row_NME, num_heads)
    num_kv_heads = key_KME.shape[0]
    blocks = _blocks(before, row_NME.shape[1])
    grad_NME = torch.empty_like(row_NME) if len(blocks) == 1 else torch.zeros_like(row_NME)
    grad_query_HME, grad_key_KME, grad_value_KME = _split_heads(grad_NME, num_heads)
    grad_HME = _gather(grad_LHE, grad_LHE.new_empty(before, num_heads, width))
    for index, (start, end) in enumerate(blocks):
        query = query_HME[:, start:end].reshape(num_kv_heads, -1, width)
        key, value = key_KME[:, :end].contiguous(), value_KME[:, :end].contiguous()
        grad = grad_HME[:, start:end].reshape(num_kv_heads, -1, width)
        weights = kept[index] if kept is not None else _weights(query, key, end - start)
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


def _flash(heads: Sequence[Tensor], segments: Segments) -> tuple[Tensor, tuple[Tensor, ...]]:
    longest = max(segments.lengths)
    query_SHE, key_SKE, value_SKE = (part.contiguous() for part in heads)
    # The op beneath torch.nn.attention.varlen, which hides what a backward pass outside autograd needs.
    out_SHE, log_sum_exp, rng_state, _, _ = torch.ops.aten._flash_attention_forward(
        query_SHE,
        key_SKE,
        value_SKE,
        segments.cumulative,
        segments.cumulative,
        longest,
        longest,
        0.0,
        True,
        False,
        scale=1.0,
    )
    return out_SHE, (query_SHE, key_SKE, value_SKE, out_SHE, log_sum_exp, rng_state)


def _flash_backward(
    grad_SHE: Tensor, kept: tuple[Tensor, ...], segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    query_SHE, key_SKE, value_SKE, out_SHE, log_sum_exp, rng_state = kept
    longest = max(segments.lengths)
    with _same_bits():
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            grad_SHE.contiguous(),
            query_SHE,
            key_SKE,
            value_SKE,
            out_SHE,
            log_sum_exp,
            segments.cumulative,
            segments.cumulative,
            longest,
            longest,
            0.0,
            True,
            rng_state,
            torch.empty(0, device=grad_SHE.device),
            scale=1.0,
        )
    return gradients


@contextmanager
def _same_bits() -> Iterator[None]:
    """Has flash attention's backward pass add up in one order, if algorithms are to be deterministic.

    Where torch is told to warn only, it warns and adds up as it comes.
    """
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error" if mode else "default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


class SegmentAttention(torch.autograd.Function):
    """`attend` for autograd: `SegmentAttention.apply(heads_SNE, num_kv_heads, segments)`."""

    @staticmethod
    def forward(ctx: Any, heads_SNE: Tensor, num_kv_heads: int, segments: Segments) -> Tensor:
        """See `attend`."""
        out_SHE, kept = attend(heads_SNE, num_kv_heads, segments, keep=any(ctx.needs_input_grad))
        ctx.save_for_backward(*kept)
        ctx.num_kv_heads, ctx.segments = num_kv_heads, segments
        return out_SHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SHE: Tensor) -> tuple[Tensor, None, None]:
        """See `attend_backward`."""
        return attend_backward(grad_SHE, ctx.saved_tensors, ctx.num_kv_heads, ctx.segments), None, None
