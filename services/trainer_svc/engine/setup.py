"""Builds what a run trains with: model, optimizer, examples, and the plan of its steps."""

from __future__ import annotations

import math
import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer_svc.engine.adapters import add_adapters, target_modules
from trainer_svc.engine.base_model import compute_dtype, load_base_model
from trainer_svc.engine.bitsandbytes import num_weights
from trainer_svc.engine.checkpoint import RunIdentity, TrainingState, load_checkpoint, read_training_state
from trainer_svc.engine.device import matrix_peak_flops
from trainer_svc.engine.errors import JobFault
from trainer_svc.engine.events import EventLog
from trainer_svc.engine.examples import ExampleSet, load_examples
from trainer_svc.engine.layers.compiled import compiled
from trainer_svc.engine.layers.elementwise import PLAIN
from trainer_svc.engine.layers.speed_up import speed_up
from trainer_svc.engine.optimizer import make_optimizer
from trainer_svc.engine.process_group import ProcessGroup
from trainer_svc.engine.row_order import derived_seed
from trainer_svc.engine.rows import file_sha256
from trainer_svc.engine.run_spec import TOKENS_PER_PASS, FullMethod, LoraMethod, RunSpec, check_together
from trainer_svc.engine.sharding import decoder_layers, shard


@dataclass(frozen=True)
class Plan:
    """The steps of a run.

    Attributes:
        rows_per_step: rows of one optimizer step, over all processes; an epoch's last step may have fewer.
        steps_per_epoch: the last one included.
        total_steps: of the whole run, a resumed part included.
    """

    rows_per_step: int
    steps_per_epoch: int
    total_steps: int

    @classmethod
    def of(cls, spec: RunSpec, num_rows: int, world_size: int) -> Plan:
        rows_per_step = spec.batch_size * spec.gradient_accumulation_steps * world_size
        steps_per_epoch = math.ceil(num_rows / rows_per_step)
        total_steps = spec.epochs * steps_per_epoch
        if spec.max_steps is not None:
            total_steps = min(total_steps, spec.max_steps)
        return cls(rows_per_step, steps_per_epoch, total_steps)


@dataclass(frozen=True)
class Workload:
    """All that the loop works on; the model and the optimizer change as it goes."""

    model: PreTrainedModel | PeftModel
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    trainable: tuple[nn.Parameter, ...]
    training: ExampleSet
    validation: ExampleSet | None
    plan: Plan
    start: TrainingState
    dtype: torch.dtype
    matrix_peak_flops: float
    stored_dtype: torch.dtype
    packs_rows: bool
    is_sharded: bool


def prepare(spec: RunSpec, group: ProcessGroup, events: EventLog) -> Workload:
    """Loads and builds everything, and logs what it found.

    Args:
        spec: the run's.
        group: the run's processes.
        events: gets the facts.

    Raises:
        JobFault: the data, the base model or the method can't be trained with.
        CheckpointError: `resume_from` is damaged or of another run.
    """
    try:
        check_together(
            spec.method,
            spec.extras,
            validates=spec.validation_file is not None,
            processes=group.world_size,
        )
    except ValueError as error:
        raise JobFault(str(error)) from error
    if spec.extras.compile:
        _check_compiler()
    dtype = compute_dtype(spec.extras.dtype, group.device)
    peak_flops = matrix_peak_flops(group.device, dtype)  # while there is room for large matrices
    # Frozen weights can be held in the format of the products; weights that learn need float32, since most
    # updates are smaller than bfloat16's steps.
    weights_dtype = dtype if isinstance(spec.method, LoraMethod) else torch.float32
    # Weights to be sharded may be too many for one device; it gets them a layer at a time.
    is_sharded = isinstance(spec.method, FullMethod) and group.world_size > 1
    place = torch.device("cpu") if is_sharded else group.device
    base = load_base_model(spec.base_model_dir, weights_dtype, place, spec.extras)
    longest = spec.extras.max_sequence_length or base.context_length
    if longest > base.context_length:
        raise JobFault(
            f"max_sequence_length is {longest:,}, but {spec.base_model_id} reads at most "
            f"{base.context_length:,} tokens"
        )
    training, validation = _load_data(spec, base.tokenizer, longest, events)
    # Every process makes the same adapters.
    torch.manual_seed(derived_seed(spec.seed, 0))
    model = _apply_method(spec, base.model, events)
    model.train()
    layers = "transformers' layers"
    elementwise = compiled() if spec.extras.compile else PLAIN
    if base.packs_rows and speed_up(model, dtype, elementwise):
        layers = "hand-written layers"
    elif spec.extras.compile:
        for layer in decoder_layers(base.model):
            # Attention to packed rows would be compiled anew for each number of rows.
            part = layer.get_submodule("mlp") if base.packs_rows else layer
            part.compile(dynamic=True)
    if spec.extras.compile:
        layers += " by torch.compile, the first steps up to two minutes longer"
    if isinstance(spec.method, FullMethod):
        _share_out(base.model, spec.method, group, events)
    optimizer = make_optimizer(model.parameters(), spec)
    plan = Plan.of(spec, len(training.examples), group.world_size)
    start = _start_state(spec, plan, training)
    if spec.resume_from is not None:
        load_checkpoint(spec.resume_from, model, optimizer)
        events.log(f"resumed from step {start.step} (epoch {start.epoch})", step=start.step)
    workload = Workload(
        model=model,
        base=base.model,
        tokenizer=base.tokenizer,
        optimizer=optimizer,
        trainable=tuple(parameter for parameter in model.parameters() if parameter.requires_grad),
        training=training,
        validation=validation,
        plan=plan,
        start=start,
        dtype=dtype,
        matrix_peak_flops=peak_flops,
        stored_dtype=base.stored_dtype,
        packs_rows=base.packs_rows,
        is_sharded=isinstance(model, FSDPModule),
    )
    _log_facts(workload, spec, group, layers, events)
    return workload


def _check_compiler() -> None:
    """torch.compile writes C++, on a GPU too, and has it compiled."""
    compiler = os.environ.get("CXX", "g++")
    missing = None
    if shutil.which(compiler) is None:
        missing = f"the C++ compiler {compiler}"
    elif not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing = "Python's headers"
    if missing is not None:
        raise JobFault(
            f"compile needs {missing}, which this trainer lacks: leave it out, or have it installed"
        )


def _load_data(
    spec: RunSpec, tokenizer: PreTrainedTokenizerBase, longest: int, events: EventLog
) -> tuple[ExampleSet, ExampleSet | None]:
    training = load_examples(spec.training_file, tokenizer, longest, spec.extras.long_rows)
    _log_rows("training", training, longest, events)
    if spec.validation_file is None:
        return training, None
    validation = load_examples(spec.validation_file, tokenizer, longest, spec.extras.long_rows)
    _log_rows("validation", validation, longest, events)
    return training, validation


def _log_rows(name: str, examples: ExampleSet, longest: int, events: EventLog) -> None:
    events.log(
        f"{name}: {len(examples.examples):,} rows · {examples.num_tokens:,} tokens, "
        f"{examples.num_targets:,} of them targets",
        rows=len(examples.examples),
        tokens=examples.num_tokens,
        target_tokens=examples.num_targets,
    )
    if examples.num_truncated:
        events.log(
            f"{name}: {examples.num_truncated:,} rows were longer than {longest:,} tokens and were cut",
            rows_truncated=examples.num_truncated,
        )
    if examples.num_split:
        events.log(
            f"{name}: {examples.num_split:,} rows were longer than {longest:,} tokens and were split",
            rows_split=examples.num_split,
        )
    if examples.num_skipped:
        events.log(
            f"{name}: {examples.num_skipped:,} rows have nothing to learn and are left out",
            rows_skipped=examples.num_skipped,
        )


def _apply_method(spec: RunSpec, model: PreTrainedModel, events: EventLog) -> PreTrainedModel | PeftModel:
    match spec.method:
        case LoraMethod() as method:
            modules = ", ".join(target_modules(model, method))
            variant = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}[spec.extras.lora_variant]
            events.log(f"{variant} · rank {method.rank} · alpha {method.alpha} · on {modules}")
            return add_adapters(model, method, spec.extras, spec.base_model_id)
        case FullMethod() as method:
            checkpointing = "on" if method.activation_checkpointing else "off"
            events.log(f"full fine-tuning · activation checkpointing {checkpointing}")
            if method.activation_checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
            return model


def _share_out(model: PreTrainedModel, method: FullMethod, group: ProcessGroup, events: EventLog) -> None:
    """Shards the weights over several processes; in one process says which settings have no effect."""
    if group.world_size > 1:
        events.log(shard(model, method, group))
        return
    asked = [name for name in ("memory_efficient_fsdp_wrap", "fsdp_cpu_offload") if getattr(method, name)]
    if asked:
        events.log(f"{' and '.join(asked)}: no effect, since one process has nothing to shard")


def _start_state(spec: RunSpec, plan: Plan, training: ExampleSet) -> TrainingState:
    identity = RunIdentity(
        base_model_id=spec.base_model_id,
        method=spec.method.model_dump(mode="json"),
        training_sha256=file_sha256(spec.training_file),
        seed=spec.seed,
        shuffle=spec.shuffle,
        rows_per_step=plan.rows_per_step,
        num_rows=len(training.examples),
    )
    if spec.resume_from is not None:
        return read_training_state(spec.resume_from, identity)
    return TrainingState(identity=identity)


def _log_facts(workload: Workload, spec: RunSpec, group: ProcessGroup, layers: str, events: EventLog) -> None:
    total = sum(num_weights(parameter) for parameter in workload.model.parameters())
    trainable = sum(parameter.numel() for parameter in workload.trainable)
    dtype = str(workload.dtype).removeprefix("torch.")
    plan = workload.plan
    events.log(
        f"{spec.base_model_id} · {total / 1e6:.1f} M parameters, {trainable / 1e6:.2f} M of them trained",
        parameters=total,
        trainable_parameters=trainable,
    )
    events.log(
        f"{group.device.type} · {dtype} · {group.world_size} process{'es' if group.world_size > 1 else ''} · "
        f"rows {'packed' if workload.packs_rows else 'one by one'}, no padding · {layers}",
        device=group.device.type,
        dtype=dtype,
        processes=group.world_size,
        tokens_per_pass=spec.tokens_per_pass or TOKENS_PER_PASS[group.device.type],
        longest_row_tokens=max(example.num_tokens for example in workload.training.examples),
    )
    events.log(
        f"{plan.total_steps:,} steps · {plan.steps_per_epoch:,} an epoch · "
        f"{plan.rows_per_step:,} rows a step",
        total_steps=plan.total_steps,
        steps_per_epoch=plan.steps_per_epoch,
        rows_per_step=plan.rows_per_step,
    )
