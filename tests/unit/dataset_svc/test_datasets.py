"""What an account may have, and what is left of uploads that came to nothing."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator
from pathlib import Path
from unittest.mock import AsyncMock, Mock

import pytest

import dataset_svc
from dataset_svc import datasets as datasets_module
from dataset_svc.datasets import Datasets, Limits
from dataset_svc.incoming_file import CheckedFile
from dataset_svc.tables import datasets as table
from dataset_svc.tables import metadata
from svc_kit.database import Database, migrate, utc_now
from svc_kit.errors import LimitReached

COLUMNS = tuple(f"column-{number}" for number in range(100))


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    url = f"sqlite+aiosqlite:///{tmp_path}/datasets.sqlite"
    migrate(url, Path(next(iter(dataset_svc.__path__))) / "migrations", metadata)
    database = Database(url)
    yield database
    await database.close()


@pytest.fixture
def store() -> AsyncMock:
    return AsyncMock()


@pytest.fixture
def datasets(database: Database, store: AsyncMock) -> Datasets:
    return Datasets(database, store, Mock(), Mock(), Limits(10, None))


async def test_columns_of_all_datasets_together_have_a_limit(
    datasets: Datasets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list has them all, and is made in memory."""
    monkeypatch.setattr(datasets_module, "MAX_COLUMN_CHARS", 2_000)
    file = CheckedFile(10, 1, COLUMNS, "0" * 64)
    for _ in range(2):
        await datasets.commit(await datasets.begin("a", "csv", None), "rows", file, None)

    with pytest.raises(LimitReached, match=r"columns' names .* no dataset is taken above 2,000"):
        await datasets.begin("a", "csv", None)

    await datasets.begin("b", "csv", None)


async def test_what_a_killed_service_left_is_swept(
    datasets: Datasets, database: Database, store: AsyncMock
) -> None:
    old, young, kept, deleted = [await datasets.begin("a", "csv", None) for _ in range(4)]
    file = CheckedFile(10, 1, COLUMNS, "0" * 64)
    for upload in (kept, deleted):
        await datasets.commit(upload, "rows", file, None)
    long_ago = utc_now() - dt.timedelta(hours=25)
    async with database.write() as connection:
        for row in (old, kept):
            await connection.execute(table.update().where(table.c.id == row.id).values(created_at=long_ago))
        await connection.execute(table.update().where(table.c.id == deleted.id).values(status="deleted"))

    sweeping = asyncio.create_task(datasets.sweep())
    try:
        async with asyncio.timeout(20):
            while len(await stored_ids(database)) > 2:  # noqa: ASYNC110  # the sweep tells nobody
                await asyncio.sleep(0.01)
    finally:
        sweeping.cancel()
        await asyncio.wait([sweeping])

    assert await stored_ids(database) == {young.id, kept.id}
    gone = {old.object_key, deleted.object_key}
    assert {call.args[0] for call in store.delete.call_args_list} == gone
    # Parts of a large upload are no object yet.
    assert {call.args[0] for call in store.abort_uploads.call_args_list} == gone
    [reports] = store.delete_prefix.call_args_list
    assert reports.args[0].startswith(deleted.object_key)


async def stored_ids(database: Database) -> set[str]:
    async with database.read() as connection:
        return {row.id for row in await connection.execute(table.select())}
