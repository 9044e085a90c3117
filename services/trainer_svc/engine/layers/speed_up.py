"""Has a model compute its loss by the hand-written layers of this engine, where they cover it.

The model stays a transformers model, with or without peft's adapters: its parameters, their names, saving and
generating are what they were. It only takes a pack besides what it takes already, and answers with its loss.

Shapes: S tokens of a pack, T target tokens of a pack, D model width, E width of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from trainer_svc.engine.layers.elementwise import PLAIN, Elementwise
from trainer_svc.engine.layers.fast_layer import FastLayer, Rows
from trainer_svc.engine.layers.linear_cross_entropy import summed_cross_entropy
from trainer_svc.engine.layers.projection import Projection
from trainer_svc.engine.layers.segment_attention import Segments
from trainer_svc.engine.packing import PACKABLE_MODEL_TYPES, Pack

# Products of other sizes are up to a tenth slower, and the CPU's library keeps a megabyte for each size that
# it has ever seen.
_TOKENS_MULTIPLE = 32
# Larger models' weights aren't packed: the two copies would take too much memory for what they gain.
_PACKED_UP_TO_BYTES = 2**30


def speed_up(
    model: PreTrainedModel | PeftModel, dtype: torch.dtype, elementwise: Elementwise = PLAIN
) -> bool:
    """Puts the fast path into a model, if it covers all that the model does.

    To be called once, after adapters were added, weights frozen and moved to their device, and before
    anything is sharded. Frozen weights are laid out anew in memory.

    Args:
        model: changed in place. Its frozen weights must not change afterwards.
        dtype: of activations and matrix products.
        elementwise: what is computed between the products, as it is or compiled.

    Returns:
        Whether it was put in. If not, the model is as it was, and `fast_loss` must not be called: another
        family, adapters with dropout or of another kind than LoRA, quantised weights.
    """
    causal_lm = _causal_lm(model)
    if not _is_covered(causal_lm):
        return False
    head = Projection([causal_lm.lm_head])
    projections = [head]
    for layer in causal_lm.model.layers:
        fast_layer = FastLayer(layer, dtype, elementwise)
        _extend(layer, functools.partial(_layer_forward, layer, fast_layer))
        projections += fast_layer.projections
    if sum(p.nbytes for projection in projections for p in projection.parameters()) <= _PACKED_UP_TO_BYTES:
        for projection in projections:
            projection.pack()
    _extend(causal_lm.lm_head, functools.partial(_head_forward, head, dtype))
    _extend(causal_lm, functools.partial(_model_forward, causal_lm, dtype))
    causal_lm.tunery_fast_layers = True
    return True


def is_fast(model: nn.Module) -> bool:
    """Whether `speed_up` has put the fast path into the model."""
    return hasattr(_causal_lm(model), "tunery_fast_layers")


def fast_loss(model: nn.Module, pack: Pack) -> Tensor:
    """The sum of the cross entropies of a pack's targets, in nats: float32 scalar.

    Args:
        model: `is_fast`.
        pack: one row or several.
    """
    loss = _causal_lm(model)(pack=pack)
    assert isinstance(loss, Tensor)
    return loss


def _causal_lm(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _is_covered(causal_lm: Any) -> bool:
    config = causal_lm.config
    if config.model_type not in PACKABLE_MODEL_TYPES:
        return False
    inner = causal_lm.model
    position = torch.zeros(1, 1, dtype=torch.int64, device=inner.embed_tokens.weight.device)
    cos, _ = inner.rotary_emb(torch.empty(0, device=position.device), position_ids=position)
    return (
        type(inner.embed_tokens) is nn.Embedding
        and Projection.is_covered(causal_lm.lm_head)
        and all(FastLayer.is_covered(layer) for layer in inner.layers)
        # Not just a part of each head is rotated.
        and cos.shape[-1] == inner.layers[0].self_attn.head_dim
    )


def _extend(module: nn.Module, with_pack: Callable[..., Tensor]) -> None:
    """Has a module's forward call `with_pack` when it's given a pack.

    The module's own call stays the way in, since FSDP gathers a module's weights there.
    """
    original = module.forward

    @functools.wraps(original)
    def forward(*args: Any, pack: Any = None, **kwargs: Any) -> Any:
        return original(*args, **kwargs) if pack is None else with_pack(*args, pack=pack, **kwargs)

    module.forward = forward


def _model_forward(causal_lm: Any, dtype: torch.dtype, *, pack: Pack) -> Tensor:
    inner = causal_lm.model
    # What fills up is a row of its own that nothing reads.
    filling = -pack.num_tokens % _TOKENS_MULTIPLE
    input_ids_S = pad(pack.input_ids.squeeze(0), (0, filling))
    lengths = (*pack.segment_lengths, filling) if filling else pack.segment_lengths
    hidden_SD = inner.embed_tokens(input_ids_S).to(dtype)
    no_data = torch.empty(0, dtype=torch.float32, device=hidden_SD.device)
    cos_1SE, sin_1SE = inner.rotary_emb(no_data, position_ids=pad(pack.position_ids, (0, filling)))
    rows = Rows(
        Segments.of(lengths, hidden_SD.device, dtype, shared=pack.shared_prefix),
        cos_1SE.squeeze(0).unsqueeze(1).to(dtype),
        sin_1SE.squeeze(0).unsqueeze(1).to(dtype),
    )
    *layers, last_layer = inner.layers
    for layer in layers:
        hidden_SD = layer(hidden_SD, pack=rows)
    # The rest of the last layer is for nobody, nor is what fills up here: no label is there for it.
    outputs_T = pad(pack.logit_positions, (0, -len(pack.labels) % _TOKENS_MULTIPLE))
    hidden_TD = last_layer(hidden_SD, pack=replace(rows, outputs_T=outputs_T))
    hidden_TD = inner.norm(hidden_TD).to(dtype)
    loss = causal_lm.lm_head(hidden_TD, pack=pack.labels)
    assert isinstance(loss, Tensor)
    return loss


def _layer_forward(layer: Any, fast_layer: FastLayer, hidden_SD: Tensor, *, pack: Rows) -> Tensor:
    return fast_layer(hidden_SD, pack, recompute=layer.gradient_checkpointing and layer.training)


def _head_forward(head: Projection, dtype: torch.dtype, hidden_TD: Tensor, *, pack: Tensor) -> Tensor:
    return summed_cross_entropy(hidden_TD, pack, head, tuple(head.parameters()), dtype)
