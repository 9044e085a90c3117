"""What a cancelled call leaves in a database."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import sqlalchemy as sa

from svc_kit.database import SQLITE_BUSY_SECONDS, Database

# One row, after some tens of milliseconds.
_SLOW = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 300000) SELECT sum(i) FROM n"


async def test_a_transaction_that_is_cancelled_midway_locks_nothing(tmp_path: Path) -> None:
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'rows.sqlite'}")
    async with database.write() as connection:
        await connection.execute(sa.text("CREATE TABLE rows (number INTEGER)"))
    reading = asyncio.Event()

    async def write_and_read() -> None:
        async with database.write() as connection:
            await connection.execute(sa.text("INSERT INTO rows VALUES (1)"))
            reading.set()
            await connection.execute(sa.text(_SLOW))

    call = asyncio.create_task(write_and_read())
    await reading.wait()
    for _ in range(50):  # until SQLite is at the statement
        await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    async with asyncio.timeout(SQLITE_BUSY_SECONDS / 2), database.write() as connection:
        await connection.execute(sa.text("INSERT INTO rows VALUES (2)"))
    async with database.read() as connection:
        assert (await connection.execute(sa.text("SELECT number FROM rows"))).scalars().all() == [2]
    await database.close()
