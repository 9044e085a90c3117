"""What a run is asked to do: typed, frozen, checked when built.

Imports neither torch nor transformers, so that services can check a request against the same classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trainer_svc.engine.errors import JobFault

# The names that the engine itself writes into an artifact; a log file can't take one.
_ARTIFACT_FILE_ENDINGS = (".safetensors", ".json", ".jinja", ".md", ".model")

MERGED_DIR = "merged"  # in an artifact: the model with the adapter merged in

# By device. Past this a pass's matrix products gain nothing, and its activations are what fills the memory.
TOKENS_PER_PASS = {"cpu": 1024, "cuda": 16384}


class _Spec(BaseModel):
    # NaN and infinity would pass the bounds below (nan > 0 is false, but inf > 0 is true).
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LoraMethod(_Spec):
    """Train low-rank adapters beside frozen weights (Hu et al. 2021, arXiv:2106.09685).

    Attributes:
        rank: rank of the update of each adapted matrix.
        alpha: the update is scaled by alpha / rank (rsLoRA: by alpha / sqrt(rank)).
        attn_modules: attention matrices to adapt, by torchtune's names (`output_proj`) or transformers'
            (`o_proj`).
        apply_to_mlp: also adapt the three matrices of each feed-forward block.
        apply_to_output: also adapt the output head.
    """

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1, le=1024)
    alpha: int = Field(default=16, ge=1, le=65536)
    attn_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "output_proj")
    apply_to_mlp: bool = False
    apply_to_output: bool = False

    @model_validator(mode="after")
    def _adapts_something(self) -> LoraMethod:
        if not (self.attn_modules or self.apply_to_mlp or self.apply_to_output):
            raise ValueError("LoRA adapts nothing: name attn_modules, or set apply_to_mlp or apply_to_output")
        return self


class FullMethod(_Spec):
    """Train all weights: float32 master weights, products in bfloat16 where the machine has it.

    Attributes:
        activation_checkpointing: compute each layer's activations again in the backward pass instead of
            keeping them: less memory, about a third more time.
        memory_efficient_fsdp_wrap: shard the embedding and the output head apart from the layers, so that
            fewer weights are whole at once. Several processes only.
        fsdp_cpu_offload: keep the shards, their gradients and the optimizer's state in the host's memory.
            Several processes with GPUs only.
    """

    kind: Literal["full"] = "full"
    activation_checkpointing: bool = True
    memory_efficient_fsdp_wrap: bool = True
    fsdp_cpu_offload: bool = True


Method = Annotated[LoraMethod | FullMethod, Field(discriminator="kind")]


class Extras(_Spec):
    """Settings beyond the usual ones; the keys that a client may send as `extras`.

    Attributes:
        optimizer: `adamw` (fused), or `adamw_8bit`, which keeps its state in 8 bits (needs bitsandbytes).
        weight_decay: AdamW's decoupled decay.
        adam_beta1: decay of the mean of gradients.
        adam_beta2: decay of the mean of squared gradients.
        adam_epsilon: added to the root of the mean of squared gradients.
        lr_scheduler: the learning rate after the warm-up, over the steps left: as it is, a line to zero,
            or half a cosine to zero.
        warmup_steps: steps over which the learning rate rises from zero in a line.
        max_grad_norm: gradients with a larger norm are scaled down to it.
        dtype: of the matrix products; `auto` is bfloat16 where the machine has it natively, else float32.
        max_sequence_length: longest row in tokens; None is the model's context.
        long_rows: what happens to longer rows: cut at the end (counted in the log), the run refused, or split
            into rows of at most that length, none of which sees the one before.
        packing: several rows in one pass, without padding and without seeing each other; None is on where the
            model can. False runs row by row. The numbers are the same.
        compile: have torch.compile fuse what is between the matrix products: up to two minutes at the start
            (10 s on an H200), steps up to a third faster on a GPU.
        attention: `auto` is the engine's own for packed rows; `sdpa` and `eager` are transformers', row by
            row.
        eval_every_steps: measure the validation loss after every so many steps too; None is each epoch's end.
        checkpoint_every_steps: write a checkpoint after every so many steps too; None is each epoch's end.
        keep_checkpoints: keep so many of the newest checkpoints, and the best one by validation loss; the
            rest are removed. None keeps each epoch's, and of those in between the newest.
        early_stopping_patience: end training once so many measurements of the validation loss had no gain;
            None trains to the end.
        early_stopping_min_gain: the least fall of the validation loss that counts as a gain, in nats.
        max_non_finite_steps: so many steps in a row with an infinite loss or gradient send the run back to
            its newest checkpoint with other weights, with half the learning rate, once; the next time they
            end it.
        report_every_steps: every so many steps, a step's event also has memory, padding and the share of the
            device's matrix peak.
        lora_dropout: probability of dropping an adapter's input, 0 to below 1.
        lora_variant: `rslora` scales updates by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732),
            `dora` learns their magnitude apart (Liu et al. 2024, arXiv:2402.09353).
        quantize_base: `nf4` holds the frozen weights in 4 bits (QLoRA, Dettmers et al. 2023,
            arXiv:2305.14314; bitsandbytes, GPU only).
        save_merged: also store the base model with the adapter merged in, in the folder `merged` of the
            model's files, for servers that take no adapters.
    """

    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    max_sequence_length: int | None = Field(default=None, ge=2)
    long_rows: Literal["truncate", "refuse", "split"] = "truncate"
    packing: bool | None = None
    compile: bool = False
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    eval_every_steps: int | None = Field(default=None, ge=1)
    checkpoint_every_steps: int | None = Field(default=None, ge=1)
    keep_checkpoints: int | None = Field(default=None, ge=1)
    early_stopping_patience: int | None = Field(default=None, ge=1)
    early_stopping_min_gain: float = Field(default=0.0, ge=0)
    max_non_finite_steps: int = Field(default=5, ge=1)
    report_every_steps: int = Field(default=10, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_variant: Literal["lora", "rslora", "dora"] = "lora"
    quantize_base: Literal["none", "nf4"] = "none"
    save_merged: bool = False

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Extras:
        if self.packing and self.attention != "auto":
            raise ValueError(f"packing needs attention auto, not {self.attention}: leave one of them out")
        if self.early_stopping_min_gain and self.early_stopping_patience is None:
            raise ValueError("early_stopping_min_gain needs early_stopping_patience")
        if self.save_merged and self.quantize_base != "none":
            raise ValueError("save_merged needs the base model's own weights: leave quantize_base out")
        return self


_LORA_EXTRAS = ("lora_dropout", "lora_variant", "quantize_base", "save_merged")
_VALIDATION_EXTRAS = ("eval_every_steps", "early_stopping_patience")


def check_together(
    method: LoraMethod | FullMethod, extras: Extras, *, validates: bool, processes: int = 1
) -> None:
    """Refuses settings that would have no effect, or don't go together.

    Args:
        method: LoRA or full.
        extras: the settings.
        validates: whether the run has validation rows.
        processes: how many the run has.

    Raises:
        ValueError: a setting only makes sense with another method, with validation rows, or in one process.
    """
    changed = {name for name in extras.model_fields_set if getattr(extras, name) != _default(name)}
    if isinstance(method, FullMethod):
        for name in _LORA_EXTRAS:
            if name in changed:
                raise ValueError(f"{name} goes with LoRA only, and this run trains all weights")
        if extras.optimizer == "adamw_8bit" and processes > 1:
            raise ValueError(
                "optimizer adamw_8bit can't update weights that are sharded over processes: take adamw, one "
                "process, or LoRA"
            )
    if not validates:
        for name in _VALIDATION_EXTRAS:
            if name in changed:
                raise ValueError(f"{name} needs validation rows, and this run has none")


def _default(extra: str) -> object:
    return Extras.model_fields[extra].default


class RunSpec(_Spec):
    """One run of the engine, as its JSON file gives it.

    Attributes:
        base_model_dir: transformers folder of the base model.
        base_model_id: the base model's id in the catalog; goes into the adapter's config and the model card.
        base_model_licence: licence of the base model, for the model card; None leaves it out.
        training_file: JSONL of rows (see `rows.py`).
        validation_file: JSONL of rows for the loss at each epoch's end; None is no validation.
        output_dir: folder of events, checkpoints and artifact; made if missing, one run each.
        method: LoRA or full.
        epochs: passes over the training rows.
        batch_size: rows that one process takes at once.
        learning_rate: AdamW's, after the warm-up.
        gradient_accumulation_steps: batches in one optimizer step; a step's rows are batch_size times this
            times the number of processes.
        max_steps: end after this many optimizer steps even if epochs are left; None is no limit.
        seed: of the rows' order, the adapters' first weights and dropout.
        shuffle: a new order of the rows in each epoch; False keeps the file's.
        extras: settings beyond the usual ones.
        resume_from: folder of a checkpoint of an earlier run of the same specification; None starts anew.
        tokens_per_pass: most tokens that go through the model at once, a longer row aside; None is what suits
            the device. Fewer need less memory, and give the same results.
        leaves_removed_checkpoints: leave the folder of a checkpoint that is not kept any more to whoever
            reads the events.
        readback_dir: where the artifact will appear as it was read back from where it is kept, to be held
            against the trained model; None takes the artifact as it was written.
        stop_file: once this file exists, the run writes a checkpoint after the step under way and stops; None
            runs to the end.
        train_log_file: name of a plain log file to write among the artifact's files; None writes none.
        wandb_project: Weights & Biases project to log to; None doesn't.
    """

    base_model_dir: Path
    base_model_id: str = Field(min_length=1)
    base_model_licence: str | None = None
    training_file: Path
    validation_file: Path | None = None
    output_dir: Path
    method: Method = Field(default_factory=LoraMethod)
    epochs: int = Field(default=1, ge=1, lt=2**31)
    batch_size: int = Field(default=8, ge=1, le=65536)
    learning_rate: float = Field(default=2e-4, gt=0)
    gradient_accumulation_steps: int = Field(default=1, ge=1, le=65536)
    max_steps: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    shuffle: bool = True
    extras: Extras = Field(default_factory=Extras)
    resume_from: Path | None = None
    tokens_per_pass: int | None = Field(default=None, ge=1)
    leaves_removed_checkpoints: bool = False
    readback_dir: Path | None = None
    stop_file: Path | None = None
    train_log_file: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$")
    wandb_project: str | None = Field(default=None, min_length=1, max_length=128)

    @field_validator("train_log_file")
    @classmethod
    def _log_file_overwrites_nothing(cls, name: str | None) -> str | None:
        if name is not None and name.lower().endswith(_ARTIFACT_FILE_ENDINGS):
            raise ValueError(f"a log file can't end in any of {', '.join(_ARTIFACT_FILE_ENDINGS)}: {name!r}")
        return name

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> RunSpec:
        check_together(self.method, self.extras, validates=self.validation_file is not None)
        if self.extras.save_merged and self.train_log_file == MERGED_DIR:
            raise ValueError(f"a log file can't be called {MERGED_DIR}, as the merged model's folder is")
        return self


def num_processes(torchrun_arguments: Sequence[str]) -> int:
    """How many processes torchrun starts on a machine, when it's told so."""
    for argument in torchrun_arguments:
        if match := re.fullmatch(r"--nproc_per_node=(\d+)", argument):
            return int(match[1])
    return 1


def read_run_spec(path: Path) -> RunSpec:
    """Reads a run specification.

    Raises:
        JobFault: the file breaks a rule of `RunSpec`; the message names each field.
        OSError: the file can't be read.
    """
    try:
        return RunSpec.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc']) or 'the file'}: {problem['msg']}"
            for problem in error.errors(include_url=False)
        )
        raise JobFault(f"the run specification is not valid: {problems}") from error
