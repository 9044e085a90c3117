"""What two that act at the same time on one job make of it."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from minio.error import MinioException
from sqlalchemy.ext.asyncio import AsyncConnection

from job_svc.change_feed import ChangeFeed
from job_svc.credits import Price
from job_svc.job_state import JobStatus
from job_svc.lease_queue import LeaseQueue
from job_svc.sweeper import Sweeper
from job_svc.tables import jobs
from svc_kit.database import Database, utc_now
from svc_kit.errors import LeaseLost

from .conftest import insert_job, stored_job


@pytest.fixture
def queue(database: Database) -> LeaseQueue:
    return LeaseQueue(database, ChangeFeed(database), Price(0), 15.0, 3, None)


def store_of(listed: Callable[[str], Awaitable[list[Any]]]) -> Any:
    return Mock(list=listed, delete_all=AsyncMock(), abort_uploads=AsyncMock())


async def test_a_sweep_asked_for_during_one_is_done_again(database: Database, queue: LeaseQueue) -> None:
    """A trainer stores something behind the sweep's back, and only then says that its run has stopped."""
    await insert_job(database, "job-a", JobStatus.CANCELLED, lease_token="lease-a")
    stored: list[Any] = []

    async def listed(_prefix: str) -> list[Any]:
        found = list(stored)
        if not stored:
            stored.append(SimpleNamespace(key="late"))
            await queue.hand_back("job-a", "lease-a", "the run was stopped")
        return found

    store = store_of(listed)
    sweeper = Sweeper(database, ChangeFeed(database), store)
    await sweeper.sweep_now("job-a")
    assert not (await stored_job(database, "job-a")).swept
    await sweeper.sweep_now("job-a")
    assert (await stored_job(database, "job-a")).swept
    [*_, last] = store.delete_all.call_args_list
    assert list(last.args[0]) == ["late"]


async def test_a_job_that_cant_be_swept_keeps_none_from_it(database: Database) -> None:
    for job_id in ("job-a", "job-b"):
        await insert_job(database, job_id, JobStatus.CANCELLED)

    async def listed(prefix: str) -> list[Any]:
        if "job-a" in prefix:
            raise MinioException("locked")
        return []

    sweeper = Sweeper(database, ChangeFeed(database), store_of(listed))
    for due in await sweeper._due():
        await sweeper._try_to_sweep(due)
    assert not (await stored_job(database, "job-a")).swept
    assert (await stored_job(database, "job-b")).swept


async def test_a_lease_renewed_while_lapsed_ones_are_looked_for_stays(
    database: Database, queue: LeaseQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = utc_now()
    lapsed = {"lease_expires_at": now - dt.timedelta(seconds=1), "attempts": 1}
    for name in ("renewed", "lost"):
        values = lapsed | {"lease_token": f"lease-{name}", "leased_by": name}
        await insert_job(database, name, JobStatus.RUNNING, **values)
    read = database.read

    @asynccontextmanager
    async def read_and_renew() -> AsyncIterator[AsyncConnection]:
        async with read() as connection:
            yield connection
        await queue.renew("renewed", "lease-renewed")

    monkeypatch.setattr(database, "read", read_and_renew)
    await queue._requeue(jobs.c.lease_expires_at < now, "the trainer was lost")
    monkeypatch.undo()
    await queue.renew("renewed", "lease-renewed")
    with pytest.raises(LeaseLost):
        await queue.renew("lost", "lease-lost")
    assert (await stored_job(database, "lost")).faults == 1


async def test_leases_from_before_the_clock_was_set_back_are_lost_too(database: Database) -> None:
    """Of a trainer that is gone; any other would have renewed its lease."""
    queue = LeaseQueue(database, ChangeFeed(database), Price(0), 0.2, 3, None)
    for job_id, hours in (("job-a", 1), ("job-b", -1)):
        expires_at = utc_now() + dt.timedelta(hours=hours)
        lease = {"leased_by": "trainer", "lease_token": f"lease-{job_id}", "lease_expires_at": expires_at}
        await insert_job(database, job_id, JobStatus.RUNNING, started_at=utc_now(), attempts=1, **lease)
    reaping = asyncio.create_task(queue.reap())
    try:
        async with asyncio.timeout(20):
            for job_id in ("job-a", "job-b"):
                while (await stored_job(database, job_id)).status != "queued":  # noqa: ASYNC110  # no event
                    await asyncio.sleep(0.02)
    finally:
        reaping.cancel()
        await asyncio.wait([reaping])
