"""Jobs as their owners see them: made, listed, cancelled."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from job_svc import credits
from job_svc.change_feed import SWEEP, VALIDATION, ChangeFeed, job_topic
from job_svc.job_data_client import JobDataClient
from job_svc.job_plan import JobPlan
from job_svc.job_state import ENDED, LIVE, JobStatus, move
from job_svc.paging import Page
from job_svc.tables import checkpoints, events, jobs, models
from svc_kit.catalog import BaseModelEntry, Catalog
from svc_kit.database import Database, utc_now
from svc_kit.errors import InvalidRequest, JobEnded, LimitReached, NotFound, TuneryError
from svc_kit.idempotency import used_otherwise
from svc_kit.ids import new_id
from svc_kit.log import current_request_id
from svc_kit.strict_json import nearest
from tunery.dataset.v1 import job_data_service_pb2 as data_pb2

MAX_PAGE = 100
DEFAULT_PAGE = 20
_JOB_ID = re.compile(r"job-[a-z2-7]{20}")
# torchtune's name for the attention's last matrix, whatever transformers calls it.
OUTPUT_PROJECTION = "output_proj"
# Put together once, which takes longer than SQLite's answer.
_ID_OF_ACCOUNT = (jobs.c.id == sa.bindparam("job_id"), jobs.c.account_id == sa.bindparam("account_id"))
_JOB = jobs.select().where(*_ID_OF_ACCOUNT)
_JOB_WITH_MODEL = (
    sa.select(jobs, models.c.id.label("model_id"))
    .outerjoin_from(jobs, models, models.c.job_id == jobs.c.id)
    .where(*_ID_OF_ACCOUNT)
)


def check_job_id(job_id: str) -> str:
    """Returns the id.

    Raises:
        NotFound: it is no id that a job could have.
    """
    if not _JOB_ID.fullmatch(job_id):
        raise NotFound(f"There is no job {job_id[:60]!r}.")
    return job_id


class Jobs:
    """The jobs of all accounts; every method acts for one of them."""

    def __init__(
        self,
        database: Database,
        feed: ChangeFeed,
        job_data: JobDataClient,
        catalog: Catalog,
        price: credits.Price,
        max_live_jobs: int,
    ) -> None:
        self._database = database
        self._feed = feed
        self._job_data = job_data
        self._catalog = catalog
        self._price = price
        self._max_live_jobs = max_live_jobs

    async def create(self, account_id: str, plan: JobPlan, idempotency_key: str | None) -> sa.Row[Any]:
        """Makes a job, in the state `validation`, and holds its cost.

        Where the account has made a job with the same key already, returns that one as it is now.

        Raises:
            UnknownBaseModel: the catalog doesn't have the base model.
            InvalidRequest: a data URI is not allowed, a dataset is unknown or doesn't fit.
            InsufficientCredits: the balance is below the cost.
            LimitReached: the account has as many live jobs as it may.
        """
        if idempotency_key is not None:
            async with self._database.read() as connection:
                if made := await self._made_with(connection, account_id, idempotency_key, plan):
                    return made
        check_fit(plan, self._catalog.get(plan.base_model))
        job_id = new_id("job")
        try:
            # A refusal may come after a hold: of columns that don't fit, of the second of two URIs.
            held = await self._job_data.hold(
                data_pb2.HoldJobDataRequest(
                    account_id=account_id, job_id=job_id, uris=plan.uris, task_type=plan.task_type
                )
            )
            row = await self._insert(account_id, job_id, plan, held, idempotency_key)
        except TuneryError:
            await self._job_data.release(job_id)
            raise
        if row.id != job_id:  # the same request was carried out meanwhile
            await self._job_data.release(job_id)
        return row

    async def _made_with(
        self, connection: AsyncConnection, account_id: str, idempotency_key: str | None, plan: JobPlan
    ) -> sa.Row[Any] | None:
        if idempotency_key is None:
            return None
        query = jobs.select().where(
            jobs.c.account_id == account_id, jobs.c.idempotency_key == idempotency_key
        )
        made = (await connection.execute(query)).one_or_none()
        if made is not None and made.request_digest != plan.digest():
            raise used_otherwise(idempotency_key)
        return made

    async def _check_limit(self, connection: AsyncConnection, account_id: str) -> None:
        live = sa.and_(jobs.c.status.in_(sorted(LIVE)), jobs.c.account_id == account_id)
        num_live = await connection.scalar(sa.select(sa.func.count()).where(live)) or 0
        if num_live >= self._max_live_jobs:
            raise LimitReached(
                f"The account has {num_live:,} jobs waiting or running, and {self._max_live_jobs:,} is the "
                "limit; wait for one to end, or cancel one."
            )

    async def _insert(
        self,
        account_id: str,
        job_id: str,
        plan: JobPlan,
        held: list[data_pb2.HeldData],
        idempotency_key: str | None,
    ) -> sa.Row[Any]:
        _check_formats(plan, held)
        dataset = held[0].dataset if held[0].HasField("dataset") else None
        num_validation_rows = _num_validation_rows(plan, dataset.row_count if dataset else None)
        values = {
            "id": job_id,
            "account_id": account_id,
            "status": JobStatus.VALIDATION,
            "base_model": plan.base_model,
            "dataset_id": dataset.id if dataset else None,
            "task_type": plan.task_type,
            "suffix": plan.suffix,
            "hyperparameters": plan.hyperparameters,
            "input_config": plan.input_config,
            "run": plan.run,
            "training_uri": plan.training_uri,
            "validation_uri": plan.validation_uri,
            "num_validation_rows": num_validation_rows,
            "priority": plan.priority,
            "idempotency_key": idempotency_key,
            "request_digest": plan.digest() if idempotency_key is not None else None,
            "created_at": utc_now(),
            "request_id": current_request_id(),
            "next_seq": 2,
        }
        async with self._database.write() as connection:
            await self._database.lock(connection, f"jobs of {account_id}")
            if made := await self._made_with(connection, account_id, idempotency_key, plan):
                return made
            await self._check_limit(connection, account_id)
            if dataset:
                cost = self._price.of(
                    planned_tokens(plan.run, dataset.size_bytes, dataset.row_count - num_validation_rows)
                )
                values["credits_held"] = await credits.hold(connection, account_id, job_id, cost)
            row = (await connection.execute(jobs.insert().values(values).returning(*jobs.c))).one()
            await connection.execute(
                events.insert().values(
                    job_id=job_id,
                    seq=1,
                    time=row.created_at,
                    kind="log",
                    message=f"job {job_id} made: {plan.base_model} on {plan.training_uri}",
                )
            )
        self._feed.announce(VALIDATION)
        return row

    async def get(self, account_id: str, job_id: str) -> sa.Row[Any]:
        """Returns a job.

        Raises:
            NotFound: the account has no such job.
        """
        return await self._one(_JOB, account_id, job_id)

    async def get_with_model(self, account_id: str, job_id: str) -> sa.Row[Any]:
        """Returns a job with the id of the model that it made, or None, as `model_id`.

        Raises:
            NotFound: the account has no such job.
        """
        return await self._one(_JOB_WITH_MODEL, account_id, job_id)

    async def _one(self, query: sa.Select[Any], account_id: str, job_id: str) -> sa.Row[Any]:
        names = {"job_id": check_job_id(job_id), "account_id": account_id}
        async with self._database.read() as connection:
            row = (await connection.execute(query, names)).one_or_none()
        if row is None:
            raise NotFound(f"There is no job {job_id!r}.")
        return row

    async def page(self, account_id: str, page: Page) -> tuple[list[sa.Row[Any]], int]:
        """Returns a page of jobs, newest first, and how many there are in all."""
        own = jobs.c.account_id == account_id
        newest = jobs.select().where(own).order_by(jobs.c.number.desc())
        async with self._database.read() as connection:
            total = await connection.scalar(sa.select(sa.func.count()).where(own))
            return list(await connection.execute(newest.limit(page.limit).offset(page.offset))), total or 0

    async def cancel(self, account_id: str, job_id: str) -> sa.Row[Any]:
        """Cancels a job and settles its credits; its trainer stops when it next renews its lease.

        Raises:
            NotFound: the account has no such job.
            JobEnded: the job has ended already.
        """
        before = await self.get(account_id, job_id)
        async with self._database.write() as connection:
            row = await move(
                connection, job_id, sorted(LIVE), JobStatus.CANCELLED, "job cancelled by its owner"
            )
            if row is not None:
                charged = await credits.settle(connection, row, self._price.of(row.tokens_trained))
                row = (
                    await connection.execute(
                        jobs.update()
                        .where(jobs.c.id == job_id)
                        .values(credits_charged=charged)
                        .returning(*jobs.c)
                    )
                ).one()
                await connection.execute(checkpoints.delete().where(checkpoints.c.job_id == job_id))
        if row is None:
            ended = before if before.status in ENDED else await self.get(account_id, job_id)
            raise JobEnded(f"Job {job_id} can't be cancelled: it is {ended.status}.", status=ended.status)
        self._feed.announce(job_topic(job_id), SWEEP)
        return row

    async def checkpoints(self, job_ids: list[str]) -> dict[str, list[sa.Row[Any]]]:
        """Returns jobs' checkpoints by step; a job without any has an empty list."""
        found: dict[str, list[sa.Row[Any]]] = {job_id: [] for job_id in job_ids}
        query = checkpoints.select().where(checkpoints.c.job_id.in_(job_ids))
        async with self._database.read() as connection:
            for row in await connection.execute(query.order_by(checkpoints.c.step)):
                found[row.job_id].append(row)
        return found

    async def statuses(self, job_ids: Sequence[str]) -> dict[str, JobStatus]:
        """Returns the states of those of the jobs that exist."""
        query = sa.select(jobs.c.id, jobs.c.status).where(jobs.c.id.in_(job_ids))
        async with self._database.read() as connection:
            return {row.id: JobStatus(row.status) for row in await connection.execute(query)}


def planned_tokens(run: dict[str, Any], size_bytes: float, num_rows: int) -> int:
    """Returns an estimate of the tokens that a whole run trains on, `max_steps` considered."""
    rows_per_step = run["batch_size"] * run["gradient_accumulation_steps"]
    steps = run["epochs"] * math.ceil(max(num_rows, 1) / rows_per_step)
    share = min(1.0, run.get("max_steps", steps) / steps)
    return math.ceil(credits.estimate_tokens(size_bytes, num_rows) * run["epochs"] * share)


def check_fit(plan: JobPlan, base_model: BaseModelEntry) -> None:
    """Refuses what the base model doesn't have or can't read, before anything is stored."""
    longest = plan.run["extras"].get("max_sequence_length", 0)
    if longest > base_model.context_length:
        raise InvalidRequest(
            f"`max_sequence_length` is {longest:,}, but {base_model.id} reads at most "
            f"{base_model.context_length:,} tokens.",
            field="fine_tuning_options.extras.max_sequence_length",
        )
    known = [OUTPUT_PROJECTION, *base_model.attention_modules]
    for module in plan.run["method"].get("attn_modules", []):
        if module not in known:
            raise InvalidRequest(
                f"`lora_attn_modules`: {module!r} is no attention module of {base_model.id}"
                f"{nearest(module, known)}; they are {', '.join(known)}.",
                field="fine_tuning_options.custom_training_options.lora_attn_modules",
            )


def _check_formats(plan: JobPlan, held: list[data_pb2.HeldData]) -> None:
    expected = "csv" if plan.task_type else "jsonl"
    for uri, data in zip(plan.uris, held, strict=True):
        if data.format != expected:
            raise InvalidRequest(
                f"{uri} is a {data.format.upper()} dataset; this request trains on {expected.upper()}. "
                "CSV goes with /api/v1/fine-tuning/jobs, JSONL dialogs with /fine_tuning/jobs/submit.",
                field="dataset_id" if plan.task_type else "data",
            )


def _num_validation_rows(plan: JobPlan, num_rows: int | None) -> int:
    if num_rows is None:
        return 0
    if num_rows < 1:
        raise InvalidRequest("The dataset has no rows to train on.", field="dataset_id")
    if plan.validation_split == 0:
        return 0
    num_validation_rows = max(1, round(num_rows * plan.validation_split))
    if num_validation_rows >= num_rows:
        raise InvalidRequest(
            f"`hyperparameters.validation_split` {plan.validation_split:g} of {num_rows} rows leaves none to "
            "train on; use a smaller share or more rows.",
            field="hyperparameters.validation_split",
        )
    return num_validation_rows
