"""Waiting, when cancelled, for work that can't be cut off, so that no clean-up runs beside it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from svc_kit.errors import TuneryError

log = structlog.get_logger(__name__)

Result = TypeVar("Result")


async def see_through(work: Awaitable[Result], when_cancelled: Callable[[], object] | None = None) -> Result:
    """Returns what `work` returns. A caller that is cancelled ends only once the work has.

    Args:
        work: goes on whatever happens to the caller; what it returns or raises then is dropped.
        when_cancelled: tells it that nobody waits for its result any more.
    """
    working = asyncio.ensure_future(work)
    del work  # it may be the same
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        if when_cancelled is not None:
            when_cancelled()
        while not working.done():
            with contextlib.suppress(asyncio.CancelledError):  # once more
                await asyncio.wait([working])
        if not working.cancelled() and not isinstance(working.exception(), TuneryError | _Stopped | None):
            log.warning("work failed whose caller had left", cause=repr(working.exception()))
        raise
    finally:
        # What it failed with has this frame in its traceback: a circle, and whatever the work held in it.
        del working


async def in_stoppable_thread(work: Callable[[Callable[[], None]], Result]) -> Result:
    """Runs blocking work that calls its argument now and then, which ends the work once nobody waits for it.

    A caller that is cancelled ends only once the thread has.
    """
    is_stopped = threading.Event()

    def look_up() -> None:
        if is_stopped.is_set():
            raise _Stopped

    return await see_through(asyncio.to_thread(work, look_up), is_stopped.set)


class _Stopped(Exception):
    """Ends the work of a thread whose result nobody waits for."""
