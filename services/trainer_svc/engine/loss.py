"""The loss: cross entropy of the target tokens, and of nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trainer_svc.engine.layers.speed_up import fast_loss, is_fast
from trainer_svc.engine.packing import Pack


def summed_loss(model: nn.Module, pack: Pack, dtype: torch.dtype, *, packs_rows: bool) -> Tensor:
    """The sum of the cross entropies of a pack's targets, in nats.

    The caller divides by the number of targets of the whole optimizer step: a mean over each pack would
    weigh a token of a small pack more than one of a large pack. Logits are computed only where a target is
    predicted, since over the whole sequence they would be the largest tensor by far, and the cross entropy
    in float32.

    Args:
        model: a causal language model of transformers, with or without peft's adapters.
        pack: one row only, unless `packs_rows`.
        dtype: of the matrix products; bfloat16 runs under autocast.
        packs_rows: whether the model's attention is `packing.packed_attention`.

    Returns:
        float32 scalar.
    """
    assert packs_rows or len(pack.segment_lengths) == 1
    if is_fast(model):
        return fast_loss(model, pack)
    segments = {"segment_lengths": pack.segment_lengths} if packs_rows else {}
    device_type = pack.input_ids.device.type
    with torch.autocast(device_type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits_1TV = model(
            input_ids=pack.input_ids,
            position_ids=pack.position_ids,
            logits_to_keep=pack.logit_positions,
            use_cache=False,
            **segments,
        ).logits
    return cross_entropy(logits_1TV.squeeze(0).float(), pack.labels, reduction="sum")
