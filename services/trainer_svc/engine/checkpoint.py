"""Writes a run's state so that nobody ever sees half of it, and continues from it bit for bit.

A checkpoint's folder is what peft or transformers load (weights, config, tokenizer), plus `training_state/`
with the optimizer's tensors and a JSON file. There is no random state in it: every random number of the
engine comes from a seed derived from the run's seed and the step, and the order of rows from seed and epoch.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
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


class CheckpointMark(BaseModel):
    """A checkpoint of a run that is kept.

    Attributes:
        step: optimizer steps done.
        epoch: the epoch of the last step, from 1.
        ends_epoch: whether the epoch (or the run) ends with it.
        validation_loss: measured at this step; None without.
        half_rate: whether the run had gone back before, and learns at half the rate since.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    epoch: int
    ends_epoch: bool
    validation_loss: float | None
    half_rate: bool = False

    @property
    def path(self) -> Path:
        """Its folder, below the run's. After going back it's another: the first may still be copied from."""
        name = f"epoch-{self.epoch}" if self.ends_epoch else f"step-{self.step}"
        return Path(CHECKPOINTS_DIR) / (f"{name}-half-rate" if self.half_rate else name)


class TrainingState(BaseModel):
    """How far a run is.

    Attributes:
        identity: of the run.
        step: optimizer steps done.
        epoch: the epoch of the last step, from 1.
        tokens_trained: input tokens so far.
        training_loss: of the last step; None before the first.
        validation_loss: as last measured; None without validation.
        best_validation_loss: the lowest so far, as early stopping counts gains.
        measurements_without_gain: of the validation loss, since its last gain.
        skipped_steps: how many steps in a row, up to this one, had no finite gradients and changed nothing.
        learning_rate_factor: 0.5 once the run went back because it diverged, before that 1.
        checkpoints: those that are kept, this one included, by step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: RunIdentity
    step: int = 0
    epoch: int = 0
    tokens_trained: int = 0
    training_loss: float | None = None
    validation_loss: float | None = None
    best_validation_loss: float | None = None
    measurements_without_gain: int = 0
    skipped_steps: int = 0
    learning_rate_factor: float = 1.0
    checkpoints: tuple[CheckpointMark, ...] = ()

    @property
    def changed_at_step(self) -> int:
        """The last step that changed the weights; 0 if none has."""
        return self.step - self.skipped_steps


def split_kept(
    marks: tuple[CheckpointMark, ...], keep: int | None
) -> tuple[tuple[CheckpointMark, ...], tuple[CheckpointMark, ...]]:
    """Returns the checkpoints to keep and those to remove.

    Args:
        marks: by step.
        keep: so many of the newest stay, and the best by validation loss; None keeps each epoch's, and of
            those in between the newest.
    """
    if keep is None:
        kept = {mark.step for mark in marks if mark.ends_epoch} | {mark.step for mark in marks[-1:]}
    else:
        kept = {mark.step for mark in marks[-keep:]}
        measured = [mark for mark in marks if mark.validation_loss is not None]
        if measured:
            kept.add(min(measured, key=lambda mark: mark.validation_loss or 0.0).step)
    return (
        tuple(mark for mark in marks if mark.step in kept),
        tuple(mark for mark in marks if mark.step not in kept),
    )


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Makes a folder appear complete or not at all: filled under another name beside it, then renamed.

    Args:
        folder: one of this name is replaced.
        fill: writes the files into the folder that it is given.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)


@dataclass(frozen=True)
class Snapshot:
    """All that training changes.

    Attributes:
        weights: the adapter's, or all of the model's; by the names of the model's state.
        optimizer: its tensors by `SLOT/PARAMETER`.
        is_live: whether these are the tensors in use, which the next optimizer step changes.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    is_live: bool

    def copied(self) -> Snapshot:
        """Copies on the CPU, which training doesn't change."""
        if not self.is_live:
            return self
        return Snapshot(
            {name: _whole_copy(tensor) for name, tensor in self.weights.items()},
            {name: _whole_copy(tensor) for name, tensor in self.optimizer.items()},
            is_live=False,
        )


def take_snapshot(
    model: PreTrainedModel | PeftModel, optimizer: torch.optim.Optimizer | None, *, keep: bool
) -> Snapshot:
    """Returns the state: live, but copied where sharded tensors have to be put together anyway.

    Every process must call it.

    Args:
        model: trained by the engine.
        optimizer: None leaves its state out.
        keep: whether this process wants the state; the others return an empty one.
    """
    learnt = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # Tied weights are one tensor with two names, and are written once.
    tied = set(model.all_tied_weights_keys)
    weights = {
        name: tensor.detach()
        for name, tensor in model.state_dict().items()
        if ((name in learnt) if isinstance(model, PeftModel) else (name not in tied))
    }
    state: dict[str, Tensor] = {}
    if optimizer is not None:
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        state = {
            f"{slot}/{names[parameter]}": torch.as_tensor(value).detach()
            for parameter, slots in optimizer.state.items()
            for slot, value in slots.items()
        }
    is_live = not any(isinstance(tensor, DTensor) for tensor in weights.values())
    if not is_live:
        weights, state = _put_together(weights, keep=keep), _put_together(state, keep=keep)
    return Snapshot(weights, state, is_live) if keep else Snapshot({}, {}, is_live=False)


def _put_together(tensors: dict[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    whole = {}
    for name, tensor in tensors.items():
        copy = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:  # on the CPU one by one: together they may not fit a device
            whole[name] = _whole_copy(copy)
    return whole


def _whole_copy(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def save_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, Tensor],
    folder: Path,
    dtype: torch.dtype,
) -> None:
    """Writes what `from_pretrained` loads: an adapter if the model has one, else all weights.

    Args:
        model: trained by the engine; only its configuration is read.
        tokenizer: the base model's.
        weights: of a snapshot.
        folder: must exist.
        dtype: number format of full weights; adapters are always written in float32.
    """
    if isinstance(model, PeftModel):
        # Without save_embedding_layers=False peft asks the hub about the base model's vocabulary.
        model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    else:
        model.save_pretrained(folder, state_dict={name: tensor.to(dtype) for name, tensor in weights.items()})
        # save_pretrained writes down the format that the model trains in, not that of the weights given.
        config_path = folder / "config.json"
        config = json.loads(config_path.read_text(encoding="utf-8"))
        config["dtype"] = str(dtype).removeprefix("torch.")
        config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        # safetensors writes files that only their owner can read.
        file.chmod(0o644)


def save_training_state(folder: Path, state: TrainingState, optimizer: dict[str, Tensor]) -> None:
    """Writes `training_state/` into a checkpoint's folder."""
    state_dir = folder / STATE_DIR
    state_dir.mkdir()
    save_file(optimizer, state_dir / _OPTIMIZER_FILE)
    (state_dir / _STATE_FILE).write_text(state.model_dump_json(indent=2) + "\n", encoding="utf-8")


class CheckpointWriter:
    """Copies and writes checkpoints in the background, one at a time and in order.

    The next step's passes only read what is copied. So training waits for a copy just before it changes
    the weights, and hardly ever has to.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_use_one_core)
        self._copying: Future[Snapshot] | None = None
        self._writing: Future[None] | None = None
        self._waiting_since: float | None = None

    def write(self, state: Snapshot, write: Callable[[Snapshot, float], None]) -> None:
        """Has a copy of `state` written. Waits while the one before still is: two would hold two copies.

        Args:
            state: as it is in use; not to be changed before `wait_for_copy` has returned.
            write: called with the copy, and with the seconds for which training waited for it.

        Raises:
            OSError: the one before could not be written.
        """
        started_at = time.perf_counter()
        self.wait()
        self._waiting_since = None
        waited = time.perf_counter() - started_at
        copying = self._copying = self._thread.submit(_copy_beside_training(state))
        self._writing = self._thread.submit(lambda: write(copying.result(), waited + self._waited_for_copy()))

    def _waited_for_copy(self) -> float:
        since = self._waiting_since
        return 0.0 if since is None else time.perf_counter() - since

    def wait_for_copy(self) -> None:
        """Returns once the state may be changed."""
        if self._copying is not None:
            self._waiting_since = None if self._copying.done() else time.perf_counter()
            self._copying.result()
            self._copying = None

    def wait(self) -> None:
        """Returns once all is written.

        Raises:
            OSError: it could not be written.
        """
        self.wait_for_copy()
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Waits for what is being written, and ends the thread."""
        self._thread.shutdown()


def _copy_beside_training(state: Snapshot) -> Callable[[], Snapshot]:
    """Copies the state as it is now. On a GPU in a stream of its own, for which no pass has to wait."""
    device = next((tensor.device for tensor in state.weights.values()), torch.device("cpu"))
    if device.type != "cuda":
        return state.copied
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))

    def copied() -> Snapshot:
        with torch.cuda.stream(stream):
            return state.copied()

    return copied


def _use_one_core() -> None:
    torch.set_num_threads(1)  # of this thread; the steps have the others


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
            _load_weights(model, weights, folder)
        saved = load_file(folder / STATE_DIR / _OPTIMIZER_FILE)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from error
    parameters = dict(model.named_parameters())
    for key, tensor in saved.items():
        slot, _, name = key.partition("/")
        # bitsandbytes counts steps in Python's numbers.
        is_number = tensor.ndim == 0 and not tensor.is_floating_point()
        optimizer.state[parameters[name]][slot] = (
            int(tensor) if is_number else _placed_like(parameters[name], tensor)
        )


def _load_weights(model: PreTrainedModel, weights: dict[str, Tensor], folder: Path) -> None:
    own = model.state_dict()
    tied = set(model.all_tied_weights_keys)  # written once, under the other name
    if differing := (own.keys() - tied) ^ (weights.keys() - tied):
        raise CheckpointError(f"{folder} doesn't fit the model: {', '.join(sorted(differing)[:5])}")
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(_placed_like(own[name], tensor))


def _placed_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A tensor as this process holds the parameter: sharded where that is, and on its device."""
    if isinstance(parameter, DTensor) and tensor.ndim > 0:
        shards = distribute_tensor(
            tensor.to(parameter.device_mesh.device_type), parameter.device_mesh, parameter.placements
        )
        return shards.to(parameter.to_local().device)  # the host's, where shards are kept there
    return tensor.to(parameter.device)
