"""A service's own SQL database: SQLite in WAL mode, or PostgreSQL."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine.interfaces import DBAPIConnection, Dialect
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.types import TypeDecorator

SQLITE_BUSY_SECONDS = 10
POSTGRES_CONNECT_SECONDS = 5
# What SQLAlchemy raises when the database can't be reached, went away, or has no connection free.
DATABASE_AWAY = (
    sa.exc.OperationalError,
    sa.exc.InterfaceError,
    sa.exc.InternalError,  # a transaction that PostgreSQL has ended
    sa.exc.TimeoutError,
)
# What a process that stopped, or whose machine is gone, holds locked in PostgreSQL must not stop all others.
_POSTGRES_OPTIONS = "-c idle_in_transaction_session_timeout=10s -c lock_timeout=8s"


class UtcTime(TypeDecorator[dt.datetime]):
    """A point in time, to the microsecond, in UTC on every backend (SQLite forgets time zones)."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        assert value is None or value.tzinfo is not None, "a naive time"
        return value.astimezone(dt.UTC) if value else None

    def process_result_value(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        if value is not None and value.tzinfo is None:
            value = value.replace(tzinfo=dt.UTC)
        return value


class JsonText(TypeDecorator[Any]):
    """A JSON value as ASCII text: keeps the order of keys, and NUL characters, which jsonb refuses."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        return None if value is None else json.loads(value)


# A row's number is given by the database, so that "newest first" has no ties.
Number = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def utc_now() -> dt.datetime:
    """Returns the time now, in UTC."""
    return dt.datetime.now(dt.UTC)


class Database:
    """Connections to one service's database.

    `write()` transactions on SQLite take the write lock at their start (BEGIN IMMEDIATE), so that
    one never fails halfway because another got in between; on PostgreSQL a row's lock does that.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_sqlite = url.startswith("sqlite")
        self._engine = _sqlite_engine(url) if self.is_sqlite else _postgres_engine(url)
        # Without transactions, whose beginning and end cost more than most of what is read. SQLAlchemy would
        # set a connection of aiosqlite to that and back each time, so there it has connections of its own.
        self._reader = (
            _sqlite_reader(url)
            if self.is_sqlite
            else self._engine.execution_options(isolation_level="AUTOCOMMIT")
        )

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection for reading; each statement sees what is committed."""
        async with self._reader.connect() as connection:
            yield connection

    @contextlib.asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction: committed at the block's end, rolled back when it raises."""
        async with self._engine.connect() as connection:
            if self.is_sqlite:
                connection = await connection.execution_options(tunery_begin="IMMEDIATE")
            async with connection.begin():
                yield connection

    async def lock(self, connection: AsyncConnection, name: str) -> None:
        """Keeps other transactions that lock the same name off until this one's end.

        On SQLite each `write()` does that by itself.
        """
        if not self.is_sqlite:
            await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(name))))

    async def upsert(
        self,
        connection: AsyncConnection,
        table: sa.Table,
        key: Mapping[str, Any],
        values: Mapping[str, Any],
        only_first: Mapping[str, Any] | None = None,
    ) -> None:
        """Makes a row, or changes the one of the same key.

        Args:
            connection: a `write()`'s.
            table: with a unique index over the key's columns.
            key: their values.
            values: of the other columns, new or changed.
            only_first: of columns that a row keeps once it is there.
        """
        insert = sqlite.insert if self.is_sqlite else postgresql.insert
        await connection.execute(
            insert(table)
            .values({**key, **(only_first or {}), **values})
            .on_conflict_do_update(index_elements=list(key), set_=dict(values))
        )

    async def close(self) -> None:
        """Closes every connection."""
        await self._reader.dispose()
        await self._engine.dispose()


def _postgres_engine(url: str) -> AsyncEngine:
    return create_async_engine(
        url,
        hide_parameters=True,
        pool_pre_ping=True,
        skip_autocommit_rollback=True,
        pool_size=20,
        max_overflow=20,
        pool_timeout=5,
        connect_args={
            "connect_timeout": POSTGRES_CONNECT_SECONDS,
            "options": f"{sa.make_url(url).query.get('options', '')} {_POSTGRES_OPTIONS}".strip(),
        },
    )


def _sqlite_engine(url: str) -> AsyncEngine:
    engine = create_async_engine(url, hide_parameters=True, connect_args={"timeout": SQLITE_BUSY_SECONDS})
    _begin_explicitly(engine.sync_engine)
    return engine


def _sqlite_reader(url: str) -> AsyncEngine:
    engine = create_async_engine(
        url,
        hide_parameters=True,
        connect_args={"timeout": SQLITE_BUSY_SECONDS},
        isolation_level="AUTOCOMMIT",
        skip_autocommit_rollback=True,
    )
    _set_up_connections(engine.sync_engine)
    return engine


def _set_up_connections(engine: sa.Engine) -> None:
    @sa.event.listens_for(engine, "connect")
    def set_up(connection: DBAPIConnection, _record: Any) -> None:
        # SQLAlchemy's recipe: the driver must not begin transactions of its own.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()


def _begin_explicitly(engine: sa.Engine) -> None:
    """Has SQLite's transactions begin as `tunery_begin` says, and hold whatever is done in them, DDL too."""
    _set_up_connections(engine)

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        kind = connection.get_execution_options().get("tunery_begin", "DEFERRED")
        connection.exec_driver_sql(f"BEGIN {kind}")

    @sa.event.listens_for(engine, "invalidate")
    def roll_back(connection: DBAPIConnection, _record: Any, _error: BaseException | None) -> None:
        # A connection is closed when a call is cancelled in the midst of a statement. SQLite keeps a closed
        # one's transaction, and with it the write lock, as long as any rows of a statement are unread.
        with contextlib.suppress(Exception):  # the connection goes in any case, and the cancel goes on
            connection.rollback()


def migrate(url: str, migrations: Path, metadata: sa.MetaData, revision: str = "head") -> None:
    """Brings a service's tables to the newest version. Blocking; safe to call from several replicas.

    Args:
        url: the database's URL, an async one.
        migrations: the service's Alembic folder; its name is part of the version table's, so that
            services can share a PostgreSQL database.
        metadata: the service's tables.
        revision: the version to go to, for tests of the way from there.
    """
    config = alembic.config.Config()
    config.set_main_option("script_location", str(migrations))
    sync_url = url.replace("+aiosqlite", "")
    engine = sa.create_engine(sync_url, execution_options={"tunery_begin": "IMMEDIATE"})
    if engine.dialect.name == "sqlite":
        _begin_explicitly(engine)
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            # One replica migrates at a time; the lock goes with the transaction.
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(hashtext('tunery-migrations'))"))
        config.attributes["connection"] = connection
        config.attributes["metadata"] = metadata
        config.attributes["version_table"] = f"{migrations.parent.name}_version"
        alembic.command.upgrade(config, revision)
    engine.dispose()
