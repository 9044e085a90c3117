"""Two dataset_svc and two job_svc on one PostgreSQL: what one did, the other sees and goes on with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import grpc
import pytest

from svc_kit.ids import new_id
from tunery.dataset.v1 import dataset_service_pb2
from tunery.job.v1 import fine_tuning_service_pb2, job_service_pb2
from tunery.ports import free_ports
from tunery.trainer.v1 import worker_service_pb2 as worker_pb2

from .conftest import Services, running
from .test_worker_protocol import details, end, event, get, lease_of, refused, report, whole_log

pytestmark = pytest.mark.parametrize("service_processes", ["postgresql"], indirect=True)
# The log stream looks again every 2 seconds by itself; a notice from the other replica is far faster.
SEEN_SECONDS = 0.5


@pytest.fixture(scope="module")
def second_processes(
    service_processes: Services, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Services]:
    folder = tmp_path_factory.mktemp("second")
    dataset, job = (f"127.0.0.1:{port}" for port in free_ports(2))
    environment = service_processes.environment
    with (
        running("dataset_svc", dataset, environment, folder / "dataset_svc.log"),
        running("job_svc", job, environment, folder / "job_svc.log"),
    ):
        yield replace(service_processes, dataset_address=dataset, job_address=job, channels={})


@pytest.fixture
async def second(second_processes: Services) -> AsyncIterator[Services]:
    yield second_processes
    for channel in second_processes.channels.values():
        await channel.close()
    second_processes.channels.clear()


async def test_a_line_written_through_one_is_followed_through_another(
    services: Services, second: Services
) -> None:
    account = services.account()
    job = await services.new_job(account)
    lease = await lease_of(second, job, new_id("trainer"))
    follower = services.jobs.TailLogs(
        job_service_pb2.TailLogsRequest(job_id=job.id, after_seq=lease.next_seq - 1), metadata=account
    )
    waits = []
    for seq in range(lease.next_seq, lease.next_seq + 8):
        reading = asyncio.ensure_future(follower.read())
        await report(second, lease, event(seq))
        start = time.monotonic()
        assert (await reading).seq == seq
        waits.append(time.monotonic() - start)
    await end(services, lease, failed=worker_pb2.Failed(message="done", fault="job"))
    assert sorted(waits)[len(waits) // 2] < SEEN_SECONDS


async def test_a_trainer_may_wait_at_one_for_a_job_made_at_another(
    services: Services, second: Services
) -> None:
    account = services.account()
    waiting = asyncio.create_task(second.lease(new_id("trainer"), wait_seconds=20))
    job = await services.new_job(account)
    lease = await waiting
    assert lease is not None
    assert lease.job_id == job.id
    await end(services, lease, failed=worker_pb2.Failed(message="done", fault="job"))
    assert (await get(second, account, job)).status == "failed"


async def test_what_one_did_another_goes_on_with(services: Services, second: Services) -> None:
    account = services.account()
    dataset = await services.upload(account, "question,answer\n" + "a,b\n" * 10)
    listing = dataset_service_pb2.ListDatasetsRequest()
    listed = await second.datasets.ListDatasets(listing, metadata=account)
    assert [each.id for each in listed.data] == [dataset.id]
    create = job_service_pb2.CreateJobRequest(base_model="tunery-tiny", dataset_id=dataset.id, task_type="qa")
    job = await second.jobs.CreateJob(create, metadata=account)
    delete = dataset_service_pb2.DeleteDatasetRequest(dataset_id=dataset.id)
    in_use = second.datasets.DeleteDataset(delete, metadata=account)
    assert job.id in await refused(in_use, grpc.StatusCode.ABORTED)
    request = fine_tuning_service_pb2.GetJobStatusRequest(job_id=job.id)
    status = await services.fine_tuning.GetJobStatus(request, metadata=account)
    assert status.job_id == job.id
    cancel = job_service_pb2.CancelJobRequest(job_id=job.id)
    assert (await services.jobs.CancelJob(cancel, metadata=account)).status == "cancelled"
    assert (await details(second, account, job)).job.status == "cancelled"
    assert await whole_log(second, account, job) == await whole_log(services, account, job)
    await second.datasets.DeleteDataset(delete, metadata=account)
    assert not (await services.datasets.ListDatasets(listing, metadata=account)).data
