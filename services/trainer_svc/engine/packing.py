"""Several rows in one forward pass, without padding and without seeing each other.

Rows are laid end to end in one sequence; positions start again at each row, and attention is computed row
by row. So every row gets what it would get alone, while the matrix products, most of the work, are as large
as the whole pack.

Shapes: S tokens of a pack, T target tokens of a pack, L tokens of a row, H heads, D a head's width.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from trainer_svc.engine.examples import Example
from trainer_svc.engine.layers.segment_attention import SegmentAttention, Segments

PACKED_ATTENTION = "tunery_packed"

# A shorter prefix saves less than attending to it apart costs.
_SHARED_FROM = 8

# Of more groups, all have about the same size anyway.
_EVENED_OUT = 32

# Families whose attention is plain causal attention with nothing added (no sliding window, no soft cap,
# no sinks), each held against transformers' own attention in tests/unit/engine/test_packing.py.
PACKABLE_MODEL_TYPES = frozenset({"llama", "qwen2", "qwen3"})


@dataclass(frozen=True)
class Pack:
    """Rows laid end to end.

    Attributes:
        input_ids: int64 [1, S].
        position_ids: int64 [1, S]; each row's start at 0.
        segment_lengths: the rows' lengths up to their last target, in tokens; they sum to S.
        shared_prefix: if not 0, all rows begin with so many tokens that are in the pack once, as its first
            segment; the other segments are what each row has beyond them. Such a pack has at least two rows.
        logit_positions: int64 [T]; where a target is predicted, that is, the position before it.
        labels: int64 [T]; the target tokens.
        counts: False for a pass that only keeps other processes company: its loss counts as zero.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_lengths: tuple[int, ...]
    logit_positions: Tensor
    labels: Tensor
    shared_prefix: int = 0
    counts: bool = True

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]


def make_pack(examples: Sequence[Example], device: torch.device, *, share_prefix: bool = False) -> Pack:
    """Lays examples end to end.

    Args:
        examples: at least one.
        device: where the tensors go.
        share_prefix: lay what all examples begin with only once, if it's worth it: a chat template's or the
            rows' own system message. A causal model computes the same for it in every row. Only for
            `layers`.
    """
    shared = _shared_prefix(examples) if share_prefix else 0
    # A row's last target is predicted from what is before it; what follows is seen by nothing that counts.
    ends = [_last_target(example) for example in examples]
    parts_L = [example.input_ids[shared:end] for example, end in zip(examples, ends, strict=True)]
    positions_L = [torch.arange(shared, end) for end in ends]
    if shared:
        parts_L.insert(0, examples[0].input_ids[:shared])
        positions_L.insert(0, torch.arange(shared))
    logit_positions_T = []
    start = shared
    for example, end in zip(examples, ends, strict=True):
        # Position 0 of a row is never a target, so the position before a target is in the same row.
        before_T = example.is_target.nonzero().squeeze(1) - 1
        logit_positions_T.append(torch.where(before_T < shared, before_T, before_T - shared + start))
        start += end - shared
    labels_T = [example.input_ids[example.is_target] for example in examples]
    return Pack(
        input_ids=torch.cat(parts_L).unsqueeze(0).to(device),
        position_ids=torch.cat(positions_L).unsqueeze(0).to(device),
        segment_lengths=tuple(map(len, parts_L)),
        logit_positions=torch.cat(logit_positions_T).to(device),
        labels=torch.cat(labels_T).to(device),
        shared_prefix=shared,
    )


def _last_target(example: Example) -> int:
    """The position of the last target; 1 without any, since a pack has something of each row."""
    targets_T = example.is_target.nonzero().squeeze(1)
    return int(targets_T[-1]) if len(targets_T) else 1


def _shared_prefix(examples: Sequence[Example]) -> int:
    """How many tokens to share: none of them a target, and each row has more that counts."""
    if len(examples) == 1:
        return 0
    shortest = min(map(_last_target, examples)) - 1
    ends = torch.stack(
        [
            (example.input_ids[:shortest] != examples[0].input_ids[:shortest]) | example.is_target[:shortest]
            for example in examples
        ]
    ).any(0)
    length = int(ends.nonzero()[0]) if ends.any() else shortest
    return length if length >= _SHARED_FROM else 0


def group_rows(
    examples: Sequence[Example], max_tokens: int, multiple_of: int = 1, *, share_prefix: bool = False
) -> list[list[Example]]:
    """Splits examples into few groups of about the same size; a row longer than `max_tokens` stands alone.

    The longest go first, each to where most room is (LPT: Graham 1969, Bounds on Multiprocessing Timing
    Anomalies); then, of few groups, rows change places as long as that makes the largest smaller. A small
    last group would cost a pass over all weights for little, and where cores take a group each, the largest
    counts.

    Args:
        examples: of one step.
        max_tokens: of a group, as `make_pack` lays it out; 0 makes each row a group of its own.
        multiple_of: the number of groups is one of this, if there are as many rows.
        share_prefix: as for `make_pack`.

    Returns:
        Groups in the order of their first examples, each in the order given: a function of the arguments.
    """
    shared = _shared_prefix(examples) if share_prefix and examples else 0
    lengths = [_last_target(example) - shared for example in examples]
    room = max_tokens - shared
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    short = [length for length in lengths if length <= room]
    fewest = max(1, len(lengths) - len(short) + -(-sum(short) // max(room, 1)))
    num_groups = -(-fewest // multiple_of) * multiple_of
    while num_groups <= len(lengths):
        groups = _longest_first(lengths, longest_first, num_groups)
        if num_groups <= _EVENED_OUT:
            _even_out(groups, lengths)
        if all(len(group) == 1 or sum(lengths[i] for i in group) <= room for group in groups):
            return [[examples[index] for index in group] for group in sorted(map(sorted, groups))]
        # Of many groups one or two in a hundred more cost less than trying each number.
        num_groups += multiple_of * (1 + num_groups // (64 * multiple_of))
    return [[example] for example in examples]


def _longest_first(lengths: Sequence[int], order: Sequence[int], num_groups: int) -> list[list[int]]:
    """Puts one row after the other into the smallest group, the first of equals."""
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    smallest_first = [(0, number) for number in range(num_groups)]  # is a heap
    for index in order:
        size, number = smallest_first[0]
        groups[number].append(index)
        heapq.heapreplace(smallest_first, (size + lengths[index], number))
    return groups


def _even_out(groups: list[list[int]], lengths: Sequence[int]) -> None:
    """Swaps rows of the largest group for shorter ones of another, the best swap first, while that helps."""
    sizes = [sum(lengths[index] for index in group) for group in groups]
    while True:
        largest = sizes.index(max(sizes))
        best: tuple[int, int, int, int] | None = None
        places = [_first_places(group, lengths) for group in groups]
        for other in range(len(groups)):
            for (length, here), (shorter, there) in itertools.product(
                places[largest].items(), places[other].items()
            ):
                moved = length - shorter
                larger = max(sizes[largest] - moved, sizes[other] + moved)
                if larger < sizes[largest] and (best is None or larger < best[0]):
                    best = (larger, other, here, there)
        if best is None:
            return
        _, other, here, there = best
        groups[largest][here], groups[other][there] = groups[other][there], groups[largest][here]
        for number in (largest, other):
            sizes[number] = sum(lengths[index] for index in groups[number])


def _first_places(group: Sequence[int], lengths: Sequence[int]) -> dict[int, int]:
    """Where each length is first in a group: rows of one length are as good as each other."""
    places: dict[int, int] = {}
    for place, index in enumerate(group):
        places.setdefault(lengths[index], place)
    return places


def packed_attention(
    module: nn.Module,  # noqa: ARG001 transformers passes it
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

    For models that `layers` doesn't cover.

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
    if dropout == 0.0:
        heads_1NSD = torch.cat((query * scaling, key, value), dim=1)
        # Where weights learn, the rotary embedding is float32; autocast knows nothing of what follows.
        if torch.is_autocast_enabled(heads_1NSD.device.type):
            heads_1NSD = heads_1NSD.to(torch.get_autocast_dtype(heads_1NSD.device.type))
        segments = Segments.of(segment_lengths, heads_1NSD.device, heads_1NSD.dtype)
        out_SHD = SegmentAttention.apply(heads_1NSD.squeeze(0).transpose(0, 1), key.shape[1], segments)
        assert isinstance(out_SHD, Tensor)
        return out_SHD.unsqueeze(0), None
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
