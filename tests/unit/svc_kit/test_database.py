"""What a cancelled call leaves in a database."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from svc_kit.database import SQLITE_BUSY_SECONDS, Database


async def test_a_transaction_that_is_cancelled_midway_locks_nothing(tmp_path: Path) -> None:
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'rows.sqlite'}")
    is_held, may_go_on, loop = asyncio.Event(), threading.Event(), asyncio.get_running_loop()

    def hold() -> int:
        loop.call_soon_threadsafe(is_held.set)
        may_go_on.wait(20)
        return 1

    @sa.event.listens_for(database._engine.sync_engine, "connect")
    def teach(connection: Any, _: Any) -> None:
        connection.create_function("hold", 0, hold)

    async with database.write() as connection:
        await connection.execute(sa.text("CREATE TABLE rows (number INTEGER)"))

    async def write_and_read() -> None:
        async with database.write() as connection:
            await connection.execute(sa.text("INSERT INTO rows VALUES (1)"))
            await connection.execute(sa.text("SELECT hold()"))

    call = asyncio.create_task(write_and_read())
    await is_held.wait()
    call.cancel()
    may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await call

    async with asyncio.timeout(SQLITE_BUSY_SECONDS / 2), database.write() as connection:
        await connection.execute(sa.text("INSERT INTO rows VALUES (2)"))
    async with database.read() as connection:
        assert (await connection.execute(sa.text("SELECT number FROM rows"))).scalars().all() == [2]
    await database.close()


@pytest.mark.parametrize(
    "statement", ["INSERT INTO rows VALUES (:value)", "SELECT * FROM none WHERE x = :value"]
)
async def test_errors_name_no_values(tmp_path: Path, statement: str) -> None:
    """They get into logs, and values are users' or secrets."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'rows.sqlite'}")
    async with database.write() as connection:
        await connection.execute(sa.text("CREATE TABLE rows (number INTEGER CHECK (number < 0))"))
    for use in (database.write, database.read):
        with pytest.raises(sa.exc.DBAPIError) as raised:
            async with use() as connection:
                await connection.execute(sa.text(statement), {"value": "secret"})
        assert "secret" not in str(raised.value)
    await database.close()
