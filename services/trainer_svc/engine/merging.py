"""Adapters merged into their base model: a plain transformers folder, for servers that take no adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from trainer_svc.engine.adapters import load_adapters
from trainer_svc.engine.base_model import load_base_model
from trainer_svc.engine.checkpoint import save_model
from trainer_svc.engine.run_spec import MERGED_DIR


def write_merged(adapter_dir: Path, base_model_dir: Path, dtype: torch.dtype) -> None:
    """Adds an adapter to the base model's weights, and writes these into `MERGED_DIR` below the adapter.

    Args:
        adapter_dir: as peft loads it.
        base_model_dir: transformers folder of the base model.
        dtype: number format of the written weights. The sum itself is made in float32.
    """
    base = load_base_model(base_model_dir, torch.float32, torch.device("cpu"))
    adapted = load_adapters(base.model, adapter_dir)
    tied = set(base.model.all_tied_weights_keys)
    if _untie_adapted_head(base.model):
        tied = set()
    merged = adapted.merge_and_unload()
    weights = {name: tensor for name, tensor in merged.state_dict().items() if name not in tied}
    folder = adapter_dir / MERGED_DIR
    folder.mkdir()
    save_model(merged, base.tokenizer, weights, folder, dtype)


def _untie_adapted_head(model: PreTrainedModel) -> bool:
    """Gives an adapted output head weights of its own, or its update would change the embedding too."""
    head = model.get_output_embeddings()
    if not isinstance(head, BaseTunerLayer):
        return False
    linear: Any = head.get_base_layer()
    linear.weight = nn.Parameter(linear.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return True
