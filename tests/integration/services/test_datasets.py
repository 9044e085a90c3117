"""Datasets and their holds, on both databases."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from dataset_svc.settings import DatasetSettings
from dataset_svc.uploads import MAX_CONCURRENT_UPLOADS
from svc_kit.ids import new_id
from svc_kit.object_store import ObjectStore
from svc_kit.settings import ObjectStoreSettings
from tunery.dataset.v1 import dataset_service_pb2, job_data_service_pb2
from tunery.dataset.v1.job_data_service_pb2_grpc import JobDataServiceStub
from tunery.job.v1 import job_pb2, job_service_pb2

from .conftest import Metadata, Services

ROWS = "question,answer\nq,a\n"


def delete_request(dataset_id: str) -> dataset_service_pb2.DeleteDatasetRequest:
    return dataset_service_pb2.DeleteDatasetRequest(dataset_id=dataset_id)


async def code_of(call: grpc.aio.UnaryUnaryCall) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def make_job(services: Services, account: Metadata, dataset_id: str) -> job_pb2.Job:
    request = job_service_pb2.CreateJobRequest(
        base_model="tunery-tiny", dataset_id=dataset_id, task_type="qa"
    )
    return await services.jobs.CreateJob(request, metadata=account)


async def test_a_dataset_is_shown_once_stored_and_gone_once_deleted(services: Services) -> None:
    account = services.account()
    made = await services.upload(account, 'Question,Answer\r\n"a ""b""","two\nlines"\r\n', "my.CSV")
    assert (made.name, made.row_count, list(made.columns)) == ("my.CSV", 1, ["Question", "Answer"])
    get = dataset_service_pb2.GetDatasetRequest(dataset_id=made.id)
    assert await services.datasets.GetDataset(get, metadata=account) == made
    await services.datasets.DeleteDataset(delete_request(made.id), metadata=account)
    assert await code_of(services.datasets.GetDataset(get, metadata=account)) == grpc.StatusCode.NOT_FOUND
    again = services.datasets.DeleteDataset(delete_request(made.id), metadata=account)
    assert await code_of(again) == grpc.StatusCode.NOT_FOUND


async def test_a_report_on_a_dataset_that_is_deleted_meanwhile_leaves_nothing(services: Services) -> None:
    account = services.account()
    dataset = await services.upload(account, ROWS)
    question = dataset_service_pb2.GetDatasetReportRequest(dataset_id=dataset.id, base_model="tunery-tiny")
    report = services.datasets.GetDatasetReport(question, metadata=account)
    # On the first database the base model has to be fetched, before the rows are measured.
    model_file = Path(services.environment["TUNERY_MODELS_DIR"]) / "tunery-tiny" / "config.json"
    while not model_file.exists():
        assert not report.done(), await report
        await asyncio.sleep(0.05)
    await services.datasets.DeleteDataset(delete_request(dataset.id), metadata=account)
    assert await code_of(report) == grpc.StatusCode.NOT_FOUND
    own = {
        name.removeprefix("TUNERY_").lower(): value
        for name, value in services.environment.items()
        if name.startswith("TUNERY_S3_")
    }
    stored = await ObjectStore(ObjectStoreSettings.model_validate(own)).list("accounts/")
    assert not [each.key for each in stored if dataset.id in each.key]


async def test_a_native_upload_that_is_cut_off_stores_nothing(services: Services) -> None:
    account = services.account()
    part = dataset_service_pb2.UploadDatasetRequest
    header = dataset_service_pb2.UploadHeader(file_name="rows.csv", size_bytes=len(ROWS) + 1)
    parts = [part(header=header), part(chunk=ROWS.encode())]
    upload = services.datasets.UploadDataset(iter(parts), metadata=account)
    assert await code_of(upload) == grpc.StatusCode.INVALID_ARGUMENT
    listed = await services.datasets.ListDatasets(dataset_service_pb2.ListDatasetsRequest(), metadata=account)
    assert not listed.data


@pytest.mark.parametrize(
    ("file_name", "name", "shown"),
    [
        ("rows.csv", "  two words ", "two words"),
        ("rows.csv", "  ", "rows.csv"),
        ("C:\\folder\\rows.csv", None, "rows.csv"),
        ("folder/👩\u200d🔬\u00a0.csv", None, "👩\u200d🔬\u00a0.csv"),
    ],
)
async def test_a_native_uploads_names_are_read_as_a_forms(
    services: Services, file_name: str, name: str | None, shown: str
) -> None:
    part = dataset_service_pb2.UploadDatasetRequest
    header = dataset_service_pb2.UploadHeader(file_name=file_name, name=name, size_bytes=len(ROWS))
    parts = [part(header=header), part(chunk=ROWS.encode())]
    made = await services.datasets.UploadDataset(iter(parts), metadata=services.account())
    assert made.name == shown


@pytest.mark.parametrize("field", ["file_name", "name"])
@pytest.mark.parametrize("text", ["a\nb.csv", "a\0.csv", "x" * 260 + ".csv"])
async def test_a_native_uploads_wrong_names_are_refused(services: Services, field: str, text: str) -> None:
    part = dataset_service_pb2.UploadDatasetRequest
    header = dataset_service_pb2.UploadHeader(
        **{"file_name": "rows.csv", "size_bytes": len(ROWS), field: text}
    )
    upload = services.datasets.UploadDataset(iter([part(header=header)]), metadata=services.account())
    with pytest.raises(grpc.aio.AioRpcError, match=f"header.{field}") as caught:
        await upload
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_dataset_in_use_stays_until_the_jobs_end(services: Services) -> None:
    account = services.account()
    dataset = await services.upload(account, ROWS)
    first, second = [await make_job(services, account, dataset.id) for _ in range(2)]
    for job in (first, second):
        held = services.datasets.DeleteDataset(delete_request(dataset.id), metadata=account)
        assert await code_of(held) == grpc.StatusCode.ABORTED
        cancel = job_service_pb2.CancelJobRequest(job_id=job.id)
        await services.jobs.CancelJob(cancel, metadata=account)
    await services.datasets.DeleteDataset(delete_request(dataset.id), metadata=account)


async def test_a_job_and_a_deletion_at_the_same_time_never_both_succeed(services: Services) -> None:
    account = services.account()
    for _ in range(15):
        dataset = await services.upload(account, ROWS)
        made, deleted = await asyncio.gather(
            make_job(services, account, dataset.id),
            code_of(services.datasets.DeleteDataset(delete_request(dataset.id), metadata=account)),
            return_exceptions=True,
        )
        if isinstance(made, job_pb2.Job):
            assert deleted == grpc.StatusCode.ABORTED
            await services.jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=made.id), metadata=account)
        else:
            assert isinstance(made, grpc.aio.AioRpcError)
            assert made.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_hold_whose_job_was_refused_is_given_back(services: Services) -> None:
    account = services.account()
    dataset = await services.upload(account, ROWS)
    request = job_service_pb2.CreateJobRequest(
        base_model="tunery-tiny",
        dataset_id=dataset.id,
        task_type="qa",
        hyperparameters=job_pb2.Hyperparameters(validation_split=1.0),
    )
    refused = services.jobs.CreateJob(request, metadata=account)
    assert await code_of(refused) == grpc.StatusCode.INVALID_ARGUMENT
    await services.datasets.DeleteDataset(delete_request(dataset.id), metadata=account)


async def test_a_young_hold_without_a_job_yet_counts(services: Services) -> None:
    """job_svc holds the data first and commits the job a moment later."""
    account_id = new_id("acct")
    account = services.account(account_id)
    dataset = await services.upload(account, ROWS)
    stub = JobDataServiceStub(services.channel(services.dataset_address))
    request = job_data_service_pb2.HoldJobDataRequest(
        account_id=account_id, job_id=new_id("job"), uris=[f"dataset://{dataset.id}"]
    )
    await stub.HoldJobData(request, metadata=services.process("job_svc"))
    held = services.datasets.DeleteDataset(delete_request(dataset.id), metadata=account)
    assert await code_of(held) == grpc.StatusCode.ABORTED
    release = job_data_service_pb2.ReleaseJobDataRequest(job_id=request.job_id)
    await stub.ReleaseJobData(release, metadata=services.process("job_svc"))
    await services.datasets.DeleteDataset(delete_request(dataset.id), metadata=account)


async def test_another_accounts_dataset_is_not_there(services: Services) -> None:
    owner, other = services.account(), services.account()
    dataset = await services.upload(owner, ROWS)
    get = dataset_service_pb2.GetDatasetRequest(dataset_id=dataset.id)
    assert await code_of(services.datasets.GetDataset(get, metadata=other)) == grpc.StatusCode.NOT_FOUND
    delete = services.datasets.DeleteDataset(delete_request(dataset.id), metadata=other)
    assert await code_of(delete) == grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError, match="There is no dataset"):
        await make_job(services, other, dataset.id)


@pytest.mark.parametrize("dataset_id", ["", "x", "ds-\0", "../../x", "ds-" + "a" * 20, "é" * 400])
async def test_ids_that_are_none_are_not_found(services: Services, dataset_id: str) -> None:
    get = dataset_service_pb2.GetDatasetRequest(dataset_id=dataset_id)
    call = services.datasets.GetDataset(get, metadata=services.account())
    assert await code_of(call) == grpc.StatusCode.NOT_FOUND


async def test_uploads_beyond_the_limit_are_refused_and_block_nobody(services: Services) -> None:
    """Slow clients hold every place: the next is told to come back, and those that hold one finish."""
    part = dataset_service_pb2.UploadDatasetRequest
    header = part(header=dataset_service_pb2.UploadHeader(file_name="rows.csv", size_bytes=len(ROWS)))
    share = DatasetSettings.model_fields["max_concurrent_uploads"].default
    accounts = [services.account() for _ in range(MAX_CONCURRENT_UPLOADS // share)]
    account = services.account()

    async def upload_on(who: Metadata) -> None:
        async with asyncio.timeout(30):
            while True:
                await services.upload(who, ROWS)

    async def refused(who: Metadata) -> str:
        """Why an account's next upload is refused, asked until the last of the slow ones has its place."""
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await upload_on(who)
        assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        return raised.value.details() or ""

    slow = []
    for holder in accounts:
        await services.upload(account, ROWS)  # those before have left places
        calls = [services.datasets.UploadDataset(metadata=holder) for _ in range(share)]
        for call in calls:
            await call.write(header)
        slow += calls
        if holder is not accounts[-1]:
            assert f"has {share} uploads under way" in await refused(holder)
    assert f"{MAX_CONCURRENT_UPLOADS} uploads are under way" in await refused(account)
    for call in slow:
        await call.write(part(chunk=ROWS.encode()))
        await call.done_writing()
    stored = await asyncio.gather(*slow)
    assert len({dataset.id for dataset in stored}) == MAX_CONCURRENT_UPLOADS
    await services.upload(account, ROWS)
