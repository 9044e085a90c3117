"""What becomes of a job whose validation fails in a way that nobody foresaw."""

from __future__ import annotations

import asyncio
import datetime as dt
from pathlib import Path
from typing import Any, cast

import job_svc
from job_svc.change_feed import ChangeFeed, job_topic
from job_svc.credits import Price
from job_svc.job_data_client import JobDataClient
from job_svc.job_state import JobStatus
from job_svc.tables import jobs, metadata
from job_svc.validation import Validator
from svc_kit.database import Database, migrate, utc_now
from tunery.dataset.v1 import job_data_service_pb2 as data_pb2


class UnreadableData:
    """Stands for a dataset_svc whose answers nobody foresaw."""

    def __init__(self) -> None:
        self.asked_for: set[str] = set()

    async def prepare(self, request: data_pb2.PrepareJobDataRequest) -> Any:
        self.asked_for.add(request.job_id)
        raise TypeError("no number")


async def test_an_unforeseen_failure_is_tried_again_and_then_ends_the_job(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path}/jobs.sqlite"
    migrate(url, Path(job_svc.__file__).with_name("migrations"), metadata)
    database, data = Database(url), UnreadableData()
    await insert_job(database, "new", utc_now())
    # Its stack may have been down for hours.
    await insert_job(database, "old", utc_now() - dt.timedelta(hours=5))
    await insert_job(database, "hopeless", utc_now(), failing_since=utc_now() - dt.timedelta(minutes=31))
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
        await database.close()


async def insert_job(
    database: Database, job_id: str, created_at: dt.datetime, failing_since: dt.datetime | None = None
) -> None:
    values = {
        "id": job_id,
        "account_id": "acct",
        "status": JobStatus.VALIDATION,
        "base_model": "tunery-tiny",
        "hyperparameters": {},
        "input_config": {},
        "run": {"seed": 0},
        "training_uri": "dataset://ds",
        "created_at": created_at,
        "failing_since": failing_since,
        "next_seq": 2,
    }
    async with database.write() as connection:
        await connection.execute(jobs.insert().values(values))


async def outcome(database: Database, job_id: str) -> tuple[str, str | None, str | None]:
    """A job's state, fault and error."""
    async with database.read() as connection:
        row = (await connection.execute(jobs.select().where(jobs.c.id == job_id))).one()
    return row.status, row.fault, row.error
