"""What is between the matrix products, compiled: each function one or two kernels, made at its first call.

A GPU spends as much time on these functions as on the products when each of their operations goes through its
memory. A CPU's cache holds a pack's activations, so there it gains little.

Shapes: as in `elementwise.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from trainer_svc.engine.layers.elementwise import PLAIN, Elementwise

# Of inputs, for each of which a function is compiled: widths, two or three dimensions, numbers of threads.
_MOST_KINDS = 64


@functools.cache
def compiled() -> Elementwise:
    """The functions of `elementwise.py` by torch.compile; numbers differ within rounding."""
    write_swiglu_gradients = _compiled(_write_swiglu_gradients)

    def swiglu_backward(grad_SF: Tensor, gate_up_S2F: Tensor, _activated_SF: Tensor | None) -> Tensor:
        out_S2F = torch.empty_like(gate_up_S2F)
        write_swiglu_gradients(grad_SF, gate_up_S2F, *out_S2F.chunk(2, dim=-1))
        return out_S2F

    return Elementwise(
        rms_norm=_compiled(PLAIN.rms_norm),
        rms_norm_again=_compiled(PLAIN.rms_norm_again),
        rms_norm_backward=_compiled(PLAIN.rms_norm_backward),
        rms_norm_weight_gradient=_compiled(PLAIN.rms_norm_weight_gradient),
        rotate=_compiled(_rotate),
        swiglu=_compiled(_swiglu),
        swiglu_again=_compiled(_swiglu_again),
        swiglu_backward=swiglu_backward,
    )


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function for any number of tokens.

    Widths are constants of the kernel: where it has to take any width, it loads number by number, which on an
    H200 takes two to three times as long.
    """
    fast = torch.compile(function, fullgraph=True, dynamic=False)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        # Each thread has settings of its own. As an argument of torch.compile only the newest torch takes it.
        if torch._dynamo.config.recompile_limit < _MOST_KINDS:
            torch._dynamo.config.recompile_limit = _MOST_KINDS
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.ndim > 1:
                torch._dynamo.maybe_mark_dynamic(argument, 0)
        return fast(*arguments)

    return call


# Those of `elementwise.py` write into parts of tensors by `out=`, which torch.compile doesn't take. And on a
# GPU silu is cheaper made again than kept; a CPU loses little by it.


def _rotate(x_SHE: Tensor, cos_S1E: Tensor, sin_S1E: Tensor, out_SHE: Tensor) -> None:
    left, right = x_SHE.chunk(2, dim=-1)
    out_SHE.copy_(x_SHE * cos_S1E + torch.cat((-right, left), dim=-1) * sin_S1E)


def _swiglu(gate_up_S2F: Tensor) -> tuple[Tensor, None]:
    return _swiglu_again(gate_up_S2F, None), None


def _swiglu_again(gate_up_S2F: Tensor, _activated_SF: Tensor | None) -> Tensor:
    gate_SF, up_SF = gate_up_S2F.chunk(2, dim=-1)
    return silu(gate_SF) * up_SF


def _write_swiglu_gradients(
    grad_SF: Tensor, gate_up_S2F: Tensor, grad_gate_SF: Tensor, grad_up_SF: Tensor
) -> None:
    # Into one tensor by `cat` it would be two kernels' work, each reading everything.
    gate_SF, up_SF = gate_up_S2F.chunk(2, dim=-1)
    grad_gate_SF.copy_(torch.ops.aten.silu_backward(grad_SF * up_SF, gate_SF))
    grad_up_SF.copy_(grad_SF * silu(gate_SF))
