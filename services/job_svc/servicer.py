"""The rpcs for accounts: each parses, asks the domain once, and converts back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import sqlalchemy as sa
from google.api import httpbody_pb2
from google.protobuf import empty_pb2

from job_svc import views
from job_svc.config_request import CancelBody, ConfigBody
from job_svc.credits import MAX_ENTRIES, MICRO, CreditLedger
from job_svc.csv_job_request import CsvJobBody
from job_svc.job_files import TAR, JobFiles
from job_svc.jobs import DEFAULT_PAGE, MAX_PAGE, Jobs
from job_svc.log_stream import LogStream
from job_svc.models import Models
from job_svc.paging import Page
from svc_kit.catalog import Catalog
from svc_kit.errors import InvalidRequest
from svc_kit.idempotency import idempotency_key
from svc_kit.identity import current_identity
from svc_kit.rest_answers import CREATED, NDJSON, NO_CONTENT
from svc_kit.strict_json import message_to_object, parse_json_object, validate
from tunery.job.v1 import (
    credit_service_pb2 as credit_pb2,
)
from tunery.job.v1 import (
    credit_service_pb2_grpc,
    fine_tuning_service_pb2_grpc,
    job_pb2,
    job_service_pb2_grpc,
    model_service_pb2_grpc,
)
from tunery.job.v1 import (
    fine_tuning_service_pb2 as fine_tuning_pb2,
)
from tunery.job.v1 import (
    job_service_pb2 as job_service_pb2,
)
from tunery.job.v1 import (
    model_pb2 as model_pb2,
)
from tunery.job.v1 import (
    model_service_pb2 as model_service_pb2,
)

_Page = TypeVar("_Page")


def _account_id() -> str:
    return current_identity().subject


def _page(
    request: job_service_pb2.ListJobsRequest | credit_pb2.ListCreditEntriesRequest, default: int, most: int
) -> Page:
    return Page.of(
        request.limit if request.HasField("limit") else None,
        request.offset if request.HasField("offset") else None,
        default=default,
        most=most,
    )


def _required_job_id(job_id: str) -> str:
    if not job_id:
        raise InvalidRequest("`job_id` is missing.", field="job_id")
    return job_id


class JobServicer(job_service_pb2_grpc.JobServiceServicer):
    """tunery.job.v1.JobService."""

    def __init__(self, jobs: Jobs, models: Models, logs: LogStream) -> None:
        self._jobs = jobs
        self._models = models
        self._logs = logs

    async def CreateJob(self, request: job_service_pb2.CreateJobRequest, context: Any) -> job_pb2.Job:
        return await self._create(_without_empty(message_to_object(request)), context)

    async def CreateJobFromJson(self, request: httpbody_pb2.HttpBody, context: Any) -> job_pb2.Job:
        job = await self._create(parse_json_object(request.data), context)
        await context.send_initial_metadata(CREATED)
        return job

    async def _create(self, body: dict[str, Any], context: Any) -> job_pb2.Job:
        plan = validate(CsvJobBody, body).plan()
        job = await self._jobs.create(_account_id(), plan, idempotency_key(context))
        # A repeated request's job may have ended meanwhile.
        return await self._show(job.id, views.job_message)

    async def ListJobs(self, request: job_service_pb2.ListJobsRequest, context: Any) -> job_pb2.JobList:
        found, total = await self._jobs.page(_account_id(), _page(request, DEFAULT_PAGE, MAX_PAGE))
        model_ids = await self._models.of_jobs([job.id for job in found])
        data = [views.job_message(job, model_ids.get(job.id)) for job in found]
        return job_pb2.JobList(data=data, total=total)

    async def GetJob(self, request: job_service_pb2.GetJobRequest, context: Any) -> job_pb2.Job:
        return await self._show(request.job_id, views.job_message)

    async def GetJobDetails(
        self, request: job_service_pb2.GetJobDetailsRequest, context: Any
    ) -> job_pb2.JobDetails:
        return await self._show(request.job_id, views.details_message)

    async def CancelJob(self, request: job_service_pb2.CancelJobRequest, context: Any) -> job_pb2.Job:
        return views.job_message(await self._jobs.cancel(_account_id(), request.job_id), None)

    async def _show(self, job_id: str, view: Callable[[sa.Row[Any], str | None], Any]) -> Any:
        job = await self._jobs.get_with_model(_account_id(), job_id)
        return view(job, job.model_id)

    async def TailLogs(
        self, request: job_service_pb2.TailLogsRequest, context: Any
    ) -> AsyncIterator[job_pb2.LogRecord]:
        if request.after_seq < 0:
            raise InvalidRequest("`after_seq` must be 0 or more.", field="after_seq")
        job = await self._jobs.get(_account_id(), request.job_id)
        with self._logs.follower(_account_id()):
            async for page in self._logs.follow(job.id, request.after_seq):
                for event in page:
                    yield views.log_record(event)

    async def StreamMetrics(
        self, request: job_service_pb2.StreamMetricsRequest, context: Any
    ) -> AsyncIterator[job_pb2.Metric]:
        if request.after_seq < 0:
            raise InvalidRequest("`after_seq` must be 0 or more.", field="after_seq")
        job = await self._jobs.get(_account_id(), request.job_id)
        with self._logs.follower(_account_id()):
            pages = self._logs.follow(job.id, request.after_seq, stored_only=request.stored_only)
            async for page in _as_ndjson(pages, context):
                for event in page:
                    if event.kind in views.METRIC_KINDS:
                        yield views.metric(event)


class FineTuningServicer(fine_tuning_service_pb2_grpc.FineTuningServiceServicer):
    """tunery.job.v1.FineTuningService."""

    def __init__(self, jobs: Jobs, logs: LogStream, files: JobFiles, public_url: str) -> None:
        self._jobs = jobs
        self._logs = logs
        self._files = files
        self._public_url = public_url.rstrip("/")

    async def _view(self, job: sa.Row[Any]) -> fine_tuning_pb2.FineTuningJob:
        found = (await self._jobs.checkpoints([job.id]))[job.id]
        return views.fine_tuning_job_message(job, found, self._public_url)

    async def _submit(self, body: dict[str, Any], context: Any) -> fine_tuning_pb2.FineTuningJob:
        plan = validate(ConfigBody, body).plan(body)
        return await self._view(await self._jobs.create(_account_id(), plan, idempotency_key(context)))

    async def SubmitJob(self, request: fine_tuning_pb2.Config, context: Any) -> fine_tuning_pb2.FineTuningJob:
        return await self._submit(message_to_object(request), context)

    async def SubmitJobFromJson(
        self, request: httpbody_pb2.HttpBody, context: Any
    ) -> fine_tuning_pb2.FineTuningJob:
        return await self._submit(parse_json_object(request.data), context)

    async def GetJobStatus(
        self, request: fine_tuning_pb2.GetJobStatusRequest, context: Any
    ) -> fine_tuning_pb2.FineTuningJob:
        return await self._view(await self._jobs.get(_account_id(), _required_job_id(request.job_id)))

    async def _cancel(self, job_id: str) -> fine_tuning_pb2.FineTuningJob:
        return await self._view(await self._jobs.cancel(_account_id(), _required_job_id(job_id)))

    async def CancelSubmittedJob(
        self, request: fine_tuning_pb2.CancelSubmittedJobRequest, context: Any
    ) -> fine_tuning_pb2.FineTuningJob:
        return await self._cancel(request.job_id)

    async def CancelSubmittedJobFromJson(
        self, request: httpbody_pb2.HttpBody, context: Any
    ) -> fine_tuning_pb2.FineTuningJob:
        return await self._cancel(validate(CancelBody, parse_json_object(request.data)).job_id)

    async def TailJob(
        self, request: fine_tuning_pb2.TailJobRequest, context: Any
    ) -> AsyncIterator[fine_tuning_pb2.LogLines]:
        job = await self._jobs.get(_account_id(), _required_job_id(request.job_id))
        with self._logs.follower(_account_id()):
            async for page in _as_ndjson(self._logs.follow(job.id, 0), context):
                if page:
                    yield views.log_lines(page)

    async def GetJobFile(
        self, request: fine_tuning_pb2.GetJobFileRequest, context: Any
    ) -> AsyncIterator[httpbody_pb2.HttpBody]:
        content_type, chunks = await self._files.open(_account_id(), request.job_id, request.path)
        async for chunk in chunks:
            yield httpbody_pb2.HttpBody(content_type=content_type, data=chunk)


class ModelServicer(model_service_pb2_grpc.ModelServiceServicer):
    """tunery.job.v1.ModelService."""

    def __init__(self, models: Models, files: JobFiles, catalog: Catalog) -> None:
        self._models = models
        self._files = files
        self._catalog = catalog

    async def ListFineTunedModels(
        self, request: model_service_pb2.ListFineTunedModelsRequest, context: Any
    ) -> model_pb2.FineTunedModelList:
        found = await self._models.listed(_account_id())
        return model_pb2.FineTunedModelList(data=[views.model_message(model) for model in found])

    async def DeleteFineTunedModel(
        self, request: model_service_pb2.DeleteFineTunedModelRequest, context: Any
    ) -> empty_pb2.Empty:
        await self._models.delete(_account_id(), request.model_id)
        await context.send_initial_metadata(NO_CONTENT)
        return empty_pb2.Empty()

    async def DownloadFineTunedModel(
        self, request: model_service_pb2.DownloadFineTunedModelRequest, context: Any
    ) -> AsyncIterator[httpbody_pb2.HttpBody]:
        model = await self._models.get(_account_id(), request.model_id)
        async for chunk in self._files.tar(model.object_prefix):
            yield httpbody_pb2.HttpBody(content_type=TAR, data=chunk)

    async def ListBaseModels(
        self, request: model_service_pb2.ListBaseModelsRequest, context: Any
    ) -> model_pb2.BaseModelList:
        return model_pb2.BaseModelList(
            data=[
                model_pb2.BaseModel(
                    id=entry.id,
                    source=entry.source,
                    revision=entry.revision or "",
                    context_length=entry.context_length,
                    licence=entry.licence,
                    description=entry.description,
                )
                for entry in self._catalog.default_first
            ]
        )


class CreditServicer(credit_service_pb2_grpc.CreditServiceServicer):
    """tunery.job.v1.CreditService."""

    def __init__(self, ledger: CreditLedger) -> None:
        self._ledger = ledger

    async def GetCredits(self, request: credit_pb2.GetCreditsRequest, context: Any) -> credit_pb2.Credits:
        balance = await self._ledger.balance(_account_id())
        return credit_pb2.Credits(balance=None if balance is None else balance / MICRO)

    async def ListCreditEntries(
        self, request: credit_pb2.ListCreditEntriesRequest, context: Any
    ) -> credit_pb2.CreditEntryList:
        page = _page(request, MAX_ENTRIES, MAX_ENTRIES)
        found = await self._ledger.entries(_account_id(), page)
        return credit_pb2.CreditEntryList(data=[views.entry_message(entry) for entry in found])


async def _as_ndjson(pages: AsyncIterator[_Page], context: Any) -> AsyncIterator[_Page]:
    """A log's pages. That lines come is told with the first, so that what fails before is an error."""
    first = await anext(pages)
    await context.send_initial_metadata(NDJSON)
    yield first
    async for page in pages:
        yield page


def _without_empty(body: dict[str, Any]) -> dict[str, Any]:
    """A native message's required strings are absent when empty, so a missing one is said to be missing."""
    return {key: value for key, value in body.items() if value != ""}
