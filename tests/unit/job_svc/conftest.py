"""A database of job_svc's, and jobs in it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import job_svc
from job_svc.job_state import JobStatus
from job_svc.tables import jobs, metadata
from svc_kit.database import Database, migrate, utc_now


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    """An empty one."""
    url = f"sqlite+aiosqlite:///{tmp_path}/jobs.sqlite"
    migrate(url, Path(next(iter(job_svc.__path__))) / "migrations", metadata)
    database = Database(url)
    yield database
    await database.close()


async def insert_job(database: Database, job_id: str, status: JobStatus, **values: Any) -> None:
    """Puts a job into the table as it is, past all that a job goes through."""
    usual = {
        "id": job_id,
        "account_id": "acct",
        "status": status,
        "base_model": "tunery-tiny",
        "hyperparameters": {},
        "input_config": {},
        "run": {"seed": 0},
        "training_uri": "dataset://ds",
        "created_at": utc_now(),
        "next_seq": 2,
    }
    async with database.write() as connection:
        await connection.execute(jobs.insert().values(usual | values))


async def stored_job(database: Database, job_id: str) -> Any:
    """Returns a job's row."""
    async with database.read() as connection:
        return (await connection.execute(jobs.select().where(jobs.c.id == job_id))).one()
