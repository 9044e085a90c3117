"""How many logs an account may follow at a time."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from job_svc.settings import JobSettings
from tunery.job.v1 import fine_tuning_service_pb2, job_service_pb2

from .conftest import Metadata, Services

LIMIT = JobSettings.model_fields["max_open_tails"].default


@pytest.mark.parametrize("service_processes", ["sqlite"], indirect=True)
async def test_an_account_follows_a_limited_number_of_logs(services: Services) -> None:
    account, other = services.account(), services.account()
    job = await services.new_job(account)
    request = job_service_pb2.TailLogsRequest(job_id=job.id)
    tails = [services.jobs.TailLogs(request, metadata=account) for _ in range(LIMIT)]
    await asyncio.gather(*(tail.read() for tail in tails))

    for refused in (
        services.jobs.TailLogs(request, metadata=account),
        services.jobs.StreamMetrics(
            job_service_pb2.StreamMetricsRequest(job_id=job.id, stored_only=True), metadata=account
        ),
        services.fine_tuning.TailJob(fine_tuning_service_pb2.TailJobRequest(job_id=job.id), metadata=account),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await refused.read()
        assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert f"{LIMIT} logs" in (raised.value.details() or "")
    others_job = await services.new_job(other)
    others = services.jobs.TailLogs(job_service_pb2.TailLogsRequest(job_id=others_job.id), metadata=other)
    assert (await others.read()).seq == 1

    tails.pop().cancel()

    async with asyncio.timeout(10):
        while not await opens(services, request, account):  # noqa: ASYNC110  # another process's state
            await asyncio.sleep(0.02)
    for tail in (*tails, others):
        tail.cancel()
    for each, owner in ((job, account), (others_job, other)):
        await services.jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=each.id), metadata=owner)


async def opens(services: Services, request: job_service_pb2.TailLogsRequest, account: Metadata) -> bool:
    """Whether one more log can be followed."""
    call = services.jobs.TailLogs(request, metadata=account)
    try:
        await call.read()
    except grpc.aio.AioRpcError:
        return False
    finally:
        call.cancel()
    return True
