"""The service's resources as its REST answers show them."""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

TaskType = Literal["qa", "not_qa"]
Scope = Literal["read", "write", "admin"]


class Dataset(TypedDict):
    """An uploaded file of training rows."""

    id: str
    name: str
    size_bytes: int
    row_count: int
    columns: list[str]
    created_at: str


class BadRow(TypedDict):
    """A row that can't be trained on."""

    line: int
    column: NotRequired[str]
    problem: str
    cure: str


class TokenLengthBin(TypedDict):
    """How many rows have a length from `from_tokens` to `to_tokens`."""

    from_tokens: int
    to_tokens: int
    num_rows: int


class TokenLengths(TypedDict):
    """Lengths of rows in tokens."""

    min: int
    max: int
    mean: float
    p50: int
    p95: int
    p99: int
    histogram: list[TokenLengthBin]


class DuplicateRow(TypedDict):
    """A row that repeats an earlier one."""

    line: int
    first_line: int


class ExampleToken(TypedDict):
    """A token's text, and whether it is trained on."""

    text: str
    is_target: bool


class ExampleRow(TypedDict):
    """A row as the model sees it."""

    line: int
    num_tokens: int
    text: str
    tokens: list[ExampleToken]


class DatasetReport(TypedDict):
    """What a job would make of a dataset's rows; lists have at most 100 entries, counts count all."""

    dataset_id: str
    format: str
    base_model: str
    task_type: NotRequired[str]
    num_rows: int
    num_bad_rows: int
    bad_rows: list[BadRow]
    token_lengths: NotRequired[TokenLengths]
    num_rows_measured: int
    max_sequence_length: int
    num_long_rows: int
    long_row_lines: list[int]
    num_duplicate_rows: int
    duplicate_rows: list[DuplicateRow]
    num_rows_without_target: int
    without_target_lines: list[int]
    example: NotRequired[ExampleRow]


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


class ApiKey(TypedDict):
    """What is known of an API key; `id` is its first 11 characters."""

    id: str
    name: str
    scopes: list[Scope]
    created_at: str


class CreatedApiKey(TypedDict):
    """A new API key; `api_key` is the key itself."""

    key: ApiKey
    api_key: str
