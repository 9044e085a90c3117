"""Two job_svc on one PostgreSQL: what one writes, a follower of the other sees at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from svc_kit.ids import new_id
from tunery.job.v1 import job_service_pb2
from tunery.ports import free_ports
from tunery.trainer.v1 import worker_service_pb2 as worker_pb2

from .conftest import Services, running
from .test_worker_protocol import end, event, lease_of, report

# The log stream looks again every 2 seconds by itself; a notice from the other replica is far faster.
SEEN_SECONDS = 0.5


@pytest.fixture
def second(services: Services, tmp_path: Path) -> Iterator[Services]:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    with running("job_svc", address, services.environment, tmp_path / "job_svc.log"):
        yield replace(services, job_address=address)


@pytest.mark.parametrize("service_processes", ["postgresql"], indirect=True)  # replicas are for PostgreSQL
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
