"""Accounts and API keys in SQL."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.authz.tables import accounts, api_keys
from svc_kit.database import Database, utc_now


@dataclass(frozen=True)
class Account:
    """A team or a person that owns datasets, jobs and models."""

    id: str
    name: str
    is_admin: bool


@dataclass(frozen=True)
class StoredKey:
    """What is kept of an API key.

    Attributes:
        key_hash: SHA-256 in hex.
        prefix: the key's visible beginning.
    """

    key_hash: str
    prefix: str


class AccountRepository:
    """Reads and writes the two tables."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find_by_key_hash(self, key_hash: str) -> Account | None:
        """Returns the account that a key belongs to, or None."""
        query = (
            sa.select(accounts.c.id, accounts.c.name, accounts.c.is_admin)
            .join(api_keys, api_keys.c.account_id == accounts.c.id)
            .where(api_keys.c.key_hash == key_hash)
        )
        async with self._database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        return Account(row.id, row.name, row.is_admin) if row else None

    async def add(self, account: Account, key: StoredKey) -> None:
        """Stores an account with its key, both or none."""
        async with self._database.write() as connection:
            await _insert(connection, account, key)

    async def add_first(self, account: Account, key: StoredKey) -> bool:
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


async def _insert(connection: AsyncConnection, account: Account, key: StoredKey) -> None:
    now = utc_now()
    await connection.execute(
        sa.insert(accounts).values(
            id=account.id, name=account.name, is_admin=account.is_admin, created_at=now
        )
    )
    await connection.execute(
        sa.insert(api_keys).values(
            key_hash=key.key_hash, account_id=account.id, prefix=key.prefix, created_at=now
        )
    )
