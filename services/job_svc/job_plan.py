"""What a job is to do, whichever contract asked for it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field

from svc_kit.strict_json import Integer

# What the messages' counts (int32) can hold.
LARGEST_COUNT = 2**31 - 1

Priority = Annotated[Integer, Field(ge=-100, le=100)]


@dataclass(frozen=True)
class JobPlan:
    """A request for a job, checked as far as it can be without its data.

    Attributes:
        base_model: an id that the request names; the catalog may not know it.
        training_uri: where the rows to train on are.
        validation_uri: where the rows to validate on are.
        task_type: `qa` or `not_qa` for CSV rows; None for dialogs.
        suffix: part of the model's id.
        priority: among the account's own jobs, the highest goes first.
        validation_split: share of the training rows kept for validation, 0 to 1.
        hyperparameters: as the first contract shows them.
        input_config: as the second contract shows it.
        run: a `tunery.trainer.v1.TrainingRun` as an object.
    """

    base_model: str
    training_uri: str
    validation_uri: str | None
    task_type: str | None
    suffix: str | None
    priority: int
    validation_split: float
    hyperparameters: dict[str, Any]
    input_config: dict[str, Any]
    run: dict[str, Any]

    def digest(self) -> str:
        """Returns SHA-256, in hex, of all that was asked for."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def uris(self) -> list[str]:
        """The job's data URIs, training first."""
        return [self.training_uri, *([] if self.validation_uri is None else [self.validation_uri])]
