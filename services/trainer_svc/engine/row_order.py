"""Which rows each step trains on, and which of them fall to which process."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from trainer_svc.engine.examples import Example


def derived_seed(*parts: int) -> int:
    """A seed in [0, 2**63) that depends on all parts; neighbouring parts give unrelated seeds."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def epoch_order(num_rows: int, *, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """The order of the rows in an epoch: a function of the arguments alone, so that a resumed run repeats it.

    Args:
        num_rows: rows of the training file.
        seed: the run's.
        epoch: from 1.
        shuffle: False keeps the file's order.
    """
    if not shuffle:
        return list(range(num_rows))
    generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
    return torch.randperm(num_rows, generator=generator).tolist()


def rank_share(examples: Sequence[Example], *, rank: int, world_size: int) -> list[Example]:
    """The rows of one step that fall to one process; together the shares are all rows, each once.

    Rows are dealt by length, forth and back, so that no process waits long for another.
    """
    if world_size == 1:
        return list(examples)
    by_length = sorted(examples, key=lambda example: -example.num_tokens)
    share = []
    for start in range(0, len(by_length), world_size):
        deal = by_length[start : start + world_size]
        place = rank if (start // world_size) % 2 == 0 else world_size - 1 - rank
        if place < len(deal):
            share.append(deal[place])
    return share
