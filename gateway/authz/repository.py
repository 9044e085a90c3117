"""Accounts and API keys in SQL."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.authz.api_keys import ApiKey
from gateway.authz.tables import accounts, api_keys
from svc_kit.database import Database, utc_now


@dataclass(frozen=True)
class Account:
    """A team or a person that owns datasets, jobs and models."""

    id: str
    name: str
    is_admin: bool


class Changes:
    """What one transaction reads and writes; all of it is kept, or none."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def list_keys(self, account_id: str) -> list[ApiKey]:
        """Returns an account's keys, oldest first."""
        return await _list_keys(self._connection, account_id)

    async def add(self, account: Account, key: ApiKey) -> None:
        """Stores an account with its key."""
        await _insert(self._connection, account, key)

    async def add_key(self, key: ApiKey) -> None:
        """Stores a further key.

        Raises:
            IntegrityError: the account has a key with this beginning.
        """
        await _insert_key(self._connection, key)

    async def remove_key(self, key: ApiKey) -> None:
        """Removes a key. Idempotent."""
        await self._connection.execute(sa.delete(api_keys).where(api_keys.c.key_hash == key.key_hash))


class AccountRepository:
    """Reads and writes the two tables."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find_key(self, key_hash: str) -> ApiKey | None:
        """Returns the key with a hash, or None."""
        query = sa.select(api_keys).where(api_keys.c.key_hash == key_hash)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        return _api_key(row) if row else None

    async def find_account(self, account_id: str) -> Account | None:
        """Returns an account, or None."""
        query = sa.select(accounts).where(accounts.c.id == account_id)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        return Account(row.id, row.name, row.is_admin) if row else None

    async def list_keys(self, account_id: str) -> list[ApiKey]:
        """Returns an account's keys, oldest first."""
        async with self._database.read() as connection:
            return await _list_keys(connection, account_id)

    async def names_of_keys(self, account_ids: Collection[str]) -> set[tuple[str, str]]:
        """Returns the account's id and the key's of every key of some accounts."""
        query = sa.select(api_keys.c.account_id, api_keys.c.prefix).where(
            api_keys.c.account_id.in_(account_ids)
        )
        async with self._database.read() as connection:
            return {(row.account_id, row.prefix) for row in await connection.execute(query)}

    async def add_first(self, account: Account, key: ApiKey) -> bool:
        """Stores an account with its key if there is no account yet; returns whether it did.

        Safe to call from several replicas at once: those that come second find the key taken.
        """
        try:
            async with self._database.write() as connection:
                if (await connection.execute(sa.select(accounts.c.id).limit(1))).first() is not None:
                    return False
                await _insert(connection, account, key)
        except IntegrityError:
            return False
        return True

    @asynccontextmanager
    async def change(self, *account_ids: str) -> AsyncIterator[Changes]:
        """A transaction: no other one on any of these accounts overlaps it."""
        async with self._database.write() as connection:
            for account_id in sorted(set(account_ids)):  # in one order, or two could wait for each other
                await self._database.lock(connection, f"keys of {account_id}")
            yield Changes(connection)


def _api_key(row: sa.Row[Any]) -> ApiKey:
    return ApiKey(
        key_hash=row.key_hash,
        id=row.prefix,
        account_id=row.account_id,
        name=row.name,
        scopes=tuple(row.scopes.split()),
        created_at=row.created_at,
    )


async def _list_keys(connection: AsyncConnection, account_id: str) -> list[ApiKey]:
    query = (
        sa.select(api_keys)
        .where(api_keys.c.account_id == account_id)
        .order_by(api_keys.c.created_at, api_keys.c.prefix)
    )
    return [_api_key(row) for row in await connection.execute(query)]


async def _insert(connection: AsyncConnection, account: Account, key: ApiKey) -> None:
    await connection.execute(
        sa.insert(accounts).values(
            id=account.id, name=account.name, is_admin=account.is_admin, created_at=utc_now()
        )
    )
    await _insert_key(connection, key)


async def _insert_key(connection: AsyncConnection, key: ApiKey) -> None:
    await connection.execute(
        sa.insert(api_keys).values(
            key_hash=key.key_hash,
            account_id=key.account_id,
            prefix=key.id,
            name=key.name,
            scopes=" ".join(key.scopes),
            created_at=key.created_at,
        )
    )
