"""What a decoder layer does between its matrix products, forward and backward, in few passes over memory.

Activations stay in the format of the products, but within a norm, which is float32.

Shapes: S tokens of a pack, D model width, H heads, E width of a head, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu


def rms_norm(x_SD: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Each row brought to a root mean square of one, times a weight.

    Zhang & Sennrich 2019, arXiv:1910.07467. In float32 throughout and rounded once: on the CPU that is also
    faster than bfloat16.

    Returns:
        [S, D] in `x_SD`'s format, and each row's factor, float32 [S, 1].
    """
    out_SD = x_SD.to(torch.float32, copy=True)
    norm_S1 = torch.linalg.vector_norm(out_SD, dim=-1, keepdim=True)
    scale_S1 = (norm_S1 * norm_S1 / x_SD.shape[-1] + epsilon).rsqrt_()
    return _weighted(out_SD.mul_(scale_S1), weight_D).to(x_SD.dtype), scale_S1


def rms_norm_again(x_SD: Tensor, scale_S1: Tensor, weight_D: Tensor) -> Tensor:
    """What `rms_norm` returned, from the factors that it returned."""
    return _weighted(x_SD.to(torch.float32, copy=True).mul_(scale_S1), weight_D).to(x_SD.dtype)


def rms_norm_backward(
    grad_SD: Tensor, x_SD: Tensor, scale_S1: Tensor, weight_D: Tensor, residual_grad_SD: Tensor | None
) -> Tensor:
    """The gradient of `rms_norm` by `x_SD`, plus that which reaches `x_SD` around the norm."""
    normed_SD = x_SD.to(torch.float32, copy=True).mul_(scale_S1)
    out_SD = _weighted(grad_SD.to(torch.float32, copy=True), weight_D)
    mean_S1 = (out_SD * normed_SD).mean(-1, keepdim=True)
    out_SD.addcmul_(normed_SD, mean_S1, value=-1).mul_(scale_S1)
    if residual_grad_SD is not None:
        out_SD += residual_grad_SD
    return out_SD.to(x_SD.dtype)


def rms_norm_weight_gradient(grad_SD: Tensor, x_SD: Tensor, scale_S1: Tensor) -> Tensor:
    """The gradient of `rms_norm` by its weight: float32 [D]."""
    normed_SD = x_SD.to(torch.float32, copy=True).mul_(scale_S1)
    return normed_SD.mul_(grad_SD).flatten(0, -2).sum(0)


def _weighted(x_SD: Tensor, weight_D: Tensor) -> Tensor:
    return x_SD.mul_(weight_D.float())


def rotate(x_SHE: Tensor, cos_S1E: Tensor, sin_S1E: Tensor, out_SHE: Tensor) -> None:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864), with a head's halves as pairs, as Llama has it.

    With the sine's sign turned it is its own gradient, since a rotation's inverse is its transpose.

    Args:
        x_SHE: queries or keys.
        cos_S1E: both halves alike.
        sin_S1E: both halves alike.
        out_SHE: is written; not `x_SHE`.
    """
    half = x_SHE.shape[-1] // 2
    sin = sin_S1E[..., :half]
    torch.mul(x_SHE, cos_S1E, out=out_SHE)
    out_SHE[..., :half].addcmul_(x_SHE[..., half:], sin, value=-1)
    out_SHE[..., half:].addcmul_(x_SHE[..., :half], sin)


def swiglu(gate_up_S2F: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202): [S, F]; and silu(gate), which is slow to make."""
    gate_SF, up_SF = gate_up_S2F.chunk(2, dim=-1)
    activated_SF = silu(gate_SF)
    return activated_SF * up_SF, activated_SF


def swiglu_again(gate_up_S2F: Tensor, activated_SF: Tensor | None) -> Tensor:
    """What `swiglu` returned first, from what it returned second."""
    assert activated_SF is not None
    return activated_SF * gate_up_S2F.chunk(2, dim=-1)[1]


def swiglu_backward(grad_SF: Tensor, gate_up_S2F: Tensor, activated_SF: Tensor | None) -> Tensor:
    """The gradient of `swiglu` by gate and up: [S, 2F]."""
    assert activated_SF is not None
    gate_SF, up_SF = gate_up_S2F.chunk(2, dim=-1)
    out_S2F = torch.empty_like(gate_up_S2F)
    grad_gate_SF, grad_up_SF = out_S2F.chunk(2, dim=-1)
    torch.mul(grad_SF, activated_SF, out=grad_up_SF)
    torch.ops.aten.silu_backward.grad_input(grad_SF * up_SF, gate_SF, grad_input=grad_gate_SF)
    return out_S2F


class Elementwise(NamedTuple):
    """The functions above, as they are or compiled (see `compiled.py`, where `swiglu` keeps nothing)."""

    rms_norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] = rms_norm
    rms_norm_again: Callable[[Tensor, Tensor, Tensor], Tensor] = rms_norm_again
    rms_norm_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor] = rms_norm_backward
    rms_norm_weight_gradient: Callable[[Tensor, Tensor, Tensor], Tensor] = rms_norm_weight_gradient
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], None] = rotate
    swiglu: Callable[[Tensor], tuple[Tensor, Tensor | None]] = swiglu
    swiglu_again: Callable[[Tensor, Tensor | None], Tensor] = swiglu_again
    swiglu_backward: Callable[[Tensor, Tensor, Tensor | None], Tensor] = swiglu_backward


PLAIN = Elementwise()
