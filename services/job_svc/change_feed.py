"""Wakes those who wait for a change: in this process, and over PostgreSQL's LISTEN/NOTIFY in replicas."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Iterator

import psycopg
import structlog

from svc_kit.database import Database

log = structlog.get_logger(__name__)

_CHANNEL = "tunery_job_changes"
_RECONNECT_SECONDS = 1.0

QUEUE = "queue"
VALIDATION = "validation"
SWEEP = "sweep"


def job_topic(job_id: str) -> str:
    """Returns the topic of one job's log and state."""
    return f"job:{job_id}"


class Subscription:
    """One waiter's view of a topic. Clear it before reading what may have changed, then wait."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def clear(self) -> None:
        """Forgets changes so far."""
        self._changed.clear()

    def notice(self) -> None:
        """Ends a wait."""
        self._changed.set()

    async def wait(self, timeout_seconds: float) -> None:
        """Returns at the next change, or after the timeout: a lost notice costs that much, no more."""
        # Not asyncio.wait_for: before Python 3.12 it may return in place of being cancelled.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._changed.wait()


class ChangeFeed:
    """Announces changes, after their commit, by topic."""

    def __init__(self, database: Database) -> None:
        self._listen_url = None if database.is_sqlite else database.url.replace("+psycopg", "")
        self._waiters: dict[str, set[Subscription]] = defaultdict(set)
        self._outgoing: asyncio.Queue[str] = asyncio.Queue()

    @contextlib.contextmanager
    def subscribe(self, topic: str) -> Iterator[Subscription]:
        """Gives a subscription for the block's time."""
        subscription = Subscription()
        self._waiters[topic].add(subscription)
        try:
            yield subscription
        finally:
            self._waiters[topic].discard(subscription)
            if not self._waiters[topic]:
                del self._waiters[topic]

    def announce(self, *topics: str) -> None:
        """Tells waiters here and in replicas. To be called after the commit."""
        for topic in topics:
            self._wake(topic)
            if self._listen_url:
                self._outgoing.put_nowait(topic)

    def _wake(self, topic: str) -> None:
        for subscription in self._waiters.get(topic, ()):
            subscription.notice()

    async def run(self) -> None:
        """Exchanges announcements with replicas until cancelled. On SQLite there are none."""
        if self._listen_url is None:
            await asyncio.Event().wait()
        while self._listen_url:
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._listen(self._listen_url))
                    group.create_task(self._notify(self._listen_url))
            except* psycopg.Error as error:
                log.warning("change feed lost its connection", cause=str(error.exceptions[0]))
            await asyncio.sleep(_RECONNECT_SECONDS)

    async def _listen(self, url: str) -> None:
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            await connection.execute(f"LISTEN {_CHANNEL}")
            async for notice in connection.notifies():
                self._wake(notice.payload)

    async def _notify(self, url: str) -> None:
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            while True:
                topic = await self._outgoing.get()
                await connection.execute("SELECT pg_notify(%s, %s)", (_CHANNEL, topic))
