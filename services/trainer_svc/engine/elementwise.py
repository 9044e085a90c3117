"""What a decoder layer does between its matrix products, forward and backward, in few passes over memory.

Activations stay in the format of the products; sums over a row and the scales that come of them are float32.

Shapes: S tokens of a pack, D model width, H heads, E width of a head, F feed-forward width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def rms_scale(x_SD: Tensor, epsilon: float) -> Tensor:
    """The factor that brings each row to a root mean square of one (Zhang & Sennrich 2019, arXiv:1910.07467).

    Returns:
        float32 [S, 1], or [..., 1] for other leading dimensions.
    """
    norm = torch.linalg.vector_norm(x_SD, dim=-1, keepdim=True, dtype=torch.float32)
    return (norm * norm / x_SD.shape[-1] + epsilon).rsqrt_()


def rms_norm(x_SD: Tensor, scale_S1: Tensor, weight_D: Tensor) -> Tensor:
    """Normalised rows times the weight, in `x_SD`'s format."""
    out_SD = torch.empty_like(x_SD)
    # `out` has each product written in the narrow format at once, without a float32 copy.
    torch.mul(x_SD, scale_S1, out=out_SD)
    return out_SD.mul_(weight_D.to(x_SD.dtype))


def rms_norm_backward(
    grad_SD: Tensor, x_SD: Tensor, scale_S1: Tensor, weight_D: Tensor, residual_grad_SD: Tensor | None
) -> Tensor:
    """The gradient of `rms_norm` by `x_SD`, plus that which reaches `x_SD` around the norm."""
    weighted_SD = grad_SD * weight_D.to(grad_SD.dtype)
    dot_S1 = (weighted_SD * x_SD).sum(-1, keepdim=True, dtype=torch.float32)
    along_x_S1 = scale_S1.pow(3).mul_(dot_S1).div_(-x_SD.shape[-1])
    out_SD = torch.empty_like(x_SD)
    if residual_grad_SD is None:
        torch.mul(weighted_SD, scale_S1, out=out_SD)
    else:
        torch.addcmul(residual_grad_SD, weighted_SD, scale_S1, out=out_SD)
    return out_SD.addcmul_(x_SD, along_x_S1)


def rms_norm_weight_gradient(grad_SD: Tensor, x_SD: Tensor, scale_S1: Tensor) -> Tensor:
    """The gradient of `rms_norm` by its weight: float32 [D]."""
    return (grad_SD * x_SD).mul_(scale_S1).flatten(0, -2).sum(0, dtype=torch.float32)


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


def swiglu(gate_up_S2F: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202): [S, F]."""
    gate_SF, up_SF = gate_up_S2F.chunk(2, dim=-1)
    return silu(gate_SF).mul_(up_SF)


def swiglu_backward(grad_SF: Tensor, gate_up_S2F: Tensor) -> Tensor:
    """The gradient of `swiglu` by gate and up: [S, 2F]."""
    gate_SF, up_SF = gate_up_S2F.chunk(2, dim=-1)
    out_S2F = torch.empty_like(gate_up_S2F)
    grad_gate_SF, grad_up_SF = out_S2F.chunk(2, dim=-1)
    activated_SF = silu(gate_SF)
    torch.mul(grad_SF, activated_SF, out=grad_up_SF)
    grad_activated_SF = torch.mul(grad_SF, up_SF, out=activated_SF)
    torch.ops.aten.silu_backward.grad_input(grad_activated_SF, gate_SF, grad_input=grad_gate_SF)
    return out_S2F
