"""The second contract's Config, and what it means.

Its two unions are flat objects told apart by a discriminator, `finetuning_type` and `log_type`. The
values are `lora`, `full`, `disk` and `wandb`; the schemas' names, which OpenAPI implies where a
discriminator has no mapping, are accepted too.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from job_svc.job_files import ERROR_REPORT_NAME, WANDB_NAME
from job_svc.job_plan import LARGEST_COUNT, JobPlan, Priority
from job_svc.torchrun_overrides import parse_overrides
from svc_kit.errors import InvalidRequest
from svc_kit.strict_json import Integer, StrictBody, nearest
from trainer_svc.engine.run_spec import Extras, Method, check_together, num_processes

DEFAULT_EPOCHS = 3
DEFAULT_BATCH_ROWS = 8
DEFAULT_LEARNING_RATES = {"lora": 2e-4, "full": 2e-5}
DEFAULT_RANK = 8
ATTENTION_MODULES = ["q_proj", "k_proj", "v_proj", "output_proj"]
LONGEST_METADATA_BYTES = 16 * 1024
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PROJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

Count = Annotated[Integer, Field(ge=1, le=LARGEST_COUNT)]
SmallCount = Annotated[Integer, Field(ge=1, le=1024)]


class LoraBody(StrictBody):
    """`LoraFineTuneOptions`."""

    finetuning_type: Literal["lora", "LoraFineTuneOptions"]
    lora_attn_modules: list[str] = ATTENTION_MODULES
    apply_lora_to_mlp: bool = False
    apply_lora_to_output: bool = False
    lora_rank: SmallCount = DEFAULT_RANK
    lora_alpha: Annotated[Integer, Field(ge=1, le=65536)] | None = None

    @model_validator(mode="after")
    def _adapts_something(self) -> LoraBody:
        if not (self.lora_attn_modules or self.apply_lora_to_mlp or self.apply_lora_to_output):
            raise ValueError(
                "LoRA adapts nothing; name `lora_attn_modules`, or set `apply_lora_to_mlp` or "
                "`apply_lora_to_output`"
            )
        return self

    def method(self) -> dict[str, Any]:
        """Returns the engine's options."""
        return {
            "kind": "lora",
            "rank": self.lora_rank,
            "alpha": self.lora_alpha or 2 * self.lora_rank,
            "attn_modules": self.lora_attn_modules,
            "apply_to_mlp": self.apply_lora_to_mlp,
            "apply_to_output": self.apply_lora_to_output,
        }


class FullBody(StrictBody):
    """`FullFineTuneOptions`."""

    finetuning_type: Literal["full", "FullFineTuneOptions"]
    enable_activation_checkpointing: bool = True
    memory_efficient_fsdp_wrap: bool = True
    fsdp_cpu_offload: bool = True

    def method(self) -> dict[str, Any]:
        """Returns the engine's options."""
        return {
            "kind": "full",
            "activation_checkpointing": self.enable_activation_checkpointing,
            "memory_efficient_fsdp_wrap": self.memory_efficient_fsdp_wrap,
            "fsdp_cpu_offload": self.fsdp_cpu_offload,
        }


class DiskLoggerBody(StrictBody):
    """`DiskLogger`."""

    log_type: Literal["disk", "DiskLogger"]
    filename: str

    @field_validator("filename")
    @classmethod
    def _check_filename(cls, filename: str) -> str:
        if not _FILE_NAME.fullmatch(filename) or ".." in filename:
            raise ValueError(
                "a file name without a path is expected: at most 100 of A-Z a-z 0-9 . _ -, "
                "the first a letter or digit"
            )
        if filename in (ERROR_REPORT_NAME, WANDB_NAME):
            raise ValueError("this is the name of another of the job's files; take another")
        return filename


class WandbLoggerBody(StrictBody):
    """`WandBLogger`."""

    log_type: Literal["wandb", "WandBLogger"]
    project: str

    @field_validator("project")
    @classmethod
    def _check_project(cls, project: str) -> str:
        if not _PROJECT.fullmatch(project):
            raise ValueError("a project's name is at most 128 of A-Z a-z 0-9 . _ -")
        return project


def _kind(discriminator: str, kinds: dict[str, str]) -> Discriminator:
    """Tells a flat union's members apart, with an error that names what was expected."""

    def tag(value: Any) -> str:
        given = value.get(discriminator) if isinstance(value, dict) else None
        return kinds.get(given, "unknown") if isinstance(given, str) else "unknown"

    expected = " or ".join(f"`{kind}`" for kind in dict.fromkeys(kinds.values()))
    return Discriminator(
        tag,
        custom_error_type="discriminator",
        custom_error_message=f"`{discriminator}` tells which options these are, and must be {expected}",
    )


MethodBody = Annotated[
    Annotated[LoraBody, Tag("lora")] | Annotated[FullBody, Tag("full")],
    _kind(
        "finetuning_type",
        {"lora": "lora", "full": "full", "LoraFineTuneOptions": "lora", "FullFineTuneOptions": "full"},
    ),
]
LoggerBody = Annotated[
    Annotated[DiskLoggerBody, Tag("disk")] | Annotated[WandbLoggerBody, Tag("wandb")],
    _kind("log_type", {"disk": "disk", "wandb": "wandb", "DiskLogger": "disk", "WandBLogger": "wandb"}),
]


class FineTuningOptionsBody(StrictBody):
    """`FineTuningOptions`."""

    n_epochs: Count = DEFAULT_EPOCHS
    batch_size: SmallCount = DEFAULT_BATCH_ROWS
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    gradient_accumulation_steps: SmallCount = 1
    seed: Annotated[Integer, Field(ge=0, lt=2**32)] = 0
    shuffle: bool = True
    custom_training_options: MethodBody = LoraBody(finetuning_type="lora")
    extras: dict[str, Any] = Field(default_factory=dict)


class ConfigBody(StrictBody):
    """`Config`."""

    model: str
    data: str
    validation_data: str | None = None
    fine_tuning_options: FineTuningOptionsBody = FineTuningOptionsBody()
    logger: LoggerBody | None = None
    overrides: str = ""
    metadata: dict[str, Any] | None = None
    priority: Priority = 0

    @field_validator("metadata")
    @classmethod
    def _is_short(cls, metadata: dict[str, Any] | None) -> dict[str, Any] | None:
        # Every answer about the job has it.
        size = len(json.dumps(metadata, ensure_ascii=False).encode())
        if size > LONGEST_METADATA_BYTES:
            raise ValueError(f"its JSON has {size:,} bytes, and {LONGEST_METADATA_BYTES:,} is the limit")
        return metadata

    def plan(self, sent: dict[str, Any]) -> JobPlan:
        """Returns the job that the request asks for.

        Args:
            sent: the request as it was sent, to be given back.

        Raises:
            InvalidRequest: `overrides` or `extras` are wrong.
        """
        options = self.fine_tuning_options
        method = options.custom_training_options.method()
        learning_rate = options.lr or DEFAULT_LEARNING_RATES[method["kind"]]
        log = {"wandb_project": self.logger.project} if isinstance(self.logger, WandbLoggerBody) else {}
        return JobPlan(
            base_model=self.model,
            training_uri=self.data,
            validation_uri=self.validation_data,
            task_type=None,
            suffix=None,
            priority=self.priority,
            validation_split=0.0,
            hyperparameters={"epochs": options.n_epochs, "learning_rate": learning_rate},
            input_config=sent,
            run={
                "base_model": self.model,
                "method": method,
                "epochs": options.n_epochs,
                "batch_size": options.batch_size,
                "gradient_accumulation_steps": options.gradient_accumulation_steps,
                "learning_rate": learning_rate,
                "seed": options.seed,
                "shuffle": options.shuffle,
                "extras": self._extras(method),
                **_overrides(self.overrides),
                **log,
            },
        )

    def _extras(self, method: dict[str, Any]) -> dict[str, Any]:
        extras = _check_extras(self.fine_tuning_options.extras)
        try:
            check_together(
                TypeAdapter(Method).validate_python(method),
                extras,
                validates=self.validation_data is not None,
                processes=num_processes(_overrides(self.overrides)["torchrun_arguments"]),
            )
        except ValueError as error:
            field = "fine_tuning_options.extras"
            raise InvalidRequest(f"`{field}`: {error}.", field=field) from error
        # A null asks for the default, which is what a run takes where a setting is left out.
        return extras.model_dump(mode="json", exclude_unset=True, exclude_none=True)


def _overrides(text: str) -> dict[str, Any]:
    """Returns what `overrides` changes in a run.

    Restarts are the service's own work, not torchrun's: a run that died goes on from its last checkpoint.
    """
    run: dict[str, Any] = {"torchrun_arguments": []}
    for argument in parse_overrides(text):
        name, _, value = argument.partition("=")
        if name == "--max_restarts":
            run["max_restarts"] = int(value)
        else:
            run["torchrun_arguments"].append(argument)
    return run


def _check_extras(extras: dict[str, Any]) -> Extras:
    known = list(Extras.model_fields)
    for name in extras:
        if name not in known:
            raise InvalidRequest(
                f"`fine_tuning_options.extras.{name}` is not known{nearest(name, known)}; "
                f"known are {', '.join(sorted(known))}.",
                field=f"fine_tuning_options.extras.{name}",
            )
    try:
        # JSON knows no integers, and a native message's Struct no others than doubles: 3.0 is one.
        exact = {
            name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in extras.items()
        }
        return Extras.model_validate(exact, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(str(part) for part in ("fine_tuning_options.extras", *first["loc"]))
        told = first["msg"].removeprefix("Value error, ")
        message = f"`{path}`: {told}, but it is {json.dumps(first['input'], ensure_ascii=False)[:200]}."
        raise InvalidRequest(message, field=path) from error


class CancelBody(StrictBody):
    """The body of the second contract's cancel."""

    job_id: str
