"""A request that is sent again with its key makes nothing new, and a key serves for one request only."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import grpc
import pytest

from tunery.dataset.v1 import dataset_pb2, dataset_service_pb2
from tunery.job.v1 import fine_tuning_service_pb2, job_pb2, job_service_pb2

from .conftest import Metadata, Services

ROWS = "question,answer\nq,a\n"
DIALOG = '{"dialog":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}\n'


def with_key(account: Metadata, key: str) -> Metadata:
    return (*account, ("idempotency-key", key))


async def refused(call: Awaitable[Any]) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    return raised.value.details() or ""


def job_on(dataset: dataset_pb2.Dataset, **changes: Any) -> job_service_pb2.CreateJobRequest:
    values = {"base_model": "tunery-tiny", "dataset_id": dataset.id, "task_type": "qa"}
    return job_service_pb2.CreateJobRequest(**values | changes)


async def cancel_all(services: Services, account: Metadata) -> int:
    listed = await services.jobs.ListJobs(job_service_pb2.ListJobsRequest(), metadata=account)
    for job in listed.data:
        await services.jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=job.id), metadata=account)
    return listed.total


async def test_a_job_asked_for_again_is_the_same_job(services: Services) -> None:
    account = services.account()
    dataset = await services.upload(account, ROWS)
    keyed = with_key(account, "k-1")
    at_once = [services.jobs.CreateJob(job_on(dataset), metadata=keyed) for _ in range(5)]
    made = await asyncio.gather(*at_once)
    again = await services.jobs.CreateJob(job_on(dataset), metadata=keyed)
    assert {job.id for job in made} == {again.id}
    message = await refused(services.jobs.CreateJob(job_on(dataset, suffix="x"), metadata=keyed))
    assert "'k-1' was used for another request" in message
    other = await services.jobs.CreateJob(job_on(dataset, suffix="x"), metadata=with_key(account, "k-2"))
    assert other.id != again.id
    assert await cancel_all(services, account) == 2
    # As it is now, an end included.
    ended = await services.jobs.CreateJob(job_on(dataset), metadata=keyed)
    assert (ended.id, ended.status) == (again.id, "cancelled")
    # Nothing holds the dataset: the calls that came second have let go of it.
    request = dataset_service_pb2.DeleteDatasetRequest(dataset_id=dataset.id)
    await services.datasets.DeleteDataset(request, metadata=account)


async def test_a_key_is_an_accounts_own_and_serves_both_contracts(services: Services) -> None:
    first, second = services.account(), services.account()
    made = []
    for account in (first, second):
        dataset = await services.upload(account, DIALOG, "rows.jsonl")
        config = fine_tuning_service_pb2.Config(model="tunery-tiny", data=f"dataset://{dataset.id}")
        keyed = with_key(account, "same")
        made += [(await services.fine_tuning.SubmitJob(config, metadata=keyed)).job_id for _ in range(2)]
        assert await cancel_all(services, account) == 1
    assert made[0] == made[1] != made[2] == made[3]


async def test_two_keys_for_one_request_are_refused(services: Services) -> None:
    account = services.account()
    keyed = with_key(with_key(account, "k-1"), "k-2")
    message = await refused(services.jobs.CreateJob(job_on(dataset_pb2.Dataset(id="ds-x")), metadata=keyed))
    assert message == "`Idempotency-Key` is there 2 times; send one for a request."
    assert "is there 2 times" in await refused(services.upload(keyed, ROWS))


async def test_an_upload_of_another_format_is_another_request(services: Services) -> None:
    account = services.account()
    await services.upload(with_key(account, "k-1"), ROWS, "rows.csv", "rows")
    again = services.upload(with_key(account, "k-1"), ROWS, "rows.jsonl", "rows")
    assert "'k-1' was used for another request" in await refused(again)


async def test_an_upload_sent_again_is_the_same_dataset(services: Services) -> None:
    account = services.account()
    keyed = with_key(account, "k-1")
    first, again = [await services.upload(keyed, ROWS) for _ in range(2)]
    assert first == again
    at_once = await asyncio.gather(*(services.upload(with_key(account, "k-2"), ROWS) for _ in range(4)))
    assert len({dataset.id for dataset in at_once}) == 1
    for text, name in ((ROWS + "q,a\n", "rows.csv"), (ROWS, "other.csv")):
        assert "was used for another request" in await refused(services.upload(keyed, text, name))
    listed = dataset_service_pb2.ListDatasetsRequest()
    assert len((await services.datasets.ListDatasets(listed, metadata=account)).data) == 2
    # A deleted dataset's key is free.
    request = dataset_service_pb2.DeleteDatasetRequest(dataset_id=first.id)
    await services.datasets.DeleteDataset(request, metadata=account)
    assert (await services.upload(keyed, ROWS)).id != first.id


@pytest.mark.parametrize("key", ["", "k" * 256])
async def test_a_key_of_another_form_is_refused(services: Services, key: str) -> None:
    account = services.account()
    keyed = with_key(account, key)
    assert "`Idempotency-Key` must be 1 to 255" in await refused(services.upload(keyed, ROWS))
    request = job_on(await services.upload(account, ROWS), hyperparameters=job_pb2.Hyperparameters())
    assert "`Idempotency-Key` must be" in await refused(services.jobs.CreateJob(request, metadata=keyed))
