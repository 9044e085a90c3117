"""What becomes of a job whose validation fails in a way that nobody foresaw."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import Any, cast
from unittest.mock import AsyncMock, Mock

import pytest

from job_svc.change_feed import ChangeFeed, job_topic
from job_svc.credits import Price
from job_svc.job_data_client import JobDataClient
from job_svc.job_state import JobStatus
from job_svc.validation import Validator
from svc_kit.database import Database, utc_now
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
