"""Work that several wait for."""

from __future__ import annotations

import asyncio

import pytest

from svc_kit.shared_calls import SharedCalls


async def test_call_is_shared_and_outlives_a_caller_that_leaves() -> None:
    calls: SharedCalls[int] = SharedCalls()
    started, may_end = asyncio.Event(), asyncio.Event()
    num_runs = 0

    async def work() -> int:
        nonlocal num_runs
        num_runs += 1
        started.set()
        await may_end.wait()
        return num_runs

    first = asyncio.create_task(calls.run("key", work))
    await started.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.create_task(calls.run("key", work))
    third = asyncio.create_task(calls.run("key", work))
    may_end.set()
    assert await asyncio.gather(second, third) == [1, 1]
    assert await calls.run("key", work) == 2


async def test_failure_is_not_kept() -> None:
    calls: SharedCalls[int] = SharedCalls()

    async def fail() -> int:
        raise OSError("no route")

    async def succeed() -> int:
        return 1

    with pytest.raises(OSError, match="no route"):
        await calls.run("key", fail)
    assert await calls.run("key", succeed) == 1


async def test_close_stops_what_runs() -> None:
    calls: SharedCalls[None] = SharedCalls()
    started = asyncio.Event()

    async def work() -> None:
        started.set()
        await asyncio.Event().wait()

    caller = asyncio.create_task(calls.run("key", work))
    await started.wait()
    await calls.close()
    with pytest.raises(asyncio.CancelledError):
        await caller
