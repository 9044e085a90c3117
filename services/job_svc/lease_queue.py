"""The queue, from the trainers' side: leases, events, and how attempts end.

A lease's token fences: every statement here names it, so a trainer whose lease went to another, or whose
job was cancelled, changes nothing any more.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from job_svc import credits, estimates
from job_svc.change_feed import QUEUE, SWEEP, ChangeFeed, job_topic
from job_svc.job_plan import LARGEST_COUNT
from job_svc.job_state import ENDED, JobStatus, move, one_line
from job_svc.sweeper import SWEEP_AGAIN, attempt_prefix
from job_svc.tables import checkpoints, events, jobs, models, turns
from svc_kit.database import DATABASE_AWAY, Database, utc_now
from svc_kit.errors import InvalidRequest, LeaseLost
from svc_kit.ids import new_id, random_id

log = structlog.get_logger(__name__)

MAX_WAIT_SECONDS = 30.0
_REAP_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 3.0


@dataclass(frozen=True)
class RunEvent:
    """An event that a trainer reports: a line of the log, and what it tells in numbers."""

    seq: int
    time: dt.datetime
    kind: str
    message: str
    data: dict[str, Any]


@dataclass(frozen=True)
class RunResult:
    """What a run came to; `object_prefix` is where the model's files lie."""

    object_prefix: str
    training_loss: float | None
    validation_loss: float | None
    steps: int
    epochs_completed: int
    tokens_trained: int


class LeaseQueue:
    """Gives jobs to trainers and takes their reports."""

    def __init__(
        self,
        database: Database,
        feed: ChangeFeed,
        price: credits.Price,
        lease_seconds: float,
        max_retries: int,
        max_running_jobs: int | None,
    ) -> None:
        self._database = database
        self._feed = feed
        self._price = price
        self.lease_seconds = lease_seconds
        self._max_retries = max_retries
        self._max_running_jobs = max_running_jobs

    async def lease(self, trainer_id: str, wait_seconds: float) -> sa.Row[Any] | None:
        """Gives a queued job to a trainer, waiting for one; None when there is none in time.

        Accounts take turns: next is the one that has the fewest jobs running, of several the one that had to
        wait for longest. Of its jobs the one of the highest priority is taken, of several the oldest.
        """
        await self._requeue_held_by(trainer_id)
        deadline = asyncio.get_running_loop().time() + min(wait_seconds, MAX_WAIT_SECONDS)
        with self._feed.subscribe(QUEUE) as changes:
            while True:
                changes.clear()
                row = await self._take(trainer_id)
                remaining = deadline - asyncio.get_running_loop().time()
                if row is not None or remaining <= 0:
                    break
                await changes.wait(min(remaining, 2.0))
        if row is not None:
            self._feed.announce(job_topic(row.id))
        return row

    async def _take(self, trainer_id: str) -> sa.Row[Any] | None:
        if self._database.is_sqlite and not await self._is_any_queued():
            return None  # the usual case, without taking the write lock
        passed_over: set[str] = set()
        while True:
            async with self._database.write() as connection:
                account_id = await connection.scalar(_whose_turn(self._max_running_jobs, passed_over))
                if account_id is None:
                    return None
                if (row := await self._take_from(connection, account_id, trainer_id)) is not None:
                    return row
            # Others take its last jobs, or have begun to and come to a halt.
            passed_over.add(account_id)

    async def _is_any_queued(self) -> bool:
        query = sa.select(jobs.c.id).where(jobs.c.status == JobStatus.QUEUED).limit(1)
        async with self._database.read() as connection:
            return (await connection.execute(query)).first() is not None

    async def _take_from(
        self, connection: AsyncConnection, account_id: str, trainer_id: str
    ) -> sa.Row[Any] | None:
        if self._max_running_jobs is not None:
            # One after the other, or each would count the jobs without the other's.
            await self._database.lock(connection, f"turn of {account_id}")
            num_running = await connection.scalar(_num_running(account_id))
            if num_running is None or num_running >= self._max_running_jobs:
                return None
        next_job = (
            sa.select(jobs.c.id, jobs.c.attempts)
            .where(jobs.c.status == JobStatus.QUEUED, jobs.c.account_id == account_id)
            .order_by(jobs.c.priority.desc(), jobs.c.number)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        found = (await connection.execute(next_job)).one_or_none()
        if found is None:
            return None
        await self._note_turn(connection, account_id)
        attempt = found.attempts + 1
        line = f"training starts on {trainer_id}" + (f", attempt {attempt}" if attempt > 1 else "")
        return await move(
            connection,
            found.id,
            [JobStatus.QUEUED],
            JobStatus.RUNNING,
            line,
            leased_by=trainer_id,
            lease_token=new_id("lease"),
            lease_expires_at=self._expiry(),
            attempts=attempt,
            started_at=utc_now(),
        )

    async def _note_turn(self, connection: AsyncConnection, account_id: str) -> None:
        await self._database.upsert(connection, turns, {"account_id": account_id}, {"taken_at": utc_now()})

    def _expiry(self) -> dt.datetime:
        return utc_now() + dt.timedelta(seconds=self.lease_seconds)

    async def last_checkpoint(self, job_id: str) -> str | None:
        """Returns the object prefix of a job's newest checkpoint."""
        query = sa.select(checkpoints.c.object_prefix).where(checkpoints.c.job_id == job_id)
        async with self._database.read() as connection:
            return await connection.scalar(query.order_by(checkpoints.c.step.desc()).limit(1))

    async def renew(self, job_id: str, lease_token: str) -> None:
        """Renews a lease.

        Raises:
            LeaseLost: the lease is another's now, or the job has ended.
        """
        async with self._database.write() as connection:
            await self._hold_lease(connection, job_id, lease_token)

    async def _hold_lease(self, connection: AsyncConnection, job_id: str, token: str) -> sa.Row[Any]:
        update = (
            jobs.update()
            .where(jobs.c.id == job_id, jobs.c.lease_token == token, jobs.c.status == JobStatus.RUNNING)
            .values(lease_expires_at=self._expiry())
        )
        row = (await connection.execute(update.returning(*jobs.c))).one_or_none()
        if row is None:
            raise LeaseLost(f"The lease on {job_id} is lost: stop the run and drop its files.")
        return row

    async def put_probe(
        self, probe: dict[str, Any], job_id: str | None = None, lease_token: str | None = None
    ) -> str:
        """Keeps what a base model costs, and tells what the job under the lease will take.

        Returns:
            The estimate in words; nothing without a lease.

        Raises:
            LeaseLost: the lease is another's now, or the job has ended: just now, where it can't fit.
        """
        async with self._database.write() as connection:
            await estimates.put_probe(self._database, connection, probe)
            if job_id is None or lease_token is None:
                return ""
            row = await self._hold_lease(connection, job_id, lease_token)
            counts = estimates.RowCounts(**row.row_counts)
            cost = estimates.cost_of(row.run, counts, probe)
            why = estimates.refusal(row.run, counts, probe, cost)
            if why is None:
                kept = jobs.update().where(jobs.c.id == job_id).values(estimate=asdict(cost))
                await connection.execute(kept)
            else:
                await self._end_failed(connection, job_id, lease_token, why, "job")
        if why is None:
            return estimates.in_words(cost, probe)
        self._feed.announce(job_topic(job_id), SWEEP)
        raise LeaseLost(f"{job_id} can't be trained here: {why}.")

    async def report(self, job_id: str, lease_token: str, reported: Sequence[RunEvent]) -> None:
        """Stores events, each once however often it is reported.

        Raises:
            LeaseLost: the lease is another's now, or the job has ended.
            InvalidRequest: an event is missing between those stored and those reported.
        """
        async with self._database.write() as connection:
            row = await self._hold_lease(connection, job_id, lease_token)
            fresh = [event for event in reported if event.seq >= row.next_seq]
            if not fresh:
                return
            expected = range(row.next_seq, row.next_seq + len(fresh))
            if [event.seq for event in fresh] != list(expected):
                raise InvalidRequest(
                    f"The next event of {job_id} has seq {row.next_seq}.", field="events.seq"
                )
            await connection.execute(
                events.insert(),
                [
                    {
                        "job_id": job_id,
                        "seq": event.seq,
                        "time": event.time,
                        "kind": event.kind,
                        "message": one_line(event.message),
                        "data": event.data or None,
                    }
                    for event in fresh
                ],
            )
            values = {"next_seq": expected.stop}
            for event in fresh:
                try:
                    values |= await self._apply(connection, row, event)
                except (KeyError, TypeError, ValueError) as error:
                    message = f"The data of event {event.seq} ({event.kind}) is not complete: {error}."
                    raise InvalidRequest(message, field="events.data") from error
            await connection.execute(jobs.update().where(jobs.c.id == job_id).values(values))
        self._feed.announce(job_topic(job_id))

    async def _apply(self, connection: AsyncConnection, job: sa.Row[Any], event: RunEvent) -> dict[str, Any]:
        """Returns the columns of the job that an event changes."""
        job_id, data = job.id, event.data
        match event.kind:
            case "log":
                return {name: data[name] for name in ("wandb_url", "wandb_prefix") if data.get(name)}
            case "step":
                return {
                    "total_steps": min(int(data["total_steps"]), LARGEST_COUNT),
                    "steps_completed": min(int(data["step"]), LARGEST_COUNT),
                    "training_loss": data["loss"],
                    "tokens_trained": int(data["tokens_trained"]),
                    "peak_memory_bytes": data.get("peak_memory_bytes", job.peak_memory_bytes),
                    "remaining_seconds": data["remaining_seconds"],
                    "estimated_finish": event.time + dt.timedelta(seconds=data["remaining_seconds"]),
                }
            case "validation":
                return {"validation_loss": data["loss"]}
            case "checkpoint":
                _check_prefix(job, data["object_prefix"])
                await self._keep_checkpoint(connection, job_id, data)
                return {"epochs_completed": int(data["epochs_completed"]), "faults": 0}
            case "checkpoint_removed":
                gone = sa.and_(checkpoints.c.job_id == job_id, checkpoints.c.step == int(data["step"]))
                await connection.execute(checkpoints.delete().where(gone))
            case "deploying":
                _check_prefix(job, data["object_prefix"])
                await self._put_model(connection, job, data["object_prefix"], "deploying")
        return {}

    async def _keep_checkpoint(self, connection: AsyncConnection, job_id: str, data: dict[str, Any]) -> None:
        values = {
            "epoch": int(data["epoch"]),
            "ends_epoch": bool(data["ends_epoch"]),
            "object_prefix": data["object_prefix"],
        }
        # After one of a later step, the run has gone back, or goes on from an earlier one: the newest counts.
        later = sa.and_(checkpoints.c.job_id == job_id, checkpoints.c.step > int(data["step"]))
        await connection.execute(checkpoints.delete().where(later))
        key = {"job_id": job_id, "step": int(data["step"])}
        await self._database.upsert(connection, checkpoints, key, values)

    async def _put_model(
        self, connection: AsyncConnection, job: sa.Row[Any], object_prefix: str, status: str
    ) -> None:
        """Makes a job's model, or changes its status: it keeps its id on the way from one to the next."""
        values = {"object_prefix": object_prefix, "status": status, "created_at": utc_now()}
        only_first = {
            "id": _model_id(job),
            "account_id": job.account_id,
            "base_model": job.base_model,
            "method": job.run["method"]["kind"],
        }
        await self._database.upsert(connection, models, {"job_id": job.id}, values, only_first)

    async def complete(self, job_id: str, lease_token: str, result: RunResult) -> None:
        """Ends a job with its model: state, model and credits in one transaction. Idempotent.

        Raises:
            LeaseLost: the lease is another's now, or the job has ended otherwise.
        """
        async with self._database.write() as connection:
            row = await move(
                connection,
                job_id,
                [JobStatus.RUNNING],
                JobStatus.COMPLETED,
                f"job completed: {result.steps} steps, loss {_shown(result.training_loss)}",
                under_lease=lease_token,
                lease_expires_at=None,
                training_loss=result.training_loss,
                validation_loss=result.validation_loss,
                steps_completed=result.steps,
                epochs_completed=result.epochs_completed,
                tokens_trained=result.tokens_trained,
            )
            if row is None:
                await self._accept_repeated_end(connection, job_id, lease_token, JobStatus.COMPLETED)
                return
            _check_prefix(row, result.object_prefix)
            charged = await credits.settle(connection, row, self._price.of(result.tokens_trained))
            await connection.execute(jobs.update().where(jobs.c.id == job_id).values(credits_charged=charged))
            await self._put_model(connection, row, result.object_prefix, "available")
        self._feed.announce(job_topic(job_id), SWEEP)

    async def _accept_repeated_end(
        self, connection: AsyncConnection, job_id: str, token: str, status: JobStatus
    ) -> None:
        query = sa.select(jobs.c.id).where(
            jobs.c.id == job_id, jobs.c.lease_token == token, jobs.c.status == status
        )
        if await connection.scalar(query) is None:
            raise LeaseLost(f"The lease on {job_id} is lost: stop the run and drop its files.")

    async def fail(self, job_id: str, lease_token: str, message: str, fault: str) -> None:
        """Ends an attempt that failed. Faults of the platform are tried again, up to the limit. Idempotent.

        Raises:
            LeaseLost: the lease is another's now, or the job has ended otherwise.
        """
        async with self._database.write() as connection:
            if not await self._end_failed(connection, job_id, lease_token, message, fault):
                await self._accept_repeated_end(connection, job_id, lease_token, JobStatus.FAILED)
        self._feed.announce(job_topic(job_id), QUEUE, SWEEP)

    async def _end_failed(
        self, connection: AsyncConnection, job_id: str, lease_token: str, message: str, fault: str
    ) -> bool:
        query = sa.select(jobs.c.faults, jobs.c.run).where(
            jobs.c.id == job_id, jobs.c.lease_token == lease_token
        )
        found = (await connection.execute(query)).one_or_none()
        if found is None:
            return False
        message, faults = message.replace("\0", ""), found.faults  # PostgreSQL keeps no NUL
        if fault == "platform" and faults < found.run.get("max_restarts", self._max_retries):
            line = f"{message}; job queued again"
            row = await move(
                connection,
                job_id,
                [JobStatus.RUNNING],
                JobStatus.QUEUED,
                line,
                under_lease=lease_token,
                faults=faults + 1,
            )
            return row is not None
        row = await move(
            connection,
            job_id,
            [JobStatus.RUNNING],
            JobStatus.FAILED,
            f"job failed: {message}",
            under_lease=lease_token,
            lease_expires_at=None,
            error=message,
            fault=fault,
        )
        if row is None:
            return False
        charged = await credits.settle(connection, row, 0)
        await connection.execute(jobs.update().where(jobs.c.id == job_id).values(credits_charged=charged))
        return True

    async def hand_back(self, job_id: str, lease_token: str, reason: str) -> None:
        """Queues a job again whose trainer goes away; or notes that a run without a lease has stopped.

        Raises:
            LeaseLost: the lease is another's now.
        """
        async with self._database.write() as connection:
            row = await move(
                connection,
                job_id,
                [JobStatus.RUNNING],
                JobStatus.QUEUED,
                f"{reason}; job queued again".replace("\0", ""),
                under_lease=lease_token,
            )
            is_own = row is not None
            if not is_own:
                # An attempt that had lost its lease may have stored something after the sweep.
                ended = sa.and_(jobs.c.id == job_id, jobs.c.status.in_(ENDED))
                await connection.execute(jobs.update().where(ended).values(SWEEP_AGAIN))
                stopped = jobs.update().where(ended, jobs.c.lease_token == lease_token)
                is_own = (await connection.execute(stopped.values(lease_expires_at=None))).rowcount > 0
        self._feed.announce(job_topic(job_id), QUEUE, SWEEP)
        if not is_own:
            raise LeaseLost(f"The lease on {job_id} is lost.")

    async def _requeue_held_by(self, trainer_id: str) -> None:
        held = jobs.c.leased_by == trainer_id
        await self._requeue(held, f"{trainer_id} was restarted")

    async def _requeue(self, condition: sa.ColumnElement[bool], message: str) -> None:
        query = sa.select(jobs.c.id, jobs.c.lease_token).where(jobs.c.status == JobStatus.RUNNING, condition)
        async with self._database.read() as connection:
            lost = list(await connection.execute(query))
        for row in lost:
            # It may have been renewed, or have ended, since.
            is_lost = sa.and_(jobs.c.id == row.id, jobs.c.lease_token == row.lease_token, condition)
            async with self._database.write() as connection:
                if await connection.scalar(sa.select(jobs.c.id).where(is_lost).with_for_update()) is None:
                    continue
                await self._end_failed(connection, row.id, row.lease_token, message, "platform")
            self._feed.announce(job_topic(row.id), QUEUE, SWEEP)

    async def reap(self) -> None:
        """Takes jobs back from trainers that are not heard of any more, until cancelled.

        A trainer can be heard only while this process listens: after a start, or a pause of its own, it
        gives every trainer the lease's time to come back; and after a jump of the clock that leases end by.
        """
        clock = asyncio.get_running_loop().time
        listening_since = last_look = clock()
        clocks_differ_by = time.time() - last_look
        while True:
            await asyncio.sleep(_REAP_SECONDS)
            now, previous, last_look = clock(), last_look, clock()
            jump = time.time() - now - clocks_differ_by
            if now - previous > _LONGEST_PAUSE_SECONDS or abs(jump) > _LONGEST_PAUSE_SECONDS:
                listening_since = now
                clocks_differ_by += jump
            if now - listening_since < self.lease_seconds:
                continue
            try:
                # A lease longer than any was given before the clock was set back, to a trainer that is gone.
                now_utc, longest = utc_now(), dt.timedelta(seconds=2 * self.lease_seconds)
                is_lost = ~jobs.c.lease_expires_at.between(now_utc, now_utc + longest)
                await self._requeue(is_lost, "the trainer was lost")
            except DATABASE_AWAY as error:
                log.warning("lapsed leases can't be looked for", cause=str(error))
                listening_since = clock()  # nobody could renew a lease meanwhile


def _num_running(account_id: Any) -> sa.Select[Any]:
    return sa.select(sa.func.count()).where(
        jobs.c.status == JobStatus.RUNNING, jobs.c.account_id == account_id
    )


def _whose_turn(max_running_jobs: int | None, passed_over: Collection[str]) -> sa.Select[Any]:
    """The account that a job is to be taken from; no row where nothing waits but what is passed over.

    Jumps through the index from one account to the next: it takes as long with ten thousand queued jobs as
    with one for each account.
    """
    queued = jobs.c.status == JobStatus.QUEUED
    first = sa.select(sa.func.min(jobs.c.account_id).label("account_id")).where(queued)
    accounts = first.cte("accounts", recursive=True)
    following = (
        sa.select(sa.func.min(jobs.c.account_id))
        .where(queued, jobs.c.account_id > accounts.c.account_id)
        .correlate(accounts)
        .scalar_subquery()
    )
    accounts = accounts.union_all(sa.select(following).where(accounts.c.account_id.is_not(None)))
    num_running = _num_running(accounts.c.account_id).correlate(accounts).scalar_subquery()
    turn = (
        sa.select(accounts.c.account_id)
        .outerjoin(turns, turns.c.account_id == accounts.c.account_id)
        .where(accounts.c.account_id.is_not(None))
        .order_by(num_running, sa.nulls_first(turns.c.taken_at), accounts.c.account_id)
        .limit(1)
    )
    if passed_over:
        turn = turn.where(accounts.c.account_id.not_in(passed_over))
    return turn if max_running_jobs is None else turn.where(num_running < max_running_jobs)


def _check_prefix(job: sa.Row[Any], object_prefix: str) -> None:
    parts = object_prefix.split("/")
    if not object_prefix.startswith(attempt_prefix(job)) or "." in parts or ".." in parts:
        raise InvalidRequest(
            f"{object_prefix!r} is not below {attempt_prefix(job)}, where this attempt stores.",
            field="object_prefix",
        )


def _shown(loss: float | None) -> str:
    return "unknown" if loss is None else f"{loss:.4f}"


def _model_id(job: sa.Row[Any]) -> str:
    parts = [job.base_model.replace("/", "--"), job.suffix, random_id(8)]
    return "-".join(part for part in parts if part)
