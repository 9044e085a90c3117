"""The life of a job: its states, and the one function that changes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from job_svc.tables import events, jobs, models
from svc_kit.database import utc_now


class JobStatus(StrEnum):
    """Each state with its successors."""

    VALIDATION = "validation"  # -> queued, failed, cancelled
    QUEUED = "queued"  # -> running, cancelled
    RUNNING = "running"  # -> completed, failed, cancelled; queued again when its trainer is lost
    COMPLETED = "completed"  # the end
    FAILED = "failed"  # the end
    CANCELLED = "cancelled"  # the end


SUCCESSORS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.VALIDATION: frozenset({JobStatus.QUEUED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.CANCELLED}),
    JobStatus.RUNNING: frozenset(
        {JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.QUEUED}
    ),
    JobStatus.COMPLETED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}
ENDED = frozenset(status for status, after in SUCCESSORS.items() if not after)
LIVE = frozenset(JobStatus) - ENDED
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


async def move(
    connection: AsyncConnection,
    job_id: str,
    expected: Sequence[JobStatus],
    to: JobStatus,
    line: str,
    *,
    under_lease: str | None = None,
    **values: Any,
) -> sa.Row[Any] | None:
    """Changes a job's state and writes the change to its log, in the caller's transaction.

    Args:
        expected: the states that the job may be in; each must have `to` as a successor.
        line: what the log says of it. It is the log's last line when `to` is an end.
        under_lease: the token of the lease that the job must be under, where the caller holds one.
        values: further columns to set.

    Returns:
        The job's row after the change, or None when it was in none of the expected states (or under
        another lease): then nothing was changed.
    """
    assert all(to in SUCCESSORS[status] for status in expected), f"{expected} -> {to} is no transition"
    now = utc_now()
    if to is not JobStatus.RUNNING:
        values.update(remaining_seconds=None, estimated_finish=None)
    if to in ENDED:
        values.update(ended_at=now)
    elif to is not JobStatus.RUNNING:
        values.update(leased_by=None, lease_token=None, lease_expires_at=None)
    condition = sa.and_(jobs.c.id == job_id, jobs.c.status.in_(expected))
    if under_lease is not None:
        condition = sa.and_(condition, jobs.c.lease_token == under_lease)
    update = jobs.update().where(condition).values(status=to, next_seq=jobs.c.next_seq + 1, **values)
    row = (await connection.execute(update.returning(*jobs.c))).one_or_none()
    if row is None:
        return None
    if to is not JobStatus.COMPLETED:
        # A model that was being checked comes to nothing with its attempt.
        await connection.execute(
            models.delete().where(models.c.job_id == job_id, models.c.status == "deploying")
        )
    await connection.execute(
        events.insert().values(
            job_id=job_id,
            seq=row.next_seq - 1,
            time=now,
            kind="end" if to in ENDED else "log",
            message=one_line(line),
        )
    )
    return row


async def write_line(connection: AsyncConnection, job_id: str, line: str) -> None:
    """Adds a line to the log of a job that no trainer holds, in the caller's transaction."""
    update = jobs.update().where(jobs.c.id == job_id).values(next_seq=jobs.c.next_seq + 1)
    next_seq = (await connection.execute(update.returning(jobs.c.next_seq))).scalar_one()
    await connection.execute(
        events.insert().values(
            job_id=job_id, seq=next_seq - 1, time=utc_now(), kind="log", message=one_line(line)
        )
    )


def one_line(text: str) -> str:
    """Returns a text as it may stand in a log, whose lines repeat what users wrote: control characters, line
    ends among them, as their escapes."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
