"""What one account may have at once; over it, calls are refused with the limit and the cure."""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import grpc
import pytest

from svc_kit.ids import new_id
from tunery.dataset.v1 import dataset_service_pb2
from tunery.job.v1 import job_service_pb2

from .conftest import Metadata, Services, own_services
from .test_turns import new_jobs

ROWS = "question,answer\nq,a\n"


async def refused(call: Awaitable[Any]) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    return raised.value.details() or ""


@pytest.fixture
async def limited(service_processes: Services, tmp_path: Path) -> Any:
    """Services with small limits."""
    limits = {
        "TUNERY_MAX_LIVE_JOBS": "3",
        "TUNERY_MAX_RUNNING_JOBS": "1",
        "TUNERY_MAX_DATASETS": "2",
        "TUNERY_MAX_DATASET_BYTES": "100",
    }
    services = own_services(service_processes, **limits)
    with services.running("dataset_svc", tmp_path), services.running("job_svc", tmp_path):
        yield services
        await services.close()


@pytest.mark.parametrize("service_processes", ["sqlite"], indirect=True)
async def test_limits_of_an_account(limited: Services) -> None:
    account, other = limited.account(), limited.account()
    await at_most_three_live_jobs(limited, account, other)
    await at_most_one_job_runs(limited, account, other)
    await at_most_two_datasets_of_100_bytes(limited)


async def at_most_three_live_jobs(limited: Services, account: Metadata, other: Metadata) -> None:
    made = await new_jobs(limited, account, 0, 0, 0)
    message = await refused(new_jobs(limited, account, 0))
    assert message == (
        "The account has 3 jobs waiting or running, and 3 is the limit; wait for one to end, or cancel one."
    )
    # One that ends makes room.
    cancel = job_service_pb2.CancelJobRequest(job_id=made[0])
    await limited.jobs.CancelJob(cancel, metadata=account)
    datasets = (
        await limited.datasets.ListDatasets(dataset_service_pb2.ListDatasetsRequest(), metadata=account)
    ).data
    request = job_service_pb2.CreateJobRequest(
        base_model="tunery-tiny", dataset_id=datasets[0].id, task_type="qa"
    )
    await limited.jobs.CreateJob(request, metadata=account)
    await new_jobs(limited, other, 0)


async def at_most_one_job_runs(limited: Services, account: Metadata, other: Metadata) -> None:
    first, second = [await limited.lease(new_id("trainer")) for _ in range(2)]
    assert first is not None
    assert second is not None
    # Each account has one running, and only the first has more in the queue: nobody gets those for now.
    assert await limited.lease(new_id("trainer"), wait_seconds=0.5) is None


async def at_most_two_datasets_of_100_bytes(limited: Services) -> None:
    account = limited.account()
    small = await limited.upload(account, ROWS)
    message = await refused(limited.upload(account, ROWS + "q,a\n" * 25))
    assert "over the limit of 100; delete some" in message
    keyed = (*account, ("idempotency-key", "k"))
    last = await limited.upload(keyed, ROWS)
    assert "has 2 datasets, and 2 is the limit" in await refused(limited.upload(account, ROWS))
    # The last one's answer may have been lost.
    assert (await limited.upload(keyed, ROWS)).id == last.id
    delete = dataset_service_pb2.DeleteDatasetRequest(dataset_id=small.id)
    await limited.datasets.DeleteDataset(delete, metadata=account)
    await limited.upload(account, ROWS)
