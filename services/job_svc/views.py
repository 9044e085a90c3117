"""One job, shown as each contract shows it."""

from __future__ import annotations

import datetime as dt
from typing import Any

import sqlalchemy as sa
from google.protobuf import json_format, timestamp_pb2

from job_svc import credits, job_files
from job_svc.job_plan import LARGEST_COUNT
from job_svc.job_state import JobStatus
from tunery.job.v1 import credit_service_pb2, fine_tuning_service_pb2, job_pb2, model_pb2

# Words of the first contract, which knows no `validation`, and of the second, which says `success`.
_FIRST_STATUS = {status: status.value for status in JobStatus} | {JobStatus.VALIDATION: "queued"}
_STEP_NUMBERS = (
    "learning_rate",
    "grad_norm",
    "tokens_trained",
    "tokens_per_second",
    "remaining_seconds",
    "peak_memory_bytes",
    "padding_share",
    "matrix_peak_share",
)
_SECOND_STATUS = {status: status.value for status in JobStatus} | {JobStatus.COMPLETED: "success"}


def timestamp(time: dt.datetime | None) -> timestamp_pb2.Timestamp | None:
    """Returns a time as protobuf has it."""
    if time is None:
        return None
    result = timestamp_pb2.Timestamp()
    result.FromDatetime(time)
    return result


def job_message(job: sa.Row[Any], model_id: str | None) -> job_pb2.Job:
    """Returns the job as the first contract shows it."""
    metrics = None
    if job.steps_completed is not None:
        metrics = job_pb2.TrainingMetrics(
            training_loss=job.training_loss,
            validation_loss=job.validation_loss,
            steps_completed=job.steps_completed,
            epochs_completed=job.epochs_completed or 0,
        )
    return job_pb2.Job(
        id=job.id,
        status=_FIRST_STATUS[JobStatus(job.status)],
        base_model=job.base_model,
        dataset_id=job.dataset_id,
        task_type=job.task_type,
        hyperparameters=job_pb2.Hyperparameters(**job.hyperparameters),
        # The model may have been looked up after the row was read: a running job has none yet.
        fine_tuned_model=model_id if job.status == JobStatus.COMPLETED else None,
        training_metrics=metrics,
        created_at=timestamp(job.created_at),
        completed_at=timestamp(job.ended_at),
    )


def details_message(job: sa.Row[Any], model_id: str | None) -> job_pb2.JobDetails:
    """Returns what neither contract shows."""
    return job_pb2.JobDetails(
        job=job_message(job, model_id),
        error=job.error,
        fault=job.fault,
        attempts=job.attempts,
        total_steps=job.total_steps,
        remaining_seconds=job.remaining_seconds,
        estimated_finish=timestamp(job.estimated_finish),
        tokens_trained=job.tokens_trained,
        credits_held=_credits(job.credits_held),
        credits_charged=_credits(job.credits_charged),
        estimate=_estimate(job),
        actual=_actual(job),
        priority=job.priority,
    )


def _estimate(job: sa.Row[Any]) -> job_pb2.JobCost | None:
    if job.estimate is None:
        return None
    return job_pb2.JobCost(**job.estimate, credits=_credits(job.credits_held))


def _actual(job: sa.Row[Any]) -> job_pb2.JobCost | None:
    if job.started_at is None or job.ended_at is None:
        return None
    return job_pb2.JobCost(
        tokens=job.tokens_trained,
        steps=job.steps_completed or 0,
        seconds=(job.ended_at - job.started_at).total_seconds(),
        memory_bytes=job.peak_memory_bytes or 0.0,
        credits=_credits(job.credits_charged),
    )


def _credits(amount: int | None) -> float | None:
    return None if amount is None else amount / credits.MICRO


def fine_tuning_job_message(
    job: sa.Row[Any], checkpoints: list[sa.Row[Any]], public_url: str
) -> fine_tuning_service_pb2.FineTuningJob:
    """Returns the job as the second contract shows it."""
    files = f"{public_url}/fine_tuning/jobs/{job.id}/files/"
    config = json_format.ParseDict(job.input_config, fine_tuning_service_pb2.Config())
    return fine_tuning_service_pb2.FineTuningJob(
        job_id=job.id,
        created=timestamp(job.created_at),
        finished_at=timestamp(job.ended_at),
        status=_SECOND_STATUS[JobStatus(job.status)],
        error_path=files + job_files.ERROR_REPORT_NAME if job.status == JobStatus.FAILED else None,
        checkpoints=[files + job_files.checkpoint_path(checkpoint) for checkpoint in checkpoints],
        logs=job.wandb_url or files + job_files.log_name(job),
        input_config=config,
        metadata=config.metadata if config.HasField("metadata") else None,
    )


def log_record(event: sa.Row[Any]) -> job_pb2.LogRecord:
    """Returns a line of a log with its numbers."""
    step = None
    if event.kind == "step":
        fields = job_pb2.StepProgress.DESCRIPTOR.fields_by_name
        step = job_pb2.StepProgress(
            **{
                name: min(int(event.data[name]), LARGEST_COUNT)
                if field.type == field.TYPE_INT32
                else event.data[name]
                for name, field in fields.items()
                if name in event.data
            }
        )
    return job_pb2.LogRecord(
        seq=event.seq, time=timestamp(event.time), kind=event.kind, message=event.message, step=step
    )


METRIC_KINDS = ("step", "validation")


def metric(event: sa.Row[Any]) -> job_pb2.Metric:
    """Returns what a step or a measurement of the validation loss tells in numbers."""
    data = event.data
    shown = job_pb2.Metric(
        seq=min(event.seq, LARGEST_COUNT),
        time=timestamp(event.time),
        step=min(int(data["step"]), LARGEST_COUNT),
        epoch=min(int(data["epoch"]), LARGEST_COUNT),
    )
    if event.kind == "validation":
        shown.validation_loss = data["loss"]
        return shown
    shown.training_loss = data["loss"]
    for name in _STEP_NUMBERS:
        if name in data:
            setattr(shown, name, data[name])
    return shown


def log_lines(page: list[sa.Row[Any]]) -> fine_tuning_service_pb2.LogLines:
    """Returns lines of a log as the second contract's tail sends them."""
    return fine_tuning_service_pb2.LogLines(
        logs=[
            fine_tuning_service_pb2.Log(message=event.message, timestamp=timestamp(event.time))
            for event in page
        ]
    )


def model_message(model: sa.Row[Any]) -> model_pb2.FineTunedModel:
    """Returns a fine-tuned model."""
    return model_pb2.FineTunedModel(
        id=model.id,
        base_model=model.base_model,
        job_id=model.job_id,
        status=model.status,
        created_at=timestamp(model.created_at),
    )


def entry_message(entry: sa.Row[Any]) -> credit_service_pb2.CreditEntry:
    """Returns a line of the ledger."""
    return credit_service_pb2.CreditEntry(
        created_at=timestamp(entry.created_at),
        kind=entry.kind,
        amount=entry.amount / credits.MICRO,
        job_id=entry.job_id or None,
    )
