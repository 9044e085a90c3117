"""Work whose caller leaves, or that fails."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from svc_kit.cancellation import in_stoppable_thread, see_through


async def test_a_caller_ends_after_its_work_however_often_it_is_cancelled() -> None:
    is_begun, may_end, has_ended = asyncio.Event(), asyncio.Event(), False

    async def work() -> None:
        nonlocal has_ended
        is_begun.set()
        await may_end.wait()
        has_ended = True

    calling = asyncio.create_task(see_through(work()))
    await is_begun.wait()
    for _ in range(3):
        calling.cancel()
        await asyncio.sleep(0)
    assert not calling.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert has_ended


async def test_what_work_fails_with_later_troubles_nobody() -> None:
    """Neither a stopped thread's end nor what it fails with is an exception that was never retrieved."""
    complaints: list[Any] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, complaint: complaints.append(complaint))
    is_begun = asyncio.Event()

    def looks_up(look_up: Callable[[], None]) -> None:
        loop.call_soon_threadsafe(is_begun.set)
        while True:
            look_up()

    async def fails() -> None:
        try:
            is_begun.set()
            await asyncio.sleep(0.01)
        finally:
            raise OSError("the disk is full")

    for work in (in_stoppable_thread(looks_up), see_through(fails())):
        calling = asyncio.create_task(work)
        await is_begun.wait()
        is_begun.clear()
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
    del calling, work
    gc.collect()
    assert complaints == []


async def test_what_a_failed_thread_held_goes_at_once() -> None:
    class Buffers:
        pass

    def fail(_: Buffers) -> None:
        raise ValueError("no rows")

    async def call(threads: concurrent.futures.Executor, buffers: Buffers) -> str:
        try:
            await see_through(asyncio.get_running_loop().run_in_executor(threads, fail, buffers))
        except ValueError as error:
            return str(error)
        raise AssertionError

    buffers = Buffers()
    watch = weakref.ref(buffers)
    gc.disable()
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            assert await call(threads, buffers) == "no rows"
            del buffers
            # The thread and the loop remember what they did last.
            threads.submit(int).result()
            await asyncio.sleep(0)
        assert watch() is None
    finally:
        gc.enable()
