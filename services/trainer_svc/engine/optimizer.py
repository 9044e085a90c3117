"""AdamW and the learning rate's course."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from trainer_svc.engine.bitsandbytes import bitsandbytes_for
from trainer_svc.engine.run_spec import RunSpec


def make_optimizer(parameters: Iterable[nn.Parameter], spec: RunSpec) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over the trainable parameters.

    Matrices decay; vectors (norms, biases) don't, as is usual: they are few and set scales.

    Raises:
        JobFault: `adamw_8bit` was asked for where bitsandbytes is missing.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": spec.extras.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {
        "lr": spec.learning_rate,
        "betas": (spec.extras.adam_beta1, spec.extras.adam_beta2),
        "eps": spec.extras.adam_epsilon,
    }
    if spec.extras.optimizer == "adamw_8bit":
        return bitsandbytes_for("optimizer adamw_8bit").optim.AdamW8bit(groups, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


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
