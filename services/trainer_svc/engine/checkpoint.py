"""Writes a run's state so that nobody ever sees half of it, and continues from it bit for bit.

A checkpoint's folder is what peft or transformers load (weights, config, tokenizer), plus `training_state/`
with the optimizer's tensors and a JSON file. There is no random state in it: every random number of the
engine comes from a seed derived from the run's seed and the step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHECKPOINTS_DIR = "checkpoints"
STATE_DIR = "training_state"
_STATE_FILE = "state.json"
_OPTIMIZER_FILE = "optimizer.safetensors"


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or belongs to another run."""


class RunIdentity(BaseModel):
    """What must be the same for a run to be a continuation of another.

    Attributes:
        base_model_id: the base model.
        method: LoRA's or full's settings.
        training_sha256: of the training file.
        seed: the run's.
        shuffle: whether rows are shuffled.
        rows_per_step: over all processes and accumulated batches.
        num_rows: rows that have something to learn.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model_id: str
    method: dict[str, Any]
    training_sha256: str
    seed: int
    shuffle: bool
    rows_per_step: int
    num_rows: int


class TrainingState(BaseModel):
    """How far a run is.

    Attributes:
        identity: of the run.
        step: optimizer steps done.
        epoch: the epoch of the last step, from 1.
        tokens_trained: input tokens so far.
        training_loss: of the last step; None before the first.
        validation_loss: at the last epoch's end; None without validation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: RunIdentity
    step: int
    epoch: int
    tokens_trained: int
    training_loss: float | None
    validation_loss: float | None


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Makes a folder appear complete or not at all: filled under another name beside it, then renamed.

    Args:
        folder: must not exist yet.
        fill: writes the files into the folder that it is given.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    os.rename(partial, folder)


def save_model(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype
) -> None:
    """Writes what `from_pretrained` loads: an adapter if the model has one, else all weights.

    Args:
        model: trained by the engine.
        tokenizer: the base model's.
        folder: must exist.
        dtype: number format of full weights; adapters are always written in float32.
    """
    if isinstance(model, PeftModel):
        # Without save_embedding_layers=False peft asks the hub about the base model's vocabulary.
        model.save_pretrained(str(folder), save_embedding_layers=False)
    else:
        weights = {name: weight.to(dtype) for name, weight in model.state_dict().items()}
        model.save_pretrained(folder, state_dict=weights)
        # save_pretrained writes down the format that the model trains in, not that of the weights given.
        config_path = folder / "config.json"
        config = json.loads(config_path.read_text(encoding="utf-8"))
        config["dtype"] = str(dtype).removeprefix("torch.")
        config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        # safetensors writes files that only their owner can read.
        file.chmod(0o644)


def save_training_state(
    folder: Path, state: TrainingState, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Writes `training_state/` into a checkpoint's folder."""
    state_dir = folder / STATE_DIR
    state_dir.mkdir()
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for parameter, slots in optimizer.state.items():
        for slot, tensor in slots.items():
            tensors[f"{slot}/{names[parameter]}"] = tensor.detach().contiguous().cpu()
    save_file(tensors, state_dir / _OPTIMIZER_FILE)
    (state_dir / _STATE_FILE).write_text(state.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_training_state(folder: Path, identity: RunIdentity) -> TrainingState:
    """Reads how far a checkpoint is.

    Args:
        folder: the checkpoint.
        identity: of the run that wants to continue from it.

    Raises:
        CheckpointError: the file is missing or damaged, or the checkpoint is of another run.
    """
    path = folder / STATE_DIR / _STATE_FILE
    try:
        state = TrainingState.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}") from error
    if differing := [
        f"{field} was {theirs!r} and is {ours!r}"
        for (field, theirs), (_, ours) in zip(state.identity, identity, strict=True)
        if theirs != ours
    ]:
        raise CheckpointError(f"{folder} is a checkpoint of another run: {'; '.join(differing)}")
    return state


def load_checkpoint(
    folder: Path, model: PreTrainedModel | PeftModel, optimizer: torch.optim.Optimizer
) -> None:
    """Puts a checkpoint's weights and optimizer state into a model and optimizer made afresh.

    Raises:
        CheckpointError: a file is missing, damaged, or doesn't fit the model.
    """
    try:
        weights: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_file(file)
        if isinstance(model, PeftModel):
            set_peft_model_state_dict(model, weights)
        else:
            # Tied weights are written once.
            missing, unexpected = model.load_state_dict(weights, strict=False)
            tied = set(model.all_tied_weights_keys)
            if set(missing) - tied or unexpected:
                raise CheckpointError(f"{folder} doesn't fit the model: {missing or unexpected}")
        saved = load_file(folder / STATE_DIR / _OPTIMIZER_FILE)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from error
    parameters = dict(model.named_parameters())
    for key, tensor in saved.items():
        slot, _, name = key.partition("/")
        parameter = parameters[name]
        optimizer.state[parameter][slot] = tensor.to(parameter.device)
