"""The output head and the cross entropy in one, some targets at a time, so that no tensor holds all logits.

The gradient is made in the forward pass, where a part's probabilities are at hand (as in Hsu et al. 2024,
Liger Kernel, arXiv:2410.10989).

Shapes: T target tokens of a pack, C of them in one part, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from trainer_svc.engine.layers.projection import Projection

# Logits of one part. On the CPU about what its last cache holds; on a GPU enough to fill it.
_MAX_LOGITS = {"cpu": 2**24, "cuda": 2**28}
# Products of other sizes are slower.
_ROWS_MULTIPLE = 32
# On the CPU a sum in another format makes a copy first.
_ROWS_OF_A_SUM = {"cpu": 64, "cuda": 2**30}


def summed_cross_entropy(
    hidden_TD: Tensor, labels_T: Tensor, head: Projection, parameters: tuple[Tensor, ...], dtype: torch.dtype
) -> Tensor:
    """The sum of the targets' cross entropies, in nats.

    Args:
        hidden_TD: the model's last hidden states, where a target is predicted, and filling after them.
        labels_T: int64; the hidden states beyond them are filling.
        head: the output head.
        parameters: the head's, in its order.
        dtype: of the matrix products and of the logits.

    Returns:
        float32 scalar; 0 if there are no targets.
    """
    result = _SummedCrossEntropy.apply(hidden_TD, labels_T, head, dtype, torch.is_grad_enabled(), *parameters)
    assert isinstance(result, Tensor)
    return result


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        labels_T: Tensor,
        head: Projection,
        dtype: torch.dtype,
        makes_gradient: bool,
        *parameters: Tensor,
    ) -> Tensor:
        weights = head.weights(parameters, dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        needs = ctx.needs_input_grad[5:]
        grad_TD = torch.empty_like(hidden_TD) if makes_gradient else None
        gradients: list[Tensor | None] = [None] * len(needs)
        rows = _MAX_LOGITS[hidden_TD.device.type] // weights.weight_OI.shape[0]
        rows = max(rows - rows % _ROWS_MULTIPLE, _ROWS_MULTIPLE)
        for start in range(0, len(hidden_TD), rows):
            hidden_CD = hidden_TD[start : start + rows]
            labels_C = labels_T[start : start + rows]
            logits_CV, low_CR = head.apply(hidden_CD, weights)
            loss_C, grad_CV = _losses_and_gradient(logits_CV, labels_C)
            # The target's probability is too small for the format, and its logit is gone by now.
            if (is_lost_C := loss_C.isposinf()).any():
                lost_CV, _ = head.apply(hidden_CD[: len(labels_C)][is_lost_C], weights)
                loss_C[is_lost_C] = cross_entropy(lost_CV.float(), labels_C[is_lost_C], reduction="none")
            loss += loss_C.sum()
            if grad_TD is None:
                continue
            grad_CD, new = head.backward(grad_CV, hidden_CD, low_CR, weights, needs=needs, needs_input=True)
            assert grad_CD is not None
            grad_TD[start : start + rows] = grad_CD
            gradients = [_sum(old, more) for old, more in zip(gradients, new, strict=True)]
        ctx.save_for_backward(grad_TD, *gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_TD, *gradients = ctx.saved_tensors
        scaled = [None if gradient is None else gradient * grad_loss for gradient in gradients]
        return grad_TD * grad_loss.to(grad_TD.dtype), None, None, None, None, *scaled


def _sum(old: Tensor | None, more: Tensor | None) -> Tensor | None:
    return more if old is None or more is None else old.add_(more)


def _losses_and_gradient(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """The losses, and their sum's gradient by the logits, which takes the logits' place in memory.

    Probabilities come in the logits' format, which may have eight bits. So a likely target's loss and
    gradient are taken from the sum of all others' probabilities: one minus its own would be mere rounding.
    Logits beyond the labels are filling, whose gradient is zero. A target whose probability is below the
    format's smallest (by about e^-88) has an infinite loss.
    """
    # In place is right on the CPU only, where a row is read before it's written.
    out = logits_CV if logits_CV.device.type == "cpu" else None
    gradient_CV = torch.softmax(logits_CV, dim=-1, out=out)
    targets = (torch.arange(len(labels_C), device=labels_C.device), labels_C)
    target_C = gradient_CV[targets].float()
    gradient_CV[targets] = 0
    # Some rows at a time, since the sum makes a float32 copy first.
    parts = gradient_CV[: len(labels_C)].split(_ROWS_OF_A_SUM[logits_CV.device.type])
    others_C = torch.cat([part.sum(-1, dtype=torch.float32) for part in parts])
    gradient_CV[targets] = -others_C.to(gradient_CV.dtype)
    gradient_CV[len(labels_C) :] = 0
    loss_C = torch.where(others_C < 0.5, -torch.log1p(-others_C.clamp(max=0.5)), -target_C.log())
    loss_C[target_C < torch.finfo(gradient_CV.dtype).tiny] = torch.inf
    return loss_C, gradient_CV
