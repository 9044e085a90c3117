"""A job's log, followed live."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from job_svc.change_feed import ChangeFeed, job_topic
from job_svc.job_state import ENDED
from job_svc.tables import events, jobs
from svc_kit.database import Database
from svc_kit.errors import LimitReached
from svc_kit.under_way import UnderWay

PAGE_LINES = 500
# A notice may be lost (a replica's connection broke): then a line is late by this, never lost.
_POLL_SECONDS = 2.0
# Followers get at once what came in such a time: a thousand, each sent line by line, are too much work.
_PACE_SECONDS = 0.1


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
        self._tails: dict[str, _Tail] = {}
        self._max_followers = max_followers
        self._followers = UnderWay()

    @contextlib.contextmanager
    def follower(self, account_id: str) -> Iterator[None]:
        """Counts one of an account's followers for the block's time.

        Raises:
            LimitReached: the account has `max_followers`.
        """
        if self._followers.of(account_id) >= self._max_followers:
            raise LimitReached(
                f"The account follows {self._max_followers} logs at a time already; end one first."
            )
        with self._followers.one_more(account_id):
            yield

    async def follow(
        self, job_id: str, after_seq: int, *, stored_only: bool = False
    ) -> AsyncIterator[list[sa.Row[Any]]]:
        """Yields the lines after `after_seq` as they come, each once and in order, until the last of all.

        What is stored comes at once, be it nothing: then at least the log could be read. With `stored_only`
        that is all.
        """
        lines = await self.read(job_id, after_seq)
        yield lines
        if stored_only:
            while lines:
                lines = await self.read(job_id, lines[-1].seq)
                yield lines
            return
        newest = await self._newest_seq(job_id)
        with self._tail(job_id, newest) as tail:
            while not _has_end(lines):
                after_seq = lines[-1].seq if lines else after_seq
                grown = tail.grown
                newest_lines = tail.lines_after(after_seq)
                lines = await self.read(job_id, after_seq) if newest_lines is None else newest_lines
                if lines:
                    yield lines
                elif await self._is_over(job_id, after_seq):
                    return
                if len(lines) < PAGE_LINES and not _has_end(lines):
                    await tail.wait(grown)

    @contextlib.contextmanager
    def _tail(self, job_id: str, newest_seq: int) -> Iterator[_Tail]:
        """Gives the tail that all followers of a job have in common."""
        tail = self._tails.get(job_id)
        if tail is None or tail.has_failed:
            tail = self._tails[job_id] = _Tail(job_id, newest_seq, self.read, self._feed)
        tail.num_followers += 1
        try:
            yield tail
        finally:
            tail.num_followers -= 1
            if not tail.num_followers:
                tail.close()
            if not tail.num_followers and self._tails.get(job_id) is tail:
                del self._tails[job_id]

    async def _newest_seq(self, job_id: str) -> int:
        query = sa.select(sa.func.max(events.c.seq)).where(events.c.job_id == job_id)
        async with self._database.read() as connection:
            return await connection.scalar(query) or 0

    async def _is_over(self, job_id: str, after_seq: int) -> bool:
        """Whether nothing will ever come after `after_seq`: a follower may ask after the last line."""
        over = sa.and_(jobs.c.status.in_(sorted(ENDED)), jobs.c.next_seq - 1 <= after_seq)
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


def _has_end(lines: Sequence[sa.Row[Any]]) -> bool:
    return bool(lines) and lines[-1].kind == "end"


class _Tail:
    """A followed job's newest lines, read once for all who follow it.

    Attributes:
        num_followers: who it is read for.
        grown: set when there are more lines than there were when it was taken.
    """

    def __init__(
        self,
        job_id: str,
        newest_seq: int,
        read: Callable[[str, int], Awaitable[list[sa.Row[Any]]]],
        feed: ChangeFeed,
    ) -> None:
        self.num_followers = 0
        self.grown = asyncio.Event()
        self._job_id = job_id
        self._before_first = newest_seq  # a line's place follows from its seq, since none is missing
        self._lines: list[sa.Row[Any]] = []
        self._read = read
        self._feed = feed
        self._reading = asyncio.create_task(self._read_on())

    def lines_after(self, seq: int) -> list[sa.Row[Any]] | None:
        """Returns at most `PAGE_LINES`; None where the first of them is not here any more, or never was."""
        start = seq - self._before_first
        return None if start < 0 else self._lines[start : start + PAGE_LINES]

    async def wait(self, grown: asyncio.Event) -> None:
        """Returns when `grown` is set.

        Raises:
            Exception: what reading failed with.
        """
        await grown.wait()
        if self._reading.done():
            self._reading.result()

    @property
    def has_failed(self) -> bool:
        """Whether there will be no more lines, for want of the database."""
        return self._reading.done()

    def close(self) -> None:
        """Stops reading."""
        self._reading.cancel()

    async def _read_on(self) -> None:
        try:
            with self._feed.subscribe(job_topic(self._job_id)) as changes:
                while True:
                    changes.clear()
                    lines = await self._read(self._job_id, self._before_first + len(self._lines))
                    if lines:
                        self._grow(lines)
                        await asyncio.sleep(_PACE_SECONDS)
                    else:
                        await changes.wait(_POLL_SECONDS)
        finally:
            self.grown.set()

    def _grow(self, lines: list[sa.Row[Any]]) -> None:
        self._lines += lines
        if (surplus := len(self._lines) - 2 * PAGE_LINES) > 0:
            del self._lines[:surplus]
            self._before_first += surplus
        self.grown.set()
        self.grown = asyncio.Event()
