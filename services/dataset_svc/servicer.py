"""The rpcs of dataset_svc: each parses, asks the domain once, and converts back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import sqlalchemy as sa
from google.api import httpbody_pb2
from google.protobuf import empty_pb2, json_format, timestamp_pb2

from dataset_svc.data_sources import DatasetUri, DataSources
from dataset_svc.dataset_reports import DatasetReports, ReportRequest
from dataset_svc.datasets import Datasets
from dataset_svc.incoming_file import Format
from dataset_svc.job_data import TRAINING, VALIDATION, DataFile, DataRequest, JobData
from dataset_svc.task_columns import TaskType, plan_columns
from dataset_svc.uploads import Uploads
from svc_kit.errors import InvalidRequest, MalformedUpload, NotFound
from svc_kit.idempotency import idempotency_key
from svc_kit.identity import current_identity
from svc_kit.rest_answers import CREATED, NO_CONTENT
from tunery.dataset.v1 import (
    dataset_pb2,
    dataset_report_pb2,
    dataset_service_pb2,
    dataset_service_pb2_grpc,
    job_data_service_pb2,
    job_data_service_pb2_grpc,
)


def _message(dataset: sa.Row[Any]) -> dataset_pb2.Dataset:
    created_at = timestamp_pb2.Timestamp()
    created_at.FromDatetime(dataset.created_at)
    return dataset_pb2.Dataset(
        id=dataset.id,
        name=dataset.name,
        size_bytes=dataset.size_bytes,
        row_count=dataset.row_count,
        columns=dataset.columns,
        created_at=created_at,
    )


class DatasetServicer(dataset_service_pb2_grpc.DatasetServiceServicer):
    """tunery.dataset.v1.DatasetService."""

    def __init__(self, datasets: Datasets, uploads: Uploads, reports: DatasetReports) -> None:
        self._datasets = datasets
        self._uploads = uploads
        self._reports = reports

    async def UploadCsvForm(
        self, request_iterator: AsyncIterator[httpbody_pb2.HttpBody], context: Any
    ) -> dataset_pb2.Dataset:
        return await self._upload_form("csv", request_iterator, context)

    async def UploadDialogsForm(
        self, request_iterator: AsyncIterator[httpbody_pb2.HttpBody], context: Any
    ) -> dataset_pb2.Dataset:
        return await self._upload_form("jsonl", request_iterator, context)

    async def _upload_form(
        self, format_: Format, bodies: AsyncIterator[httpbody_pb2.HttpBody], context: Any
    ) -> dataset_pb2.Dataset:
        first = await anext(bodies, None)
        if first is None:
            raise MalformedUpload("The body is empty; multipart/form-data with the part `file` was expected.")

        async def chunks() -> AsyncIterator[bytes]:
            yield first.data
            async for body in bodies:
                yield body.data

        account_id = current_identity().subject
        row = await self._uploads.take_form(
            account_id, format_, first.content_type, chunks(), idempotency_key(context)
        )
        await context.send_initial_metadata(CREATED)
        return _message(row)

    async def UploadDataset(
        self,
        request_iterator: AsyncIterator[dataset_service_pb2.UploadDatasetRequest],
        context: Any,
    ) -> dataset_pb2.Dataset:
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidRequest("The first message must carry `header`.", field="header")
        header = first.header

        async def chunks() -> AsyncIterator[bytes]:
            async for request in request_iterator:
                if request.WhichOneof("part") != "chunk":
                    raise InvalidRequest("Every message after the first must carry `chunk`.", field="chunk")
                yield request.chunk

        row = await self._uploads.take_chunks(
            current_identity().subject,
            header.file_name,
            header.name if header.HasField("name") else None,
            header.size_bytes,
            chunks(),
            idempotency_key(context),
        )
        return _message(row)

    async def ListDatasets(
        self, request: dataset_service_pb2.ListDatasetsRequest, context: Any
    ) -> dataset_pb2.DatasetList:
        found = await self._datasets.list(current_identity().subject)
        return dataset_pb2.DatasetList(data=[_message(dataset) for dataset in found])

    async def GetDataset(
        self, request: dataset_service_pb2.GetDatasetRequest, context: Any
    ) -> dataset_pb2.Dataset:
        return _message(await self._datasets.get(current_identity().subject, request.dataset_id))

    async def GetDatasetReport(
        self, request: dataset_service_pb2.GetDatasetReportRequest, context: Any
    ) -> dataset_report_pb2.DatasetReport:
        asked = ReportRequest(
            dataset_id=request.dataset_id,
            base_model=request.base_model if request.HasField("base_model") else None,
            task_type=request.task_type if request.HasField("task_type") else None,
            max_sequence_length=(
                request.max_sequence_length if request.HasField("max_sequence_length") else None
            ),
        )
        report = await self._reports.get(current_identity().subject, asked)
        return json_format.ParseDict(report, dataset_report_pb2.DatasetReport())

    async def DeleteDataset(
        self, request: dataset_service_pb2.DeleteDatasetRequest, context: Any
    ) -> empty_pb2.Empty:
        await self._datasets.delete(current_identity().subject, request.dataset_id)
        await context.send_initial_metadata(NO_CONTENT)
        return empty_pb2.Empty()


class JobDataServicer(job_data_service_pb2_grpc.JobDataServiceServicer):
    """tunery.dataset.v1.JobDataService."""

    def __init__(self, sources: DataSources, datasets: Datasets, job_data: JobData) -> None:
        self._sources = sources
        self._datasets = datasets
        self._job_data = job_data

    async def HoldJobData(
        self, request: job_data_service_pb2.HoldJobDataRequest, context: Any
    ) -> job_data_service_pb2.HoldJobDataResponse:
        data = [await self._hold(request, uri) for uri in request.uris]
        return job_data_service_pb2.HoldJobDataResponse(data=data)

    async def _hold(
        self, request: job_data_service_pb2.HoldJobDataRequest, uri: str
    ) -> job_data_service_pb2.HeldData:
        parsed = self._sources.parse(request.account_id, uri)
        if not isinstance(parsed, DatasetUri):
            return job_data_service_pb2.HeldData(format="jsonl")
        row = await self._datasets.hold(request.account_id, parsed.dataset_id, request.job_id)
        if row.format == "csv" and request.HasField("task_type"):
            plan_columns(cast(TaskType, request.task_type), row.columns)
        return job_data_service_pb2.HeldData(dataset=_message(row), format=row.format)

    async def ReleaseJobData(
        self, request: job_data_service_pb2.ReleaseJobDataRequest, context: Any
    ) -> empty_pb2.Empty:
        await self._datasets.release(request.job_id)
        return empty_pb2.Empty()

    async def PrepareJobData(
        self, request: job_data_service_pb2.PrepareJobDataRequest, context: Any
    ) -> job_data_service_pb2.PrepareJobDataResponse:
        try:
            prepared = await self._job_data.prepare(
                DataRequest(
                    account_id=request.account_id,
                    job_id=request.job_id,
                    training_uri=request.training_uri,
                    validation_uri=request.validation_uri if request.HasField("validation_uri") else None,
                    task_type=cast(TaskType, request.task_type) if request.HasField("task_type") else None,
                    num_validation_rows=request.num_validation_rows,
                    seed=request.seed,
                    base_model=request.base_model,
                )
            )
        except NotFound as error:
            raise InvalidRequest(f"The data is gone: {error.message}") from error
        return job_data_service_pb2.PrepareJobDataResponse(
            training=_file_message(prepared.files.get(TRAINING)),
            validation=_file_message(prepared.files.get(VALIDATION)),
            remarks=prepared.remarks,
            num_bad_rows=prepared.num_bad_rows,
            report_key=prepared.report_key,
            first_problem=prepared.first_problem,
        )


def _file_message(file: DataFile | None) -> job_data_service_pb2.DataFile | None:
    if file is None:
        return None
    return job_data_service_pb2.DataFile(
        object_key=file.object_key,
        size_bytes=file.size_bytes,
        num_rows=file.num_rows,
        num_tokens=file.tokens.num_tokens,
        num_targets=file.tokens.num_targets,
        longest_row_tokens=file.tokens.longest_row_tokens,
    )
