"""Removes what ended jobs leave in the store and nothing refers to any more.

One rule serves every case (a cancelled job's checkpoints, a lost attempt's half-written files, the copy
of the data, a deleted model): of an ended job's objects those stay that a row names, the others go.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
import structlog
from minio.error import MinioException
from urllib3.exceptions import HTTPError

from job_svc.change_feed import SWEEP, ChangeFeed
from job_svc.job_state import ENDED
from job_svc.tables import checkpoints, jobs, models
from svc_kit.database import DATABASE_AWAY, Database, utc_now
from svc_kit.object_store import ObjectStore, account_prefix

log = structlog.get_logger(__name__)

_POLL_SECONDS = 10.0
_PAGE = 50


def job_prefix(account_id: str, job_id: str) -> str:
    """Returns the beginning of the keys of everything that a job stores."""
    return f"{account_prefix(account_id)}jobs/{job_id}/"


def attempt_prefix(job: sa.Row[Any]) -> str:
    """Returns the beginning of the keys of everything that a job's attempt under way may store."""
    return f"{job_prefix(job.account_id, job.id)}attempt-{job.attempts}/"


# What an update of a job sets to have it swept, even if a sweep is under way.
SWEEP_AGAIN = {"swept": False, "sweeps_asked_for": jobs.c.sweeps_asked_for + 1}


class Sweeper:
    """Sweeps ended jobs. Repeatable, and safe in several replicas."""

    def __init__(self, database: Database, feed: ChangeFeed, store: ObjectStore) -> None:
        self._database = database
        self._feed = feed
        self._store = store

    async def run(self) -> None:
        """Sweeps what is due until cancelled."""
        with self._feed.subscribe(SWEEP) as changes:
            while True:
                changes.clear()
                try:
                    for job in await self._due():
                        await self._try_to_sweep(job)
                except DATABASE_AWAY as error:
                    log.warning("the sweep was interrupted; it is tried again", cause=str(error))
                await changes.wait(_POLL_SECONDS)

    async def sweep_now(self, job_id: str) -> None:
        """Sweeps one job if it is due; where the store can't be reached, `run` does it later."""
        try:
            for job in await self._due(job_id):
                await self._try_to_sweep(job)
        except DATABASE_AWAY as error:
            log.warning("the sweep was interrupted; it is tried again", cause=str(error))

    async def _try_to_sweep(self, job: sa.Row[Any]) -> None:
        """Sweeps a job. One whose objects can't be removed must not keep others from it."""
        try:
            await self._sweep(job)
        except (MinioException, HTTPError) as error:
            log.warning("a job can't be swept for now", job_id=job.id, cause=str(error))

    async def _due(self, job_id: str | None = None) -> list[sa.Row[Any]]:
        """Returns ended jobs to sweep: only those that no trainer and no validation can still write to."""
        now = utc_now()
        nobody_writes = sa.and_(
            sa.or_(jobs.c.lease_expires_at.is_(None), jobs.c.lease_expires_at < now),
            sa.or_(jobs.c.claimed_until.is_(None), jobs.c.claimed_until < now),
        )
        query = jobs.select().where(jobs.c.status.in_(sorted(ENDED)), ~jobs.c.swept, nobody_writes)
        if job_id is not None:
            query = query.where(jobs.c.id == job_id)
        # Not by the number itself: PostgreSQL would go through all jobs in that order to find the few due.
        query = query.order_by(jobs.c.number + 0).limit(_PAGE)
        async with self._database.read() as connection:
            return list(await connection.execute(query))

    async def _sweep(self, job: sa.Row[Any]) -> None:
        kept_checkpoints = sa.select(checkpoints.c.object_prefix).where(checkpoints.c.job_id == job.id)
        kept_models = sa.select(models.c.object_prefix).where(
            models.c.job_id == job.id, models.c.status == "available"
        )
        async with self._database.read() as connection:
            kept = [*(await connection.scalars(kept_checkpoints)), *(await connection.scalars(kept_models))]
        kept += [key for key in (job.error_report_key, job.wandb_prefix) if key]
        stored = await self._store.list(job_prefix(job.account_id, job.id))
        await self._store.delete_all(item.key for item in stored if not item.key.startswith(tuple(kept)))
        await self._store.abort_uploads(job_prefix(job.account_id, job.id))
        # Asked for again meanwhile, it is done again: something may be stored, or no longer named, since.
        is_done = sa.and_(jobs.c.id == job.id, jobs.c.sweeps_asked_for == job.sweeps_asked_for)
        async with self._database.write() as connection:
            await connection.execute(jobs.update().where(is_done).values(swept=True))
