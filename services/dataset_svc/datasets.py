"""Datasets as their owners see them: stored whole or not at all, listed, deleted, held by jobs."""

from __future__ import annotations

import asyncio
import datetime as dt
import re
from dataclasses import dataclass
from typing import Any

import grpc
import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from dataset_svc.incoming_file import CheckedFile, Format
from dataset_svc.tables import datasets, holds
from svc_kit.database import DATABASE_AWAY, Database, utc_now
from svc_kit.errors import DatasetInUse, LimitReached, NotFound, UnknownDataset
from svc_kit.idempotency import used_otherwise
from svc_kit.identity import Issuer
from svc_kit.ids import new_id
from svc_kit.interceptors import from_rpc_error
from svc_kit.object_store import ObjectStore, account_prefix
from tunery.job.v1 import job_service_pb2
from tunery.job.v1.job_service_pb2_grpc import JobLifeServiceStub

log = structlog.get_logger(__name__)

_DATASET_ID = re.compile(r"ds-[a-z2-7]{20}")
_ASK_SECONDS = 10
# Databases take so many values in a statement, and no more than some ten thousands.
_HOLDS_AT_ONCE = 1000
# A hold comes before its job: for so long the job may still be on its way into the database.
_YOUNG = dt.timedelta(seconds=60)
_ABANDONED = dt.timedelta(hours=24)
_SWEEP_SECONDS = 600
# Of one account's datasets together: all of them are in the answer to a list.
MAX_COLUMN_CHARS = 8 * 1024 * 1024


@dataclass(frozen=True)
class Limits:
    """What one account may store; None is no limit."""

    max_datasets: int
    max_bytes: int | None


class Datasets:
    """The datasets of all accounts; methods with an `account_id` act for that one."""

    def __init__(
        self,
        database: Database,
        store: ObjectStore,
        job_life: JobLifeServiceStub,
        issuer: Issuer,
        limits: Limits,
    ) -> None:
        self._database = database
        self._limits = limits
        self._store = store
        self._job_life = job_life
        self._issuer = issuer

    async def begin(self, account_id: str, format_: Format, idempotency_key: str | None) -> sa.Row[Any]:
        """Notes an upload under way, so that what it leaves behind can be found; shown to nobody.

        Raises:
            LimitReached: the account has as much as it may, and none with this key.
        """
        dataset_id = new_id("ds")
        insert = datasets.insert().values(
            id=dataset_id,
            account_id=account_id,
            status="uploading",
            format=format_,
            object_key=f"{account_prefix(account_id)}datasets/{dataset_id}",
            created_at=utc_now(),
        )
        async with self._database.write() as connection:
            is_repeated = (
                idempotency_key is not None
                and (await connection.execute(_made_with(account_id, idempotency_key))).first()
            )
            if not is_repeated:
                await self._check_limits(connection, account_id, more_bytes=1)
            return (await connection.execute(insert.returning(*datasets.c))).one()

    async def _check_limits(self, connection: AsyncConnection, account_id: str, more_bytes: int) -> None:
        query = sa.select(
            sa.func.count(),
            sa.func.coalesce(sa.func.sum(datasets.c.size_bytes), 0),
            sa.func.coalesce(sa.func.sum(sa.func.length(datasets.c.columns)), 0),
        ).where(datasets.c.account_id == account_id, datasets.c.status == "stored")
        num_datasets, num_bytes, num_column_chars = (await connection.execute(query)).one()
        limits = self._limits
        if num_datasets >= limits.max_datasets:
            raise LimitReached(
                f"The account has {num_datasets:,} datasets, and {limits.max_datasets:,} is the limit; "
                "delete some that are not needed any more."
            )
        if num_column_chars > MAX_COLUMN_CHARS:
            raise LimitReached(
                f"The columns' names of the account's datasets have {num_column_chars:,} characters, and no "
                f"dataset is taken above {MAX_COLUMN_CHARS:,}; delete some that are not needed any more."
            )
        if limits.max_bytes is not None and num_bytes + more_bytes > limits.max_bytes:
            raise LimitReached(
                f"The account's datasets have {num_bytes:,} bytes, and with this one they would be over the "
                f"limit of {limits.max_bytes:,}; delete some that are not needed any more."
            )

    async def commit(
        self, upload: sa.Row[Any], name: str, file: CheckedFile, idempotency_key: str | None
    ) -> sa.Row[Any]:
        """Shows a dataset whose bytes are stored.

        Where the account has made one with the same key already, returns that one; the upload is of no use
        then.

        Raises:
            InvalidRequest: that one has another format, another name or other bytes.
            LimitReached: the account would have more than it may.
        """
        account_id = upload.account_id
        update = (
            datasets.update()
            .where(datasets.c.id == upload.id, datasets.c.status == "uploading")
            .values(
                status="stored",
                name=name,
                size_bytes=file.size_bytes,
                row_count=file.row_count,
                columns=list(file.columns),
                idempotency_key=idempotency_key,
                file_sha256=file.sha256,
                created_at=utc_now(),
            )
        )
        async with self._database.write() as connection:
            await self._database.lock(connection, f"datasets of {account_id}")
            if idempotency_key is not None:
                made = (await connection.execute(_made_with(account_id, idempotency_key))).one_or_none()
                same = (upload.format, name, file.sha256)
                if made is not None and (made.format, made.name, made.file_sha256) != same:
                    raise used_otherwise(idempotency_key)
                if made is not None:
                    return made
            await self._check_limits(connection, account_id, file.size_bytes)
            return (await connection.execute(update.returning(*datasets.c))).one()

    async def discard(self, dataset_id: str) -> None:
        """Forgets an upload that came to nothing."""
        await self._remove(dataset_id)

    async def get(self, account_id: str, dataset_id: str) -> sa.Row[Any]:
        """Returns a dataset.

        Raises:
            NotFound: the account has no such dataset.
        """
        if _DATASET_ID.fullmatch(dataset_id):
            async with self._database.read() as connection:
                row = (await connection.execute(_stored(account_id, dataset_id))).one_or_none()
            if row is not None:
                return row
        raise NotFound(f"There is no dataset {dataset_id[:60]!r}.")

    async def list(self, account_id: str) -> list[sa.Row[Any]]:
        """Returns the account's datasets, newest first."""
        query = (
            datasets.select()
            .where(datasets.c.account_id == account_id, datasets.c.status == "stored")
            .order_by(datasets.c.number.desc())
        )
        async with self._database.read() as connection:
            return list(await connection.execute(query))

    async def hold(self, account_id: str, dataset_id: str, job_id: str) -> sa.Row[Any]:
        """Keeps a dataset from being deleted while a job lives. Idempotent.

        Raises:
            UnknownDataset: the account has no such dataset.
        """
        if _DATASET_ID.fullmatch(dataset_id):
            async with self._database.write() as connection:
                # The row's lock sets holding and deleting one after the other.
                found = _stored(account_id, dataset_id).with_for_update()
                row = (await connection.execute(found)).one_or_none()
                own = sa.and_(holds.c.dataset_id == dataset_id, holds.c.job_id == job_id)
                if row is not None and (await connection.execute(holds.select().where(own))).first() is None:
                    await connection.execute(
                        holds.insert().values(dataset_id=dataset_id, job_id=job_id, created_at=utc_now())
                    )
            if row is not None:
                return row
        raise UnknownDataset(f"There is no dataset {dataset_id[:60]!r}.", field="dataset_id")

    async def release(self, job_id: str) -> None:
        """Gives a job's holds back. Idempotent."""
        async with self._database.write() as connection:
            await connection.execute(holds.delete().where(holds.c.job_id == job_id))

    async def delete(self, account_id: str, dataset_id: str) -> None:
        """Deletes a dataset.

        Raises:
            NotFound: the account has no such dataset.
            DatasetInUse: a job that has not ended holds it.
        """
        await self.get(account_id, dataset_id)
        await self._drop_lapsed_holds(dataset_id)
        async with self._database.write() as connection:
            if (await connection.execute(_stored(account_id, dataset_id).with_for_update())).first() is None:
                raise NotFound(f"There is no dataset {dataset_id!r}.")
            query = sa.select(holds.c.job_id).where(holds.c.dataset_id == dataset_id).limit(1)
            job_id = await connection.scalar(query)
            if job_id is not None:
                raise DatasetInUse(
                    f"Dataset {dataset_id} is in use by {job_id}; cancel the job or wait for its end.",
                    job_id=job_id,
                )
            await connection.execute(
                datasets.update()
                .where(datasets.c.id == dataset_id)
                .values(status="deleted", idempotency_key=None)
            )
        await self._remove(dataset_id)

    async def _drop_lapsed_holds(self, dataset_id: str) -> None:
        """Drops holds of jobs that have ended or were never made: job_svc alone knows."""
        async with self._database.read() as connection:
            query = holds.select().where(holds.c.dataset_id == dataset_id)
            held = {row.job_id: row.created_at for row in await connection.execute(query)}
        holders = list(held)
        for start in range(0, len(holders), _HOLDS_AT_ONCE):
            job_ids = holders[start : start + _HOLDS_AT_ONCE]
            try:
                answer = await self._job_life.FilterLiveJobs(
                    job_service_pb2.FilterLiveJobsRequest(job_ids=job_ids),
                    timeout=_ASK_SECONDS,
                    wait_for_ready=True,
                    metadata=self._issuer.own_metadata(),
                )
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error
            young = {job_id for job_id in answer.unknown_job_ids if utc_now() - held[job_id] < _YOUNG}
            lapsed = set(job_ids) - set(answer.live_job_ids) - young
            async with self._database.write() as connection:
                await connection.execute(
                    holds.delete().where(holds.c.dataset_id == dataset_id, holds.c.job_id.in_(lapsed))
                )

    async def _remove(self, dataset_id: str) -> None:
        """Removes a dataset that nobody is shown: its bytes first, then its row."""
        query = datasets.select().where(datasets.c.id == dataset_id, datasets.c.status != "stored")
        async with self._database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            return
        try:
            if row.status == "deleted":
                await self._store.delete_prefix(reports_prefix(row.object_key))
            await self._store.delete(row.object_key)
            await self._store.abort_uploads(row.object_key)
        except Exception as error:
            # The caller's work is done; the sweep tries again what the store can't do now.
            log.warning("objects are left to the sweep", key=row.object_key, cause=str(error))
            return
        async with self._database.write() as connection:
            await connection.execute(holds.delete().where(holds.c.dataset_id == dataset_id))
            await connection.execute(datasets.delete().where(datasets.c.id == dataset_id))

    async def sweep(self) -> None:
        """Removes what crashed uploads and interrupted deletions left, until cancelled."""
        while True:
            abandoned = sa.and_(
                datasets.c.status == "uploading", datasets.c.created_at < utc_now() - _ABANDONED
            )
            query = sa.select(datasets.c.id).where(sa.or_(abandoned, datasets.c.status == "deleted"))
            try:
                async with self._database.read() as connection:
                    due = list(await connection.scalars(query))
                for dataset_id in due:
                    await self._remove(dataset_id)
            except DATABASE_AWAY as error:
                log.warning("the sweep was interrupted; it is tried again", cause=str(error))
            await asyncio.sleep(_SWEEP_SECONDS)


def reports_prefix(object_key: str) -> str:
    """Returns the beginning of the keys of a dataset's reports, which live as long as the dataset."""
    # Not below the dataset's own key: stores that are file systems can't have a folder of a file's name.
    return f"{object_key}.reports/"


def _made_with(account_id: str, idempotency_key: str) -> sa.Select[Any]:
    return datasets.select().where(
        datasets.c.account_id == account_id,
        datasets.c.idempotency_key == idempotency_key,
        datasets.c.status == "stored",
    )


def _stored(account_id: str, dataset_id: str) -> sa.Select[Any]:
    return datasets.select().where(
        datasets.c.id == dataset_id, datasets.c.account_id == account_id, datasets.c.status == "stored"
    )
