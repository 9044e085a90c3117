"""The rpcs for the other parts of the stack: trainers, datasets, inference, the auth check."""

from __future__ import annotations

import datetime as dt
from typing import Any

from google.protobuf import empty_pb2, json_format

from job_svc.credits import CreditLedger
from job_svc.job_state import LIVE
from job_svc.jobs import Jobs
from job_svc.lease_queue import LeaseQueue, RunEvent, RunResult
from job_svc.models import Models
from job_svc.sweeper import attempt_prefix
from svc_kit.errors import InvalidRequest
from tunery.job.v1 import (
    credit_service_pb2,
    credit_service_pb2_grpc,
    job_service_pb2,
    job_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)
from tunery.trainer.v1 import worker_service_pb2 as worker_pb2
from tunery.trainer.v1 import worker_service_pb2_grpc


class WorkerServicer(worker_service_pb2_grpc.WorkerServiceServicer):
    """tunery.trainer.v1.WorkerService."""

    def __init__(self, queue: LeaseQueue) -> None:
        self._queue = queue

    async def LeaseJob(
        self, request: worker_pb2.LeaseJobRequest, context: Any
    ) -> worker_pb2.LeaseJobResponse:
        if not request.trainer_id:
            raise InvalidRequest("`trainer_id` is missing.", field="trainer_id")
        job = await self._queue.lease(request.trainer_id, request.wait_seconds)
        if job is None:
            return worker_pb2.LeaseJobResponse()
        lease = worker_pb2.Lease(
            job_id=job.id,
            lease_token=job.lease_token,
            lease_seconds=self._queue.lease_seconds,
            attempt=job.attempts,
            next_seq=job.next_seq,
            run=json_format.ParseDict(job.run, worker_pb2.TrainingRun()),
            training_key=job.training_key,
            validation_key=job.validation_key,
            attempt_prefix=attempt_prefix(job),
            resume_prefix=await self._queue.last_checkpoint(job.id),
            needs_probe=job.estimate is None,
            request_id=job.request_id,
        )
        return worker_pb2.LeaseJobResponse(lease=lease)

    async def RenewLease(self, request: worker_pb2.RenewLeaseRequest, context: Any) -> empty_pb2.Empty:
        await self._queue.renew(request.job_id, request.lease_token)
        return empty_pb2.Empty()

    async def ReportEvents(self, request: worker_pb2.ReportEventsRequest, context: Any) -> empty_pb2.Empty:
        reported = [
            RunEvent(
                seq=event.seq,
                time=event.time.ToDatetime(tzinfo=dt.UTC),
                kind=event.kind,
                message=event.message,
                data=json_format.MessageToDict(event.data),
            )
            for event in request.events
        ]
        await self._queue.report(request.job_id, request.lease_token, reported)
        return empty_pb2.Empty()

    async def PutProbe(
        self, request: worker_pb2.PutProbeRequest, context: Any
    ) -> worker_pb2.PutProbeResponse:
        probe = json_format.MessageToDict(
            request.probe, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        told = await self._queue.put_probe(
            probe,
            request.job_id if request.HasField("job_id") else None,
            request.lease_token if request.HasField("lease_token") else None,
        )
        return worker_pb2.PutProbeResponse(estimate=told)

    async def EndAttempt(self, request: worker_pb2.EndAttemptRequest, context: Any) -> empty_pb2.Empty:
        job_id, token = request.job_id, request.lease_token
        match request.WhichOneof("outcome"):
            case "completed":
                await self._queue.complete(job_id, token, _result(request.completed))
            case "failed":
                await self._queue.fail(job_id, token, request.failed.message, request.failed.fault)
            case "handed_back":
                await self._queue.hand_back(job_id, token, request.handed_back.reason)
            case _:
                raise InvalidRequest("`outcome` is missing.", field="outcome")
        return empty_pb2.Empty()


def _result(completed: worker_pb2.Completed) -> RunResult:
    return RunResult(
        object_prefix=completed.object_prefix,
        training_loss=completed.training_loss if completed.HasField("training_loss") else None,
        validation_loss=completed.validation_loss if completed.HasField("validation_loss") else None,
        steps=completed.steps,
        epochs_completed=completed.epochs_completed,
        tokens_trained=int(completed.tokens_trained),
    )


class JobLifeServicer(job_service_pb2_grpc.JobLifeServiceServicer):
    """tunery.job.v1.JobLifeService."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    async def FilterLiveJobs(
        self, request: job_service_pb2.FilterLiveJobsRequest, context: Any
    ) -> job_service_pb2.FilterLiveJobsResponse:
        statuses = await self._jobs.statuses(request.job_ids)
        return job_service_pb2.FilterLiveJobsResponse(
            live_job_ids=[job_id for job_id, status in statuses.items() if status in LIVE],
            unknown_job_ids=[job_id for job_id in request.job_ids if job_id not in statuses],
        )


class ModelArtifactServicer(model_service_pb2_grpc.ModelArtifactServiceServicer):
    """tunery.job.v1.ModelArtifactService."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def FindModelArtifact(
        self, request: model_service_pb2.FindModelArtifactRequest, context: Any
    ) -> model_service_pb2.FindModelArtifactResponse:
        model = await self._models.get(request.account_id, request.model_id)
        return model_service_pb2.FindModelArtifactResponse(
            base_model=model.base_model, method=model.method, object_prefix=model.object_prefix
        )


class CreditAccountServicer(credit_service_pb2_grpc.CreditAccountServiceServicer):
    """tunery.job.v1.CreditAccountService."""

    def __init__(self, ledger: CreditLedger) -> None:
        self._ledger = ledger

    async def OpenCreditAccount(
        self, request: credit_service_pb2.OpenCreditAccountRequest, context: Any
    ) -> empty_pb2.Empty:
        credits = request.credits if request.HasField("credits") else None
        await self._ledger.open_account(request.account_id, credits)
        return empty_pb2.Empty()
