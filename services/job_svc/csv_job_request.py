"""The first contract's request for a job, and what it means."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from job_svc.job_plan import LARGEST_COUNT, JobPlan, Priority
from svc_kit.errors import UnknownDataset
from svc_kit.strict_json import Integer, StrictBody

DEFAULT_EPOCHS = 3
DEFAULT_LEARNING_RATE = 2e-4
BATCH_ROWS = 8
# Adapters on every linear layer of the blocks: question-answer rows are mostly new facts, which attention
# projections alone hardly learn.
METHOD = {
    "kind": "lora",
    "rank": 16,
    "alpha": 32,
    "attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_to_mlp": True,
    "apply_to_output": False,
}
_ID = re.compile(r"[a-z0-9-]{1,40}")
_SUFFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _check_suffix(suffix: str) -> str:
    if suffix and not _SUFFIX.fullmatch(suffix):
        raise ValueError(
            "a suffix is at most 64 of A-Z a-z 0-9 . _ - and begins with a letter or digit, "
            "since it becomes part of the model's id"
        )
    return suffix


class HyperparametersBody(StrictBody):
    """`hyperparameters`."""

    epochs: Annotated[Integer, Field(ge=1, le=LARGEST_COUNT)] = DEFAULT_EPOCHS
    max_steps: Annotated[Integer, Field(ge=1, le=LARGEST_COUNT)] | None = None
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = DEFAULT_LEARNING_RATE
    validation_split: Annotated[float, Field(ge=0, le=1)] = 0.0


class CsvJobBody(StrictBody):
    """`CreateFineTuningJobRequest`."""

    base_model: str
    dataset_id: str
    task_type: Literal["qa", "not_qa"]
    hyperparameters: HyperparametersBody = HyperparametersBody()
    suffix: Annotated[str, AfterValidator(_check_suffix)] | None = None
    priority: Priority = 0

    def plan(self) -> JobPlan:
        """Returns the job that the request asks for.

        Raises:
            UnknownDataset: `dataset_id` is no id that a dataset could have.
        """
        if not _ID.fullmatch(self.dataset_id):
            raise UnknownDataset(f"There is no dataset {self.dataset_id[:60]!r}.", field="dataset_id")
        settings = self.hyperparameters
        uri = f"dataset://{self.dataset_id}"
        options: dict[str, Any] = {
            "n_epochs": settings.epochs,
            "batch_size": BATCH_ROWS,
            "lr": settings.learning_rate,
            "custom_training_options": {
                "finetuning_type": "lora",
                "lora_attn_modules": METHOD["attn_modules"],
                "apply_lora_to_mlp": METHOD["apply_to_mlp"],
                "apply_lora_to_output": METHOD["apply_to_output"],
                "lora_rank": METHOD["rank"],
                "lora_alpha": METHOD["alpha"],
            },
        }
        return JobPlan(
            base_model=self.base_model,
            training_uri=uri,
            validation_uri=None,
            task_type=self.task_type,
            suffix=self.suffix or None,
            priority=self.priority,
            validation_split=settings.validation_split,
            hyperparameters=settings.model_dump(exclude_none=True),
            input_config={"model": self.base_model, "data": uri, "fine_tuning_options": options},
            run={
                "base_model": self.base_model,
                "method": METHOD,
                "epochs": settings.epochs,
                "batch_size": BATCH_ROWS,
                "gradient_accumulation_steps": 1,
                "learning_rate": settings.learning_rate,
                "seed": 0,
                "shuffle": True,
                "extras": {},
                "torchrun_arguments": [],
                **({"max_steps": settings.max_steps} if settings.max_steps else {}),
            },
        )
