"""AdamW and the learning rate's course."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from trainer_svc.engine.run_spec import RunSpec


def make_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], spec: RunSpec) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over the trainable parameters.

    Matrices decay; vectors (norms, biases) don't, as is usual: they are few and set scales.
    """
    trainable = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": spec.extras.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=spec.learning_rate,
        betas=(spec.extras.adam_beta1, spec.extras.adam_beta2),
        eps=spec.extras.adam_epsilon,
        fused=True,
    )


def learning_rate_at(
    step: int,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int,
    scheduler: Literal["constant", "linear", "cosine"],
) -> float:
    """The learning rate of a step: a function of the step alone, so a resumed run needs no state for it.

    Args:
        step: from 1 to total_steps.
        peak: the highest learning rate, reached at the end of the warm-up.
        total_steps: steps of the whole run.
        warmup_steps: steps of the rise from zero; step 1 already has peak / warmup_steps.
        scheduler: the course after the warm-up; `linear` and `cosine` would reach zero one step after the
            last, so that no step is wasted.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    match scheduler:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - progress)
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
