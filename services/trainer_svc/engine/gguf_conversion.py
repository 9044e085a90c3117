"""Turns a GGUF file into the transformers folder of safetensors that everything else works with."""

from __future__ import annotations

from pathlib import Path

import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig


class UnsupportedGguf(ValueError):
    """The GGUF file names a pre-tokenizer that this module doesn't know."""


def convert_gguf(gguf_path: Path, folder: Path, context_length: int) -> None:
    """Writes the model and tokenizer of a GGUF file as a transformers folder, weights in bfloat16.

    Args:
        gguf_path: the GGUF file; quantised weights are dequantised.
        folder: an existing folder that the files are written into.
        context_length: longest row in tokens, for the tokenizer's limit.

    Raises:
        UnsupportedGguf: the file's pre-tokenizer is unknown.
    """
    pre_tokenizer = _pre_tokenizer(gguf_path)
    source = {"pretrained_model_name_or_path": str(gguf_path.parent), "gguf_file": gguf_path.name}

    tokenizer = AutoTokenizer.from_pretrained(**source)
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizer
    tokenizer.model_max_length = context_length
    tokenizer.save_pretrained(folder)

    dequantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # save_pretrained refuses a model whose config says that it is quantised, so the weights move to a
    # model that never was.
    config = AutoConfig.from_pretrained(**source)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(dequantised.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)


def _pre_tokenizer(gguf_path: Path) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer that the file names; transformers ignores the name and takes plain GPT-2's.

    For SmolLM2 the difference is in spaces before digits.
    """
    field = GGUFReader(gguf_path).get_field("tokenizer.ggml.pre")
    name = field.contents() if field is not None else None
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    match name:
        case "smollm":
            return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        case "gpt-2":
            return byte_level
        case _:
            raise UnsupportedGguf(
                f"{gguf_path.name} uses the pre-tokenizer {name!r}; known are smollm and gpt-2. "
                "Take the model from the hub (hub:OWNER/NAME) or from a transformers folder (folder:/PATH)"
            )
