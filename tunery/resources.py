"""The service's resources as its REST answers show them."""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

TaskType = Literal["qa", "not_qa"]


class Dataset(TypedDict):
    """An uploaded file of training rows."""

    id: str
    name: str
    size_bytes: int
    row_count: int
    columns: list[str]
    created_at: str


class Hyperparameters(TypedDict, total=False):
    """How to train; what is left out has the service's default."""

    epochs: int
    max_steps: int
    learning_rate: float
    validation_split: float


class TrainingMetrics(TypedDict, total=False):
    """How training goes."""

    training_loss: float
    validation_loss: float
    steps_completed: int
    epochs_completed: int


class Job(TypedDict):
    """A fine-tuning job."""

    id: str
    status: str
    base_model: str
    dataset_id: NotRequired[str]
    task_type: NotRequired[str]
    hyperparameters: Hyperparameters
    fine_tuned_model: NotRequired[str]
    training_metrics: NotRequired[TrainingMetrics]
    created_at: str
    completed_at: NotRequired[str]


class JobList(TypedDict):
    """A page of jobs, newest first, and how many there are in all."""

    data: list[Job]
    total: int


class JobCost(TypedDict):
    """What a job takes: seconds from the start of training, memory at most."""

    tokens: float
    steps: int
    seconds: float
    memory_bytes: float
    credits: NotRequired[float]


class JobDetails(TypedDict):
    """A job with why it failed, how long it will take and what it costs."""

    job: Job
    error: NotRequired[str]
    fault: NotRequired[str]
    attempts: int
    total_steps: NotRequired[int]
    remaining_seconds: NotRequired[float]
    tokens_trained: float
    credits_held: NotRequired[float]
    credits_charged: NotRequired[float]
    estimated_finish: NotRequired[str]
    estimate: NotRequired[JobCost]
    actual: NotRequired[JobCost]


class FineTunedModel(TypedDict):
    """A model that a job made."""

    id: str
    base_model: str
    job_id: str
    status: str
    created_at: str


class BaseModel(TypedDict):
    """A model of the catalog."""

    id: str
    source: str
    revision: str
    context_length: int
    licence: str
    description: str


class ChatMessage(TypedDict):
    """A message of a conversation; `role` is system, user or assistant."""

    role: str
    content: str
