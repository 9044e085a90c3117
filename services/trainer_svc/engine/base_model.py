"""Loads the base model and its tokenizer, in the number format that suits the machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trainer_svc.engine.bitsandbytes import bitsandbytes_for
from trainer_svc.engine.errors import JobFault
from trainer_svc.engine.packing import PACKABLE_MODEL_TYPES, PACKED_ATTENTION, packed_attention
from trainer_svc.engine.run_spec import Extras

# A tokenizer that knows no limit says so with an absurdly large one.
_NO_LIMIT_TOKENS = 10**9

# Elsewhere each product would first have to make the whole matrix again.
_QUANTIZED_ON = frozenset({"cuda"})

# transformers' own, for rows one by one.
_ATTENTION = {"auto": "sdpa", "sdpa": "sdpa", "eager": "eager"}


@dataclass(frozen=True)
class BaseModel:
    """A loaded base model.

    Attributes:
        model: frozen or trainable as the method asks.
        tokenizer: the model's own.
        stored_dtype: number format of the weights on disk.
        packs_rows: whether its attention takes several rows in one pass (see `packing.py`).
        context_length: longest row in tokens.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stored_dtype: torch.dtype
    packs_rows: bool
    context_length: int


def native_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware; in software it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def compute_dtype(choice: Literal["auto", "bfloat16", "float32"], device: torch.device) -> torch.dtype:
    """The number format of the matrix products."""
    if choice == "auto":
        return torch.bfloat16 if native_bfloat16(device) else torch.float32
    return torch.bfloat16 if choice == "bfloat16" else torch.float32


def load_base_model(
    folder: Path,
    weights_dtype: torch.dtype,
    device: torch.device,
    extras: Extras = Extras(),  # noqa: B008 # frozen
) -> BaseModel:
    """Loads a transformers folder. Never runs code from the folder, never opens a pickle.

    Args:
        folder: a folder of safetensors, config and tokenizer.
        weights_dtype: number format that the weights are held in.
        device: where the weights go.
        extras: attention, packing and quantization.

    Raises:
        JobFault: the folder is missing something, its architecture is unknown or can't do what `extras` ask
            for, or the machine can't quantize.
    """
    safe: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder, **safe)
        tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
        packs_rows = _packs_rows(config, extras)
        if packs_rows:
            AttentionInterface.register(PACKED_ATTENTION, packed_attention)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=weights_dtype,
            use_safetensors=True,
            attn_implementation=PACKED_ATTENTION if packs_rows else _ATTENTION[extras.attention],
            quantization_config=_quantization(extras, weights_dtype, device),
            **safe,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise JobFault(f"the base model in {folder} can't be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise JobFault(
            f"the base model in {folder} has no end-of-text token, so no answer's end can be trained"
        )
    if extras.quantize_base == "none":  # quantized weights are there already
        # Not model.to(device): transformers' decorator hides its type.
        torch.nn.Module.to(model, device)
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        stored_dtype=config.dtype if isinstance(config.dtype, torch.dtype) else weights_dtype,
        packs_rows=packs_rows,
        context_length=_context_length(config, tokenizer),
    )


def _packs_rows(config: PretrainedConfig, extras: Extras) -> bool:
    layer_types = getattr(config, "layer_types", None) or ["full_attention"]
    packable = config.model_type in PACKABLE_MODEL_TYPES and set(layer_types) == {"full_attention"}
    if extras.packing and not packable:
        raise JobFault(
            f"a model of the type {config.model_type} can't take packed rows; those that can are "
            f"{', '.join(sorted(PACKABLE_MODEL_TYPES))}, with full attention: leave packing out"
        )
    return packable and extras.packing is not False and extras.attention == "auto"


def _quantization(extras: Extras, compute_dtype: torch.dtype, device: torch.device) -> Any:
    if extras.quantize_base == "none":
        return None
    if device.type not in _QUANTIZED_ON:
        raise JobFault("quantize_base nf4 needs a GPU, and this trainer has none; leave it out")
    bitsandbytes_for("quantize_base nf4")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _context_length(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    known = [limit for limit in limits if limit is not None and limit < _NO_LIMIT_TOKENS]
    if not known:
        raise JobFault("the base model doesn't say how long a row it can read; set max_sequence_length")
    return int(min(known))
