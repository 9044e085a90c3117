"""The state `validation`: a job's data is copied and checked before the job is queued."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from job_svc import credits, estimates
from job_svc.change_feed import QUEUE, SWEEP, VALIDATION, ChangeFeed, job_topic
from job_svc.job_data_client import JobDataClient
from job_svc.job_state import ENDED, JobStatus, move, write_line
from job_svc.jobs import planned_tokens
from job_svc.sweeper import SWEEP_AGAIN
from job_svc.tables import jobs
from svc_kit.database import DATABASE_AWAY, Database, UtcTime, utc_now
from svc_kit.errors import InsufficientCredits, TuneryError
from svc_kit.log import working_for
from tunery.dataset.v1 import job_data_service_pb2 as data_pb2

log = structlog.get_logger(__name__)

CONCURRENT_VALIDATIONS = 2
_CLAIM = dt.timedelta(seconds=15)
# Nobody has tried for so long: the stack was down, and what failed before it counts no more.
_FORGOTTEN_AFTER = dt.timedelta(minutes=10)
_RENEW_SECONDS = 2.0
_POLL_SECONDS = 2.0
_TURNS_KEPT = 10_000
_RETRY_SECONDS = 2.0
_GIVE_UP_AFTER = dt.timedelta(minutes=30)


class Validator:
    """Takes jobs in `validation` one by one. Any number of replicas may run; a claim keeps them apart.

    Accounts take turns, and of each there is one job at a time: neither many jobs nor slow data of one keep
    those of others waiting.
    """

    def __init__(
        self,
        database: Database,
        feed: ChangeFeed,
        job_data: JobDataClient,
        price: credits.Price,
    ) -> None:
        self._database = database
        self._feed = feed
        self._job_data = job_data
        self._price = price
        self._last_turns: dict[str, float] = {}

    async def run(self) -> None:
        """Works until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(CONCURRENT_VALIDATIONS):
                group.create_task(self._work())

    async def _work(self) -> None:
        with self._feed.subscribe(VALIDATION) as changes:
            while True:
                changes.clear()
                try:
                    job = await self._claim()
                    if job is None:
                        await changes.wait(_POLL_SECONDS)
                    else:
                        with working_for(job.request_id, job.id):
                            await self._validate_claimed(job)
                except Exception:
                    # The worker must outlive whatever one job does to it; the claim lapses by itself.
                    log.exception("validation was interrupted")
                    await asyncio.sleep(_RETRY_SECONDS)

    async def _claim(self) -> sa.Row[Any] | None:
        now = utc_now()
        in_validation = jobs.c.status == JobStatus.VALIDATION
        # A claim of a time that none can have yet was made before the clock was set back.
        is_claimed = jobs.c.claimed_until.between(now, now + 2 * _CLAIM)
        busy = sa.select(jobs.c.account_id).where(in_validation, is_claimed)
        waiting = sa.select(jobs.c.account_id).where(in_validation, jobs.c.account_id.not_in(busy)).distinct()
        async with self._database.write() as connection:
            account_id = self._next_in_turn(await connection.scalars(waiting))
            oldest = (
                sa.select(jobs.c.id)
                .where(in_validation, jobs.c.account_id == account_id)
                # Those that were tried in vain come after those that were not tried yet.
                .order_by(sa.nulls_first(jobs.c.claimed_until), jobs.c.number)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            if account_id is None or (job_id := await connection.scalar(oldest)) is None:
                return None
            is_forgotten = jobs.c.claimed_until < now - _FORGOTTEN_AFTER
            claim = (
                jobs.update()
                .where(jobs.c.id == job_id)
                .values(
                    claimed_until=now + _CLAIM,
                    failing_since=sa.case((is_forgotten, sa.null()), else_=jobs.c.failing_since),
                )
            )
            return (await connection.execute(claim.returning(*jobs.c))).one()

    def _next_in_turn(self, account_ids: Iterable[str]) -> str | None:
        """The account that had no turn for longest; None if none waits."""
        account_id = min(account_ids, key=lambda each: self._last_turns.get(each, 0.0), default=None)
        if account_id is not None:
            self._last_turns.pop(account_id, None)
            self._last_turns[account_id] = time.monotonic()
            if len(self._last_turns) > _TURNS_KEPT:
                del self._last_turns[next(iter(self._last_turns))]  # the longest ago
        return account_id

    async def _validate_claimed(self, job: sa.Row[Any]) -> None:
        validating = asyncio.create_task(self._validate(job))
        keeper = asyncio.create_task(self._keep_claim(job.id))
        try:
            await asyncio.wait([validating, keeper], return_when=asyncio.FIRST_COMPLETED)
        finally:
            # Either the job was cancelled, and its data is of no use; or the validation is done.
            if not validating.done():
                validating.cancel()
            keeper.cancel()
            await asyncio.wait([validating, keeper])
        if not validating.cancelled():
            validating.result()

    async def _keep_claim(self, job_id: str) -> None:
        """Returns once the job is not in validation any more."""
        mine = sa.and_(jobs.c.id == job_id, jobs.c.status == JobStatus.VALIDATION)
        while True:
            await asyncio.sleep(_RENEW_SECONDS)
            try:
                async with self._database.write() as connection:
                    renewal = jobs.update().where(mine).values(claimed_until=utc_now() + _CLAIM)
                    if (await connection.execute(renewal)).rowcount == 0:
                        await self._sweep_again(connection, job_id)
                        return
            except DATABASE_AWAY as error:
                log.warning("a claim can't be renewed for now", job_id=job_id, cause=str(error))

    async def _validate(self, job: sa.Row[Any]) -> None:
        try:
            await self._prepare(job)
        except DATABASE_AWAY:
            raise
        except Exception:
            log.exception("a job's data can't be checked", job_id=job.id)
            await self._fail_or_wait(job, TuneryError("The service failed to check the job's data."))

    async def _prepare(self, job: sa.Row[Any]) -> None:
        request = data_pb2.PrepareJobDataRequest(
            account_id=job.account_id,
            job_id=job.id,
            training_uri=job.training_uri,
            validation_uri=job.validation_uri,
            task_type=job.task_type,
            num_validation_rows=job.num_validation_rows,
            base_model=job.base_model,
            seed=job.run["seed"],
        )
        data = await self._job_data.prepare(request)
        if isinstance(data, TuneryError):
            await self._fail_or_wait(job, data)
        elif data.num_bad_rows:
            message = f"{data.num_bad_rows} broken rows in the data, the first: {data.first_problem}"
            await self._fail(job, message, "job", data.report_key or None)
        else:
            await self._enqueue(job, data)

    async def _fail_or_wait(self, job: sa.Row[Any], error: TuneryError) -> None:
        if error.http_status < 500:
            await self._fail(job, error.message, "job", None)
        elif utc_now() - await self._failing_since(job.id) > _GIVE_UP_AFTER:
            await self._fail(job, error.message, "platform", None)
        else:
            log.warning("the job's data can't be prepared for now", job_id=job.id, cause=error.message)
            await asyncio.sleep(_RETRY_SECONDS)
            mine = sa.and_(jobs.c.id == job.id, jobs.c.status == JobStatus.VALIDATION)
            async with self._database.write() as connection:
                await connection.execute(jobs.update().where(mine).values(claimed_until=utc_now()))

    async def _failing_since(self, job_id: str) -> dt.datetime:
        """Returns when the first try failed. The job's age says nothing: the stack may have been down."""
        since = sa.func.coalesce(jobs.c.failing_since, sa.literal(utc_now(), UtcTime))
        note = jobs.update().where(jobs.c.id == job_id).values(failing_since=since)
        async with self._database.write() as connection:
            noted = await connection.execute(note.returning(jobs.c.failing_since))
            failing_since: dt.datetime = noted.scalar_one()
        return failing_since

    async def _enqueue(self, job: sa.Row[Any], data: data_pb2.PrepareJobDataResponse) -> None:
        values: dict[str, Any] = {
            "training_key": data.training.object_key,
            "validation_key": data.validation.object_key or None,
            "claimed_until": None,
        }
        counts = estimates.RowCounts.of(data)
        values["row_counts"] = asdict(counts)
        async with self._database.read() as connection:
            found = await estimates.find_probes(connection, job.run)
        remarks = list(data.remarks)
        if found:
            probe = estimates.roomiest(found)
            cost = estimates.cost_of(job.run, counts, probe)
            if why := estimates.refusal(job.run, counts, probe, cost):
                await self._fail(job, why, "job", None)
                return
            values["estimate"] = asdict(cost)
            remarks.append(estimates.in_words(cost, probe))
        rows = f"{data.training.num_rows} rows to train on"
        if data.HasField("validation"):
            rows += f", {data.validation.num_rows} to validate on"
        try:
            async with self._database.write() as connection:
                for remark in remarks:
                    await write_line(connection, job.id, remark)
                line = f"data checked: {rows}; job queued"
                queued = await move(
                    connection, job.id, [JobStatus.VALIDATION], JobStatus.QUEUED, line, **values
                )
                if queued is None:
                    raise _CancelledMeanwhile
                if job.credits_held is None:
                    # After the job's row, as everywhere: two that lock in turns would wait for each other.
                    tokens = planned_tokens(job.run, data.training.size_bytes, data.training.num_rows)
                    price = self._price.of(tokens)
                    held = await credits.hold(connection, job.account_id, job.id, price)
                    await connection.execute(
                        jobs.update().where(jobs.c.id == job.id).values(credits_held=held)
                    )
        except _CancelledMeanwhile:
            async with self._database.write() as connection:
                await self._sweep_again(connection, job.id)
            self._feed.announce(SWEEP)
            return
        except InsufficientCredits as error:
            await self._fail(job, error.message, "job", None)
            return
        self._feed.announce(job_topic(job.id), QUEUE)

    async def _fail(self, job: sa.Row[Any], message: str, fault: str, report_key: str | None) -> None:
        async with self._database.write() as connection:
            row = await move(
                connection,
                job.id,
                [JobStatus.VALIDATION],
                JobStatus.FAILED,
                f"job failed: {message}",
                error=message,
                fault=fault,
                error_report_key=report_key,
                claimed_until=None,
            )
            if row is None:
                await self._sweep_again(connection, job.id)
            else:
                charged = await credits.settle(connection, row, 0)
                await connection.execute(
                    jobs.update().where(jobs.c.id == job.id).values(credits_charged=charged)
                )
        self._feed.announce(job_topic(job.id), SWEEP)

    @staticmethod
    async def _sweep_again(connection: AsyncConnection, job_id: str) -> None:
        """Has a job that ended meanwhile swept once more: its data may have come after the sweep."""
        ended = sa.and_(jobs.c.id == job_id, jobs.c.status.in_(sorted(ENDED)))
        await connection.execute(jobs.update().where(ended).values(SWEEP_AGAIN))


class _CancelledMeanwhile(Exception):
    """Rolls the transaction back, its hold and its lines included."""
