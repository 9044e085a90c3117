"""What is between the matrix products, compiled: each function one or two kernels, made at its first call.

A GPU spends as much time on these functions as on the products when each of their operations goes through its
memory. A CPU's cache holds a pack's activations, so there it gains little.

Shapes: as in `elementwise.py`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from trainer_svc.engine.layers.elementwise import PLAIN, Elementwise

# Of inputs, for each of which a function is compiled: two or three dimensions, numbers of threads.
_MOST_KINDS = 64


@functools.cache
def compiled() -> Elementwise:
    """The functions of `elementwise.py` by torch.compile; numbers differ within rounding."""
    functions = PLAIN._replace(rotate=_rotate, swiglu_backward=_swiglu_backward)
    return Elementwise._make(
        # Its stub doesn't know of the limit.
        torch.compile(function, fullgraph=True, dynamic=True, recompile_limit=_MOST_KINDS)  # type: ignore[call-overload]
        for function in functions
    )


# Those of `elementwise.py` write into parts of tensors by `out=`, which torch.compile doesn't take.


def _rotate(x_SHE: Tensor, cos_S1E: Tensor, sin_S1E: Tensor, out_SHE: Tensor) -> None:
    left, right = x_SHE.chunk(2, dim=-1)
    out_SHE.copy_(x_SHE * cos_S1E + torch.cat((-right, left), dim=-1) * sin_S1E)


def _swiglu_backward(grad_SF: Tensor, gate_up_S2F: Tensor, activated_SF: Tensor) -> Tensor:
    gate_SF, up_SF = gate_up_S2F.chunk(2, dim=-1)
    grad_gate_SF = torch.ops.aten.silu_backward(grad_SF * up_SF, gate_SF)
    return torch.cat((grad_gate_SF, grad_SF * activated_SF), dim=-1)
