"""Waiting for a change, and being cancelled meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from job_svc.change_feed import ChangeFeed
from svc_kit.database import Database


@pytest.mark.parametrize("num_turns", range(4))
async def test_a_cancel_just_after_a_change_still_cancels(database: Database, num_turns: int) -> None:
    """Else a loop that waits for changes goes on, and who waits for its end waits for ever."""
    feed = ChangeFeed(database)

    async def look_for_changes() -> None:
        with feed.subscribe("topic") as changes:
            while True:
                await changes.wait(20)
                changes.clear()

    looking = asyncio.create_task(look_for_changes())
    await asyncio.sleep(0)
    feed.announce("topic")
    for _ in range(num_turns):
        await asyncio.sleep(0)
    looking.cancel()
    done, _ = await asyncio.wait([looking], timeout=1)
    looking.cancel()
    assert done
