"""Credits: an append-only ledger whose sum is the balance.

A job's cost is its tokens times its epochs at the configured price. An estimate, made from the data's
size before anything is tokenized, is held when the job is made. When the job ends the hold is released
and what was trained is charged, as far as the balance goes; a failed job is charged nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from job_svc.paging import Page
from job_svc.tables import credit_accounts, credit_entries
from svc_kit.database import Database, utc_now
from svc_kit.errors import InsufficientCredits, InvalidRequest

MICRO = 1_000_000
MAX_CREDITS = 1e9
MAX_ENTRIES = 10_000
# Texts in Latin letters have about 4 bytes a token and a chat template adds about 20 tokens a row; both
# are taken on the safe side, so that what is held covers what will be charged.
BYTES_PER_TOKEN = 3
TEMPLATE_TOKENS_PER_ROW = 32


@dataclass(frozen=True)
class Price:
    """What training costs."""

    credits_per_million_tokens: float

    def of(self, num_tokens: int) -> int:
        """Returns the cost in millionths of a credit, rounded up."""
        return math.ceil(num_tokens * self.credits_per_million_tokens)


def estimate_tokens(size_bytes: float, num_rows: int) -> int:
    """Returns how many tokens one pass over the rows takes, rather too many than too few."""
    return math.ceil(size_bytes / BYTES_PER_TOKEN) + TEMPLATE_TOKENS_PER_ROW * num_rows


async def _lock_account(connection: AsyncConnection, account_id: str) -> bool:
    """Keeps others from spending at the same time; tells whether the account keeps a balance."""
    query = sa.select(credit_accounts.c.account_id).where(credit_accounts.c.account_id == account_id)
    return (await connection.execute(query.with_for_update())).first() is not None


async def _balance(connection: AsyncConnection, account_id: str) -> int:
    query = sa.select(sa.func.coalesce(sa.func.sum(credit_entries.c.amount), 0))
    total = (await connection.execute(query.where(credit_entries.c.account_id == account_id))).scalar_one()
    return int(total)


async def _enter(connection: AsyncConnection, account_id: str, kind: str, amount: int, job_id: str) -> None:
    await connection.execute(
        credit_entries.insert().values(
            account_id=account_id, kind=kind, amount=amount, job_id=job_id, created_at=utc_now()
        )
    )


async def hold(connection: AsyncConnection, account_id: str, job_id: str, amount: int) -> int | None:
    """Takes a job's estimated cost off the balance, in the caller's transaction.

    Returns:
        The amount held, or None for an account that keeps no balance.

    Raises:
        InsufficientCredits: the balance is lower.
    """
    if not await _lock_account(connection, account_id):
        return None
    balance = await _balance(connection, account_id)
    if amount > balance:
        raise InsufficientCredits(
            f"The job needs {amount / MICRO:,.2f} credits and the account has {balance / MICRO:,.2f}; "
            "use fewer epochs, max_steps or a smaller dataset, or add credits.",
            needed=amount / MICRO,
            balance=balance / MICRO,
        )
    await _enter(connection, account_id, "hold", -amount, job_id)
    return amount


async def settle(connection: AsyncConnection, job: sa.Row[Any], cost: int) -> int | None:
    """Releases a job's hold and charges what it used, in the transaction that ends the job.

    Returns:
        The amount charged: the cost, but never so much that the balance would be below zero. None for an
        account that keeps no balance.
    """
    if job.credits_held is None:
        return None
    await _lock_account(connection, job.account_id)
    await _enter(connection, job.account_id, "release", job.credits_held, job.id)
    charged = min(cost, await _balance(connection, job.account_id))
    if charged:
        await _enter(connection, job.account_id, "charge", -charged, job.id)
    return charged


class CreditLedger:
    """Accounts' balances and entries."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def open_account(self, account_id: str, credits: float | None) -> None:
        """Opens an account with a first balance; without one, it keeps none. Idempotent.

        Raises:
            InvalidRequest: credits are negative, not finite or over `MAX_CREDITS`.
        """
        if credits is None:
            return
        if not 0 <= credits <= MAX_CREDITS:
            raise InvalidRequest(f"`credits` must be from 0 to {MAX_CREDITS:,.0f}.", field="credits")
        async with self._database.write() as connection:
            if await _lock_account(connection, account_id):
                return
            await connection.execute(credit_accounts.insert().values(account_id=account_id))
            await _enter(connection, account_id, "grant", round(credits * MICRO), "")

    async def balance(self, account_id: str) -> int | None:
        """Returns the balance in millionths; None for an account that keeps none."""
        async with self._database.read() as connection:
            query = sa.select(credit_accounts).where(credit_accounts.c.account_id == account_id)
            if (await connection.execute(query)).first() is None:
                return None
            return await _balance(connection, account_id)

    async def entries(self, account_id: str, page: Page) -> list[sa.Row[Any]]:
        """Returns a page of the account's entries, oldest first."""
        own = credit_entries.select().where(credit_entries.c.account_id == account_id)
        oldest = own.order_by(credit_entries.c.number).limit(page.limit).offset(page.offset)
        async with self._database.read() as connection:
            return list(await connection.execute(oldest))
