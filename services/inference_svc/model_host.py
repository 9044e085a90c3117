"""Models in memory: a bounded number of base models, each with a bounded number of adapters on it.

Everything here runs on one thread (`model_thread.py`), so nothing is locked.
"""

from __future__ import annotations

import gc
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from inference_svc.answer import ModelFiles

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class ReadyModel:
    """A model that is set up to answer.

    Attributes:
        model: in evaluation mode, with the adapter asked for switched on and every other one off.
        tokenizer: the model's own.
        end_token_ids: tokens that end an answer.
        context_length: the longest conversation with its answer, in tokens.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    end_token_ids: frozenset[int]
    context_length: int


@dataclass
class _LoadedBase:
    """A base model with the adapters that are on it, least recently used first."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    end_token_ids: frozenset[int]
    adapted: PeftModel | None = None
    adapter_keys: OrderedDict[str, None] = field(default_factory=OrderedDict)


class ModelHost:
    """Loads models when they are asked for and lets go of those unused for longest."""

    def __init__(self, max_base_models: int, max_adapters: int) -> None:
        """Args:
        max_base_models: base models, and whole fine-tuned ones, in memory at a time.
        max_adapters: adapters in memory at a time, on each base model.
        """
        self._max_base_models = max_base_models
        self._max_adapters = max_adapters
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._bases: OrderedDict[str, _LoadedBase] = OrderedDict()

    @contextmanager
    def use(self, files: ModelFiles) -> Iterator[ReadyModel]:
        """Gives a model, loaded first where needed, until the block ends.

        Raises:
            OSError: a file is missing or can't be read.
            ValueError: the files are no model, or the adapter is not one for this model.
        """
        base = self._base(files)
        limit = getattr(base.model.config, "max_position_embeddings", files.context_length)
        ready = ReadyModel(base.model, base.tokenizer, base.end_token_ids, min(limit, files.context_length))
        if files.adapter_key is not None:
            assert files.adapter_dir is not None
            self._switch_on(base, files.base_key, files.adapter_key, files.adapter_dir)
            yield ready
        elif base.adapted is not None:
            with base.adapted.disable_adapter():
                yield ready
        else:
            yield ready

    def forget(self, key: str) -> None:
        """Lets go of a deleted model, an adapter or a whole one. Repeatable."""
        if self._bases.pop(key, None) is not None:
            _free_memory()
        for base in self._bases.values():
            if key in base.adapter_keys:
                _drop_adapter(base, key)

    def _base(self, files: ModelFiles) -> _LoadedBase:
        if files.base_key not in self._bases:
            while len(self._bases) >= self._max_base_models:
                key, _ = self._bases.popitem(last=False)
                log.info("let go of a model", key=key)
            _free_memory()  # before the next one takes its own
            self._bases[files.base_key] = _load_base(files.base_dir, self._device)
            log.info("loaded a model", key=files.base_key, device=str(self._device))
        self._bases.move_to_end(files.base_key)
        return self._bases[files.base_key]

    def _switch_on(self, base: _LoadedBase, base_key: str, adapter_key: str, adapter_dir: Path) -> None:
        if adapter_key not in base.adapter_keys:
            try:
                _load_adapter(base, adapter_key, adapter_dir)
            except BaseException:
                # peft may have put half of an adapter on the model; the next request loads it anew.
                del self._bases[base_key]
                raise
        assert base.adapted is not None
        base.adapted.set_adapter(adapter_key, inference_mode=True)
        base.adapter_keys.move_to_end(adapter_key)
        while len(base.adapter_keys) > self._max_adapters:
            _drop_adapter(base, next(iter(base.adapter_keys)))


def _load_base(folder: Path, device: torch.device) -> _LoadedBase:
    # The engine's load_base_model sets a model up for training: another attention, another number format,
    # no cache. An answer has to be what plain transformers gives for the same files.
    safe: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True, **safe)
    named = model.generation_config.eos_token_id
    end_token_ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    # A model's folder can hold sampling settings of its own; transformers would fill them in wherever a
    # request has none, so that the same request meant something else on each model.
    model.generation_config = GenerationConfig()
    model.to(device)  # type: ignore[arg-type]  # transformers wraps torch's method, and mypy loses self
    return _LoadedBase(model, tokenizer, frozenset(end_token_ids))


def _load_adapter(base: _LoadedBase, key: str, folder: Path) -> None:
    if not (folder / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} holds no adapter_model.safetensors")  # peft would open a pickle
    with warnings.catch_warnings():
        # peft warns that merging an adapted output head would change the tied embedding; nothing is merged.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing.*"
        )  # peft's use of an old name
        if base.adapted is None:
            base.adapted = PeftModel.from_pretrained(base.model, folder, adapter_name=key)
        else:
            base.adapted.load_adapter(folder, adapter_name=key)
    base.adapter_keys[key] = None
    log.info("loaded an adapter", key=key)


def _drop_adapter(base: _LoadedBase, key: str) -> None:
    assert base.adapted is not None
    del base.adapter_keys[key]
    if base.adapter_keys:
        # The one that is on can't go; the most recently used one is on, or is about to be.
        base.adapted.set_adapter(next(reversed(base.adapter_keys)), inference_mode=True)
        base.adapted.delete_adapter(key)
    else:
        base.model = base.adapted.unload()
        base.adapted = None
    log.info("let go of an adapter", key=key)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
