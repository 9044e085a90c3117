"""Whose data is validated next, and what becomes of jobs whose validation fails or comes too late."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator
from typing import Any, cast
from unittest.mock import AsyncMock, Mock

import pytest

from job_svc.change_feed import ChangeFeed, job_topic
from job_svc.credits import Price
from job_svc.job_data_client import JobDataClient
from job_svc.job_state import JobStatus
from job_svc.tables import jobs
from job_svc.validation import Validator
from svc_kit.database import Database, utc_now
from svc_kit.errors import InvalidRequest
from tunery.dataset.v1 import job_data_service_pb2 as data_pb2

from .conftest import insert_job, stored_job


class UnreadableData:
    """Stands for a dataset_svc whose answers nobody foresaw."""

    def __init__(self) -> None:
        self.asked_for: set[str] = set()

    async def prepare(self, request: data_pb2.PrepareJobDataRequest) -> Any:
        self.asked_for.add(request.job_id)
        raise TypeError("no number")


async def test_an_unforeseen_failure_is_tried_again_and_then_ends_the_job(database: Database) -> None:
    data, now = UnreadableData(), utc_now()
    await insert_job(database, "new", JobStatus.VALIDATION)
    # Its stack may have been down for hours.
    await insert_job(database, "old", JobStatus.VALIDATION, created_at=now - dt.timedelta(hours=5))
    failing_since = now - dt.timedelta(minutes=31)
    await insert_job(database, "hopeless", JobStatus.VALIDATION, failing_since=failing_since)
    feed = ChangeFeed(database)
    working = asyncio.create_task(Validator(database, feed, cast(JobDataClient, data), Price(0)).run())
    try:
        with feed.subscribe(job_topic("hopeless")) as changes:
            await changes.wait(20)
        assert data.asked_for == {"new", "old", "hopeless"}
        assert await outcome(database, "new") == ("validation", None, None)
        assert await outcome(database, "old") == ("validation", None, None)
        message = "The service failed to check the job's data."
        assert await outcome(database, "hopeless") == ("failed", "platform", message)
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


async def test_a_validator_ends_though_a_job_was_cancelled_just_then(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_claimed = False

    async def claim() -> Any:
        nonlocal is_claimed
        if is_claimed:
            return None
        is_claimed = True
        return Mock(request_id=None, id="job-a")

    is_unwinding, is_released = asyncio.Event(), asyncio.Event()

    async def validate(_: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            is_unwinding.set()
            await is_released.wait()

    validator = Validator(database, ChangeFeed(database), Mock(), Price(0))
    monkeypatch.setattr(validator, "_claim", claim)
    monkeypatch.setattr(validator, "_validate", validate)
    monkeypatch.setattr(
        validator, "_keep_claim", AsyncMock()
    )  # returns: the job is not in validation any more

    working = asyncio.create_task(validator.run())
    await is_unwinding.wait()
    working.cancel()
    await asyncio.sleep(0)
    is_released.set()

    done, _ = await asyncio.wait([working], timeout=2)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    assert done


async def outcome(database: Database, job_id: str) -> tuple[str, str | None, str | None]:
    """A job's state, fault and error."""
    row = await stored_job(database, job_id)
    return row.status, row.fault, row.error


class Data:
    """Stands for a dataset_svc that answers when it is told to."""

    def __init__(self) -> None:
        self.asked_for: list[str] = []
        self.may_answer = asyncio.Event()

    async def prepare(self, request: data_pb2.PrepareJobDataRequest) -> Any:
        self.asked_for.append(request.job_id)
        if request.job_id.startswith("slow"):
            await self.may_answer.wait()
        return InvalidRequest("no rows")

    async def wait_for(self, number: int) -> None:
        async with asyncio.timeout(20):
            while len(self.asked_for) < number:  # noqa: ASYNC110  # in the database's time
                await asyncio.sleep(0.01)


@pytest.fixture
async def data(database: Database) -> AsyncIterator[Data]:
    """Asked by a validator that runs; jobs inserted before the first wait are all there when it starts."""
    data = Data()
    validator = Validator(database, ChangeFeed(database), cast(JobDataClient, data), Price(0))
    working = asyncio.create_task(validator.run())
    yield data
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)


async def insert_jobs(database: Database, account_id: str, *job_ids: str, **values: Any) -> None:
    for job_id in job_ids:
        await insert_job(database, job_id, JobStatus.VALIDATION, account_id=account_id, **values)


async def test_slow_data_of_an_account_keeps_no_other_waiting(database: Database, data: Data) -> None:
    await insert_jobs(database, "a", "slow-1", "slow-2", "slow-3")
    await data.wait_for(1)
    await insert_jobs(database, "b", "b-1", "b-2")

    await data.wait_for(3)

    assert data.asked_for == ["slow-1", "b-1", "b-2"]
    data.may_answer.set()
    await data.wait_for(5)


async def test_accounts_take_turns(database: Database) -> None:
    await insert_jobs(database, "a", *(f"a-{number}" for number in range(20)))
    await insert_jobs(database, "b", "b-1", "b-2")
    validator = Validator(database, ChangeFeed(database), Mock(), Price(0))

    claimed = []
    for _ in range(5):
        job = await validator._claim()
        assert job is not None
        claimed.append(job.id)
        await validator._fail(job, "no rows", "job", None)

    assert claimed == ["a-0", "b-1", "a-1", "b-2", "a-2"]


async def test_an_account_had_its_turn_though_others_were_asked_for_meanwhile(database: Database) -> None:
    for account_id in ("a", "b", "c"):
        await insert_jobs(database, account_id, *(f"{account_id}-{number}" for number in range(3)))
    validator = Validator(database, ChangeFeed(database), Mock(), Price(0))

    under_way, claimed = [], []
    for _ in range(9):
        job = await validator._claim()
        assert job is not None
        claimed.append(job.id)
        under_way.append(job)
        if len(under_way) == 2:
            await validator._fail(under_way.pop(0), "no rows", "job", None)

    assert claimed == [f"{account_id}-{number}" for number in range(3) for account_id in ("a", "b", "c")]


@pytest.mark.parametrize(
    ("claimed_before_minutes", "is_forgotten"), [(0.1, False), (9, False), (11, True), (-60, False)]
)
async def test_failures_from_before_a_long_stop_count_no_more(
    database: Database, claimed_before_minutes: float, is_forgotten: bool
) -> None:
    """And a claim from before the clock was set back keeps nobody waiting."""
    now = utc_now()
    await insert_job(
        database, "job-a", JobStatus.VALIDATION,
        failing_since=now - dt.timedelta(hours=2),
        claimed_until=now - dt.timedelta(minutes=claimed_before_minutes),
    )  # fmt: skip
    validator = Validator(database, ChangeFeed(database), Mock(), Price(0))

    job = await validator._claim()

    assert job is not None
    assert (job.failing_since is None) == is_forgotten
    assert await validator._claim() is None


async def test_data_that_comes_after_its_jobs_end_is_swept(database: Database, data: Data) -> None:
    """The job was cancelled by another replica, and swept, while this one stood still."""
    await insert_jobs(database, "a", "slow-1")
    await data.wait_for(1)
    async with database.write() as connection:
        ended = {"status": JobStatus.CANCELLED, "swept": True, "claimed_until": None}
        await connection.execute(jobs.update().values(ended))

    data.may_answer.set()

    async with asyncio.timeout(20):
        while (await stored_job(database, "slow-1")).swept:  # noqa: ASYNC110  # in the database's time
            await asyncio.sleep(0.01)
