"""Many followers of one log, who come and go while it is written."""

from __future__ import annotations

import asyncio

from svc_kit.ids import new_id
from tunery.job.v1 import job_service_pb2
from tunery.trainer.v1 import worker_service_pb2 as worker_pb2

from .conftest import Services
from .test_worker_protocol import end, event, lease_of, report, whole_log

NUM_LINES = 600  # more than a page


async def test_each_follower_gets_each_line_once(services: Services) -> None:
    account = services.account()
    job = await services.new_job(account)
    lease = await lease_of(services, job, new_id("trainer"))
    first = lease.next_seq
    last = first + NUM_LINES  # the line that ends the log

    async def follow(after_seq: int, num_lines: int | None = None) -> list[int]:
        request = job_service_pb2.TailLogsRequest(job_id=job.id, after_seq=after_seq)
        call = services.jobs.TailLogs(request, metadata=account)
        seen = []
        async for record in call:
            seen.append(record.seq)
            if len(seen) == num_lines:
                call.cancel()
                break
        return seen

    followers = []
    for seq in range(first, last, 20):
        await report(services, lease, *(event(number) for number in range(seq, seq + 20)))
        followers.append((0, asyncio.create_task(follow(0))))
        followers.append((seq, asyncio.create_task(follow(seq))))
        followers.append((last + 5, asyncio.create_task(follow(last + 5))))
        assert len(await follow(max(0, seq - 30), 5)) == 5  # leaves early
    await end(services, lease, failed=worker_pb2.Failed(message="done", fault="job"))
    assert await follow(2**63 - 1) == []  # the largest that a client can name
    for after_seq, follower in followers:
        assert await follower == list(range(after_seq + 1, last + 1))
    assert [record.seq for record in await whole_log(services, account, job)] == list(range(1, last + 1))
