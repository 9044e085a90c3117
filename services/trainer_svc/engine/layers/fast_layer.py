"""A decoder layer of the Llama kind, forward and backward by hand.

Computes what transformers' Llama, Qwen2 and Qwen3 layers compute, on rows packed without padding, with fewer
passes over memory: matrices that read the same input are one product, adapters add onto its result, nothing
changes its number format on the way, and of what the backward pass needs, cheap things are computed again.

Shapes: S tokens of a pack, D model width, H query heads, K key and value heads, N = H + 2K, E width of a
head, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.activations import SiLUActivation

from trainer_svc.engine.layers.elementwise import Elementwise
from trainer_svc.engine.layers.projection import Projection
from trainer_svc.engine.layers.segment_attention import Segments, attend, attend_backward


@dataclass(frozen=True)
class Rows:
    """What the layers need to know of a pack.

    Attributes:
        segments: the rows' lengths.
        cos_S1E: of the rotary embedding, in the products' format.
        sin_S1E: likewise.
        outputs_T: int64; where the layer's output is asked for, in any order; None is everywhere.
    """

    segments: Segments
    cos_S1E: Tensor
    sin_S1E: Tensor
    outputs_T: Tensor | None = None


class _Kept(NamedTuple):
    """What the forward pass leaves for the backward pass.

    Attributes:
        x: the layer's input, [S, D].
        input_scale: of the first norm, float32 [S, 1].
        low_qkv: see `Projection.apply`.
        projected: queries, keys and values before their norms, [S, N, E]; None without such norms.
        head_scales: of those norms, for queries and keys.
        attended: attention's output, [S, H * E], or [T, H * E] where the layer's output is.
        attention: see `attend`.
        low_out: see `Projection.apply`.
        middle: after attention, [S, D], or [T, D] where the output is.
        middle_scale: of the second norm, float32 [S, 1].
        low_gate_up: see `Projection.apply`.
        gate_up: [S, 2F].
        activated: silu of the first half of it, [S, F]; None where that is made again.
        low_down: see `Projection.apply`.
    """

    x: Tensor
    input_scale: Tensor
    low_qkv: Tensor | None
    projected: Tensor | None
    head_scales: tuple[Tensor, ...]
    attended: Tensor
    attention: tuple[Tensor, ...]
    low_out: Tensor | None
    middle: Tensor
    middle_scale: Tensor
    low_gate_up: Tensor | None
    gate_up: Tensor
    activated: Tensor | None
    low_down: Tensor | None


class FastLayer:
    """A transformers decoder layer's modules, and how to compute with them."""

    def __init__(self, layer: Any, dtype: torch.dtype, elementwise: Elementwise) -> None:
        """Takes a layer that `is_covered`; frozen weights are laid out anew in memory.

        Args:
            layer: a decoder layer; stays as it is.
            dtype: of the activations and products.
            elementwise: what is computed between the products.
        """
        attention, mlp = layer.self_attn, layer.mlp
        self.dtype = dtype
        self.elementwise = elementwise
        self.epsilon = layer.input_layernorm.variance_epsilon
        self.scaling = attention.scaling
        self.head_width = attention.head_dim
        num_kv_heads = attention.k_proj.out_features // attention.head_dim
        self.num_heads = (attention.q_proj.out_features // attention.head_dim, num_kv_heads, num_kv_heads)
        self.norms = [layer.input_layernorm, layer.post_attention_layernorm]
        # Qwen3 normalises each head's queries and keys.
        self.has_head_norms = hasattr(attention, "q_norm")
        if self.has_head_norms:
            self.norms += [attention.q_norm, attention.k_norm]
        self.qkv = Projection([attention.q_proj, attention.k_proj, attention.v_proj])
        self.attention_out = Projection([attention.o_proj])
        self.gate_up = Projection([mlp.gate_proj, mlp.up_proj])
        self.down = Projection([mlp.down_proj])
        self.projections = (self.qkv, self.attention_out, self.gate_up, self.down)
        for projection in self.projections:
            projection.lay_out(dtype)

    @staticmethod
    def is_covered(layer: Any) -> bool:
        """Whether all that the layer does is known here."""
        attention, mlp = layer.self_attn, layer.mlp
        linear = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        linear += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        return (
            all(Projection.is_covered(module) for module in linear)
            and isinstance(mlp.act_fn, SiLUActivation)
            and attention.attention_dropout == 0
        )

    def parameters(self) -> tuple[Tensor, ...]:
        norms = (norm.weight for norm in self.norms)
        return (*norms, *(p for projection in self.projections for p in projection.parameters()))

    def split(self, values: Sequence[Any]) -> tuple[Sequence[Any], ...]:
        """What belongs to the norms and to each projection, of a sequence in the parameters' order."""
        remaining = iter(values)
        counts = (len(self.norms), *(projection.num_parameters for projection in self.projections))
        return tuple(list(islice(remaining, count)) for count in counts)

    def __call__(self, x_SD: Tensor, rows: Rows, *, recompute: bool) -> Tensor:
        """The layer's output, [S, D].

        Args:
            x_SD: the layer's input.
            rows: the pack.
            recompute: keep the input only, and compute the rest again in the backward pass.
        """
        keep = torch.is_grad_enabled() and not recompute
        out_SD = _LayerFunction.apply(x_SD, self, rows, keep, *self.parameters())
        assert isinstance(out_SD, Tensor)
        return out_SD

    def forward(
        self, x_SD: Tensor, parameters: Sequence[Tensor], rows: Rows, *, keep: bool
    ) -> tuple[Tensor, _Kept]:
        """The output, and what `backward` needs."""
        norms, qkv, attention_out, gate_up, down = self.split(parameters)
        normed_SD, input_scale_S1 = self.elementwise.rms_norm(x_SD, norms[0], self.epsilon)
        projected, low_qkv = self.qkv.apply(normed_SD, self.qkv.weights(qkv, self.dtype))
        projected_SNE = projected.view(len(x_SD), -1, self.head_width)
        query, key, value = self._split_heads(projected_SNE)
        head_scales: tuple[Tensor, ...] = ()
        if self.has_head_norms:
            query, query_scales = self.elementwise.rms_norm(query, norms[2], self.epsilon)
            key, key_scales = self.elementwise.rms_norm(key, norms[3], self.epsilon)
            head_scales = (query_scales, key_scales)
        heads_SNE = self._rotated(query, key, value, rows)
        attended_SHE, kept_attention = attend(heads_SNE, self.num_heads[1], rows.segments, keep=keep)
        attended, residual = attended_SHE.flatten(1), x_SD
        if rows.outputs_T is not None:
            attended, residual = (part.index_select(0, rows.outputs_T) for part in (attended, residual))
        middle_SD, low_out = self.attention_out.apply(
            attended, self.attention_out.weights(attention_out, self.dtype), residual_SO=residual
        )
        normed_SD, middle_scale_S1 = self.elementwise.rms_norm(middle_SD, norms[1], self.epsilon)
        gate_up_S2F, low_gate_up = self.gate_up.apply(normed_SD, self.gate_up.weights(gate_up, self.dtype))
        hidden_SF, activated_SF = self.elementwise.swiglu(gate_up_S2F)
        out_SD, low_down = self.down.apply(
            hidden_SF, self.down.weights(down, self.dtype), residual_SO=middle_SD
        )
        return out_SD, _Kept(
            x_SD,
            input_scale_S1,
            low_qkv,
            projected_SNE if self.has_head_norms else None,
            head_scales,
            attended,
            kept_attention,
            low_out,
            middle_SD,
            middle_scale_S1,
            low_gate_up,
            gate_up_S2F,
            activated_SF,
            low_down,
        )

    def backward(
        self,
        grad_SD: Tensor,
        kept: _Kept,
        parameters: Sequence[Tensor],
        needs: Sequence[bool],
        rows: Rows,
        *,
        needs_input: bool,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients by the input and by each parameter.

        Args:
            grad_SD: of the output.
            kept: of `forward`.
            parameters: as `forward` had them.
            needs: which of them learn.
            rows: the pack.
            needs_input: whether the input's gradient is asked for.
        """
        norms, qkv, attention_out, gate_up, down = self.split(parameters)
        needs_norms, needs_qkv, needs_out, needs_gate_up, needs_down = self.split(needs)
        hidden_SF = None
        if self.down.uses_input(needs_down):
            hidden_SF = self.elementwise.swiglu_again(kept.gate_up, kept.activated)
        grad_SF, grads_down = self.down.backward(
            grad_SD,
            hidden_SF,
            kept.low_down,
            self.down.weights(down, self.dtype),
            needs=needs_down,
            needs_input=True,
        )
        del hidden_SF
        assert grad_SF is not None
        grad_gate_up = self.elementwise.swiglu_backward(grad_SF, kept.gate_up, kept.activated)
        del grad_SF
        normed_SD = None
        if self.gate_up.uses_input(needs_gate_up):
            normed_SD = self.elementwise.rms_norm_again(kept.middle, kept.middle_scale, norms[1])
        grad_normed, grads_gate_up = self.gate_up.backward(
            grad_gate_up,
            normed_SD,
            kept.low_gate_up,
            self.gate_up.weights(gate_up, self.dtype),
            needs=needs_gate_up,
            needs_input=True,
        )
        del grad_gate_up
        assert grad_normed is not None
        grads_norms: list[Tensor | None] = [None] * len(norms)
        if needs_norms[1]:
            grads_norms[1] = self.elementwise.rms_norm_weight_gradient(
                grad_normed, kept.middle, kept.middle_scale
            )
        grad_middle = self.elementwise.rms_norm_backward(
            grad_normed, kept.middle, kept.middle_scale, norms[1], grad_SD
        )
        grad_attended, grads_out = self.attention_out.backward(
            grad_middle,
            kept.attended,
            kept.low_out,
            self.attention_out.weights(attention_out, self.dtype),
            needs=needs_out,
            needs_input=True,
        )
        assert grad_attended is not None
        if rows.outputs_T is not None:
            grad_attended, grad_middle = (
                part.new_zeros(len(kept.x), part.shape[1]).index_add_(0, rows.outputs_T, part)
                for part in (grad_attended, grad_middle)
            )
        grad_projected = self._attention_backward(grad_attended, kept, norms, needs_norms, grads_norms, rows)
        if self.qkv.uses_input(needs_qkv):
            normed_SD = self.elementwise.rms_norm_again(kept.x, kept.input_scale, norms[0])
        grad_normed, grads_qkv = self.qkv.backward(
            grad_projected,
            normed_SD,
            kept.low_qkv,
            self.qkv.weights(qkv, self.dtype),
            needs=needs_qkv,
            needs_input=needs_input or needs_norms[0],
        )
        grad_x = None
        if grad_normed is not None:
            if needs_norms[0]:
                grads_norms[0] = self.elementwise.rms_norm_weight_gradient(
                    grad_normed, kept.x, kept.input_scale
                )
            if needs_input:
                grad_x = self.elementwise.rms_norm_backward(
                    grad_normed, kept.x, kept.input_scale, norms[0], grad_middle
                )
        return grad_x, [*grads_norms, *grads_qkv, *grads_out, *grads_gate_up, *grads_down]

    def _attention_backward(
        self,
        grad_attended: Tensor,
        kept: _Kept,
        norms: Sequence[Tensor],
        needs_norms: Sequence[bool],
        grads_norms: list[Tensor | None],
        rows: Rows,
    ) -> Tensor:
        """The gradient by the queries, keys and values as projected, [S, N * E]; fills in the head norms'."""
        grad_heads_SNE = attend_backward(
            grad_attended.unflatten(1, (-1, self.head_width)),
            kept.attention,
            self.num_heads[1],
            rows.segments,
        )
        grad_SNE = self._rotated(*self._split_heads(grad_heads_SNE), rows, back=True)
        if self.has_head_norms:
            assert kept.projected is not None
            grads, heads = self._split_heads(grad_SNE), self._split_heads(kept.projected)
            for index, (grad, x, scale) in enumerate(
                zip(grads, heads, kept.head_scales, strict=False), start=2
            ):
                if needs_norms[index]:
                    grads_norms[index] = self.elementwise.rms_norm_weight_gradient(grad, x, scale)
                grad.copy_(self.elementwise.rms_norm_backward(grad, x, scale, norms[index], None))
        return grad_SNE.flatten(1)

    def _split_heads(self, heads_SNE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query_SHE, key_SKE, value_SKE = heads_SNE.split(self.num_heads, dim=1)
        return query_SHE, key_SKE, value_SKE

    def _rotated(
        self, query_SHE: Tensor, key_SKE: Tensor, value_SKE: Tensor, rows: Rows, *, back: bool = False
    ) -> Tensor:
        """Queries and keys rotated, or gradients rotated back; queries scaled, so that scores needn't be."""
        heads_SNE = value_SKE.new_empty(len(value_SKE), sum(self.num_heads), self.head_width)
        out_query, out_key, out_value = self._split_heads(heads_SNE)
        cos, sin = rows.cos_S1E, -rows.sin_S1E if back else rows.sin_S1E
        self.elementwise.rotate(query_SHE, cos * self.scaling, sin * self.scaling, out_query)
        self.elementwise.rotate(key_SKE, cos, sin, out_key)
        out_value.copy_(value_SKE)
        return heads_SNE


class _LayerFunction(torch.autograd.Function):
    """A layer for autograd."""

    @staticmethod
    def forward(
        ctx: Any, x_SD: Tensor, layer: FastLayer, rows: Rows, keep: bool, *parameters: Tensor
    ) -> Tensor:
        out_SD, kept = layer.forward(x_SD, parameters, rows, keep=keep)
        ctx.layer, ctx.rows, ctx.keep = layer, rows, keep
        flat, ctx.structure = tree_flatten(kept) if keep else ([x_SD], None)
        ctx.num_kept = len(flat)
        ctx.save_for_backward(*flat, *parameters)
        return out_SD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:
        layer, rows = ctx.layer, ctx.rows
        flat, parameters = ctx.saved_tensors[: ctx.num_kept], ctx.saved_tensors[ctx.num_kept :]
        if ctx.keep:
            kept = tree_unflatten(flat, ctx.structure)
        else:
            _, kept = layer.forward(flat[0], parameters, rows, keep=True)
        needs_x, _, _, _, *needs = ctx.needs_input_grad
        grad_x, gradients = layer.backward(
            grad_SD.contiguous(), kept, parameters, needs, rows, needs_input=needs_x
        )
        return grad_x, None, None, None, *gradients
