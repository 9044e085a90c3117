"""A job's log, followed live."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from job_svc.change_feed import ChangeFeed, job_topic
from job_svc.job_state import ENDED
from job_svc.tables import events, jobs
from svc_kit.database import Database
from svc_kit.errors import TooManyRequests

PAGE_LINES = 500
# A notice may be lost (a replica's connection broke): then a line is late by this, never lost.
_POLL_SECONDS = 2.0


class LogStream:
    """Reads logs."""

    def __init__(self, database: Database, feed: ChangeFeed, max_followers: int) -> None:
        """Args:
        database: the service's.
        feed: tells of new lines.
        max_followers: how many an account may have at a time, in this process.
        """
        self._database = database
        self._feed = feed
        self._max_followers = max_followers
        self._followers: Counter[str] = Counter()

    @contextmanager
    def follower(self, account_id: str) -> Iterator[None]:
        """Counts one of an account's followers for the block's time.

        Raises:
            TooManyRequests: the account has `max_followers`.
        """
        if self._followers[account_id] >= self._max_followers:
            raise TooManyRequests(
                f"The account follows {self._max_followers} logs at a time already; end one first."
            )
        self._followers[account_id] += 1
        try:
            yield
        finally:
            self._followers[account_id] -= 1
            self._followers += Counter()  # forgets those at 0

    async def follow(
        self, job_id: str, after_seq: int, *, stored_only: bool = False
    ) -> AsyncIterator[list[sa.Row[Any]]]:
        """Yields the lines after `after_seq` as they come, each once and in order, until the last of all.

        With `stored_only` it ends with what is stored.
        """
        with self._feed.subscribe(job_topic(job_id)) as changes:
            while True:
                changes.clear()
                page = await self.read(job_id, after_seq)
                if page:
                    yield page
                    after_seq = page[-1].seq
                    if page[-1].kind == "end":
                        return
                elif await self._is_over(job_id, after_seq):
                    return
                if len(page) < PAGE_LINES:
                    if stored_only:
                        return
                    await changes.wait(_POLL_SECONDS)

    async def _is_over(self, job_id: str, after_seq: int) -> bool:
        """Whether nothing will ever come after `after_seq`: a follower may ask after the last line."""
        over = sa.and_(jobs.c.status.in_(sorted(ENDED)), jobs.c.next_seq <= after_seq + 1)
        async with self._database.read() as connection:
            found = await connection.scalar(sa.select(jobs.c.id).where(jobs.c.id == job_id, over))
        return found is not None

    async def read(self, job_id: str, after_seq: int) -> list[sa.Row[Any]]:
        """Returns at most `PAGE_LINES` of the stored lines after `after_seq`."""
        query = (
            events.select()
            .where(events.c.job_id == job_id, events.c.seq > after_seq)
            .order_by(events.c.seq)
            .limit(PAGE_LINES)
        )
        async with self._database.read() as connection:
            return list(await connection.execute(query))
