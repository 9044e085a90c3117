"""Fine-tuned models."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from job_svc.sweeper import SWEEP_AGAIN, Sweeper
from job_svc.tables import checkpoints, jobs, models
from svc_kit.database import Database
from svc_kit.errors import NotFound

_LONGEST_ID = 300


class Models:
    """The fine-tuned models of all accounts; every method acts for one of them."""

    def __init__(self, database: Database, sweeper: Sweeper) -> None:
        self._database = database
        self._sweeper = sweeper

    async def listed(self, account_id: str) -> list[sa.Row[Any]]:
        """Returns the models that are available or about to be, newest first."""
        own = sa.and_(models.c.account_id == account_id, models.c.status != "deleted")
        async with self._database.read() as connection:
            return list(await connection.execute(models.select().where(own).order_by(models.c.number.desc())))

    async def get(self, account_id: str, model_id: str) -> sa.Row[Any]:
        """Returns an available model.

        Raises:
            NotFound: the account has no such model, it is deleted, or still being checked.
        """
        if model_id.isascii() and model_id.isprintable() and len(model_id) <= _LONGEST_ID:
            query = models.select().where(
                models.c.id == model_id, models.c.account_id == account_id, models.c.status != "deleted"
            )
            async with self._database.read() as connection:
                row = (await connection.execute(query)).one_or_none()
            if row is not None and row.status == "deploying":
                raise NotFound(
                    f"Model {model_id} is still being checked; it is available once its job is completed."
                )
            if row is not None:
                return row
        raise NotFound(f"There is no model {model_id[:100]!r}.")

    async def of_jobs(self, job_ids: list[str]) -> dict[str, str]:
        """Returns the ids of the models that jobs made, deleted ones too, by job."""
        query = sa.select(models.c.job_id, models.c.id).where(models.c.job_id.in_(job_ids))
        async with self._database.read() as connection:
            return {row.job_id: row.id for row in await connection.execute(query)}

    async def delete(self, account_id: str, model_id: str) -> None:
        """Deletes a model, its artifact, and the checkpoints that hold the same weights.

        Raises:
            NotFound: as of `get`; the job of a model that is still being checked can be cancelled.
        """
        model = await self.get(account_id, model_id)
        async with self._database.write() as connection:
            deleted = await connection.execute(
                models.update()
                .where(models.c.id == model_id, models.c.status == "available")
                .values(status="deleted")
            )
            if deleted.rowcount == 0:
                raise NotFound(f"There is no model {model_id!r}.")
            await connection.execute(checkpoints.delete().where(checkpoints.c.job_id == model.job_id))
            await connection.execute(jobs.update().where(jobs.c.id == model.job_id).values(SWEEP_AGAIN))
        await self._sweeper.sweep_now(model.job_id)
